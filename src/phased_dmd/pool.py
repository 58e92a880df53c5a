"""The pool: trajectories of the guided teacher, made once and kept on disk, that phases begin with or regress on."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich import get_console
from torch import Tensor

from phased_dmd.checkpoint import HashedFiles, claimed, is_whole, save_hashed
from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.engine.collectives import run_on_all_ranks, run_on_first_rank
from phased_dmd.engine.randomness import in_pairs, normal, uniform
from phased_dmd.engine.world import batch_size, rank, world_size
from phased_dmd.maths.phases import PhasePlan, step_times
from phased_dmd.models.analytic import build_mixture
from phased_dmd.models.protocol import Condition
from phased_dmd.networks.roles import System
from phased_dmd.progress import progress

POLL = 0.1  # seconds between two looks at what other jobs make
NO_END = 2**52  # entries of an exact marginal: as many as a uniform number can name


class Taken(NamedTuple):
    """Names the entries of a pool that samples take, one each, in a phase and a resolution bucket."""

    pool: "Pool"
    phase: int
    bucket: int
    entries: Sequence[int]

    def rows(self) -> list[Condition]:
        """Returns the condition of each entry's prompt."""
        return self.pool.rows(self.bucket, self.entries)

    def begin(self) -> Tensor:
        """Returns x [b, ...] at the phase's begin."""
        return self.pool.begin(self.phase, self.bucket, self.entries)

    def end(self) -> Tensor:
        """Returns x [b, ...] at the phase's end, to where the teacher goes from `begin`; kept in anchored phases."""
        return self.pool.end(self.phase, self.bucket, self.entries)


class Pool:
    """Keeps states of the guided teacher's own sampler at the phases' ends, in files that a killed run finds again.

    An entry is a number in a resolution bucket. Its prompt and first noise depend on that and the run's seed alone, and
    each of its states on the one before. Where rollouts start from experts, an anchored phase begins with what the
    frozen ones make of the noise, which is kept too. An analytic teacher's states to begin with are drawn from its
    marginal instead, and not kept. Where samples are antithetic, the entries 2 i and 2 i + 1 are a pair.
    """

    def __init__(self, system: System, conditions: Conditions | None, odds: Sequence[float], folder: Path) -> None:
        self._system, self._config, self._conditions = system, system.config, conditions
        self._folder, self._files, self._exact = folder, HashedFiles(), None
        halves = [self._config.rollouts.pool * each / sum(odds) / 2 for each in odds]
        self._counts = [2 * max(1, round(half)) if half else 0 for half in halves]  # of entries, by bucket
        if isinstance(self._config.teacher, AnalyticTeacher):
            self._exact = build_mixture(self._config.teacher)

    # ---------------------------------------------------------------- taking entries

    def draw(self, phase: int, iteration: int, bucket: int, samples: Sequence[int], *key: int | str) -> Taken | None:
        """Draws an entry for each sample of an update; None where its rollouts begin with noise. key: of the random
        numbers.
        """
        anchored = iteration < self._config.anchored(phase)
        if not anchored and not begins_with_teacher(self._config, phase):
            return None
        count = self._counts[bucket] if anchored or self._exact is None else NO_END
        if not self._config.rollouts.antithetic:
            return Taken(self, phase, bucket, (uniform(samples, *key, "entry") * count).long().tolist())
        pairs = (uniform(in_pairs(samples), *key, "entry") * (count // 2)).long().tolist()
        return Taken(self, phase, bucket, [2 * i + sample % 2 for i, sample in zip(pairs, samples, strict=True)])

    def spread(self, phase: int, bucket: int, count: int) -> Taken:
        """Takes that many entries, spread over all."""
        return Taken(self, phase, bucket, [i * self._counts[bucket] // count for i in range(count)])

    def rows(self, bucket: int, entries: Sequence[int]) -> list[Condition]:
        """Returns the condition of each entry's prompt: of all entries each prompt has as many as any other."""
        if self._conditions is None:
            return [{} for _ in entries]
        return [self._conditions.row(prompt, bucket) for prompt in self.prompts(bucket, entries)]

    def prompts(self, bucket: int, entries: Sequence[int]) -> list[int]:
        """Returns the number of each entry's prompt among the run's; none for a model that takes none."""
        if self._conditions is None:
            return []
        prompts, count = self._conditions.eligible(bucket), self._counts[bucket]
        return [prompts[i * len(prompts) // count] for i in self._keys(entries)]

    def begin(self, phase: int, bucket: int, entries: Sequence[int]) -> Tensor:
        """Returns x [b, ...] of entries at a phase's begin."""
        if phase == 1:
            return self._system.start(self._noise(bucket, entries))
        if self._config.rollouts.start == "experts":
            return self._read(phase, bucket, entries, "begin")
        if self._exact is None:
            return self._read(phase - 1, bucket, entries, "end")
        seed, keys = self._config.seed, self._keys(entries)
        u = uniform(keys, seed, "pool", "mode", phase)
        u = torch.where(torch.tensor(keys) == torch.tensor(entries), u, 1 - u)  # the opposite, too
        noise = self._noise(bucket, entries, "marginal", phase)
        return self._exact.marginal(self._system.plan.begin(phase), u, noise.cpu()).to(self._system.device)

    def end(self, phase: int, bucket: int, entries: Sequence[int]) -> Tensor:
        """Returns x [b, ...] of entries at a phase's end."""
        return self._read(phase, bucket, entries, "end")

    def _keys(self, entries: Sequence[int]) -> Sequence[int]:
        """Returns for each entry the number that its draws depend on: of a pair the even one."""
        return in_pairs(entries) if self._config.rollouts.antithetic else entries

    def _noise(self, bucket: int, entries: Sequence[int], *key: int | str) -> Tensor:
        """Draws the standard normal noise [b, ...] of entries; of a pair, the second is the negative of the first."""
        keys, shape = self._keys(entries), self._system.model.sample_shapes[bucket]
        noise = normal(shape, keys, self._config.seed, "pool", bucket, *(key or ("start",)))
        for i, (entry, even) in enumerate(zip(entries, keys, strict=True)):
            noise[i] *= 1 if entry == even else -1
        return noise.to(self._system.device)

    def _read(self, phase: int, bucket: int, entries: Sequence[int], what: str) -> Tensor:
        size = self._file_size(bucket)
        states = [self._files.read(self._path(phase, bucket, i // size), f"{i}.{what}") for i in entries]
        return torch.stack(states).to(self._system.device)

    # ---------------------------------------------------------------- making entries

    def make(self, phases: Iterable[int], between: Callable[[], object], quiet: bool = True) -> int:
        """Makes what phases need and is not there; returns the network calls that it took, for single samples.

        The processes of a group call this together and share the files; so do several jobs of one run, each of which
        makes what no other does. between: called before each file, and while others are waited for; what it raises
        ends the work, which goes on another time. quiet: do not say how far it is.
        """
        calls = 0
        for phase in sorted({end for each in phases for end in kept_ends(self._config, each)}):
            for bucket, count in enumerate(self._counts):
                size = self._file_size(bucket)
                firsts = range(0, count, size)
                files = {self._path(phase, bucket, i // size): range(i, min(i + size, count)) for i in firsts}
                left = missing_of(files)
                what, there = f"the teacher's states at the end of phase {phase}", count - sum(map(len, left.values()))
                with progress(
                    what, count, there, unit="states", quiet=quiet or not left, console=get_console()
                ) as show:  # fmt: skip
                    while left:
                        between()
                        calls += self._make_some(phase, bucket, left)
                        left = missing_of(files)
                        show(count - sum(map(len, left.values())))
            if rank() == 0:
                for lock in (self._folder / f"phase-{phase}").glob(".*.lock"):  # of who was killed; none is needed now
                    lock.unlink(missing_ok=True)
        return calls

    def _make_some(self, phase: int, bucket: int, missing: Mapping[Path, range]) -> int:
        """Makes one of the files, or as many as there are processes; returns the network calls."""
        ways = self._config.engine.sequence_parallel
        groups, group = world_size() // ways, rank() // ways
        with ExitStack() as stack:
            claim = claimed(list(missing), groups, is_whole)
            paths = run_on_first_rank(lambda: stack.enter_context(claim))
            if not paths:  # other jobs make what is left
                time.sleep(POLL)
                return 0
            # With sharded networks all processes call them equally often: who has no file makes the last one, too.
            path = paths[min(group, len(paths) - 1)]
            tensors = self._states(phase, bucket, missing[path])
            writes = group < len(paths) and rank() % ways == 0
            run_on_all_ranks(lambda: save_hashed(path, tensors) if writes else None)
        each = state_calls(self._config, self._system.plan, self._system.model.guidance, phase)
        return each * sum(len(missing[path]) for path in paths)

    @torch.no_grad()
    def _states(self, phase: int, bucket: int, entries: Sequence[int]) -> dict[str, Tensor]:
        """Computes what is kept of entries in a phase."""
        system, first = self._system, self._system.plan.steps(phase).start
        times = teacher_times(self._config, system.plan, phase)
        size = self._file_size(bucket) if world_size() > 1 else len(entries)
        padded = [*entries, *[entries[-1]] * (size - len(entries))]
        most, tensors = self._config.engine.micro_batch or size, {}
        for start in range(0, len(padded), most):
            part = padded[start : start + most]
            condition = system.model.batch(self.rows(bucket, part))
            if phase > 1 and self._config.rollouts.start == "experts":
                noise = partial(self._noise, bucket, part, "renoise")
                x = system.start(self._noise(bucket, part))
                x = system.roll(system.plan.path(phase)[:first], x, condition, noise=noise).x
                tensors |= {f"{i}.begin": state for i, state in zip(part, x.cpu(), strict=True)}
            else:
                x = self.begin(phase, bucket, part)
            end = system.roll_teacher(times, x, condition).cpu()
            tensors |= {f"{i}.end": state for i, state in zip(part, end, strict=True)}
        return tensors

    def _file_size(self, bucket: int) -> int:
        """Returns the entries of a file: as many as go through a network at once."""
        return max(1, min(batch_size(self._system.model.sample_shapes[bucket]), self._counts[bucket]))

    def _path(self, phase: int, bucket: int, number: int) -> Path:
        return self._folder / f"phase-{phase}" / f"{bucket}-{number:05d}.safetensors"


def missing_of(files: Mapping[Path, range]) -> dict[Path, range]:
    """Returns the files that are not whole, as the first process sees them."""
    return {path: files[path] for path in run_on_first_rank(lambda: [path for path in files if not is_whole(path)])}


def begins_with_teacher(config: Config, phase: int) -> bool:
    """Says whether a phase begins with states of the teacher's, and not with noise or what experts make of it."""
    return phase > 1 and config.rollouts.start == "teacher"


def kept_ends(config: Config, phase: int) -> list[int]:
    """Returns the phases at whose ends states of the teacher's must be on disk before a phase can be trained."""
    before = range(1, phase if begins_with_teacher(config, phase) else 1)
    ends = [] if isinstance(config.teacher, AnalyticTeacher) else list(before)
    return [*ends, phase] if config.anchored(phase) else ends


def teacher_times(config: Config, plan: PhasePlan, phase: int) -> tuple[float, ...]:
    """Returns the times that the teacher's own sampler goes through in a phase."""
    return plan.within(phase, step_times(config.teacher.base_steps, config.plan.shift, config.plan.start))


def state_calls(config: Config, plan: PhasePlan, guidance: Sequence[float], phase: int) -> int:
    """Returns the network calls, the guidance's own among them, that take an entry of the pool to a phase's end from
    its begin; or from noise, through the experts, where these are what the phase begins with.
    """
    before = plan.steps(phase).start if config.rollouts.start == "experts" else 0
    return before + sum(2 if guidance[plan.network(t)] > 1 else 1 for t in teacher_times(config, plan, phase)[:-1])


def pool_calls(config: Config, plan: PhasePlan, guidance: Sequence[float]) -> int:
    """Returns the network calls that all of a run's pool takes, for single samples."""
    ends = {end for phase in range(1, plan.num_phases + 1) for end in kept_ends(config, phase)}
    return config.rollouts.pool * sum(state_calls(config, plan, guidance, end) for end in ends)


def needs_pool(config: Config) -> bool:
    """Says whether a run takes anything from a pool."""
    phases = range(1, config.plan.phases + 1)
    return any(config.anchored(phase) or begins_with_teacher(config, phase) for phase in phases)
