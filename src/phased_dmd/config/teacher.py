"""The typed description of what is distilled: frozen pydantic models, free of torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _no_null(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a null character")
    return text


Count = Annotated[int, Field(gt=0, le=10**9)]
Targets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
Location = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_no_null)]  # a path, or a hub id


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class AnalyticTeacher(Section):
    """The exact prediction of a Gaussian mixture (std 0: points), and the MLP that is fitted to it as student."""

    kind: Literal["analytic"] = "analytic"
    negative_prompt: Literal[""] = ""
    means: tuple[tuple[float, ...], ...]
    std: float = Field(default=0.0, ge=0)
    weights: tuple[float, ...] | None = None
    schedule: Literal["flow", "vp-cosine", "vp-linear", "ve"] = "flow"
    prediction: Literal["flow", "x0", "eps", "v"] = "flow"
    hidden: int = Field(default=128, gt=0, le=2**16)
    layers: int = Field(default=4, gt=0, le=1000)
    fit_steps: Count = 2000
    fit_batch: Count = 512
    fit_lr: float = Field(default=2e-3, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.means or len({len(mean) for mean in self.means}) != 1 or not self.means[0]:
            raise ValueError("means: needs at least one mean, all of the same length")
        if self.weights is not None and (len(self.weights) != len(self.means) or min(self.weights) <= 0):
            raise ValueError("weights: needs one positive weight a mean")
        return self


class Size(Section):
    """A resolution bucket, in pixels; the first of a teacher's is what previews and samples are made at."""

    num_frames: int = Field(default=1, gt=0, le=2**16)
    height: int = Field(default=32, gt=0, le=2**16)
    width: int = Field(default=32, gt=0, le=2**16)
    weight: float = Field(
        default=1.0, gt=0, le=1e9, description="the share of global batches, over the sum of the weights"
    )

    def __str__(self) -> str:
        return f"{self.num_frames}x{self.height}x{self.width}"


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) else value


class PipelineTeacher(Section):
    """What a teacher from a diffusers pipeline's folder or hub id is told, whatever the model."""

    path: Location = "nano"
    revision: str | None = Field(
        default=None, pattern=r"^\w[\w-]*([./][\w-]+)*$", max_length=200,
        description="of a hub id: a commit, a tag or a branch",
    )  # fmt: skip
    sizes: tuple[Size, ...] = Field(default=(Size(),), min_length=1)
    guidance: Annotated[tuple[Annotated[float, Field(ge=1)], ...], BeforeValidator(_one_or_more)] = Field(
        default=(4.0,), min_length=1,
        description="uncond + guidance * (cond - uncond); 1 is none; one for all networks, or one each, noisiest first",
    )  # fmt: skip
    negative_prompt: str = ""
    max_tokens: Count = Field(default=512, description="of a prompt; what is beyond them is cut off")
    base_steps: Count = Field(default=40, description="of the teacher's own sampler, in evaluations")
    dtype: Literal["float64", "float32", "bfloat16"] = Field(default="float32", description="of the frozen networks")
    quantise: Literal["int8", "nf4"] | None = Field(
        default=None, description="their blocks, on one GPU, where experts and fake are adapters; needs bitsandbytes"
    )


class WanTeacher(PipelineTeacher):
    """A `WanPipeline` or `WanImageToVideoPipeline`; `nano`, `nano-moe` and `nano-i2v` are those inside the package."""

    kind: Literal["wan"] = "wan"
    first_frame: bool | None = Field(
        default=None,
        description="whether a first frame is given; by default as the pipeline's class says",
    )
    lora_targets: Targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")


class QwenImageTeacher(PipelineTeacher):
    """A `QwenImagePipeline`."""

    kind: Literal["qwen-image"] = "qwen-image"
    lora_targets: Targets = (
        "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2",
    )  # fmt: skip


class OwnTeacher(Section):
    """A model of the user's own, given to `distill` and `load` as Python objects."""

    kind: Literal["own"] = "own"
    name: str
    negative_prompt: str = ""
    base_steps: Count = 40
    weights: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = Field(
        default=(1.0,), min_length=1, description="of the model's sample_shapes, as in a Size"
    )


Teacher = AnalyticTeacher | WanTeacher | QwenImageTeacher | OwnTeacher
