"""What is exported of a finished run: which expert makes which steps, on which network, under which name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from torch import Tensor

from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import PipelineTeacher, QwenImageTeacher, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import Expert, PhasePlan
from phased_dmd.models.loader import bare_model
from phased_dmd.models.pipeline import check_pipeline
from phased_dmd.models.qwen_image import PIPELINES as QWEN_PIPELINES
from phased_dmd.models.source import SHIPPED, BareSource, Source
from phased_dmd.models.wan import PIPELINES as WAN_PIPELINES
from phased_dmd.models.wan import takes_first_frame
from phased_dmd.networks.build import check_shapes, expert_shapes
from phased_dmd.sampling.loading import Experts, read_run

PARTS = ("transformer", "transformer_2")  # of a diffusers pipeline
NOISE = ("high-noise", "low-noise")  # how vendors name the two networks


class ExportedExpert(NamedTuple):
    """One expert on one network is exported as a LoRA file or as the folder of a full transformer.

    part: the pipeline's transformer that it belongs to. name: the adapter's. file: relative to the export.
    """

    phase: int
    network: int
    steps: tuple[int, ...]
    part: str
    name: str
    file: str


@dataclass(frozen=True)
class ExportedRun:
    """A finished run has a teacher's pipeline, and experts that are exported to files.

    fused: the experts are exported as full transformers instead of LoRA files.
    """

    folder: Path
    fused: bool
    config: Config
    expert_tensors: Experts
    teacher: WanTeacher | QwenImageTeacher
    source: Source

    @classmethod
    def open(cls, folder: Path, fused: bool) -> Self:
        """Opens a finished run folder; raises UserError where no stock pipeline can run its teacher."""
        config, expert_tensors = read_run(folder)
        teacher = config.teacher
        if config.plan.start != 1:
            start = f"{config.plan.start:g}"
            raise UserError(f"{folder}: starts at t = {start}; stock pipelines start from noise alone, at 1")
        if not isinstance(teacher, PipelineTeacher):
            raise UserError(f"{folder}: a teacher of kind {teacher.kind} has no stock pipeline to export to")
        source = Source(teacher)
        try:
            check_pipeline(source, WAN_PIPELINES if isinstance(teacher, WanTeacher) else QWEN_PIPELINES)
        except OSError as error:
            raise UserError(f"teacher.path: {teacher.path} is not at hand ({error})") from error
        return cls(folder, fused, config, expert_tensors, teacher, source)

    @property
    def is_wan(self) -> bool:
        return isinstance(self.teacher, WanTeacher)

    @cached_property
    def task(self) -> str:
        if isinstance(self.teacher, WanTeacher) and takes_first_frame(self.teacher, self.source):
            return "i2v"
        return "t2v" if self.teacher.sizes[0].num_frames > 1 else "t2i"

    @cached_property
    def plan(self) -> PhasePlan:
        return phase_plan(self.config, [self.source.index["boundary_ratio"]] if len(self.networks) == 2 else [])

    @cached_property
    def networks(self) -> Sequence[str]:
        """Returns the parts of the teacher's pipeline that are its networks, noisiest first; without a switch, one."""
        return PARTS[: 1 if self.source.index.get("boundary_ratio") is None else 2]

    @property
    def base_is_shipped(self) -> bool:
        return self.teacher.path in SHIPPED

    @property
    def base(self) -> str | None:
        """Returns the teacher's hub id or shipped name; None for a local folder, whose path no export holds."""
        local = not self.base_is_shipped and Path(self.teacher.path).exists()
        return None if local else self.teacher.path

    @property
    def model(self) -> str:
        """The teacher's name in the form that file names have: lower case, and dashes between words."""
        last = (self.base or str(Path(self.teacher.path).absolute())).rstrip("/").split("/")[-1]
        return re.sub(r"[^a-z0-9.]+", "-", last.lower()).removesuffix("-diffusers").strip("-.")

    @cached_property
    def experts(self) -> tuple[ExportedExpert, ...]:
        """Lists the experts in the order of their steps.

        Up to two full experts of Wan take the places of its pipeline's own two transformers.
        """
        plan, steps_of = self.plan, dict[Expert, tuple[int, ...]]()
        for step in range(plan.num_steps):
            steps_of[plan.expert(step)] = (*steps_of.get(plan.expert(step), ()), step)
        rank = "" if self.fused else f"-rank{self.config.generator.lora.rank}"
        experts = []
        for i, (expert, steps) in enumerate(steps_of.items()):
            name = f"phase{expert.phase}" + (f"-{NOISE[expert.network]}" if len(self.networks) == 2 else "")
            stem = f"{self.model}-{self.task}-{plan.num_steps}step{rank}-{name}"
            if not self.fused:
                part, file = self.networks[expert.network], f"{stem}.safetensors"
            elif self.is_wan and len(steps_of) <= 2:
                part = file = PARTS[i]
            else:
                part, file = PARTS[0], stem
            experts.append(ExportedExpert(*expert, steps, part, name, file))
        return tuple(experts)

    @property
    def two_parts(self) -> bool:
        """Whether the exported pipeline has a `transformer_2`."""
        return PARTS[1] in ([expert.part for expert in self.experts] if self.fused else self.networks)

    @property
    def boundary_ratio(self) -> float | None:
        """Returns the time at which the pipeline changes to `transformer_2`, between two grid points, or None."""
        if not self.two_parts:
            return None
        last = max(step for expert in self.experts if expert.part == PARTS[0] for step in expert.steps)
        return (self.plan.times[last] + self.plan.times[last + 1]) / 2

    @property
    def switches(self) -> bool:
        """Whether a transformer has several experts, which the sampling script must switch between steps."""
        return len({expert.part for expert in self.experts}) < len(self.experts)

    def tensors(self, expert: ExportedExpert) -> dict[str, Tensor]:
        """Returns one expert's own tensors, by their names in the transformer."""
        prefix, found = f"{expert.network}.", self.expert_tensors(expert.phase)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}

    def check_experts(self) -> None:
        """Raises UserError where an expert's file lacks a tensor, or has one too many or of another shape."""
        source = BareSource(self.teacher)
        source.folder = self.source.folder
        model = bare_model(self.config.teacher, self.config.seed, source)
        for phase, needed in expert_shapes(self.config, model, self.plan).items():
            check_shapes(f"{self.folder}: expert of phase {phase}", needed, self.expert_tensors(phase))

    def header(self, expert: ExportedExpert) -> dict[str, Any]:
        """Returns what a reader needs to run the file: its place on the grid, its base, and how it was made."""
        config, rank = self.config, self.config.generator.lora.rank
        return {
            "base_model": self.base, "base_revision": self.teacher.revision, "grid": list(self.plan.times),
            "steps": list(expert.steps), "shift": config.plan.shift, "boundary": self.plan.end(expert.phase),
            "boundary_ratio": self.boundary_ratio, "solver": config.ablation.solver, "guidance": 1.0,
            "phase": expert.phase, "network": expert.network, "part": expert.part, "rank": rank, "alpha": rank,
            "method": config.method, "weighting": config.objective,
        }  # fmt: skip


def format_times(times: Sequence[float]) -> str:
    return ", ".join(f"{time:.6g}" for time in times)
