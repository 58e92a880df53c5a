"""What two processes on gloo hold of a role that is sharded over them, and how often they speak in an update."""

import json
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import end, launch
from recorded import distill_own, watched_steps
from safetensors.torch import load_file, save_file
from tiny import TinyCodec, TinyWan
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phased_dmd.config import Config, Engine, Fake, Generator, Lora, Plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.engine.world import processes, rank
from phased_dmd.networks.roles import FAKE, Roles, expert_role

ONE = expert_role(1)


class Held(TorchDispatchMode):
    """Counts the bytes that are held at a time, the most of them, of what operations inside make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is asked again for the shards
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_only_the_first_process_ever_holds_a_role_whole(tmp_path: Path) -> None:
    """Of a full expert the second gathers a tensor at a time: its shards as they come, in one piece, and copied."""

    def gather() -> None:
        model = TinyWan()
        with processes():
            roles = Roles(model)
            roles.shard(Engine())
            roles.add(ONE, [0], None, seed=0)
            with Held() as held:
                state = roles.state(ONE)
            (tmp_path / f"most-{rank()}").write_text(json.dumps(held.most))
            if rank() == 0:
                save_file(state, tmp_path / "state")

    assert [end(process) for process in launch(2, gather)] == [0, 0]
    wanted, found = dict(TinyWan().networks[0].named_parameters()), load_file(tmp_path / "state")
    assert {f"0.{name}" for name in wanted} == found.keys()
    assert all(torch.equal(found[f"0.{name}"], p.cpu()) for name, p in wanted.items())
    sizes = [p.nbytes for p in wanted.values()]
    first, second = (json.loads((tmp_path / f"most-{i}").read_text()) for i in (0, 1))
    assert first >= sum(sizes)
    assert second <= 3 * max(sizes) < sum(sizes) / 2


class Spoken(TorchDispatchMode):
    """Counts collectives, by the name of torch's operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Counting(TinyWan):
    """Counts its calls, and those that are differentiated, together with what is spoken."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        self.counts["calls"] += 1
        self.counts["backwards"] += torch.is_grad_enabled()
        return super().predict(network, x, t, condition)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_network_is_gathered_once_a_forward_and_once_a_backward(weights: str, tmp_path: Path) -> None:
    """In groups: two blocks, three modules around them and the network's own table. A block's recomputation is a part
    of its backward. Gradients are summed once for each group that trains.
    """
    groups, lora = 6, Lora(rank=2, alpha=2)
    config = Config(
        recipe="counted", teacher=OwnTeacher(), plan=Plan(phases=2), batch_size=2, iterations=1, sample_every=None,
        generator=Generator(lora=lora, ema=0.9), fake=Fake(weights=weights, updates=2, lora=lora),
        engine=Engine(activation_checkpointing=True), prompts=str(tmp_path / "prompts.txt"),
    )  # fmt: skip
    (tmp_path / "prompts.txt").write_text("one\nand two\n")

    def train() -> None:
        spoken, updates = Spoken(), []

        def after(role: str, _: Any) -> None:
            updates.append((role, dict(spoken.counts)))
            spoken.counts.clear()

        with spoken, watched_steps(after=after):
            distill_own(config, tmp_path / "run", Counting(spoken.counts), TinyCodec())
        (tmp_path / f"updates-{os.environ['RANK']}").write_text(json.dumps(updates))

    assert [end(process) for process in launch(2, train)] == [0, 0]
    updates = json.loads((tmp_path / "updates-0").read_text())
    assert [role for role, _ in updates] == [FAKE, FAKE, ONE, FAKE, FAKE, expert_role(2)]
    for role, counts in updates:
        gathers, sums = counts["c10d::_allgather_base_"], counts["c10d::_reduce_scatter_base_"]
        forwards = groups * counts["calls"]
        assert counts["backwards"] == 1
        assert forwards < gathers <= forwards + groups
        assert sums == (groups if (role, weights) == (FAKE, "full") else 2)
