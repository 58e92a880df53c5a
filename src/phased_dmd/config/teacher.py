"""Describes what is distilled in typed fields: frozen pydantic models, free of torch."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a null character")
    return text


Count = Annotated[int, Field(gt=0, le=10**9)]
Targets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Location = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_null)]  # a path, or a hub id


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class AnalyticTeacher(Section):
    """Predicts exactly for a mixture of Gaussians; the student is a network that is fitted to the prediction."""

    kind: Literal["analytic"] = "analytic"
    """The kind of teacher."""
    negative_prompt: Literal[""] = ""
    """An analytic teacher has no prompts, and so no negative one."""
    means: tuple[tuple[float, ...], ...] | Literal["clips"]
    """The means of the mixture's Gaussians, one list of coordinates for each; or clips: the shipped ones of digits."""
    std: float = Field(default=0.0, ge=0)
    """The standard deviation of every Gaussian in every direction; 0 makes them points."""
    weights: tuple[float, ...] | None = None
    """The relative probability of each Gaussian; null makes them all alike."""
    schedule: Literal["flow", "vp-cosine", "vp-linear", "ve"] = "flow"
    """The noise schedule alpha(t), sigma(t): flow matching, variance preserving (two forms) or variance exploding."""
    prediction: Literal["flow", "x0", "eps", "v"] = "flow"
    """What the networks predict of a noisy sample: the flow, the clean sample, the noise, or v."""
    fit_steps: Count = 2000
    """Optimiser steps that fit the student to the teacher before the distillation begins."""
    base_steps: Count = 40
    """The steps in which the teacher is sampled where its own trajectories are needed."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.means == "clips":
            if self.weights is not None:
                raise ValueError("weights: clips are all alike")
            return self
        if not self.means or len({len(mean) for mean in self.means}) != 1 or not self.means[0]:
            raise ValueError("means: needs at least one mean, all of the same length")
        if self.weights is not None and (len(self.weights) != len(self.means) or min(self.weights) <= 0):
            raise ValueError("weights: needs one positive weight a mean")
        return self


class Size(Section):
    """Describes one resolution bucket, in pixels."""

    num_frames: int = Field(default=1, gt=0, le=2**16)
    """The frames of a clip; 1 makes pictures."""
    height: int = Field(default=32, gt=0, le=2**16)
    """The height of a frame in pixels."""
    width: int = Field(default=32, gt=0, le=2**16)
    """The width of a frame in pixels."""
    weight: float = Field(default=1.0, gt=0, le=1e9)
    """The bucket's share of the batches, relative to the sum over all buckets."""

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


class PipelineTeacher(Section):
    """Describes a teacher from a diffusers pipeline's folder or hub id.

    adapter: the file in `models` that knows the kind. pipelines: the stock pipelines that a folder may be of.
    """

    adapter: ClassVar[str]
    pipelines: ClassVar[tuple[str, ...]]

    path: Location = "nano"
    """The pipeline's folder, hub id, or name inside the package: nano, nano-moe, nano-i2v, scenes or scenes-moe."""
    revision: str | None = Field(default=None, pattern=r"^\w[\w-]*([./][\w-]+)*$", max_length=200)
    """The commit, tag or branch of a hub id; null takes the newest."""
    sizes: tuple[Size, ...] = Field(default=(Size(),), min_length=1)
    """The resolution buckets to train at; previews and samples are made at the first one."""
    guidance: Annotated[tuple[Annotated[float, Field(ge=1)], ...], BeforeValidator(_one_or_more)] = Field(
        default=(4.0,), min_length=1
    )
    """The scale g of the teacher's guidance, uncond + g (cond - uncond); 1 is none. One number, or one a network."""
    negative_prompt: str = ""
    """The prompt of the unconditional half of the teacher's guidance."""
    max_tokens: Count = 512
    """The most tokens of a prompt; what is beyond them is cut off."""
    base_steps: Count = 40
    """The steps in which the undistilled teacher is sampled where an evaluation compares with it."""
    dtype: Literal["float64", "float32", "bfloat16"] = "float32"
    """The number format of the frozen networks."""
    quantise: Literal["int8", "nf4"] | None = None
    """Compresses the frozen networks' blocks, on one GPU; experts and fake must be adapters. Needs bitsandbytes."""


class WanTeacher(PipelineTeacher):
    """Takes a `WanPipeline` or `WanImageToVideoPipeline`; those of nano and of the scenes are inside the package."""

    adapter, pipelines = "wan", ("WanPipeline", "WanImageToVideoPipeline")
    kind: Literal["wan"] = "wan"
    """The kind of teacher."""
    first_frame: bool | None = None
    """Whether every prompt comes with a first frame; null decides by the class of the pipeline."""
    lora_targets: Targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    """The ends of the names of the layers that get LoRA adapters."""


class QwenImageTeacher(PipelineTeacher):
    """Takes a `QwenImagePipeline`."""

    adapter, pipelines = "qwen_image", ("QwenImagePipeline",)
    kind: Literal["qwen-image"] = "qwen-image"
    """The kind of teacher."""
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip
    """The ends of the names of the layers that get LoRA adapters."""


class QwenImageEditTeacher(QwenImageTeacher):
    """Takes a `QwenImageEditPlusPipeline`, with a picture to every prompt."""

    adapter, pipelines = "qwen_image_edit", ("QwenImageEditPlusPipeline",)
    kind: Literal["qwen-image-edit"] = "qwen-image-edit"  # type: ignore[assignment] another kind
    """The kind of teacher."""


class ZImageTeacher(PipelineTeacher):
    """Takes a `ZImagePipeline` of the base, not of Turbo."""

    adapter, pipelines = "z_image", ("ZImagePipeline",)
    kind: Literal["z-image"] = "z-image"
    """The kind of teacher."""
    norm_limit: float = Field(default=0.0, ge=0)
    """Most that a guided prediction's norm may be of the conditional's (`cfg_normalization`); 0 sets no limit."""
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "to_out.0", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
    )  # fmt: skip
    """The ends of the names of the layers that get LoRA adapters."""


class Flux2KleinTeacher(PipelineTeacher):
    """Takes a `Flux2KleinPipeline` of a base, not of one that is distilled."""

    adapter, pipelines = "flux2_klein", ("Flux2KleinPipeline",)
    kind: Literal["flux2-klein"] = "flux2-klein"
    """The kind of teacher."""
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.linear_in",
        "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "to_qkv_mlp_proj", "attn.to_out",
    )  # fmt: skip
    """The ends of the names of the layers that get LoRA adapters."""


class QwenImage21Teacher(PipelineTeacher):
    """Takes a `QwenImage21Pipeline` of the base, not of Turbo."""

    adapter, pipelines = "qwen_image_21", ("QwenImage21Pipeline",)
    kind: Literal["qwen-image-2.1"] = "qwen-image-2.1"
    """The kind of teacher."""
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "to_out.0", "img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out",
    )  # fmt: skip
    """The ends of the names of the layers that get LoRA adapters."""


class Krea2Teacher(PipelineTeacher):
    """Takes a `Krea2Pipeline` of Krea 2 Raw, not of Turbo."""

    adapter, pipelines = "krea_2", ("Krea2Pipeline",)
    kind: Literal["krea-2"] = "krea-2"
    """The kind of teacher."""
    lora_targets: Targets = ("to_q", "to_k", "to_v", "to_gate", "to_out.0", "ff.gate", "ff.up", "ff.down")
    """The ends of the names of the layers that get LoRA adapters."""


class Lumina2Teacher(PipelineTeacher):
    """Takes a `Lumina2Pipeline`."""

    adapter, pipelines = "lumina_2", ("Lumina2Pipeline",)
    kind: Literal["lumina-2"] = "lumina-2"
    """The kind of teacher."""
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "to_out.0", "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3",
    )  # fmt: skip
    """The ends of the names of the layers that get LoRA adapters."""


class OwnTeacher(Section):
    """Takes a model of the user's own, which `--own` names; in Python `distill`, `load` and `evaluate` are given it."""

    kind: Literal["own"] = "own"
    """The kind of teacher."""
    negative_prompt: str = ""
    """The prompt of the unconditional half of the teacher's guidance."""
    base_steps: Count = 40
    """The steps in which the undistilled teacher is sampled where an evaluation compares with it."""
    weights: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(default=(1.0,), min_length=1)
    """The share of the batches that each of the model's sample_shapes gets, relative to their sum."""


AnyPipeline = (
    WanTeacher | QwenImageTeacher | QwenImageEditTeacher | QwenImage21Teacher | ZImageTeacher | Flux2KleinTeacher
    | Krea2Teacher | Lumina2Teacher
)  # fmt: skip
Teacher = AnalyticTeacher | AnyPipeline | OwnTeacher
