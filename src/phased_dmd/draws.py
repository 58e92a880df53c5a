"""Every random number of training, each a function of its key and the sample's index alone."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from phased_dmd.conditions import Conditions
from phased_dmd.config import Config, OwnTeacher, PipelineTeacher
from phased_dmd.diffusion import renoise_times, times_like
from phased_dmd.engine.randomness import choice, normal, uniform
from phased_dmd.engine.world import device, rank, world_size
from phased_dmd.models.protocol import Condition
from phased_dmd.system import System


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, each a function of its key and the sample's index alone."""

    system: System
    key: tuple[int, ...]  # run seed, phase, iteration, sub-update
    everyone: Sequence[range]  # the samples of each process
    weights: Sequence[float]  # of the resolution buckets

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
        u = uniform([0], *self.key, "bucket").item() * sum(self.weights)
        return min(bisect(list(accumulate(self.weights)), u), len(self.weights) - 1)

    def noise(self, role: str, *more: int) -> Tensor:
        """Standard normal [b, ...]."""
        shape = self.system.model.sample_shapes[self.bucket]
        return normal(shape, self.samples, *self.key, role, *more).to(device())

    def exit_step(self, full: bool) -> int | None:
        """SGTS: one exit step for the whole batch, uniform over the phase; None runs the phase's steps to their end."""
        steps = self.system.plan.steps(self.key[1])
        if full or self.system.config.plan.gradient == "all":
            return None
        return steps[choice(len(steps), *self.key, "exit")]

    def times(self) -> tuple[Tensor, Tensor]:
        """(s, t): the phase's end and the re-noise times, float64 [b]."""
        t = self._renoise_times(self.samples).to(device())
        return times_like(self.system.plan.end(self.key[1]), t), t

    def networks(self) -> list[int]:
        """Whose ranges hold the re-noise times of any process's samples: every process calls them all."""
        if not self.system.plan.switches:
            return [0]
        times = [self._renoise_times(samples) for samples in self.everyone]
        return sorted({self.system.plan.network(t) for t in torch.cat(times).tolist()})

    def _renoise_times(self, samples: range) -> Tensor:
        config, plan, phase = self.system.config, self.system.plan, self.key[1]
        if config.renoise.fixed is not None:
            return torch.full((len(samples),), config.renoise.fixed, dtype=torch.float64)
        low, high = config.interval(plan, phase)
        r = uniform(samples, *self.key, "t")
        return renoise_times(r, low, high, config.plan.shift, config.t_range(plan, phase), config.renoise.clamp)

    def condition(self, conditions: Conditions | None) -> Condition:
        """The conditions of prompts drawn uniformly from those that the bucket allows."""
        if conditions is None:
            return self.system.model.batch([{}] * len(self.samples))
        prompts = conditions.eligible(self.bucket)
        chosen = (uniform(self.samples, *self.key, "prompt") * len(prompts)).long().tolist()
        return self.system.model.batch([conditions.row(prompts[i], self.bucket) for i in chosen])


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
