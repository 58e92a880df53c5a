"""One update of the fake or of an expert, in the order of the paper: draw, roll out, re-noise, score.

`draw` fixes every random number of an update. `fake_loss` and `expert_loss` roll the generator out with them and
return the loss whose gradient the update descends; the training loop calls backward, clips and steps.
"""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from phased_dmd.conditions import Conditions
from phased_dmd.config import FISHER, Config
from phased_dmd.config.teacher import OwnTeacher, PipelineTeacher
from phased_dmd.engine.randomness import choice, in_pairs, normal, uniform
from phased_dmd.maths.losses import (
    Predict,
    anchor_loss,
    biased_target,
    distribution_matching_loss,
    fisher_stop_gradient_loss,
    printed_target,
    rollout_target,
    score_matching_loss,
    subinterval_target,
)
from phased_dmd.maths.phases import Hop
from phased_dmd.maths.rollout import Rollout
from phased_dmd.maths.schedules import renoise_times, times_like, x0_through
from phased_dmd.models.protocol import Condition
from phased_dmd.networks.roles import FAKE, TEACHER, System
from phased_dmd.pool import Pool, Taken

EXPERT_UPDATE = 0  # the number of the expert's update in an iteration; the fake's are 1, 2, ...
TARGETS = {"unbiased": subinterval_target, "biased": biased_target, "printed": printed_target}
Key = tuple[int | str, ...]
States = dict[tuple[range, tuple[Hop, ...]], Tensor]  # x behind these hops of these samples' rollout
Loss = tuple[Tensor, dict[str, Tensor]]  # what an update descends, with its graph; and figures to log, without


@dataclass(frozen=True)
class Batch:
    """What an update draws for the samples of one micro-batch in this process.

    samples: their indices in the global batch. pairs: for each sample the index that keys the draws that a pair of
    antithetic samples shares; without pairs, its own. rollout_key: the random key of the rollout; updates whose keys
    are equal share one rollout. taken: the entries of the pool that the rollout begins with; None for first noise.
    path: the network calls from there to the phase's end, of which the first `before` are earlier phases'. s, t:
    float64 [b], the phase's end and the re-noise times. eps: [b, ...], the re-noise noise. networks: those that serve
    the t of any process. share: samples x processes / (global batch x sequence_parallel), so that the mean over the
    processes of what a process adds up over its micro-batches is the batch's mean.
    """

    system: System
    phase: int
    samples: range
    pairs: Sequence[int]
    shape: tuple[int, ...]
    rollout_key: Key
    condition: Condition
    taken: Taken | None
    path: tuple[Hop, ...]
    before: int
    s: Tensor
    t: Tensor
    eps: Tensor
    networks: list[int]
    share: float

    def start(self) -> Tensor:
        """Returns x [b, ...] at the first time of the path."""
        return self.system.start(self.first_noise()) if self.taken is None else self.taken.begin()

    def first_noise(self) -> Tensor:
        """Draws the standard normal noise [b, ...] that a rollout starts from; of a pair, the second is the negative
        of the first.
        """
        noise = normal(self.shape, self.pairs, *self.rollout_key, "start")
        if self.system.config.rollouts.antithetic:
            noise[1::2] *= -1
        return noise.to(self.system.device)

    def step_noise(self, step: int) -> Tensor:
        """Draws the standard normal noise [b, ...] that the `renoise` solver adds in a step."""
        return normal(self.shape, self.samples, *self.rollout_key, "renoise", step).to(self.system.device)

    def mean(self, of_each: Tensor) -> Tensor:
        """Returns the mean of a number for each sample [b], times the samples' share."""
        return of_each.mean() * self.share


def draw(
    system: System, phase: int, iteration: int, update: int, samples: range, odds: Sequence[float],
    conditions: Conditions | None, everywhere: Sequence[range] | None = None, pool: Pool | None = None,
) -> Batch:  # fmt: skip
    """Draws all random numbers of an update, each a function of its key and the sample's index alone.

    update: `EXPERT_UPDATE`, or the number of the fake's update. samples: those of this process in the micro-batch.
    odds: of the resolution buckets. conditions: the encoded prompts, or None for a model that takes none.
    everywhere: the samples of each process, this one's included; None means that it is alone. pool: see `needs_pool`.
    """
    config, plan, everywhere = system.config, system.plan, everywhere or [samples]
    key: Key = (config.seed, phase, iteration, update)
    rollout_key: Key = (config.seed, phase, iteration, EXPERT_UPDATE) if config.rollouts.reuse else key
    pairs = in_pairs(samples) if config.rollouts.antithetic else samples

    # The rollout: one resolution bucket for the whole batch, then a prompt, or an entry of the pool, for each sample.
    bucket = 0
    if len(odds) > 1:
        u = uniform([0], *rollout_key, "bucket").item() * sum(odds)
        bucket = min(bisect(list(accumulate(odds)), u), len(odds) - 1)
    taken = pool.draw(phase, iteration, bucket, samples, *rollout_key) if pool is not None else None
    rows = draw_prompts(conditions, bucket, pairs, rollout_key) if taken is None else taken.rows()

    # Stochastic gradient truncation (SGTS): one step of the phase, the exit, jumps from its time to the phase's end.
    steps = plan.steps(phase)
    exits_early = config.plan.gradient == "last" and (update == EXPERT_UPDATE or config.ablation.fake_rollout == "same")
    exit_step = steps[choice(len(steps), *rollout_key, "exit")] if exits_early else steps[-1]
    path, before = plan.path(phase, exit_step), steps.start
    if taken is not None:
        path, before = path[before:], 0

    # Re-noising: in the fake's updates the samples of a pair share its time and noise.
    shares = bool(config.rollouts.antithetic) and update != EXPERT_UPDATE
    shape = tuple(system.model.sample_shapes[bucket])
    t = draw_times(system, phase, key, samples, shares).to(system.device)
    networks = [0]
    if plan.switches:
        times = torch.cat([draw_times(system, phase, key, of_one, shares) for of_one in everywhere])
        networks = sorted({plan.network(time) for time in times.tolist()})
    return Batch(
        system, phase, samples, pairs, shape, rollout_key,
        condition=system.model.batch(rows), taken=taken, path=path, before=before,
        s=times_like(plan.end(phase), t), t=t,
        eps=normal(shape, pairs if shares else samples, *key, "eps").to(system.device),
        networks=networks,
        share=len(samples) * len(everywhere) / (config.batch_size * config.engine.sequence_parallel),
    )  # fmt: skip


def draw_prompts(
    conditions: Conditions | None, bucket: int, pairs: Sequence[int], key: Key
) -> list[Condition]:  # fmt: skip
    """Draws a prompt for each sample; returns their conditions, empty ones for a model that takes none."""
    if conditions is None:
        return [{} for _ in pairs]
    prompts = conditions.eligible(bucket)
    chosen = (uniform(pairs, *key, "prompt") * len(prompts)).long().tolist()
    return [conditions.row(prompts[i], bucket) for i in chosen]


def draw_times(system: System, phase: int, key: Key, samples: Sequence[int], shares: bool) -> Tensor:
    """Draws the re-noise times of samples, float64 [b]; shares: one time for both samples of a pair."""
    config = system.config
    interval = system.intervals[phase - 1]
    if interval.low == interval.high:  # one time for all
        return torch.full((len(samples),), interval.high, dtype=torch.float64)
    r = uniform(in_pairs(samples) if shares else samples, *key, "t")
    if config.renoise.network == "update":  # one part for all samples, drawn by its length: each r stays uniform
        *iteration_key, update = key
        parts = interval.parts(system.plan.switches, config.plan.shift)
        u = uniform([0], *iteration_key, "network").item() + int(update) / config.fake.updates
        part = bisect(parts, u % 1) - 1  # the last of the fake's updates has the expert's
        r = parts[part] + (parts[part + 1] - parts[part]) * r
    return renoise_times(r, interval.low, interval.high, config.plan.shift, interval.floor)


@torch.no_grad()
def roll_out(batch: Batch, hops: int, states: States) -> Tensor:
    """Returns x [b, ...] behind the first `hops` calls of the batch's path, without gradient.

    states: what the updates of an iteration share where `rollouts.reuse` is on, filled here; an empty one shares
    nothing. An update may ask for x at the phase's begin, before the last call and at the phase's end.
    """
    system, x, done = batch.system, None, 0
    for stop in sorted({batch.before, len(batch.path) - 1, hops}):  # in pieces: every place an update may ask for
        if stop > hops:
            break
        key = batch.samples, batch.path[:stop]
        if key not in states:
            x = batch.start() if x is None else x
            states[key] = system.roll(batch.path[done:stop], x, batch.condition, noise=batch.step_noise).x
        x, done = states[key], stop
    assert x is not None
    return x


def fake_loss(batch: Batch, states: States) -> Loss:
    """Returns the loss by which the fake learns the score of what the generator makes (Eq. 13; Eq. 4 at s = 0).

    It is the mean over the samples, times their share of the process's batch. Call it and its backward inside
    `roles.active(FAKE)`.
    """
    system, asked = batch.system, batch.system.config.ablation.target
    x_s = roll_out(batch, len(batch.path), states)
    target = TARGETS[asked] if asked != "rollout" else partial(rollout_target, x0=last_x0(batch, x_s, states))
    loss = score_matching_loss(
        partial(system.fake, condition=batch.condition, present=batch.networks),
        x_s, batch.eps, batch.s, batch.t, system.model.schedule, system.model.prediction, target,
    )  # fmt: skip
    return batch.mean(loss), {}


def last_x0(batch: Batch, x_s: Tensor, states: States) -> Tensor:
    """Returns the x_0 [b, ...] that the last call of the batch's path predicted; its state before that is in states."""
    hop, x = batch.path[-1], roll_out(batch, len(batch.path) - 1, states)
    return x0_through(x, x_s, times_like(hop.t, x), times_like(hop.r, x), batch.system.model.schedule)


def expert_loss(batch: Batch, states: States) -> Loss:
    """Returns the loss by which the phase's expert descends its divergence from the teacher at the phase's end s
    (Eq. 11; Eq. 9 at s = 0), and the figures that the objective has.

    Gradient flows through all calls of the phase, or with SGTS through the last one alone. The mean over the samples,
    times their share of the process's batch. Call it and its backward inside `roles.active(expert_role(phase))`.
    """
    system, config, model = batch.system, batch.system.config, batch.system.model
    end = roll_recorded(batch, states)
    teacher, fake = (
        partial(predict, condition=batch.condition, present=batch.networks) for predict in (system.teacher, system.fake)
    )
    if config.objective in FISHER:
        return batch.mean(fisher_loss(batch, end.x, teacher, fake)), {}
    loss, figures = distribution_matching_loss(
        end.x, batch.eps, batch.s, batch.t, model.schedule, model.prediction,
        teacher, fake, config.objective, end.x0.detach(),
    )  # fmt: skip
    figures |= thirds(batch, figures["fake_error"]) | {"size": end.x0.detach().square().flatten(1).mean(1)}
    return batch.mean(loss), {name: batch.mean(of_each.to(loss)) for name, of_each in figures.items()}


def thirds(batch: Batch, of_each: Tensor) -> dict[str, Tensor]:
    """Splits a figure [b] by the third of the phase's re-noise times that a sample's t is in, the least noisy first.

    Returns for each third the figure, 0 for a sample of another one, and 1 for a sample of its own.
    """
    interval = batch.system.intervals[batch.phase - 1]
    place = (batch.t - interval.low) / max(interval.high - interval.low, 1e-9)
    found = {}
    for third in range(3):
        inside = ((place * 3).clamp(max=2.999).floor() == third).to(of_each)
        found |= {f"fake_error_{third + 1}": of_each * inside, f"share_{third + 1}": inside}
    return found


def regression_loss(batch: Batch, states: States) -> Loss:
    """Returns the loss by which the phase's expert regresses the teacher: over the phase, from the same state, it is to
    move with the mean velocity of the guided teacher's own sampler.

    The gradient is that of `expert_loss`, whose place it takes in an anchored update; no fake is asked.
    """
    assert batch.taken is not None
    duration = batch.system.plan.begin(batch.phase) - batch.system.plan.end(batch.phase)
    return batch.mean(anchor_loss(roll_recorded(batch, states).x, batch.taken.end(), duration)), {}


def roll_recorded(batch: Batch, states: States) -> Rollout:
    """Rolls out to the phase's end, recording the expert's own calls for backward: all, or with SGTS the last one.

    What comes before them is without gradient: nothing reaches the experts of earlier phases.
    """
    recorded = len(batch.path) - 1 if batch.system.config.plan.gradient == "last" else batch.before
    x, hops = roll_out(batch, recorded, states), batch.path[recorded:]
    return batch.system.roll(hops, x, batch.condition, [hop.step for hop in hops], batch.step_noise)


def fisher_loss(batch: Batch, x_s: Tensor, teacher: Predict, fake: Predict) -> Tensor:
    """Returns a loss [b] whose gradient in x_s is that of the Fisher divergence: the teacher's denoising error minus
    the fake's, or its variant with a stopped gradient.

    Teacher and fake are differentiated down to x_s one after the other, each inside its own role: one network carries
    both, and only one of its adapters can be on.
    """
    roles, x = batch.system.roles, x_s.detach().requires_grad_()
    given = x, batch.eps, batch.s, batch.t, batch.system.model.schedule, batch.system.model.prediction
    terms: list[tuple[str, Callable[[], Tensor]]] = [(FAKE, lambda: fisher_stop_gradient_loss(teacher, fake, *given))]
    if batch.system.config.objective == "fisher":
        terms = [
            (TEACHER, lambda: score_matching_loss(teacher, *given)),
            (FAKE, lambda: -score_matching_loss(fake, *given)),
        ]
    losses = []
    for role, term in terms:
        with roles.active(role):
            loss = term()
            slope = torch.autograd.grad(loss.sum(), x)[0]
        losses.append(loss.detach() + ((x_s - x.detach()) * slope).flatten(1).sum(1))
    return torch.stack(losses).sum(0)


def bucket_odds(config: Config, conditions: Conditions | None) -> list[float]:
    """Returns the odds of the resolution buckets, 0 for one that no prompt's first frame fits."""
    match config.teacher:
        case PipelineTeacher(sizes=sizes):
            odds = [size.weight for size in sizes]
        case OwnTeacher(weights=weights):
            odds = list(weights)
        case _:
            odds = [1.0]
    return [each if conditions is None or conditions.eligible(i) else 0.0 for i, each in enumerate(odds)]
