"""Sampling: the roles bound to a model and a plan, the teacher's own sampler, and a finished run's generator."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.checkpoint import RunFolder, load_tensors, save_tensors
from phased_dmd.config import Config, UserError
from phased_dmd.diffusion import check_start
from phased_dmd.engine import device, normal
from phased_dmd.experts import FAKE, TEACHER, Roles, expert_role, route
from phased_dmd.media import grid, save_clip, save_image, save_preview
from phased_dmd.models.loader import load_model
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.phases import Hop, PhasePlan, step_times
from phased_dmd.rollouts import Rollout, rollout

BATCH = 64  # samples a network call, when sampling


@dataclass(frozen=True)
class System:
    """A model, its roles and the phase plan: every network call of training and sampling goes through here."""

    config: Config
    model: VelocityModel
    roles: Roles
    plan: PhasePlan
    negative: Condition  # one row: what the teacher's guidance leads away from

    def start(self, noise: Tensor) -> Tensor:
        """x at t_0: sigma(t_0) eps [b, ...]."""
        return noise * self.model.schedule.sigma(torch.tensor(self.plan.times[:1], dtype=torch.float64)).item()

    def roll(
        self, path: Sequence[Hop], noise: Tensor, condition: Condition, gradient_steps: Collection[int] = (),
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Rollout:  # fmt: skip
        """The experts along a path of the plan, from noise [b, ...]."""

        def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
            expert = self.plan.expert(step)
            return self.roles.predict(expert_role(expert.phase), expert.network, x, t, condition)

        model, solver = self.model, self.config.plan.solver
        return rollout(
            predict, self.start(noise), path, model.schedule, model.prediction, gradient_steps, solver, renoise
        )

    def teacher(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The guided teacher, each sample on the network whose range holds its t."""

        def call(network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            conditional = self.roles.predict(TEACHER, network, x, t, condition)
            if self.model.guidance == 1:
                return conditional
            negative = {name: row.expand(len(x), *row.shape[1:]) for name, row in self.negative.items()}
            return self.model.guide(conditional, self.roles.predict(TEACHER, network, x, t, negative))

        return route([self.plan.network(time) for time in t.tolist()], call, x, t, condition)

    def fake(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The fake score network, without guidance."""

        def call(network: int, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            return self.roles.predict(FAKE, network, x, t, condition)

        return route([self.plan.network(time) for time in t.tolist()], call, x, t, condition)

    def sample_teacher(self, noise: Tensor, condition: Condition, steps: int) -> Tensor:
        """The teacher's own deterministic sampler on `steps` steps of the plan's shifted grid: x_0 [b, ...]."""
        times = step_times(steps, self.config.plan.shift, self.config.plan.start)
        path = [Hop(i, times[i], times[i + 1]) for i in range(steps)]
        model = self.model
        with torch.no_grad():
            return rollout(
                lambda _step, x, t: self.teacher(x, t, condition),
                self.start(noise),
                path,
                model.schedule,
                model.prediction,
            ).x


def build_system(config: Config) -> tuple[System, Codec]:
    """The teacher of a config with no experts yet, and its codec."""
    model, codec = load_model(config.teacher, config.seed)
    negative = codec.encode([config.teacher.negative_prompt if config.teacher.kind == "wan" else ""])
    plan = config.phase_plan(model.switches)
    try:
        check_start(model.prediction, model.schedule, plan.times[0])
    except ValueError as error:
        raise UserError(str(error)) from None
    return System(config, model, Roles(model), plan, negative), codec


def add_expert(system: System, phase: int, trainable: bool) -> None:
    """The phase's expert, computing what the teacher (or an analytic teacher's student) does."""
    config = system.config.generator
    lora = config.lora if config.weights == "lora" else None
    networks = [expert.network for expert in system.plan.experts(phase)]
    system.roles.add(expert_role(phase), networks, lora, seed=system.config.seed, trainable=trainable)


class Sampler:
    """The few-step generator of a run, and its teacher on the same grid."""

    def __init__(self, system: System, codec: Codec) -> None:
        self.system, self.codec = system, codec

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], teacher_steps: int | None = None) -> Tensor:
        """Latents [n, ...] for n prompts with n seeds, on the CPU; teacher_steps: from the guided teacher instead."""
        parts = [
            self._batch(prompts[i : i + BATCH], seeds[i : i + BATCH], teacher_steps)
            for i in range(0, len(seeds), BATCH)
        ]
        return torch.cat(parts)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [n, frames, height, width, 3] in [0, 1], or an analytic model's samples as they are."""
        return torch.cat([self.codec.decode(part).cpu() for part in latents.split(BATCH)])

    @torch.no_grad()
    def preview(self, phase: int, prompts: Sequence[str]) -> Tensor:
        """What the generator predicts of x_0 at the end of a phase, decoded: 16 prompts, or 512 points."""
        system, shape = self.system, self.system.model.sample_shape
        seeds = range(16 if len(shape) > 1 else 512)
        condition = self.codec.encode([prompts[seed * len(prompts) // len(seeds)] for seed in seeds])
        end = system.roll(
            system.plan.path(phase), normal(shape, seeds, "sample").to(device()), condition,
            renoise=lambda step: normal(shape, seeds, "sample renoise", step).to(device()),
        )  # fmt: skip
        return self.codec.decode(end.x0).cpu()

    @torch.no_grad()
    def _batch(self, prompts: Sequence[str], seeds: Sequence[int], teacher_steps: int | None) -> Tensor:
        system, shape = self.system, self.system.model.sample_shape
        noise = normal(shape, seeds, "sample").to(device())
        condition = self.codec.encode(prompts)
        if teacher_steps is not None:
            return system.sample_teacher(noise, condition, teacher_steps).cpu()
        path = system.plan.path(system.plan.num_phases)
        return system.roll(
            path, noise, condition, renoise=lambda step: normal(shape, seeds, "sample renoise", step).to(device())
        ).x.cpu()


def load(run: Path | str) -> Sampler:
    """The sampler of a finished run folder."""
    folder = RunFolder(run)
    config = folder.config()
    if not folder.finished(config):
        raise UserError(f"{run}: the run is not finished; `phased-dmd distill` with the same arguments goes on with it")
    system, codec = build_system(config)
    for phase in range(1, system.plan.num_phases + 1):
        add_expert(system, phase, trainable=False)
        system.roles.load(expert_role(phase), load_tensors(folder.expert_path(phase))[0])
    return Sampler(system, codec)


def write_samples(
    sampler: Sampler, prompts: Sequence[str], seeds: int, output: Path, teacher_steps: int | None = None
) -> list[Path]:
    """Every prompt with seeds 0, 1, ...: a PNG, or a WebP clip, each, and a contact sheet; returns the paths."""
    pairs = [(prompt, seed) for prompt in prompts for seed in range(seeds)]
    samples = sampler.decode(sampler([p for p, _ in pairs], [s for _, s in pairs], teacher_steps))
    if samples.ndim != 5:
        save_preview(output / "samples.png", samples)
        save_tensors(output / "samples.safetensors", {"samples": samples}, {"seeds": seeds})
        return [output / "samples.png", output / "samples.safetensors"]
    paths = []
    for i, (prompt, seed) in enumerate(pairs):
        stem = "".join(c if c.isalnum() else "-" for c in prompt.lower())[:60]
        clip = samples.shape[1] > 1
        paths.append(output / f"{i:04d}-{stem}-seed{seed}.{'webp' if clip else 'png'}")
        if clip:
            save_clip(samples[i], paths[-1])
        else:
            save_image(grid(samples[i : i + 1]), paths[-1])
    save_preview(output / "contact-sheet.png", samples)
    return [*paths, output / "contact-sheet.png"]
