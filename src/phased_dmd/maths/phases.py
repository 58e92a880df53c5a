"""Which step runs when, on which expert and network: the phase plan, in plain Python."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")  # a float, or a tensor of them
T_MIN = 0.02  # the least re-noise time of a phase that ends at 0
NEAR = 1e-6  # times nearer than this are the same: rounding moves a time by less, in a pipeline's float32 too


def shift_time(u: T, shift: float) -> T:
    """Maps raw time u in [0, 1] to shifted time t = k u / (1 + (k - 1) u), k = shift."""
    return shift * u / (1 + (shift - 1) * u)  # type: ignore[operator]


def unshift_time(t: T, shift: float) -> T:
    """Maps shifted time t to raw time u, as the inverse of `shift_time`."""
    return t / (shift - (shift - 1) * t)  # type: ignore[operator]


def step_times(steps: int, shift: float, start: float = 1.0) -> tuple[float, ...]:
    """Returns the grid start = t_0 > ... > t_N = 0, evenly spaced in raw time and then shifted (Sec. 2.2)."""
    u_0 = unshift_time(start, shift)
    return (start, *(shift_time(u_0 * (1 - i / steps), shift) for i in range(1, steps)), 0.0)


def times_between(t: float, r: float, grid: Sequence[float]) -> tuple[float, ...]:
    """Returns t, the times of a finer grid that lie between t and r < t, and r."""
    return (t, *(u for u in grid if r + NEAR < u < t - NEAR), r)


class Hop(NamedTuple):
    """A hop is one network call of a rollout: the expert of `step` takes x from time t to time r < t."""

    step: int
    t: float
    r: float


class Expert(NamedTuple):
    """An expert is what one phase (counted from 1) trains on one base network (counted from 0, noisiest first)."""

    phase: int
    network: int


@dataclass(frozen=True)
class PhasePlan:
    """A phase plan splits the steps of a few-step sampler into phases and lays them over the teacher's networks.

    times: t_0 > ... > t_N = 0. starts: the first step of each phase, beginning with 0.
    switches: the teacher's own switch times, decreasing; network i serves t >= switches[i], up to rounding, and the
    last network serves the rest.
    A phase's *boundary* (its end s_k) and the teacher's *switch* are different things. A plan that cannot be is a
    ValueError.
    """

    times: tuple[float, ...]
    starts: tuple[int, ...] = (0,)
    switches: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.times) < 2 or not all(a > b for a, b in itertools.pairwise(self.times)):
            raise ValueError(f"plan: the times must decrease strictly, got {self.times}")
        if self.times[0] > 1 or self.times[-1] != 0:
            raise ValueError(f"plan: the times must lie in [0, 1] and end at 0, got {self.times}")
        if (
            not self.starts
            or self.starts[0] != 0
            or any(a >= b for a, b in itertools.pairwise((*self.starts, self.num_steps)))
        ):
            raise ValueError(
                f"plan: phases must start at 0, rise, and hold a step each; got {self.starts} of {self.num_steps} steps"
            )
        if any(a <= b for a, b in itertools.pairwise((1.0, *self.switches, 0.0))):
            raise ValueError(f"plan: switches must decrease inside (0, 1), got {self.switches}")

    @classmethod
    def even(
        cls, steps: int = 4, phases: int = 2, shift: float = 5.0, start: float = 1.0, switches: Sequence[float] = ()
    ) -> "PhasePlan":
        """Makes a plan of `steps` steps on the shifted grid, in `phases` phases of equal length."""
        if steps < 1 or phases < 1 or steps % phases:
            raise ValueError(f"plan.phases: {steps} steps cannot be split into {phases} equal phases")
        starts = tuple(range(0, steps, steps // phases))
        return cls(step_times(steps, shift, start), starts, tuple(switches))

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1

    @property
    def num_phases(self) -> int:
        return len(self.starts)

    def steps(self, phase: int) -> range:
        """Returns the steps that the phase owns."""
        return range(self.starts[phase - 1], (*self.starts, len(self.times) - 1)[phase])

    def begin(self, phase: int) -> float:
        """Returns the time the phase starts from, s_{k-1}; t_0 for the first."""
        return self.times[self.steps(phase).start]

    def end(self, phase: int) -> float:
        """Returns the phase's boundary s_k, the time its expert ends at; 0 for the last."""
        return self.times[self.steps(phase).stop]

    def within(self, phase: int, grid: Sequence[float]) -> tuple[float, ...]:
        """Returns the phase's begin, the times of a finer grid that lie inside the phase, and its end."""
        return times_between(self.begin(phase), self.end(phase), grid)

    def network(self, t: float) -> int:
        """Returns the number of the teacher network whose range holds t."""
        return sum(t < switch - NEAR for switch in self.switches)

    def expert(self, step: int) -> Expert:
        """Returns the expert that runs the step: its phase's, on the network whose range holds t_step."""
        phase = sum(step >= start for start in self.starts)
        return Expert(phase, self.network(self.times[step]))

    def experts(self, phase: int) -> tuple[Expert, ...]:
        """Returns all that the phase trains: one expert for each network that serves one of its steps."""
        return tuple(sorted({self.expert(step) for step in self.steps(phase)}))

    def floor(self, phase: int) -> float:
        """Returns the least time of the network that runs the phase's last step: a switch, or 0."""
        return (*self.switches, 0.0)[self.network(self.times[self.steps(phase)[-1]])]

    def fakes(self, phase: int, renoised: tuple[float, float] | None = None) -> tuple[int, ...]:
        """Returns the networks that need a fake: those whose range meets the re-noise times, (s_k, t_0) by default."""
        low, high = renoised or (self.end(phase), self.times[0])
        first = self.network(high)
        return tuple(range(first, max(first, self.network(low)) + 1))

    def path(self, phase: int, exit_step: int | None = None) -> tuple[Hop, ...]:
        """Returns the hops from t_0 to the phase's end (Sec. 2.3).

        With an exit step (SGTS) that step jumps straight to the end; if it is not the phase's, it is a ValueError.
        """
        last = self.steps(phase)[-1] if exit_step is None else exit_step
        if last not in self.steps(phase):
            raise ValueError(f"step {exit_step} is not one of phase {phase}: {self.steps(phase)}")
        whole = tuple(Hop(i, self.times[i], self.times[i + 1]) for i in range(last))
        return (*whole, Hop(last, self.times[last], self.end(phase)))


@dataclass(frozen=True)
class RenoiseInterval:
    """A phase's re-noise times t are drawn from (low, high], and those below `floor` are moved up to it.

    Where low = high there is one time for all.
    """

    low: float
    high: float
    floor: float = 0.0

    @classmethod
    def of(cls, plan: PhasePlan, phase: int, where: str | float, above_switch: str | None) -> "RenoiseInterval":
        """Returns the interval of a phase: from its end s up to t_0 (nested), to its own begin (disjoint), or one time.

        above_switch: `truncate` or `clamp` bounds t to the range of the network that runs the phase's last step. An
        interval that holds no time is a ValueError.
        """
        s, t_0 = plan.end(phase), plan.times[0]
        if not isinstance(where, str):
            if not s < where <= t_0:
                raise ValueError(f"ablation.renoise: {where:g} is outside ({s:g}, {t_0:g}] of phase {phase}")
            return cls(where, where)
        low, high = s if s > 0 else T_MIN, t_0 if where == "nested" else plan.begin(phase)
        floor = plan.floor(phase) if above_switch else 0.0
        if above_switch == "truncate":
            low, floor = max(low, floor), 0.0
        if not (low < high and floor <= high):
            above = f" at or above the switch {floor or low:g}" if above_switch else ""
            raise ValueError(f"renoise: no time of phase {phase} is left below {high:g}{above}")
        return cls(low, high, floor)

    def parts(self, switches: Sequence[float], shift: float) -> list[float]:
        """Returns 0 = c_0 < ... < c_n = 1; `renoise_times` maps r from c_i up to c_i+1 to the range of one network.

        switches: those of the plan, at or above which a network's times lie.
        """
        u_low, u_high = unshift_time(self.low, shift), unshift_time(self.high, shift)
        least = max(self.low, self.floor)
        inside = [unshift_time(switch, shift) for switch in switches if least < switch < self.high]
        return [0.0, *((u_high - u) / (u_high - u_low) for u in inside), 1.0]

    @property
    def support(self) -> tuple[float, float]:
        """Returns the least interval that holds every time: `PhasePlan.fakes` needs no more."""
        return max(self.low, self.floor), self.high
