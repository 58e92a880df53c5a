"""Reads Qwen-Image-2.1, for text-to-image, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Pipeline, QwenImage21Transformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor
from transformers.processing_utils import ProcessorMixin

from phased_dmd.config.teacher import QwenImage21Teacher, Size
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    as_tokens,
    check_pictures,
    check_pipeline,
    decode_clip,
    evenly_shifted,
    from_tokens,
    line_mu,
    pad_texts,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source

STRIDE = 16  # pixels a side of a latent, which is a token
SLOT = 4  # tokens, two by two, to each place of the text encoder's sequence
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states and its logits
TEMPLATE = 23  # tokens around each prompt: the system's message, which is dropped, and the ends of the chat's turns


class QwenImage21Model(PipelineModel):
    """Is the `VelocityModel` of Qwen-Image-2.1, on latents [b, 64, 1, h, w].

    The network takes text and picture as one sequence: text attends to the text before it, the picture to all.
    """

    def __init__(self, config: QwenImage21Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        check_base(source)
        channels = source.config(QwenImage21Transformer2DModel, "transformer")["in_channels"]
        check_pictures(config.sizes, (2 * STRIDE, 2 * STRIDE), "Qwen-Image-2.1")
        shapes = [(channels, 1, size.height // STRIDE, size.width // STRIDE) for size in config.sizes]
        kind, targets = QwenImage21Transformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, QwenImage21Transformer2DModel)
        return list(network.transformer_blocks)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return pad_texts(rows, self.device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Calls the network once a sample: in one call the picture's positions begin where the longest text ends."""
        (height, width), lengths = x.shape[-2:], condition["mask"].sum(1).tolist()
        velocities = []
        for i, length in enumerate(lengths):
            text, slots = condition["text"][i : i + 1, :length], length + height * width // SLOT
            is_picture = torch.arange(slots, device=x.device)[None] >= length
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                sequence = network(
                    as_tokens(x[i : i + 1]).to(self.dtype), text, t[i : i + 1].float(), [[(1, height, width)]],
                    is_picture, return_dict=False,
                )[0]  # fmt: skip
            velocities.append(from_tokens(sequence[:, -height * width :], height, width))
        return torch.cat(velocities).to(x.dtype)


class TextProcessor(Qwen3VLProcessor):
    """Is the stock pipeline's processor for prompts alone: that for pictures and clips needs torchvision."""

    def __init__(self, tokenizer: Any = None, chat_template: str | None = None) -> None:
        ProcessorMixin.__init__(self, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])


class QwenImage21Codec(PipelineCodec):
    """Encodes as the stock pipeline of Qwen-Image-2.1 does, and decodes with its VAE, on white where it is transparent.

    The pipeline cuts nothing off; here what is beyond the most tokens is.
    """

    def __init__(self, config: QwenImage21Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        super().__init__(config, source, device, AutoencoderKLQwenImage21, ["processor", "text_encoder"])
        processor = source.load(TextProcessor, "processor")
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline: Any = processor and QwenImage21Pipeline(vae=self.vae, processor=processor, **absent)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        template, tokenizer = self.pipeline.prompt_template_t2i, self.pipeline.processor.tokenizer
        tokens = tokenizer([template.format(prompt) for prompt in prompts]).input_ids
        return [len(ids) - self.pipeline._drop_idx for ids in tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, the ends of the chat's turns included."""
        self.load_encoder(Qwen3VLForConditionalGeneration)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            text, mask, _ = self.pipeline.encode_prompt(list(prompts[start : start + PROMPTS]), device=self.device)
            lengths = [text.shape[1]] * len(text) if mask is None else mask.sum(1).tolist()
            kept = (min(length, self.max_tokens) for length in lengths)
            rows += [{"text": row[:length].cpu().clone()} for row, length in zip(text, kept, strict=True)]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        pixels = decode_clip(self.vae, latents)
        return pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]


def check_base(source: Source) -> None:
    """Raises a UserError for a base that is distilled already, whose index has the times of its few steps."""
    if source.index.get("sample_sigmas"):
        raise UserError(
            f"teacher.path: {source.path} is distilled already (sample_sigmas): the variety that it lost cannot be "
            "learned from it; the recipe qwen-image-2.1 distils the base, Qwen/Qwen-Image-2.1"
        )


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["context_in_dim"])}


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps at a size, and 0."""
    tokens = size.height * size.width // STRIDE**2
    return stock_sigmas(source, steps, lambda config: line_mu(config, tokens))


ADAPTER = Adapter(
    QwenImage21Model, QwenImage21Codec, QwenImage21Transformer2DModel, AutoencoderKLQwenImage21,
    QwenImageLoraLoaderMixin, TextEncoder(Qwen3VLForConditionalGeneration, PROMPTS, TEMPLATE), condition, padded=False,
    stock=Stock(
        ("true_cfg_scale", 1.0), evenly_shifted, as_tokens, as_tokens, from_tokens,
        lambda _, tokens, *size: from_tokens(tokens, *size), limits=False, alone=True, grid="sample_sigmas",
        parts=lambda source: {"processor": source.load(TextProcessor, "processor")},
        fixed={"use_kv_cache": False},  # it would keep what the first step's expert makes of the text for the others
    ),
    sigmas=sigmas,
)  # fmt: skip
