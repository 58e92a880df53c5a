"""`distill`: the training loop of Phased DMD, its baselines and ablations, top to bottom in one function."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors
from phased_dmd.config import Config
from phased_dmd.diffusion import renoise_times, times_like
from phased_dmd.engine import choice, device, normal, seed_of, uniform
from phased_dmd.experts import FAKE, expert_role
from phased_dmd.media import save_preview
from phased_dmd.models.protocol import Codec, Condition, rows
from phased_dmd.objectives import (
    biased_target,
    distribution_matching_loss,
    printed_target,
    score_matching_loss,
    subinterval_target,
)
from phased_dmd.optim import Learner
from phased_dmd.prompts import read_prompts
from phased_dmd.sample import Sampler, System, add_expert, build_system
from phased_dmd.trackers import check_trackers, open_tracker

TARGETS = {"unbiased": subinterval_target, "biased": biased_target, "printed": printed_target}


@dataclass(frozen=True)
class Draws:
    """Every random number of one update, each a function of its key and the sample's index alone."""

    system: System
    key: tuple[int, ...]  # run seed, phase, iteration, sub-update
    samples: range

    def noise(self, role: str, *more: int) -> Tensor:
        """Standard normal [b, ...]."""
        return normal(self.system.model.sample_shape, self.samples, *self.key, role, *more).to(device())

    def exit_step(self, full: bool) -> int | None:
        """SGTS: one exit step for the whole batch, uniform over the phase; None runs the phase's steps to their end."""
        steps = self.system.plan.steps(self.key[1])
        if full or self.system.config.plan.gradient == "all":
            return None
        return steps[choice(len(steps), *self.key, "exit")]

    def times(self) -> tuple[Tensor, Tensor]:
        """(s, t): the phase's end and the re-noise times, float64 [b]."""
        config, phase = self.system.config, self.key[1]
        s = times_like(self.system.plan.end(phase), torch.empty(len(self.samples), device=device()))
        if config.renoise.fixed is not None:
            return s, torch.full_like(s, config.renoise.fixed)
        low, high = config.interval(self.system.plan, phase)
        r = uniform(self.samples, *self.key, "t").to(device())
        return s, renoise_times(r, low, high, config.plan.shift, config.renoise.t_range, config.renoise.clamp)

    def condition(self, conditions: Condition, count: int) -> Condition:
        """The conditions of prompts drawn uniformly from the `count` there are."""
        return rows(conditions, (uniform(self.samples, *self.key, "prompt") * count).long()) if conditions else {}


def prepare(config: Config) -> tuple[System, Codec, list[str], Condition]:
    """All that a run needs before it writes anything: networks, codec, prompts and their conditions."""
    check_trackers(config.trackers)
    prompts = read_prompts(config.prompts) if config.prompts is not None else [""]
    system, codec = build_system(config)
    return system, codec, prompts, codec.encode(prompts)


def distill(config: Config, output: Path | str | None = None, quiet: bool = False) -> Path:
    """Distils the config's teacher, phase by phase, into the run folder `output` (runs/<recipe>); returns the folder.

    An unfinished run of the same config goes on from its last checkpoint; a finished one is left as it is. Raises
    UserError for what the user can mend, NonFiniteError before a step that would spoil the weights.
    """
    run = RunFolder(output or Path("runs") / config.recipe)
    run.check(config)
    if run.finished(config):
        return run.path
    system, codec, prompts, conditions = prepare(config)
    plan, roles, model = system.plan, system.roles, system.model
    target = TARGETS[config.objective.target]
    schedule, prediction = model.schedule, model.prediction
    run.open(config, prompts)
    trackers = [open_tracker(name, run.path, config) for name in config.trackers]

    for phase in range(1, plan.num_phases + 1):
        # Phase onset: a new expert and new fakes, both from the teacher, with new optimisers; earlier experts frozen.
        role = expert_role(phase)
        add_expert(system, phase, trainable=True)
        if run.expert_path(phase).exists():
            roles.load(role, load_tensors(run.expert_path(phase))[0])
            roles.freeze(role)
            continue
        fake_lora = config.fake.lora if config.fake.weights == "lora" else None
        roles.add(FAKE, plan.fakes(phase), fake_lora, seed=seed_of(config.seed, phase))
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
                    draws = Draws(system, (config.seed, phase, iteration, update), range(config.batch_size))
                    condition = draws.condition(conditions, len(prompts))
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
                draws = Draws(system, (config.seed, phase, iteration, 0), range(config.batch_size))
                condition = draws.condition(conditions, len(prompts))
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
                        preview = Sampler(system, codec).preview(phase, prompts)
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
