"""What an export says of a finished run: which experts make which steps, on which base, and what they are called."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from diffusers import (
    DiffusionPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor, nn

from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher, QwenImageTeacher, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.finished import Experts, read_run
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.loader import bare_model
from phased_dmd.models.pipeline import check_pipeline
from phased_dmd.models.qwen_image import PIPELINES as QWEN_PIPELINES
from phased_dmd.models.source import SHIPPED, BareSource, Source
from phased_dmd.models.wan import PIPELINES as WAN_PIPELINES
from phased_dmd.models.wan import takes_first_frame
from phased_dmd.networks.build import check_shapes, expert_shapes

PARTS = ("transformer", "transformer_2")
NOISE = ("high-noise", "low-noise")  # how vendors name the two networks


class Piece(NamedTuple):
    """One expert as exported: one file, or folder, on one network.

    part: the pipeline's transformer it belongs to. name: of the adapter. file: relative to the export.
    """

    phase: int
    network: int
    steps: tuple[int, ...]
    times: tuple[float, ...]
    part: str
    name: str
    file: str


@dataclass(frozen=True)
class Subject:
    """A finished run, its teacher's pipeline, and how its experts are exported."""

    config: Config
    experts: Experts
    teacher: PipelineTeacher
    source: Source
    pipeline: type[DiffusionPipeline]
    transformer: type[nn.Module]
    task: str
    fused: bool
    run: Path

    @classmethod
    def of(cls, run: Path, fused: bool) -> Self:
        """Of a finished run folder; one whose teacher no stock pipeline can run is a UserError."""
        config, experts = read_run(run)
        if config.plan.start != 1:
            raise UserError(f"{run}: starts at t = {config.plan.start:g}; stock pipelines start from noise alone, at 1")
        match config.teacher:
            case WanTeacher() as teacher:
                source, moves = open_source(teacher, WAN_PIPELINES), teacher.sizes[0].num_frames > 1
                given = takes_first_frame(teacher, source)
                pipeline, network = WanImageToVideoPipeline if given else WanPipeline, WanTransformer3DModel
                task = "i2v" if given else "t2v" if moves else "t2i"
            case QwenImageTeacher() as teacher:
                source = open_source(teacher, QWEN_PIPELINES)
                pipeline, network, task = QwenImagePipeline, QwenImageTransformer2DModel, "t2i"
            case other:
                raise UserError(f"{run}: a teacher of kind {other.kind} has no stock pipeline to export to")
        return cls(config, experts, teacher, source, pipeline, network, task, fused, run)

    @cached_property
    def plan(self) -> PhasePlan:
        return self.config.phase_plan([self.source.index["boundary_ratio"]] if len(self.networks) == 2 else [])

    @cached_property
    def networks(self) -> list[str]:
        """The parts of the teacher's pipeline that hold its networks, noisiest first; without a switch, the first."""
        return list(PARTS[: 1 if self.source.index.get("boundary_ratio") is None else 2])

    @property
    def base_is_shipped(self) -> bool:
        return self.teacher.path in SHIPPED

    @property
    def base(self) -> str | None:
        """The teacher's hub id or shipped name; a local folder stays unnamed."""
        local = not self.base_is_shipped and Path(self.teacher.path).exists()
        return None if local else self.teacher.path

    @property
    def model(self) -> str:
        """The teacher's name, as files are named after it."""
        last = (self.base or str(Path(self.teacher.path).absolute())).rstrip("/").split("/")[-1]
        return re.sub(r"[^a-z0-9.]+", "-", last.lower()).removesuffix("-diffusers").strip("-.")

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The experts in the order of their steps."""
        plan, rank = self.plan, "" if self.fused else f"-rank{self.config.generator.lora.rank}"
        owners = [plan.expert(step) for step in range(plan.num_steps)]
        pieces = []
        for expert in dict.fromkeys(owners):
            steps = tuple(step for step, owner in enumerate(owners) if owner == expert)
            name = f"phase{expert.phase}" + (f"-{NOISE[expert.network]}" if len(self.networks) == 2 else "")
            stem = f"{self.model}-{self.task}-{plan.num_steps}step{rank}-{name}"
            part = self.networks[expert.network]
            if self.stock_pair:
                part = file = PARTS[len(pieces)]
            else:
                part, file = (PARTS[0], stem) if self.fused else (part, f"{stem}.safetensors")
            times = tuple(plan.times[step] for step in steps)
            pieces.append(Piece(*expert, steps, times, part, name, file))
        return tuple(pieces)

    @cached_property
    def stock_pair(self) -> bool:
        """Whether full experts fit the pipeline's own `transformer` and `transformer_2`."""
        plan = self.plan
        experts = {plan.expert(step) for step in range(plan.num_steps)}
        return self.fused and len(experts) <= 2 and isinstance(self.teacher, WanTeacher)

    @property
    def two_parts(self) -> bool:
        """Whether the exported pipeline has a `transformer_2`."""
        return len(self.pieces) == 2 and self.stock_pair if self.fused else len(self.networks) == 2

    @property
    def boundary_ratio(self) -> float | None:
        """Where the pipeline goes over to `transformer_2`: strictly between two grid points, or nowhere."""
        if not self.two_parts:
            return None
        last = max(step for piece in self.pieces if piece.part == PARTS[0] for step in piece.steps)
        return (self.plan.times[last] + self.plan.times[last + 1]) / 2

    @property
    def switches(self) -> bool:
        """Whether a transformer has several experts, to be switched by step."""
        return len({piece.part for piece in self.pieces}) < len(self.pieces)

    def tensors(self, piece: Piece) -> dict[str, Tensor]:
        """The expert's own tensors, by their names in the transformer."""
        prefix = f"{piece.network}."
        mine = {name: t for name, t in self.experts(piece.phase).items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in mine.items()}

    def check_experts(self) -> None:
        """A UserError where an expert's file has not exactly the tensors of its adapter or network, name and shape."""
        source = BareSource(self.teacher)
        source.folder = self.source.folder
        shapes = expert_shapes(self.config, bare_model(self.config.teacher, self.config.seed, source), self.plan)
        for phase, needed in shapes.items():
            check_shapes(f"{self.run}: expert of phase {phase}", needed, self.experts(phase))

    def header(self, piece: Piece) -> dict[str, Any]:
        """What a reader needs to run the file: its place on the grid, its base, and how it was made."""
        config, rank = self.config, self.config.generator.lora.rank
        return {
            "base_model": self.base, "base_revision": self.teacher.revision, "grid": list(self.plan.times),
            "steps": list(piece.steps), "shift": config.plan.shift, "boundary": self.plan.end(piece.phase),
            "boundary_ratio": self.boundary_ratio, "solver": config.plan.solver, "guidance": 1.0,
            "phase": piece.phase, "network": piece.network, "part": piece.part, "rank": rank, "alpha": rank,
            "method": config.method, "weighting": config.objective.descends,
        }  # fmt: skip

    def portable_config(self) -> dict[str, Any]:
        """The config under which `load` reads the export, without paths of this machine."""
        data, lora = self.config.model_dump(mode="json"), self.config.generator.lora
        data["generator"]["lora"]["alpha"] = lora.rank
        data["generator"]["weights"] = "full" if self.fused else "lora"
        data["teacher"] |= {"path": self.base or self.model, "quantise": None}
        data["init_experts"] = None
        data["prompts"] = Path(data["prompts"]).name
        return data


def open_source(teacher: PipelineTeacher, pipelines: Sequence[str]) -> Source:
    """The teacher's pipeline folder; one that is not at hand, or holds another pipeline, is a UserError."""
    source = Source(teacher)
    try:
        check_pipeline(source, pipelines)
    except OSError as error:
        raise UserError(f"teacher.path: {teacher.path} is not at hand ({error})") from error
    return source
