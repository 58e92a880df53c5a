"""What the processes of a group hold of a role that is sharded over them, by the bytes of two on gloo."""

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from faults import end, launch
from safetensors.torch import load_file, save_file
from tiny import TinyWan
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phased_dmd.config import Engine
from phased_dmd.engine.world import processes, rank
from phased_dmd.networks.roles import Roles, expert_role

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
    assert all(torch.equal(found[f"0.{name}"], p) for name, p in wanted.items())
    sizes = [p.nbytes for p in wanted.values()]
    first, second = (json.loads((tmp_path / f"most-{i}").read_text()) for i in (0, 1))
    assert first >= sum(sizes)
    assert second <= 3 * max(sizes) < sum(sizes) / 2
