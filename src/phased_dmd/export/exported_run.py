"""What is exported of a finished run: which expert makes which steps, on which network, under which name."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from phased_dmd.checkpoint import Reference
from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import AnyPipeline, PipelineTeacher, Size
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import Expert, PhasePlan
from phased_dmd.models.adapter import Adapter
from phased_dmd.models.loader import adapter_of, bare_model
from phased_dmd.models.pipeline import check_pipeline
from phased_dmd.models.source import SHIPPED, BareSource, Source
from phased_dmd.networks.build import check_shapes, expert_shapes
from phased_dmd.recipes import APACHE, licence_of
from phased_dmd.sampling.loading import EXPORT, Experts, read

PARTS = ("transformer", "transformer_2")  # of a diffusers pipeline
NOISE = ("high_noise", "low_noise")  # how vendors name the two networks
OTHER_WANS = re.compile(r"Wan-AI/Wan2\.[12]-[\w.-]+")  # than the recipes', under the same licence


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
    """A finished run, or a checkpoint of its last phase, has a teacher's pipeline, and experts to export to files.

    fused: the experts are exported as full transformers instead of LoRA files. dtype: of the exported weights.
    base_model: the hub id of a teacher that is a local folder.
    """

    folder: Path
    fused: bool
    dtype: torch.dtype
    base_model: str | None
    config: Config
    expert_tensors: Experts
    teacher: AnyPipeline
    source: Source

    @classmethod
    def open(cls, folder: Path, fused: bool = False, dtype: str | None = None, base_model: str | None = None) -> Self:
        """Opens a finished run folder or a checkpoint; raises UserError where no stock pipeline can run its teacher.

        dtype: float32 or bfloat16; None takes the teacher's own.
        """
        if (folder / EXPORT).exists():
            raise UserError(f"{folder}: an export already")
        config, expert_tensors, last = read(folder)
        teacher = config.teacher
        if last < config.plan.phases:
            raise UserError(f"{folder}: phase {last} of {config.plan.phases}, which makes no whole samples to export")
        if config.plan.start != 1:
            start = f"{config.plan.start:g}"
            raise UserError(f"{folder}: starts at t = {start}; stock pipelines start from noise alone, at 1")
        if not isinstance(teacher, PipelineTeacher):
            raise UserError(f"{folder}: a teacher of kind {teacher.kind} has no stock pipeline to export to")
        source = Source(teacher)
        try:
            check_pipeline(source, teacher.pipelines)
        except OSError as error:
            raise UserError(f"teacher.path: {teacher.path} is not at hand ({error})") from error
        if base_model and not Path(teacher.path).is_dir():
            raise UserError(f"--base-model: names the hub id of a teacher in a folder; {teacher.path} is its own name")
        written = torch.bfloat16 if (dtype or teacher.dtype) == "bfloat16" else torch.float32
        return cls(folder, fused, written, base_model, config, expert_tensors, teacher, source)

    @property
    def home(self) -> Path:
        """Returns the run's folder, which is not the folder's name where that is a checkpoint's."""
        reference = Reference.of(self.folder)
        return self.folder if reference is None else reference.run

    @property
    def adapter(self) -> Adapter:
        return adapter_of(self.teacher)

    @property
    def takes_images(self) -> bool:
        """Whether the model is given a picture with every prompt."""
        return self.adapter.takes_images(self.teacher, self.source)

    @cached_property
    def task(self) -> str:
        if self.takes_images:
            return "i2v" if self.adapter.stock.frames else "i2i"
        return "t2v" if self.teacher.sizes[0].num_frames > 1 else "t2i"

    @cached_property
    def plan(self) -> PhasePlan:
        return phase_plan(self.config, [self.source.index["boundary_ratio"]] if len(self.networks) == 2 else [])

    @cached_property
    def networks(self) -> Sequence[str]:
        """Returns the parts of the teacher's pipeline that are its networks, noisiest first; without a switch, one."""
        return PARTS[: 1 if self.source.index.get("boundary_ratio") is None else 2]

    @property
    def noises(self) -> Sequence[str]:
        """Returns for each network how vendors name it: by the noise, where there are two."""
        return NOISE if len(self.networks) == 2 else [""]

    @property
    def stochastic(self) -> bool:
        """Whether fresh noise is added after each step."""
        return self.config.ablation.solver == "renoise"

    @property
    def base_is_shipped(self) -> bool:
        return self.teacher.path in SHIPPED

    @property
    def base(self) -> str | None:
        """Returns the teacher's hub id or shipped name; None for a local folder, whose path no export holds."""
        local = not self.base_is_shipped and Path(self.teacher.path).exists()
        return self.base_model if local else self.teacher.path

    @property
    def licence(self) -> str:
        """Returns the licence of the base, which holds for the experts too, by its name on the hub."""
        base = self.base or ""
        free = self.base_is_shipped or licence_of(base) == APACHE or OTHER_WANS.fullmatch(base)
        return "apache-2.0" if free else "other"

    @property
    def model(self) -> str:
        """The teacher's name in the form that file names have: lower case, and underscores between words."""
        last = (self.base or str(Path(self.teacher.path).absolute())).rstrip("/").split("/")[-1]
        return re.sub(r"[^a-z0-9.]+", "_", last.lower()).removesuffix("_diffusers").strip("_.")

    @property
    def name(self) -> str:
        """What files are named after: model, task, unless the model's name says it, and steps."""
        task = "" if self.task in self.model.split("_") else f"_{self.task}"
        return f"{self.model}{task}_{self.plan.num_steps}step"

    @cached_property
    def pipeline(self) -> str:
        """Returns the name of the stock pipeline's class."""
        return self.teacher.pipelines[1 if self.task == "i2v" else 0]

    @cached_property
    def experts(self) -> tuple[ExportedExpert, ...]:
        """Lists the experts in the order of their steps; full ones take the places of the pipeline's transformers.

        Raises UserError for more full experts than places.
        """
        plan, steps_of = self.plan, dict[Expert, tuple[int, ...]]()
        for step in range(plan.num_steps):
            steps_of[plan.expert(step)] = (*steps_of.get(plan.expert(step), ()), step)
        places = PARTS[: self.adapter.places]
        if self.fused and len(steps_of) > len(places):
            raise UserError(
                f"--fused: {len(steps_of)} experts, where a {self.pipeline} has {len(places)} transformer(s) at most"
            )
        experts = []
        for i, (expert, steps) in enumerate(steps_of.items()):
            name = f"{self.noises[expert.network]}_phase{expert.phase}".strip("_")
            part = places[i] if self.fused else self.networks[expert.network]
            size = "x".join(map(str, self.lengths(self.teacher.sizes[0])))
            lora = f"{self.name}_{name}_rank{self.config.generator.lora.rank}_{size}.safetensors"
            experts.append(ExportedExpert(*expert, steps, part, name, part if self.fused else lora))
        return tuple(experts)

    def lengths(self, size: Size) -> tuple[int, ...]:
        """Returns the frames, if the model makes clips, height and width of a size."""
        return (size.num_frames, size.height, size.width)[self.task in ("t2i", "i2i") :]

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

    def tensors(self, expert: ExportedExpert, written: bool = False) -> dict[str, Tensor]:
        """Returns one expert's own tensors by their names in the transformer, as trained or as its file holds them."""
        prefix, found = f"{expert.network}.", (self.written if written else self.expert_tensors)(expert.phase)
        return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}

    def written(self, phase: int) -> dict[str, Tensor]:
        """Returns a phase's adapters as their files hold them: rounded to the dtype, alpha / rank in lora_B."""
        lora = self.config.generator.lora
        scaled = {
            name: tensor * lora.alpha / lora.rank if name.endswith(".lora_B.weight") else tensor
            for name, tensor in self.expert_tensors(phase).items()
        }
        return {name: tensor.to(self.dtype) for name, tensor in scaled.items()}

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
