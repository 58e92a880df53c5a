"""Compiled blocks while roles take turns on shared networks: what dynamo compiles, and when; its backend is `eager`."""

import copy
from collections.abc import Iterator

import pytest
import torch
from tiny import TEXT_DIM, TinyWan, draw
from torch._dynamo.utils import counters

from phased_dmd.config import Engine, Lora
from phased_dmd.engine.world import device
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, expert_role

LORA = Lora(rank=2, alpha=2)
ONE, TWO = expert_role(1), expert_role(2)
X = draw(2, *TinyWan.sample_shapes[0], seed=1).to(device())
T = torch.tensor([0.9, 0.5], device=device())
CONDITION = {"text": draw(2, 5, TEXT_DIM, seed=3).to(device())}
MODES = 3  # of a role: without gradient; with it, in the first block, whose input takes none, and in all others


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        yield
    torch._dynamo.reset()


class Longer(TinyWan):
    """Has four blocks a network."""

    def __init__(self) -> None:
        super().__init__()
        blocks = self.networks[0].blocks
        blocks.extend([copy.deepcopy(block) for block in blocks])


def graphs() -> int:
    """How many graphs were compiled so far."""
    return counters["stats"]["unique_graphs"]


def update(roles: Roles, trains: str, *others: str) -> None:
    """Calls the others without gradient, and the role that trains with it."""
    for role in others:
        with torch.no_grad():
            roles.predict(role, 0, X, T, CONDITION)
    with roles.active(trains):
        roles.predict(trains, 0, X, T, CONDITION).square().mean().backward()


@pytest.mark.parametrize(
    ("checkpointing", "fake"), [(False, None), (True, LORA)], ids=["full fake", "checkpointing, lora fake"]
)
def test_roles_that_take_turns_are_compiled_once_each(checkpointing: bool, fake: Lora | None) -> None:
    """Two phases of three iterations: nothing is compiled after the first, nor more for four blocks than for one."""
    roles = Roles(Longer())
    for role in (ONE, TWO):
        roles.add(role, [0], LORA, seed=1, trainable=False)
    if fake is not None:
        roles.add(FAKE, [0], fake, seed=2, trainable=False)
    roles.shard(Engine(compile=True, activation_checkpointing=checkpointing))
    if fake is None:
        roles.add(FAKE, [0], None, seed=2)
    roles.train(FAKE)
    for phase, experts in ((1, [ONE]), (2, [ONE, TWO])):
        roles.train(experts[-1])
        found = []
        for _ in range(3):
            update(roles, FAKE, *experts)
            update(roles, experts[-1], *experts[:-1], TEACHER, FAKE)
            found.append(graphs())
        assert found[0] == found[-1] <= MODES * (2 + phase)
        roles.freeze(experts[-1])
    assert not counters["graph_break"]
