"""Wan's transformers, VAE and text encoder, from a diffusers `WanPipeline` folder."""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from torch import Tensor, nn

from phased_dmd.config import WanTeacher
from phased_dmd.diffusion import FlowSchedule, Prediction, Schedule
from phased_dmd.models.protocol import Condition

NANO = Path(__file__).parents[1] / "assets" / "nano"


class WanModel:
    """`VelocityModel` of a Wan text-to-video pipeline; one frame makes it text-to-image."""

    def __init__(self, config: WanTeacher, pipeline: WanPipeline) -> None:
        self.schedule: Schedule = FlowSchedule()
        self.prediction: Prediction = "flow"
        self.guidance = config.guidance
        self.lora_targets: Sequence[str] = config.lora_targets
        transformer, vae = pipeline.transformer, pipeline.vae
        assert isinstance(transformer, WanTransformer3DModel) and isinstance(vae, AutoencoderKLWan)
        self.networks: Sequence[nn.Module] = [transformer.eval().requires_grad_(False)]
        self.students: Sequence[nn.Module] = self.networks
        self.switches: Sequence[float] = ()
        space, time = vae.config["scale_factor_spatial"], vae.config["scale_factor_temporal"]
        _, patch_h, patch_w = transformer.config["patch_size"]
        for name, size, stride in (
            ("height", config.height, space * patch_h),
            ("width", config.width, space * patch_w),
            ("num_frames", config.num_frames - 1, time),
        ):
            if size % stride:
                nearest = stride * max(1 if name != "num_frames" else 0, round(size / stride)) + (name == "num_frames")
                raise ValueError(
                    f"teacher.{name}: {size + (name == 'num_frames')} does not fit the strides; nearest is {nearest}"
                )
        frames = (config.num_frames - 1) // time + 1
        self.sample_shape: tuple[int, ...] = (
            transformer.config["in_channels"],
            frames,
            config.height // space,
            config.width // space,
        )

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text = condition["text"]
        return network(x.to(text.dtype), (t * 1000).to(torch.float32), text, return_dict=False)[0]

    def guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return unconditional + self.guidance * (conditional - unconditional)


class WanCodec:
    """`Codec` of the same pipeline: UMT5 embeddings [b, tokens, d], zero beyond the prompt's end; Wan's video VAE."""

    def __init__(self, config: WanTeacher, pipeline: WanPipeline) -> None:
        self.tokenizer, self.max_tokens = pipeline.tokenizer, config.max_tokens
        self.encoder, self.vae = pipeline.text_encoder.eval(), pipeline.vae.eval()
        shape = 1, -1, 1, 1, 1
        self.mean = torch.tensor(self.vae.config["latents_mean"]).reshape(shape)
        self.std = torch.tensor(self.vae.config["latents_std"]).reshape(shape)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )  # fmt: skip
        device = self.encoder.device
        mask = tokens.attention_mask.to(device)
        states = self.encoder(tokens.input_ids.to(device), mask).last_hidden_state
        return {"text": states * mask[..., None]}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(latents * self.std.to(latents) + self.mean.to(latents)).sample
        return pixels.float().permute(0, 2, 3, 4, 1) / 2 + 0.5


def load_wan(config: WanTeacher, device: torch.device) -> tuple[WanModel, WanCodec]:
    """The pipeline of a folder or hub id, or `nano`, in float32."""
    source = NANO if config.path == "nano" else config.path
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline = WanPipeline.from_pretrained(source, dtype=torch.float32).to(device)
    if pipeline.transformer_2 is not None:
        raise ValueError(f"path: {config.path} has two transformers, which are not supported yet")
    if pipeline.transformer.config["in_channels"] != pipeline.vae.config["z_dim"]:
        raise ValueError(f"path: {config.path} takes more than latents (image-to-video?), which is not supported yet")
    names = [name for name, _ in pipeline.transformer.named_modules()]
    for target in config.lora_targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ValueError(f"lora_targets: {target} ends the name of no module of the transformer")
    return WanModel(config, pipeline), WanCodec(config, pipeline)
