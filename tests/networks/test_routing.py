"""Which of a teacher's networks runs at which time: a recording stub under the plans over two networks.

Four steps of shift 5 begin at 1, .9375, .8333 and .625; the switch is .875, and t >= switch runs network 0.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded import Recorded, adapters, distill_own
from tiny import newest_checkpoint
from torch import Tensor, nn

from phased_dmd.config import Ablation, Config, Fake, Generator, Lora, Plan, Renoise
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.engine.world import device
from phased_dmd.maths.phases import NEAR, PhasePlan
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.networks.build import add_expert
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, System, expert_role

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


class Two:
    """`VelocityModel` of two networks that writes down what is guided, and how."""

    schedule, prediction = FlowSchedule(), "flow"
    switches, guidance, lora_targets, sample_shapes = (SWITCH,), GUIDANCE, ("to_q",), ((2,),)

    def __init__(self) -> None:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.networks = self.students = [Numbered(number).to(device()) for number in (0, 1)]
        self.guided: list[tuple[int, float]] = []
        self.called = -1

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        assert isinstance(network, Numbered) and t.dtype == torch.float64
        self.called = network.number
        return network(x)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        self.guided.append((self.called, guidance))
        return conditional


def networks_of(recorder: Recorded, role: str, phase: int) -> set[int]:
    return {call.network for call in recorder.of(role, phase)}


def config_of(plan: Plan, fake: Any = "full", **changes: Any) -> Config:
    return Config(
        recipe="routing", teacher=OwnTeacher(), plan=plan,
        generator=Generator(lora=Lora(rank=1, alpha=1)), fake=Fake(weights=fake, updates=2, lora=Lora(rank=1, alpha=1)),
        iterations=6, batch_size=16, sample_every=None, checkpoint_every=6, keep_last="all", **changes,
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
    tmp_path: Path,
) -> None:  # fmt: skip
    """Generator, fake and teacher in every phase; what no step or re-noise time needs is neither made nor called.

    A fake as adapter is one for all phases, on the networks that any of them needs.
    """
    two, run = Two(), tmp_path / "run"
    recorder = Recorded(two, run)  # type: ignore[arg-type]
    distill_own(config_of(plan, fake, **{type(renoise).__name__.lower(): renoise}), run, recorder)

    carried = [adapters(network) for network in two.networks]
    assert {(call.network, t >= SWITCH) for call in recorder.calls for t in call.t.tolist()} == {(0, True), (1, False)}
    assert set(two.guided) == {(i, GUIDANCE[i]) for i in set().union(*renoised)}
    per_phase = len(GRID) // plan.phases
    for phase in range(1, plan.phases + 1):
        role, (_, saved) = expert_role(phase), newest_checkpoint(run, phase)
        assert {i for i, roles in enumerate(carried) if role in roles} == experts[phase - 1]
        assert networks_of(recorder, role, phase) == experts[phase - 1]
        assert networks_of(recorder, FAKE, phase) == networks_of(recorder, TEACHER, phase) == renoised[phase - 1]
        made = {int(name.split("/")[2][0]) for name in saved if name.startswith(f"{FAKE}/weights/")}
        assert made == (renoised[phase - 1] if fake == "full" else set().union(*renoised))
        stepped = {
            (call.role, round(t, 4))
            for call in recorder.calls
            for t in call.t.tolist()
            if call.phase == phase and call.role not in (TEACHER, FAKE)
        }
        assert stepped == {(expert_role(i // per_phase + 1), GRID[i]) for i in range(phase * per_phase)}


@pytest.mark.parametrize("starts", [(0,), (0, 2), (0, 1, 2, 3)])
def test_just_under_at_and_just_over_the_switch(starts: tuple[int, ...]) -> None:
    """As near as can be told apart: teacher and fake sample by sample in every phase, and steps that begin there."""
    plan = PhasePlan((1.0, ABOVE, SWITCH, BELOW, 0.0), starts, (SWITCH,))
    recorder: Any = Recorded(Two())  # type: ignore[arg-type]
    system = System(config_of(Plan(phases=len(starts))), recorder, Roles(recorder), plan, {})
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).to(device())
    t = torch.tensor([BELOW, SWITCH, ABOVE], dtype=torch.float64, device=device())
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
            calls = [(call.network, tuple(call.t.tolist())) for call in recorder.of(role, phase)]
            assert calls == [(0, (SWITCH, ABOVE))] * repeats + [(1, (BELOW,))] * repeats
        steps = [(call.network, call.t[0].item()) for call in recorder.calls[-20:] if call.role.startswith("phase")]
        count = plan.steps(phase).stop
        assert steps[-count:] == [(0, 1.0), (0, ABOVE), (0, SWITCH), (1, BELOW)][:count]
