"""Reads Qwen-Image, for text-to-image, from a diffusers folder."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from phased_dmd.config.teacher import QwenImageTeacher, Size
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter, Comfy, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    check_pictures,
    check_pipeline,
    decode_clip,
    line_mu,
    pad_texts,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source

PATCH = 2  # latents a side of one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states and its logits
TEMPLATE = 34  # tokens that the pipeline puts before each prompt


class QwenImageModel(PipelineModel):
    """Is the `VelocityModel` of Qwen-Image, on latents [b, 16, 1, h, w]: only the network sees them packed."""

    def __init__(self, config: QwenImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        if source.config(QwenImageTransformer2DModel, "transformer").get("guidance_embeds"):
            raise UserError(f"teacher.path: {config.path} is distilled from its guidance already, and takes none")
        vae = source.config(AutoencoderKLQwenImage, "vae")
        stride = 2 ** len(vae["temperal_downsample"])
        check_pictures(config.sizes, (stride * PATCH, stride * PATCH), "Qwen-Image")
        shapes = [(vae["z_dim"], 1, size.height // stride, size.width // stride) for size in config.sizes]
        kind, targets = QwenImageTransformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, QwenImageTransformer2DModel)
        return list(network.transformer_blocks)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return pad_texts(rows, self.device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        height, width = (length // PATCH for length in x.shape[-2:])
        mask = condition["mask"]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                pack(x).to(self.dtype), condition["text"], None if mask.all() else mask.to(x.device), t.float(),
                [[(1, height, width)]] * len(x), return_dict=False,
            )[0]  # fmt: skip
        return unpack(velocity, height, width).to(x.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Guides, and rescales each token to the norm of the conditional's; one of zeros stays so."""
        guided = super().guide(conditional, unconditional, guidance)
        tokens = pack(guided)
        norm = tokens.norm(dim=2, keepdim=True)
        scale = pack(conditional).norm(dim=2, keepdim=True) / norm.masked_fill(norm == 0, 1)
        return unpack(tokens * scale, guided.shape[3] // PATCH, guided.shape[4] // PATCH)


class QwenImageCodec(PipelineCodec):
    """Encodes as the stock pipeline of Qwen-Image does, and decodes with its VAE."""

    def __init__(self, config: QwenImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        super().__init__(config, source, device, AutoencoderKLQwenImage, ["tokenizer", "text_encoder"])
        tokenizer = source.load(Qwen2Tokenizer, "tokenizer")
        absent = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = QwenImagePipeline(vae=self.vae, tokenizer=tokenizer, **absent)  # type: ignore[arg-type]
        if config.max_tokens > (most := self.pipeline.tokenizer_max_length):
            raise UserError(f"teacher.max_tokens: {config.max_tokens} is more than Qwen-Image's {most}")

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        template, dropped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        tokens = self.pipeline.tokenizer([template.format(prompt) for prompt in prompts]).input_ids
        return [len(ids) - dropped for ids in tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, the template's end included."""
        self.load_encoder(Qwen2_5_VLForConditionalGeneration)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            text, mask = self.pipeline.encode_prompt(
                list(prompts[start : start + PROMPTS]), device=self.device, max_sequence_length=self.max_tokens
            )
            lengths = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
            rows += [{"text": row[:length].cpu().clone()} for row, length in zip(text, lengths, strict=True)]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        return decode_clip(self.vae, latents)


def pack(x: Tensor) -> Tensor:
    """Packs latents [b, c, 1, h, w] into tokens [b, h/2 w/2, 4 c]."""
    b, c, _, h, w = x.shape
    patches = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, -1, c * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens [b, height width, 4 c] into latents [b, c, 1, 2 height, 2 width]."""
    patches = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 1, PATCH * height, PATCH * width)


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["joint_attention_dim"])}


def scheduler(shift: float, steps: int, stochastic: bool) -> FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler that shifts the pipeline's evenly spaced times alike at every resolution."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=math.log(shift), max_shift=math.log(shift),
        shift_terminal=None, stochastic_sampling=stochastic,  # type: ignore[arg-type] None is its default
    )  # fmt: skip


def restored(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks the stock pipeline's tokens into latents [b, c, 1, height, width]."""
    return unpack(tokens, height // PATCH, width // PATCH)


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps at a size, and 0."""
    side = PATCH * 2 ** len(source.config(AutoencoderKLQwenImage, "vae")["temperal_downsample"])
    tokens = size.height * size.width // side**2
    return stock_sigmas(source, steps, lambda config: line_mu(config, tokens))


ADAPTER = Adapter(
    QwenImageModel, QwenImageCodec, QwenImageTransformer2DModel, AutoencoderKLQwenImage, QwenImageLoraLoaderMixin,
    TextEncoder(Qwen2_5_VLForConditionalGeneration, PROMPTS, TEMPLATE), condition, padded=False,
    stock=Stock(("true_cfg_scale", 1.0), scheduler, pack, pack, restored, lambda _, *given: restored(*given)),
    comfy=Comfy(
        {"patch_size": 2, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
        ((r"qwen_image", "qwen_image_fp8_e4m3fn"),),
        ("qwen_2.5_vl_7b_fp8_scaled", "qwen_image"), "qwen_image_vae", "EmptySD3LatentImage", "ModelSamplingAuraFlow",
        note="ComfyUI's Qwen-Image differs from diffusers' own where a side has an odd number of 16-pixel patches, by "
        "up to .03 of\nlatents of standard deviation .59, with a LoRA or without.",
    ),
    sigmas=sigmas,
    alike=4,  # its last block, half of which gets no gradient, must be none of those that are counted
)  # fmt: skip
