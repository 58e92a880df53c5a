"""NVIDIA's Model Optimizer as the peer: its DMD2 pipeline trained as its own example trains it, on our teachers.

The package has losses and no loop (`modelopt.torch.fastgen`). The one below follows that of its example
(examples/diffusers/fastgen/dmd2 in NVIDIA/Model-Optimizer): one update of the student in every `frequency` steps, of
the fake in the others; a clip, AdamW, then the average. It is data-free: the student's inputs come from backward
simulation. The student is written as a run folder of one phase with full weights, which `evaluate` takes.
"""

import copy
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import modelopt.torch.fastgen as fastgen
import torch
from peak import Peak, Update, largest
from peer import Options
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from phased_dmd.checkpoint import RunFolder
from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.engine.randomness import generator, seed_of
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.networks.build import build_system, load_teacher
from phased_dmd.networks.optim import decayed
from phased_dmd.prompts import read_prompts
from phased_dmd.train import expert_header

TRAIN_TIMESTEPS = 1000  # of Wan: its networks are told 1000 t


class PointPipeline(fastgen.DMDPipeline):
    """The pipeline for networks of points, which take (x, t) and nothing else."""

    def _call_model(
        self, model: nn.Module, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor | None = None,
        **_: Any,
    ) -> Tensor:  # fmt: skip
        return model(hidden_states, timestep)


@dataclass
class Training:
    """The pipeline with its two optimisers and what it is fed."""

    config: Config
    options: Options
    model: VelocityModel
    conditions: Conditions | None
    pipeline: fastgen.DMDPipeline
    optimisers: Mapping[bool, torch.optim.AdamW]  # True: the student's
    prompts: torch.Generator

    def loss(self, student: bool) -> Tensor:
        """Returns the loss of an update on a new batch of noise and prompts."""
        count, shape = self.config.batch_size, tuple(self.model.sample_shapes[0])
        texts: dict[str, Tensor] = {}
        if self.conditions is not None:
            chosen = torch.randint(self.conditions.num_prompts, (count,), generator=self.prompts).tolist()
            texts["encoder_hidden_states"] = self._text([self.conditions.row(i, 0) for i in chosen])
            if student:
                texts["negative_encoder_hidden_states"] = self._text([self.conditions.negative] * count)
        latents, noise = torch.zeros(count, *shape), torch.randn(count, *shape)  # of the latents only the shape is used
        update = self.pipeline.compute_student_loss if student else self.pipeline.compute_fake_score_loss
        return update(latents, noise, **texts)["total"]

    def step(self, student: bool, iteration: int) -> None:
        """Clips the gradients, updates one network by them and clears them; iteration: of the student, from 0."""
        optimiser, lr = self.optimisers[student], self.options.lr if student else self.options.fake_lr
        for group in optimiser.param_groups:
            group["lr"] = decayed(lr, self.config.optimiser.decay, iteration, self.config.iterations)
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, self.config.optimiser.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if student:
            self.pipeline.update_ema()

    def _text(self, rows: list[dict[str, Tensor]]) -> Tensor:
        return self.model.batch(rows)["text"]


def begin(config: Config, options: Options, folder: Path) -> Training:
    """Builds the three networks from the teacher's weights. folder: for the encoded prompts."""
    model, codec = load_teacher(config)
    points = isinstance(config.teacher, AnalyticTeacher)
    conditions = None
    if config.prompts is not None:
        conditions = Conditions(codec, read_prompts(config.prompts), config.teacher.negative_prompt, folder)
    torch.manual_seed(seed_of(config.seed, "peer"))
    student = copy.deepcopy(model.students[0]).requires_grad_(not options.lora)
    fake = fastgen.create_fake_score(model.students[0])
    if options.lora:
        lora = LoraConfig(r=options.lora, lora_alpha=options.lora, target_modules=list(model.lora_targets))
        inject_adapter_in_model(lora, student)
    pipeline = (PointPipeline if points else fastgen.DMDPipeline)(
        student, model.networks[0], fake, dmd_config(config, options, None if points else TRAIN_TIMESTEPS)
    )
    betas = (options.beta1, 0.999)
    optimisers = {
        trained: torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], betas=betas)
        for trained, network in ((True, student), (False, fake))
    }
    return Training(config, options, model, conditions, pipeline, optimisers, generator(config.seed, "peer", "prompts"))


def dmd_config(config: Config, options: Options, timesteps: int | None) -> fastgen.DMDConfig:
    """Returns the pipeline's own configuration: our grid and guidance, and its options."""
    (guidance,) = getattr(config.teacher, "guidance", (1.0,))
    times = fastgen.SampleTimestepConfig(
        time_dist_type=options.times, shift=config.plan.shift, t_list=list(options.grid(config))
    )
    ema = None if config.generator.ema is None else fastgen.EMAConfig(decay=config.generator.ema, fsdp2=False)
    return fastgen.DMDConfig(
        pred_type="flow", guidance_scale=None if guidance == 1 else guidance, num_train_timesteps=timesteps,
        sample_t_cfg=times, student_sample_steps=config.plan.steps, student_sample_type=options.sample_type,
        student_update_freq=options.frequency, fake_score_pred_type=options.fake_loss, backward_simulation=True,
        ema=ema,
    )  # fmt: skip


def train(config: Config, options: Options, folder: Path) -> None:
    """Trains a student and writes it as a finished run; one that was stopped starts again."""
    run = RunFolder(folder)
    run.open(config, [prompt.line() for prompt in read_prompts(config.prompts)] if config.prompts else [])
    training = begin(config, options, folder / "conditions")
    rows = []
    for iteration in range(config.iterations):
        started, cpu_started = time.perf_counter(), time.process_time()
        for student in (*[False] * (options.frequency - 1), True):
            training.loss(student).backward()
            training.step(student, iteration)
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        rows.append({"phase": 1, "iteration": iteration + 1, "seconds": seconds, "cpu_seconds": cpu_seconds})
    (folder / "timing.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    system = build_system(config, training.model, training.conditions.negative if training.conditions else {})
    run.save_expert(1, student_weights(training), expert_header(config, system, 1))


def student_weights(training: Training) -> dict[str, Tensor]:
    """Returns the averaged student's weights as an expert's, an adapter merged into them."""
    pipeline = training.pipeline
    student = copy.deepcopy(pipeline.student)
    if pipeline.ema is not None:
        pipeline.ema.copy_to(student)
    for module in student.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    return {
        f"0.{name.replace('.base_layer', '')}": p.detach()
        for name, p in student.named_parameters()
        if "lora_" not in name
    }


def peak(config: Config, options: Options) -> Peak:
    """Measures an update of the student and one of the fake, each with the gradients of one network alone."""
    with TemporaryDirectory() as folder:
        training = begin(config, options, Path(folder))
        updates = []
        for student, optimiser in training.optimisers.items():
            training.loss(student).backward()
            training.step(student, 0)  # the optimiser has its states from now on
            trained = [p for group in optimiser.param_groups for p in group["params"]]
            updates.append(Update(trained, lambda student=student: training.loss(student).backward()))
        pipeline = training.pipeline
        networks = pipeline.student, pipeline.teacher, pipeline.fake_score
        resident = [t for network in networks for t in (*network.parameters(), *network.buffers())]
        states = [t for o in training.optimisers.values() for state in o.state.values() for t in state.values()]
        averages = pipeline.ema.state_dict().values() if pipeline.ema else ()
        return largest(updates, [*resident, *states, *averages])
