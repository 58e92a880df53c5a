"""Qwen-Image: text-to-image, from a diffusers folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from phased_dmd.config.teacher import QwenImageTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.schedules import FlowSchedule, Prediction, Schedule
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import (
    Source,
    check_pipeline,
    check_sizes,
    check_targets,
    dtype_of,
    encoder_dtype,
    guidance_of,
)

PIPELINES = ("QwenImagePipeline",)
PATCH = 2  # latents a side of one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states and its logits


class QwenImageModel:
    """`VelocityModel` of Qwen-Image's transformer, on latents [b, 16, 1, h, w]: only the network sees them packed."""

    def __init__(self, config: QwenImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, PIPELINES)
        self.schedule: Schedule = FlowSchedule()
        self.prediction: Prediction = "flow"
        self.lora_targets: Sequence[str] = config.lora_targets
        self.device, self.dtype = device, dtype_of(config)
        if source.config(QwenImageTransformer2DModel, "transformer").get("guidance_embeds"):
            raise UserError(f"teacher.path: {config.path} is distilled from its guidance already, and takes none")
        vae = source.config(AutoencoderKLQwenImage, "vae")
        stride = 2 ** len(vae["temperal_downsample"])
        for i, size in enumerate(config.sizes):
            if size.num_frames != 1:
                raise UserError(f"teacher.sizes.{i}: {size} has {size.num_frames} frames; Qwen-Image makes pictures")
        check_sizes(config.sizes, (stride * PATCH, stride * PATCH), 1)
        self.sample_shapes: Sequence[tuple[int, ...]] = [
            (vae["z_dim"], 1, size.height // stride, size.width // stride) for size in config.sizes
        ]
        self.guidance: Sequence[float] = guidance_of(config, 1)
        network = source.network(QwenImageTransformer2DModel, "transformer", self.dtype, device)
        check_targets(network, config.lora_targets)
        self.networks: Sequence[nn.Module] = [network]
        self.students: Sequence[nn.Module] = self.networks
        self.switches: Sequence[float] = []

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, QwenImageTransformer2DModel)
        return list(network.transformer_blocks)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """text [b, tokens, d], zeros behind the shorter ones, and mask [b, tokens], true where there is text."""
        texts = [row["text"].to(self.device, self.dtype) for row in rows]
        lengths = torch.tensor([len(text) for text in texts], device=self.device)
        mask = torch.arange(int(lengths.max()), device=self.device) < lengths[:, None]
        return {"text": pad_sequence(texts, batch_first=True), "mask": mask}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = (length // PATCH for length in x.shape[-2:])
        mask = condition["mask"]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                pack(x).to(self.dtype), condition["text"], None if mask.all() else mask, t.float(),
                [[(1, height, width)]] * len(x), return_dict=False,
            )[0]  # fmt: skip
        return unpack(velocity, height, width).to(x.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Each token of the guided prediction is rescaled to the norm of the conditional's; one of zeros stays so."""
        guided = unconditional + guidance * (conditional - unconditional)
        tokens = pack(guided)
        norm = tokens.norm(dim=2, keepdim=True)
        scale = pack(conditional).norm(dim=2, keepdim=True) / norm.masked_fill(norm == 0, 1)
        return unpack(tokens * scale, guided.shape[3] // PATCH, guided.shape[4] // PATCH)


class QwenImageCodec:
    """`Codec` through the stock pipeline's own encoding, and Qwen-Image's VAE."""

    takes_images = False

    def __init__(self, config: QwenImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, PIPELINES)
        source.check_weights("text_encoder")
        self.source, self.device, self.max_tokens = source, device, config.max_tokens
        self.text_dtype, self._fingerprint = encoder_dtype(config, device), ""
        self.vae: AutoencoderKLQwenImage = source.load(AutoencoderKLQwenImage, "vae", dtype=torch.float32).to(device)
        shape = 1, -1, 1, 1, 1
        self.mean = torch.tensor(self.vae.config["latents_mean"], device=device).reshape(shape)
        self.std = torch.tensor(self.vae.config["latents_std"], device=device).reshape(shape)
        tokenizer = source.load(Qwen2Tokenizer, "tokenizer")
        absent = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = QwenImagePipeline(vae=self.vae, tokenizer=tokenizer, **absent)  # type: ignore[arg-type]
        if config.max_tokens > (most := self.pipeline.tokenizer_max_length):
            raise UserError(f"teacher.max_tokens: {config.max_tokens} is more than Qwen-Image's {most}")

    @property
    def fingerprint(self) -> str:
        parts = ["tokenizer", "text_encoder"]
        self._fingerprint = self._fingerprint or self.source.fingerprint(parts, self.max_tokens)
        return self._fingerprint

    def free(self) -> None:
        self.pipeline.text_encoder = None

    def too_long(self, prompts: Sequence[str]) -> int:
        template, dropped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        tokens = self.pipeline.tokenizer([template.format(prompt) for prompt in prompts]).input_ids
        return sum(len(ids) - dropped > self.max_tokens for ids in tokens)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """text [tokens, d] each, the template's end included."""
        if self.pipeline.text_encoder is None:
            encoder = self.source.load(Qwen2_5_VLForConditionalGeneration, "text_encoder", dtype=self.text_dtype)
            self.pipeline.text_encoder = encoder.to(self.device)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            text, mask = self.pipeline.encode_prompt(
                list(prompts[start : start + PROMPTS]), device=self.device, max_sequence_length=self.max_tokens
            )
            lengths = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
            rows += [{"text": row[:length].cpu().clone()} for row, length in zip(text, lengths, strict=True)]
        return rows

    def fits(self, image: Path) -> list[int]:
        return []

    def encode_image(self, image: Path, bucket: int) -> Condition:
        return {}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.device, self.vae.dtype)
        pixels = self.vae.decode(latents * self.std + self.mean, return_dict=False)[0]
        return pixels.permute(0, 2, 3, 4, 1) / 2 + 0.5


def pack(x: Tensor) -> Tensor:
    """Latents [b, c, 1, h, w] to tokens [b, h/2 w/2, 4 c]."""
    b, c, _, h, w = x.shape
    patches = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, -1, c * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens [b, height width, 4 c] to latents [b, c, 1, 2 height, 2 width]."""
    patches = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 1, PATCH * height, PATCH * width)
