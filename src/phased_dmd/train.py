"""`distill`: the training loop of Phased DMD, its baselines and ablations, top to bottom in one function."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors
from phased_dmd.conditions import Conditions, fitting
from phased_dmd.config import Config, UserError
from phased_dmd.draws import Draws, bucket_weights
from phased_dmd.engine import seed_of
from phased_dmd.experts import FAKE, expert_role
from phased_dmd.media import save_preview
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.objectives import (
    biased_target,
    distribution_matching_loss,
    printed_target,
    score_matching_loss,
    subinterval_target,
)
from phased_dmd.optim import Learner
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.sample import Sampler
from phased_dmd.system import Own, System, add_expert, build_system, load_teacher
from phased_dmd.trackers import check_trackers, open_tracker

TARGETS = {"unbiased": subinterval_target, "biased": biased_target, "printed": printed_target}


def prepare(config: Config, own: Own | None = None, strict: bool = False) -> tuple[VelocityModel, Codec, list[Prompt]]:
    """All that can be checked before a run writes anything: networks, codec, prompts and their first frames.

    Prompts that the encoder must cut off are counted in a warning, or, if strict, refused.
    """
    check_trackers(config.trackers)
    prompts = read_prompts(config.prompts) if config.prompts is not None else []
    model, codec = load_teacher(config, own)
    fitting(codec, prompts)
    if cut := codec.too_long([prompt.text for prompt in prompts]):
        message = f"prompts: {cut} of {len(prompts)} are longer than the text encoder takes, and are cut off"
        if strict:
            raise UserError(message)
        warnings.warn(message, stacklevel=2)
    for phase in range(1, config.plan.phases + 1) if config.init_experts else ():
        initial_expert(config, model, phase)
    return model, codec, prompts


def initial_expert(config: Config, model: VelocityModel, phase: int) -> dict[str, Tensor]:
    """What the run `init_experts` holds for the time a phase begins at: its expert that serves the nearest step."""
    other = RunFolder(config.init_experts or "")
    plan, t = other.config().phase_plan(model.switches), config.phase_plan(model.switches).begin(phase)
    step = min(range(plan.num_steps), key=lambda step: abs(plan.times[step] - t))
    path = other.expert_path(plan.expert(step).phase)
    if not path.exists():
        raise UserError(f"init_experts: {path} is not there yet")
    return load_tensors(path)[0]


def distill(
    config: Config, output: Path | str | None = None, quiet: bool = False, *,
    own: Own | None = None, cache: Path | None = None, strict: bool = False,
) -> Path:  # fmt: skip
    """Distils the config's teacher, phase by phase, into the run folder `output` (runs/<recipe>); returns the folder.

    An unfinished run of the same config goes on from its last checkpoint; a finished one is left as it is.
    own: the model and codec of a teacher of the user's own. cache: a folder of encoded prompts that runs share
    (RUN/conditions). strict: refuse prompts that would be cut off. Raises UserError for what the user can mend,
    NonFiniteError before a step that would spoil the weights.
    """
    run = RunFolder(output or Path("runs") / config.recipe)
    run.check(config)
    if run.finished(config):
        return run.path
    model, codec, prompts = prepare(config, own, strict)
    run.open(config, [prompt.line() for prompt in prompts])
    conditions = encode_prompts(config, codec, prompts, cache or run.path / "conditions")
    system = build_system(config, model, conditions.negative if conditions else {})
    plan, roles, weights = system.plan, system.roles, bucket_weights(config, conditions)
    target = TARGETS[config.objective.target]
    schedule, prediction = model.schedule, model.prediction
    trackers = [open_tracker(name, run.path, config) for name in config.trackers]

    for phase in range(1, plan.num_phases + 1):
        # Phase onset: a new expert and new fakes, both from the teacher, with new optimisers; earlier experts frozen.
        role = expert_role(phase)
        add_expert(system, phase, trainable=True)
        if run.expert_path(phase).exists():
            roles.load(role, load_tensors(run.expert_path(phase))[0])
            roles.freeze(role)
            continue
        if config.init_experts:
            roles.load(role, initial_expert(config, model, phase))
        fake_lora = config.fake.lora if config.fake.weights == "lora" else None
        roles.add(FAKE, plan.fakes(phase, config.support(plan, phase)), fake_lora, seed=seed_of(config.seed, phase))
        expert = Learner(role, roles.parameters(role), config.generator.optimiser, config.generator.ema)
        fake = Learner(FAKE, roles.parameters(FAKE), config.fake.optimiser)
        done, tensors = run.load_checkpoint(phase) or (0, None)
        if tensors is not None:
            expert.load(tensors)
            fake.load(tensors)
        run.rewind_metrics(phase, done)
        gradient_steps = plan.steps(phase)
        fake_norm = 0.0
        clipped = 0 if tensors is None else int(tensors["clipped"])

        with progress_bar(phase, plan.num_phases, done, config.iterations, quiet) as show:
            for iteration in range(done, config.iterations):
                at, started = (iteration, config.iterations), time.perf_counter()
                where = f"phase {phase}, iteration {iteration}"
                fake_losses = []

                # The fake learns the score of what the generator makes (Eq. 13; Eq. 4 where the phase ends at s = 0).
                for update in range(1, config.fake.updates + 1):
                    draws = Draws(system, (config.seed, phase, iteration, update), range(config.batch_size), weights)
                    condition = draws.condition(conditions)
                    path = plan.path(phase, draws.exit_step(full=config.plan.fake_rollout == "full"))
                    with torch.no_grad():
                        x_s = system.roll(
                            path, draws.noise("start"), condition, renoise=lambda i: draws.noise("renoise", i)
                        ).x
                    s, t = draws.times()
                    with roles.active(FAKE):
                        loss = score_matching_loss(
                            lambda x, t: system.fake(x, t, condition),
                            x_s,
                            draws.noise("eps"),
                            s,
                            t,
                            schedule,
                            prediction,
                            target,
                        ).mean()
                        loss.backward()
                    fake_norm = fake.step(loss, where, at)
                    fake_losses.append(loss.item())

                # The generator descends the difference of fake and teacher at the phase's end (Eq. 11; Eq. 9 at s = 0).
                draws = Draws(system, (config.seed, phase, iteration, 0), range(config.batch_size), weights)
                condition = draws.condition(conditions)
                path = plan.path(phase, draws.exit_step(full=False))
                exits = gradient_steps if config.plan.gradient == "all" else (path[-1].step,)
                with roles.active(role):
                    end = system.roll(path, draws.noise("start"), condition, exits, lambda i: draws.noise("renoise", i))
                    s, t = draws.times()
                    loss = distribution_matching_loss(
                        end.x, draws.noise("eps"), s, t, schedule, prediction,
                        teacher=lambda x, t: system.teacher(x, t, condition),
                        fake=lambda x, t: system.fake(x, t, condition),
                        weighting=config.objective.weighting, x0_generator=end.x0.detach(),
                    ).mean()  # fmt: skip
                    loss.backward()
                norm = expert.step(loss, where, at)
                clipped += norm > config.generator.optimiser.clip

                count = iteration + 1
                fake_loss = sum(fake_losses) / len(fake_losses)
                show(count, f"fake {fake_loss:.4f} generator {loss.item():.4f}")
                if count % config.log_every == 0 or count == config.iterations:
                    since = (count - 1) % config.log_every + 1
                    row = {
                        "phase": phase, "iteration": count, "fake_loss": fake_loss, "generator_loss": loss.item(),
                        "fake_gradient_norm": fake_norm, "generator_gradient_norm": norm, "clipped": clipped / since,
                    }  # fmt: skip
                    run.log("metrics.jsonl", row)
                    for track in trackers:
                        track((phase - 1) * config.iterations + count, row)
                    run.log(
                        "timing.jsonl", {"phase": phase, "iteration": count, "seconds": time.perf_counter() - started}
                    )
                    clipped = 0
                if count % config.sample_every == 0 or count == config.iterations:
                    with expert.averaged():
                        preview = preview_samples(system, codec, phase, conditions, weights)
                    save_preview(run.path / "samples" / f"phase-{phase}-iteration-{count:06d}.png", preview)
                if count % config.checkpoint_every == 0:
                    state = {**expert.state(), **fake.state(), "clipped": torch.tensor(clipped)}
                    run.save_checkpoint(phase, count, state)

        if expert.ema is not None:
            roles.load(role, expert.ema)
        save_tensors(run.expert_path(phase), roles.state(role), expert_header(config, system, phase))
        roles.freeze(role)
        roles.remove(FAKE)
    return run.path


def encode_prompts(config: Config, codec: Codec, prompts: Sequence[Prompt], folder: Path) -> Conditions | None:
    """The prompts' conditions; None for a teacher that takes no prompts."""
    if not prompts:
        return None
    return Conditions(codec, prompts, config.teacher.negative_prompt, folder)


def preview_samples(
    system: System, codec: Codec, phase: int, conditions: Conditions | None, weights: Sequence[float]
) -> Tensor:
    """16 prompts spread over all there are, or 512 points, in the first bucket that is drawn."""
    bucket = next(i for i, weight in enumerate(weights) if weight)
    if conditions is None:
        rows: list[Condition] = [{}] * (512 if len(system.model.sample_shapes[bucket]) == 1 else 16)
    else:
        prompts = conditions.eligible(bucket)
        rows = [conditions.row(prompts[i * len(prompts) // 16], bucket) for i in range(16)]
    return Sampler(system, codec, bucket).preview(phase, rows)


def expert_header(config: Config, system: System, phase: int) -> dict[str, object]:
    """What a reader needs to run the expert: its place on the grid and, for LoRA, its scale."""
    lora = config.generator.lora if config.generator.weights == "lora" else None
    return {
        "phase": phase, "steps": list(system.plan.steps(phase)), "grid": list(system.plan.times),
        "shift": config.plan.shift, "boundary": system.plan.end(phase), "solver": config.plan.solver,
        "weights": config.generator.weights,
        "rank": lora and lora.rank, "alpha": lora and lora.alpha, "method": config.method,
        "weighting": config.objective.weighting,
    }  # fmt: skip


@contextmanager
def progress_bar(phase: int, phases: int, done: int, total: int, quiet: bool) -> Iterator:
    """A bar with phase, losses, rate and time left; yields a function of (iterations done, text)."""
    columns = (
        TextColumn(f"phase {phase}/{phases}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"),
    )  # fmt: skip
    with Progress(*columns, disable=quiet) as bar:
        task = bar.add_task("", total=total, completed=done, losses="", rate="")
        started = time.monotonic()

        def show(count: int, losses: str) -> None:
            rate = (count - done) / max(time.monotonic() - started, 1e-9)
            bar.update(task, completed=count, losses=losses, rate=f"{rate:.2f} it/s")

        yield show
