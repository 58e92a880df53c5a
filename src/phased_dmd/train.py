"""`distill`: the training of Phased DMD, its baselines and ablations, top to bottom: run, phase, iteration."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd import health
from phased_dmd.checkpoint import RunFolder
from phased_dmd.conditions import Conditions, picture_hashes
from phased_dmd.config import Config
from phased_dmd.engine.collectives import all_reduce_means, run_on_first_rank, run_with_heartbeat
from phased_dmd.engine.signals import Signals
from phased_dmd.engine.timer import SaveTimer
from phased_dmd.engine.world import check_groups, out_of_memory, processes, rank, split_batch, warn
from phased_dmd.errors import Stopped, UserError
from phased_dmd.inputs import compare_finished, contents, prepare
from phased_dmd.models.protocol import Codec
from phased_dmd.networks.build import (
    Own,
    System,
    add_adapters,
    add_expert,
    add_fake,
    build_system,
    describe_expert,
    load_expert,
    remove_fake,
)
from phased_dmd.networks.optim import Learner, NonFiniteError
from phased_dmd.networks.roles import FAKE, expert_role
from phased_dmd.pool import Pool, needs_pool
from phased_dmd.progress import progress_bar
from phased_dmd.sampling.initial import initial_expert
from phased_dmd.sampling.loading import read_expert
from phased_dmd.sampling.previews import make_preview
from phased_dmd.step import (
    EXPERT_UPDATE,
    Batch,
    Loss,
    States,
    bucket_odds,
    draw,
    expert_loss,
    fake_loss,
    regression_loss,
)
from phased_dmd.trackers import Trackers


@dataclass
class Position:
    """Progress inside a phase, between two updates, with what the next line of metrics has gathered by then; saved in
    checkpoints.
    """

    phase: int
    iteration: int = 0  # iterations done
    update: int = 0  # updates of the fake done in the next one
    fake_losses: list[float] = field(default_factory=list)
    fake_norm: float | None = None
    fake_step: float | Tensor | None = None  # still on the device, until a line or a checkpoint needs it
    clipped: int = 0
    counted: int = 0  # iterations since the last line, of which `clipped` were
    skipped: int = 0
    figures: dict[str, float] = field(default_factory=dict)  # sums since the last line, see `health.add`

    def plain(self) -> dict[str, Any]:
        """Returns it as JSON holds it; waits for the device."""
        return asdict(replace(self, fake_step=None if self.fake_step is None else float(self.fake_step)))


@dataclass(frozen=True)
class Job:
    """What the phases of a run share.

    odds: of the resolution buckets. pool: the teacher's states, if the run needs any. micro_batches: the samples of
    every process in each, see `split_batch`.
    fresh_fakes: what adapters that are fakes start from, by phase, see `add_adapters`.
    """

    run: RunFolder
    system: System
    codec: Codec
    conditions: Conditions | None
    odds: Sequence[float]
    pool: Pool | None
    micro_batches: Sequence[Sequence[range]]
    rank: int
    fresh_fakes: Mapping[int, dict[str, Tensor]]
    signals: Signals
    timer: SaveTimer
    trackers: Trackers
    quiet: bool


def distill(
    config: Config, output: Path | str | None = None, quiet: bool = False, *,
    own: Own | None = None, cache: Path | None = None, strict: bool = False, only_phase: int | None = None,
) -> Path:  # fmt: skip
    """Distils the config's teacher, phase by phase, into the run folder `output` (`runs/RECIPE`); returns the folder.

    An unfinished run of the same config goes on from its last checkpoint; a finished one is left as it is. Where its
    prompts, base and initial experts lie is no part of a config: they are compared by what they hold. In the processes
    that torchrun starts, all call this, and share the work.
    own: the model and codec of a teacher of the user's own. cache: a folder of encoded prompts that runs share
    (RUN/conditions). strict: refuse prompts that would be cut off. only_phase: the one phase to train, while other
    processes train the others into the same folder; the last one makes a run of them. Raises UserError for what the
    user can mend, NonFiniteError before a step that would spoil the weights, Stopped after a signal, OutOfMemory.
    """
    if not isinstance(config, Config):
        raise UserError(f"config: a {type(config).__name__}, where a Config is needed; recipes.resolve makes one")
    run = RunFolder(output or Path("runs") / config.recipe, only_phase)
    with processes(alone=config.engine.offload):
        run.check(config)
        if run_on_first_rank(lambda: nothing_left(run, config)):
            return run.path
        check_groups(config.engine)
        micro_batches = split_batch(config.batch_size, config.engine, pairs=config.rollouts.antithetic is not None)
        with out_of_memory(lambda: "the VAE"):
            model, codec, prompts = run_with_heartbeat(lambda _: prepare(config, own, strict))
        shown = config.trackers if rank() == 0 else ()
        with Signals() as signals, run.locked(), Trackers(shown, run.own, config) as trackers:
            kept = cache or run.path / "conditions"
            between = partial(leave_encoding, signals, kept)
            pictures = picture_hashes(prompts, between) if codec.takes_images else None
            lines = [prompt.line() for prompt in prompts]
            run_on_first_rank(lambda: run.open(config, lines, contents(config, prompts, pictures)))
            negative = config.teacher.negative_prompt
            with out_of_memory(lambda: "the encoding of the prompts"):
                conditions = Conditions(codec, prompts, negative, kept, between, pictures, quiet) if prompts else None
            with out_of_memory(lambda: "the teacher's networks"):  # loaded here: the encoders are gone by now
                guide = conditions.negative if conditions else {}
                system = run_with_heartbeat(lambda _: build_system(config, model, guide))
            fresh_fakes = add_adapters(system, only_phase)
            system.roles.shard(config.engine)
            odds = bucket_odds(config, conditions)
            pool = Pool(system, conditions, odds, run.path / "pool") if needs_pool(config) else None
            job = Job(
                run, system, codec, conditions, odds, pool, micro_batches, rank(), fresh_fakes, signals,
                SaveTimer(config.checkpoint_minutes), trackers, quiet or rank() > 0,
            )  # fmt: skip
            for phase in range(1, system.plan.num_phases + 1) if only_phase is None else [only_phase]:
                job = replace(job, run=run.of_phase(phase))
                if learners := begin(job, phase):
                    train_phase(job, phase, *learners)
                    end(job, phase, learners[0])
        run_on_first_rank(lambda: finish(run, config))
    return run.path


def nothing_left(run: RunFolder, config: Config) -> bool:
    """Says whether the run, or the one phase of it that is asked for, is done; for the first rank."""
    run.close(config)  # a kill may have come before
    if run.finished(config):
        compare_finished(run, config)
        return True
    return run.only is not None and run.expert_path(run.only).exists()


def finish(run: RunFolder, config: Config) -> None:
    """Tidies a run whose phases are all done; for the first rank."""
    run.close(config)
    run.retire(config)


def begin(job: Job, phase: int) -> tuple[Learner, Learner | None] | None:
    """Begins a phase: a new expert and new fakes, which compute what the teacher does, are given new optimisers.

    With `init_experts` the expert computes what is there. Where all updates are anchored there are no fakes. Returns
    None if the phase is done: its expert is then frozen.
    """
    run, roles, config, role = job.run, job.system.roles, job.system.config, expert_role(phase)
    add_expert(job.system, phase, trainable=True)
    if run_on_first_rank(run.expert_path(phase).exists):
        load_expert(job.system, phase, read_expert(run, phase)[0], str(run.expert_path(phase)))
        roles.freeze(role)
        return None
    make_pool(job, phase)
    if config.init_experts:
        start = initial_expert(config, job.system.model, phase, roles.state(role))
        load_expert(job.system, phase, start, "init_experts")
    iterations = config.phase_iterations(phase)
    same = {"iterations": iterations, "seed": config.seed}
    expert = Learner(role, roles.parameters(role), config.optimiser, config.generator.lr, config.generator.ema, **same)
    if not config.matches(phase):
        return expert, None
    add_fake(job.system, phase, job.fresh_fakes.get(phase))
    return expert, Learner(FAKE, roles.parameters(FAKE), config.optimiser, config.fake.lr, **same)


def make_pool(job: Job, phase: int) -> None:
    """Makes the states of the teacher that a phase needs, if any, and writes what they took to timing.jsonl.

    Of processes that each train a phase, every one helps with what any of them needs.
    """
    if job.pool is None:
        return
    shared = job.run.only is not None and job.system.config.rollouts.start == "teacher"
    phases = range(1, job.system.plan.num_phases + 1) if shared else [phase]

    def leave() -> None:
        if number := job.signals.asked():
            where = f"phase {phase}, the pool"
            raise Stopped(number, f"{job.run.path}: stopped and saved at {where}; the same command goes on from there")

    started, cpu_started = time.perf_counter(), time.process_time()
    if calls := job.pool.make(phases, leave, job.quiet):
        row = {
            "phase": phase, "iteration": 0, "pool_calls": calls,
            "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started,
        }  # fmt: skip
        run_on_first_rank(lambda: job.run.log("timing.jsonl", row))


def train_phase(job: Job, phase: int, expert: Learner, fake: Learner | None) -> None:
    """Runs the phase's iterations from its last checkpoint on: some updates of the fake, then one of the expert.

    In the first ones, if the phase is anchored, the expert regresses the teacher, and the fake waits.
    """
    run, config = job.run, job.system.config
    state, iterations = expert.state() | (fake.state() if fake else {}), config.phase_iterations(phase)
    at = Position(**(run.load_checkpoint(phase, state) or {"phase": phase}))
    run_on_first_rank(lambda: run.rewind_metrics(phase, at.iteration))
    done = sum(map(config.phase_iterations, range(1, phase)))
    job.trackers.begin(done + at.iteration)
    told: set[str] = set()

    def fake_updates() -> int:
        return 0 if at.iteration < config.anchored(phase) else config.fake.updates

    def part() -> str:
        return f"phase {phase}, iteration {at.iteration}, {FAKE if at.update < fake_updates() else expert.role}"

    with progress_bar(config, phase, at.iteration, job.quiet, only=run.only is not None) as show, out_of_memory(part):
        cpu_seconds = 0.0  # since the last line
        while at.iteration < iterations:
            started, cpu_started = time.perf_counter(), time.process_time()
            rollouts: States = {}  # what the updates of this iteration share of them
            logs = (at.iteration + 1) % config.log_every == 0 or at.iteration + 1 == iterations

            # The fake follows the generator, then the expert is updated against it.
            for update in range(at.update + 1, fake_updates() + 1):
                assert fake is not None
                loss, norm, _, step = train_step(job, at, update, fake, fake_loss, rollouts, state, logs)
                if norm is not None:
                    at.fake_norm, at.fake_step = norm, at.fake_step if step is None else step
                    at.fake_losses.append(loss)
                at.update = update
                save_if_due(job, at, state)
                leave_if_asked(job, at, state)
            with job.system.roles.following(expert.role, config.fake.pull):
                loss_of = expert_loss if fake_updates() else regression_loss
                loss, norm, figures, generator_step = train_step(
                    job, at, EXPERT_UPDATE, expert, loss_of, rollouts, state, logs
                )
            at.clipped += norm is not None and norm > config.optimiser.clip
            health.add(at.figures, figures)
            fake_losses = sum(at.fake_losses) / len(at.fake_losses) if at.fake_losses else None
            at.iteration, at.update, at.fake_losses, at.counted = at.iteration + 1, 0, [], at.counted + 1
            cpu_seconds += time.process_time() - cpu_started

            # What is seen of it: the bar, a line of metrics, a checkpoint, then a preview, which may need more memory.
            last = at.iteration == iterations
            show(at.iteration, f"fake {fake_losses or 0:.3g} generator {loss:.3g}")
            if logs:
                row = {
                    "phase": phase, "iteration": at.iteration, "fake_loss": fake_losses,
                    "generator_loss": None if norm is None else loss, "fake_gradient_norm": at.fake_norm,
                    "generator_gradient_norm": norm, "fake_step": at.plain()["fake_step"],
                    "generator_step": None if generator_step is None else generator_step.item(),
                    "clipped": at.clipped / at.counted, **health.line(at.figures),
                }  # fmt: skip
                row |= {"skipped": at.skipped} if config.skips else {}
                run_on_first_rank(partial(log, run, row, time.perf_counter() - started, cpu_seconds))
                run_on_first_rank(partial(tell_health, job, phase, told))
                cpu_seconds = 0.0
                if at.iteration % config.log_every == 0:  # a run that is made longer knows nothing of its former end
                    at.clipped, at.counted, at.figures = 0, 0, {}
                job.trackers.track(done + at.iteration, row)
            save_if_due(job, at, state, always=at.iteration % config.checkpoint_every == 0)
            if config.sample_every is not None and (at.iteration % config.sample_every == 0 or last):
                save_samples(job, at, expert)
            leave_if_asked(job, at, state)


def train_step(
    job: Job, at: Position, update: int, learner: Learner, loss_of: Callable[[Batch, States], Loss], rollouts: States,
    state: Mapping[str, Tensor], measured: bool = False,
) -> tuple[float, float | None, Mapping[str, float | None], Tensor | None]:  # fmt: skip
    """Makes one update of a network: forward and backward of every micro-batch, then clip and optimiser step.

    Returns the loss over all processes, the gradient's norm before it was clipped, or None for an update that was left
    out, see `on_non_finite`, the loss's figures over all processes, and if measured the size of the step.
    """
    system, config, seen, figures = job.system, job.system.config, [], {}
    with system.roles.active(learner.role):  # which adapter is on is a state of the network: backward needs it, too
        for samples in job.micro_batches:
            if seen:  # what was gathered of the update is given up: it is made again
                leave_if_asked(job, at, state)
            batch = draw(
                system, at.phase, at.iteration, update, samples[job.rank], job.odds, job.conditions,
                everywhere=samples, pool=job.pool,
            )  # fmt: skip
            loss, figures = loss_of(batch, rollouts if config.rollouts.reuse else {})
            # Of the processes that share a sample each has a part of its gradient, which `Batch.share` has divided.
            (loss * config.engine.sequence_parallel).backward()
            seen.append(torch.stack([loss.detach(), *figures.values()]))
    mean_loss, *means = all_reduce_means(torch.stack(seen, 1).sum(1))
    try:
        norm = learner.checked_norm(mean_loss, f"phase {at.phase}, iteration {at.iteration}")
        learner.clip(norm)
        step = learner.step(at.iteration, measured)
        return mean_loss, norm.item(), dict(zip(figures, means, strict=True)), step
    except NonFiniteError as error:
        on_non_finite(job, error, at, state)
        return mean_loss, None, dict.fromkeys(figures), None
    finally:
        learner.optimiser.zero_grad()


def tell_health(job: Job, phase: int, told: set[str]) -> None:
    """Warns of what the phase's lines of metrics show to be wrong, of each cause once."""
    for finding in health.current(job.run.metrics(), job.system.config, phase):
        if finding.cause not in told:
            told.add(finding.cause)
            warn(f"health: {finding}")


def end(job: Job, phase: int, expert: Learner) -> None:
    """Writes the expert, averaged if it is; from now on it is frozen, and its fakes are gone."""
    if expert.ema is not None:
        expert.put(expert.ema)
    tensors, header = job.system.roles.state(expert_role(phase)), expert_header(job.system.config, job.system, phase)
    run_on_first_rank(lambda: job.run.save_expert(phase, tensors, header))
    job.system.roles.freeze(expert_role(phase))
    remove_fake(job.system)


def on_non_finite(job: Job, error: NonFiniteError, at: Position, state: Mapping[str, Tensor]) -> None:
    """Counts an update that is left out, as `skips` allows; else saves networks and optimisers as they were before it,
    and raises the error with the place.
    """
    if at.skipped < (most := job.system.config.skips):
        at.skipped += 1
        warn(f"{error}; left out, {at.skipped} of at most {most} in this phase")
        return
    try:
        kept = f"the state before it is in {job.run.save_failure(at.plain(), state)}"
    except UserError as problem:
        kept = str(problem)
    config = job.system.config
    rates = f"generator.lr is {config.generator.lr:g} and fake.lr {config.fake.lr:g}, of which one may be too high"
    raise NonFiniteError(f"{error}; {rates}; {kept}") from None


def save_if_due(job: Job, at: Position, state: Mapping[str, Tensor], always: bool = False) -> None:
    """Saves where `always`, or where `checkpoint_minutes` ask for it."""
    if job.timer.due() or always:
        save(job, at, state)
        job.timer.saved()


def save(job: Job, at: Position, state: Mapping[str, Tensor]) -> None:
    """Makes a checkpoint, and removes those that need not be kept any more."""
    job.run.save_checkpoint(at.plain(), state, *job.system.config.kept)


def leave_if_asked(job: Job, at: Position, state: Mapping[str, Tensor]) -> None:
    """Saves and raises Stopped after a signal."""
    if number := job.signals.asked():
        save(job, at, state)
        where = f"phase {at.phase}, iteration {at.iteration}" + (f", update {at.update}" if at.update else "")
        raise Stopped(number, f"{job.run.path}: stopped and saved at {where}; the same command goes on from there")


def log(run: RunFolder, row: Mapping[str, Any], seconds: float, cpu_seconds: float) -> None:
    """Writes a line of metrics.jsonl and one of timing.jsonl.

    seconds: of the iteration just done. cpu_seconds: of the first process, in all iterations since the last line.
    """
    run.log("metrics.jsonl", row)
    where = {"phase": row["phase"], "iteration": row["iteration"]}
    run.log("timing.jsonl", {**where, "seconds": seconds, "cpu_seconds": cpu_seconds})


def save_samples(job: Job, at: Position, expert: Learner) -> None:
    """Writes a preview of what the generator predicts at the phase's end, by the averaged expert if it has one, below
    what the base makes of the same noise.
    """
    run, steps = job.run, job.system.config.teacher.base_steps
    with expert.averaged(), out_of_memory(lambda: f"phase {at.phase}, iteration {at.iteration}, the preview"):
        preview = make_preview(
            job.system, job.codec, at.phase, job.conditions, job.odds, run.path / "samples", job.pool
        )
    name, made = f"phase-{at.phase}-iteration-{at.iteration:06d}.png", f"iteration {at.iteration}"
    run_on_first_rank(
        lambda: run.save_samples(name, lambda path: preview.save(path, made, f"base, {steps} steps", run.prompts()))
    )
    if looks := health.looks(preview.pixels, preview.base):
        row = {"phase": at.phase, "iteration": at.iteration, **looks}
        run_on_first_rank(lambda: run.log("previews.jsonl", row))
        done = sum(map(job.system.config.phase_iterations, range(1, at.phase)))
        job.trackers.track(done + at.iteration, row)


def leave_encoding(signals: Signals, folder: Path) -> None:
    """Raises Stopped after a signal that this process got."""
    if signals.noted:
        message = f"{folder}: stopped while prompts were encoded; the same command goes on from there"
        raise Stopped(signals.noted, message)


def expert_header(config: Config, system: System, phase: int) -> dict[str, object]:
    """Returns what a reader needs to run the expert that a phase ends with."""
    return describe_expert(config, system.plan, phase, config.phase_iterations(phase))
