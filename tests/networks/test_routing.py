"""Which of a teacher's networks runs at which time: a recording stub under the plans over two networks.

Four steps of shift 5 begin at 1, .9375, .8333 and .625; the switch is .875, and t >= switch runs network 0.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from phased_dmd import train
from phased_dmd.config import Ablation, Config, Fake, Generator, Lora, Plan, Renoise
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.maths.phases import NEAR, PhasePlan
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.networks.build import add_expert
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, System, expert_role
from phased_dmd.train import distill

SWITCH = 0.875
BELOW, ABOVE = SWITCH - 2 * NEAR, math.nextafter(SWITCH, 1)  # below by more than rounding moves a grid point
GRID = (1.0, 0.9375, 0.8333, 0.625)
GUIDANCE = (3.0, 2.0)


class Numbered(nn.Module):
    """A linear map that knows which network it is, or is a copy of."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.to_q = number, nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)


class Call(NamedTuple):
    phase: int
    role: str
    network: int
    times: tuple[float, ...]


class Recorder:
    """`VelocityModel` of two networks that writes down every call."""

    schedule, prediction = FlowSchedule(), "flow"
    switches, guidance, lora_targets, sample_shapes = (SWITCH,), GUIDANCE, ("to_q",), ((2,),)

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.networks = self.students = [Numbered(0), Numbered(1)]
        self.calls: list[Call] = []
        self.guided: list[tuple[int, float]] = []
        self.phase, self.role = 0, ""

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert isinstance(network, Numbered) and t.dtype == torch.float64
        self.calls.append(Call(self.phase, self.role, network.number, tuple(t.tolist())))
        return network(x)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        self.guided.append((self.calls[-1].network, guidance))
        return conditional

    def networks_of(self, role: str, phase: int) -> set[int]:
        return {call.network for call in self.calls if (call.role, call.phase) == (role, phase)}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    model, predict = Recorder(), Roles.predict

    def spy(roles: Roles, role: str, *args: Any) -> Tensor:
        model.role = role
        return predict(roles, role, *args)

    monkeypatch.setattr(Roles, "predict", spy)
    return model


def config_of(plan: Plan, fake: Any = "full", **changes: Any) -> Config:
    return Config(
        recipe="routing", teacher=OwnTeacher(), plan=plan,
        generator=Generator(lora=Lora(rank=1, alpha=1)), fake=Fake(weights=fake, updates=2, lora=Lora(rank=1, alpha=1)),
        iterations=6, batch_size=16, sample_every=None, **changes,
    )  # fmt: skip


BOTH, ABOVE_SWITCH = {0, 1}, Renoise(above_switch="truncate")
CLAMPED = Renoise(above_switch="clamp")
PLANS = [  # the plan, its re-noise times; of each phase the networks of its experts, and of its re-noise times
    (Plan(phases=2), Renoise(), [{0}, {1}], [BOTH, BOTH]),  # (.8333, 1] holds the switch
    (Plan(phases=2), ABOVE_SWITCH, [{0}, {1}], [{0}, BOTH]),
    (Plan(phases=2), CLAMPED, [{0}, {1}], [{0}, BOTH]),
    (Plan(phases=4), Renoise(), [{0}, {0}, {1}, {1}], [{0}, BOTH, BOTH, BOTH]),
    (Plan(phases=4), CLAMPED, [{0}, {0}, {1}, {1}], [{0}, {0}, BOTH, BOTH]),
    (Plan(phases=1), Renoise(), [BOTH], [BOTH]),
    (Plan(phases=1, gradient="all"), Renoise(), [BOTH], [BOTH]),
    (Plan(phases=2), Ablation(renoise="disjoint"), [{0}, {1}], [BOTH, {1}]),
]


@pytest.mark.parametrize(("plan", "renoise", "experts", "renoised"), PLANS)
@pytest.mark.parametrize("fake", ["full", "lora"])
def test_a_run_calls_each_network_on_its_side_of_the_switch_only(
    plan: Plan, renoise: Renoise | Ablation, experts: list[set[int]], renoised: list[set[int]], fake: str,
    recorder: Recorder,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Generator, fake and teacher in every phase; what no step or re-noise time needs is neither made nor called.

    A fake as adapter is one for all phases, on the networks that any of them needs.
    """
    held, add, begin = defaultdict(set), Roles.add, train.begin

    def spy(roles: Roles, role: str, networks: Sequence[int], *args: Any, **kwargs: Any) -> None:
        held[role, recorder.phase] |= set(networks)
        add(roles, role, networks, *args, **kwargs)

    def phase_begins(job: Any, phase: int) -> Any:
        recorder.phase = phase
        return begin(job, phase)

    monkeypatch.setattr(Roles, "add", spy)
    monkeypatch.setattr(train, "begin", phase_begins)
    distill(
        config_of(plan, fake, **{type(renoise).__name__.lower(): renoise}),
        tmp_path / "run",
        quiet=True,
        own=(recorder, PlainCodec()),
    )

    assert {(call.network, t >= SWITCH) for call in recorder.calls for t in call.times} == {(0, True), (1, False)}
    assert set(recorder.guided) == {(i, GUIDANCE[i]) for i in set().union(*renoised)}
    per_phase = len(GRID) // plan.phases
    for phase in range(1, plan.phases + 1):
        assert held[expert_role(phase), 0] == recorder.networks_of(expert_role(phase), phase) == experts[phase - 1]
        assert recorder.networks_of(FAKE, phase) == renoised[phase - 1]
        made = held[FAKE, phase] if fake == "full" else held[FAKE, 0]
        assert made == renoised[phase - 1] if fake == "full" else made == set().union(*renoised)
        assert recorder.networks_of(TEACHER, phase) == renoised[phase - 1]
        stepped = {
            (call.role, round(t, 4))
            for call in recorder.calls
            for t in call.times
            if call.phase == phase and call.role not in (TEACHER, FAKE)
        }
        assert stepped == {(expert_role(i // per_phase + 1), GRID[i]) for i in range(phase * per_phase)}


@pytest.mark.parametrize("starts", [(0,), (0, 2), (0, 1, 2, 3)])
def test_just_under_at_and_just_over_the_switch(starts: tuple[int, ...], recorder: Recorder) -> None:
    """As near as can be told apart: teacher and fake sample by sample in every phase, and steps that begin there."""
    plan = PhasePlan((1.0, ABOVE, SWITCH, BELOW, 0.0), starts, (SWITCH,))
    system = System(config_of(Plan(phases=len(starts))), recorder, Roles(recorder), plan, {})
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([BELOW, SWITCH, ABOVE], dtype=torch.float64)
    for phase in range(1, plan.num_phases + 1):
        recorder.phase = phase
        add_expert(system, phase, trainable=False)
        system.roles.add(FAKE, (0, 1), None, seed=0)
        with torch.no_grad():
            rolled = system.roll(plan.path(phase), system.start(x), {}).x
            outputs = system.teacher(x, t, {}), system.fake(x, t, {})
        assert torch.isfinite(rolled).all()
        expected = torch.stack([recorder.networks[number](row) for number, row in zip((1, 0, 0), x, strict=True)])
        for output in outputs:  # each sample's own network, in the samples' order
            torch.testing.assert_close(output, expected)
        system.roles.remove(FAKE)
        for role, repeats in ((TEACHER, 2), (FAKE, 1)):  # one call a network, twice with guidance
            calls = [(c.network, c.times) for c in recorder.calls if (c.role, c.phase) == (role, phase)]
            assert calls == [(0, (SWITCH, ABOVE))] * repeats + [(1, (BELOW,))] * repeats
        steps = [(call.network, call.times[0]) for call in recorder.calls[-20:] if call.role.startswith("phase")]
        count = plan.steps(phase).stop
        assert steps[-count:] == [(0, 1.0), (0, ABOVE), (0, SWITCH), (1, BELOW)][:count]
