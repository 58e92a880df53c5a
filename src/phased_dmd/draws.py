"""Every random number of training, each a function of its key and the sample's index alone."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.config.teacher import OwnTeacher, PipelineTeacher
from phased_dmd.engine.randomness import choice, generator, normal, uniform
from phased_dmd.engine.world import device, rank, world_size
from phased_dmd.maths.phases import Hop
from phased_dmd.maths.schedules import renoise_times, times_like
from phased_dmd.models.protocol import Condition
from phased_dmd.networks.system import System

Key = tuple[int | str, ...]


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, each a function of its key and the sample's index alone.

    update 0 is the generator's. The options of `Rollouts` say which updates share a path of the generator, by giving
    them the same key for it.
    """

    system: System
    phase: int
    iteration: int
    update: int
    everyone: Sequence[range]  # the samples of each process
    weights: Sequence[float]  # of the resolution buckets

    @property
    def key(self) -> Key:
        """Of the re-noise time and noise."""
        return self.system.config.seed, self.phase, self.iteration, self.update

    @property
    def cycle(self) -> Key:
        """Of the path within the phase: its exit."""
        reuse = self.system.config.rollouts.reuse
        return self.system.config.seed, self.phase, self.iteration, 0 if reuse else self.update

    @cached_property
    def place(self) -> int | None:
        """Which of the pool's batches the path begins with, if there is a pool."""
        size = self.system.config.rollouts.pool
        return choice(size, *self.cycle, "pool") if size and self.phase > 1 else None

    @cached_property
    def origin(self) -> Key:
        """Of the path up to the phase: prompts, first noise, resolution."""
        if self.place is None:
            return self.cycle
        rollouts = self.system.config.rollouts
        renewed = int(self.iteration * rollouts.pool_refresh)  # batches so far, one place after the other
        times = -(-(renewed - self.place) // rollouts.pool)
        return self.system.config.seed, self.phase, "pool", self.place, times

    @property
    def samples(self) -> range:
        """This process's."""
        return self.everyone[rank()]

    @property
    def share(self) -> float:
        """The share of this process's batch that the samples are."""
        config = self.system.config
        return len(self.samples) * world_size() / (config.batch_size * config.engine.sequence_parallel)

    @cached_property
    def bucket(self) -> int:
        """One resolution bucket for the whole batch."""
        if len(self.weights) == 1:
            return 0
        u = uniform([0], *self.origin, "bucket").item() * sum(self.weights)
        return min(bisect(list(accumulate(self.weights)), u), len(self.weights) - 1)

    # ---------------------------------------------------------------- the generator's path

    @cached_property
    def first(self) -> int:
        """The phase's first step."""
        return self.system.plan.steps(self.phase).start

    @cached_property
    def path(self) -> tuple[Hop, ...]:
        """From t_0 to the phase's end; for SGTS by one exit step for the whole batch, uniform over the phase."""
        return self.system.plan.path(self.phase, self._exit_step())

    @property
    def _both_signs(self) -> bool:
        """Whether the update re-noises one sample of each pair with both signs, and the other not."""
        return self.update > 0 and self.system.config.rollouts.antithetic == "noise"

    @property
    def rolled(self) -> range:
        """The samples whose paths an update needs; all of those that other updates share."""
        shares = self.system.config.rollouts.reuse or self.place is not None
        return self.samples[::2] if self._both_signs and not shares else self.samples

    @property
    def shared(self) -> Tensor | None:
        """Where among those rolled each sample's path is [b]; None: in its own place."""
        if not self._both_signs:
            return None
        number = torch.arange(len(self.samples))
        return number // 2 if len(self.rolled) < len(number) else number - number % 2 + self.update % 2

    def start(self) -> Tensor:
        """Standard normal [rolled, ...]: the path's first noise, in pairs of both signs if `antithetic` says so."""
        if self.system.config.rollouts.antithetic != "start":
            return self._normal(self.rolled, *self.origin, "start")
        return _alternate(self._normal(_pairs(self.rolled), *self.origin, "start"))

    def renoise(self, step: int) -> Tensor:
        """Standard normal [rolled, ...], which the `renoise` solver adds in a step."""
        return self._normal(self.rolled, *(self.origin if step < self.first else self.cycle), "renoise", step)

    def condition(self, conditions: Conditions | None) -> Condition:
        """The conditions of prompts drawn uniformly from those that the bucket allows."""
        if conditions is None:
            return self.system.model.batch([{}] * len(self.rolled))
        samples = _pairs(self.rolled) if self.system.config.rollouts.antithetic == "start" else self.rolled
        prompts = conditions.eligible(self.bucket)
        chosen = (uniform(samples, *self.origin, "prompt") * len(prompts)).long().tolist()
        return self.system.model.batch([conditions.row(prompts[i], self.bucket) for i in chosen])

    def _exit_step(self) -> int:
        config, steps = self.system.config, self.system.plan.steps(self.phase)
        if config.plan.gradient == "all" or (self.update and config.plan.fake_rollout == "full"):
            return steps[-1]
        if config.plan.exits == "independent":
            return steps[choice(len(steps), *self.cycle, "exit")]
        generators = self.update == 0 or config.rollouts.reuse
        turn = self.iteration if generators else self.iteration * config.fake.updates + self.update - 1
        shuffle, place = divmod(turn, len(steps))
        rng = generator(config.seed, self.phase, shuffle, "exits", "generator" if generators else "fake")
        return steps[int(torch.randperm(len(steps), generator=rng)[place])]

    # ---------------------------------------------------------------- re-noising

    @property
    def paired(self) -> bool:
        """Whether neighbours share re-noise time and noise."""
        return self.update > 0 and self.system.config.rollouts.antithetic is not None

    def eps(self) -> Tensor:
        """Standard normal [b, ...], in pairs of both signs if `antithetic` says so."""
        if not self.paired:
            return self._normal(self.samples, *self.key, "eps")
        eps = self._normal(_pairs(self.samples), *self.key, "eps")
        return _alternate(eps) if self.system.config.rollouts.antithetic == "noise" else eps

    def times(self) -> tuple[Tensor, Tensor]:
        """(s, t): the phase's end and the re-noise times, float64 [b]."""
        t = self._times(self.samples).to(device())
        return times_like(self.system.plan.end(self.phase), t), t

    def networks(self) -> list[int]:
        """Whose ranges hold the re-noise times of any process's samples: every process calls them all."""
        if not self.system.plan.switches:
            return [0]
        times = [self._times(samples) for samples in self.everyone]
        return sorted({self.system.plan.network(t) for t in torch.cat(times).tolist()})

    def _times(self, samples: Sequence[int]) -> Tensor:
        config, plan = self.system.config, self.system.plan
        if config.renoise.fixed is not None:
            return torch.full((len(samples),), config.renoise.fixed, dtype=torch.float64)
        low, high = config.interval(plan, self.phase)
        drawn = range(config.batch_size) if config.renoise.sort else samples
        r = uniform(_pairs(drawn) if self.paired else drawn, *self.key, "t")
        if config.renoise.sort:
            r = r.sort().values[list(samples)]
        return renoise_times(r, low, high, config.plan.shift, config.t_range(plan, self.phase), config.renoise.clamp)

    def _normal(self, samples: Sequence[int], *key: int | str) -> Tensor:
        return normal(self.system.model.sample_shapes[self.bucket], samples, *key).to(device())


def _pairs(samples: Sequence[int]) -> list[int]:
    """Each sample's even neighbour, whose draws it shares."""
    return [sample - sample % 2 for sample in samples]


def _alternate(x: Tensor) -> Tensor:
    """Every second sample [b, ...] with the other sign."""
    return torch.cat([x[::2, None], -x[1::2, None]], 1).flatten(0, 1)


def bucket_weights(config: Config, conditions: Conditions | None) -> list[float]:
    """Of the resolution buckets; 0 where no prompt's first frame fits."""
    match config.teacher:
        case PipelineTeacher(sizes=sizes):
            weights = [size.weight for size in sizes]
        case OwnTeacher(weights=own):
            weights = list(own)
        case _:
            weights = [1.0]
    return [w if conditions is None or conditions.eligible(i) else 0.0 for i, w in enumerate(weights)]
