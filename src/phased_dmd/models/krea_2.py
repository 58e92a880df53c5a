"""Reads Krea 2 Raw, for text-to-image, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline, Krea2Transformer2DModel
from diffusers.loaders import Krea2LoraLoaderMixin
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3VLModel

from phased_dmd.config.teacher import Krea2Teacher, Size
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    check_pictures,
    check_pipeline,
    decode_clip,
    evenly_shifted,
    line_mu,
    pad_texts,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.qwen_image import PATCH, pack, restored, unpack
from phased_dmd.models.source import Source

PROMPTS = 8  # a call of the text encoder, which keeps every layer's states, of the padding too
TEMPLATE = 34  # tokens that the pipeline puts before each prompt; those behind it count among the most


class Krea2Model(PipelineModel):
    """Is the `VelocityModel` of Krea 2, on latents [b, 16, 1, h, w]: only the network sees them packed."""

    def __init__(self, config: Krea2Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        check_base(source)
        stride = vae_stride(source)
        check_pictures(config.sizes, (stride * PATCH, stride * PATCH), "Krea 2")
        channels = source.config(AutoencoderKLQwenImage, "vae")["z_dim"]
        shapes = [(channels, 1, size.height // stride, size.width // stride) for size in config.sizes]
        kind, targets = Krea2Transformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, Krea2Transformer2DModel)
        fusion = network.text_fusion
        return [*fusion.layerwise_blocks, *fusion.refiner_blocks, *network.transformer_blocks]

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return pad_texts(rows, self.device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        (height, width), text, mask = (side // PATCH for side in x.shape[-2:]), condition["text"], condition["mask"]
        places = Krea2Pipeline.prepare_position_ids(text.shape[1], height, width, x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                pack(x).to(self.dtype), text, t.float(), places, None if mask.all() else mask.to(x.device),
                return_dict=False,
            )[0]  # fmt: skip
        return unpack(velocity, height, width).to(x.dtype)


class Krea2Codec(PipelineCodec):
    """Encodes as the stock pipeline of Krea 2 does, and decodes with its VAE."""

    def __init__(self, config: Krea2Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        layers = source.index.get("text_encoder_select_layers")
        super().__init__(config, source, device, AutoencoderKLQwenImage, ["tokenizer", "text_encoder"], layers)
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        tokenizer = source.load(AutoTokenizer, "tokenizer")
        self.pipeline = Krea2Pipeline(
            vae=self.vae, tokenizer=tokenizer, text_encoder_select_layers=layers, **absent
        )  # fmt: skip

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        pipeline = self.pipeline
        around = pipeline.prompt_template_encode_num_suffix_tokens - pipeline.prompt_template_encode_start_idx
        tokens = pipeline.tokenizer([pipeline.prompt_template_encode_prefix + prompt for prompt in prompts]).input_ids
        return [len(ids) + around for ids in tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, layers, d] for each prompt, the template's end included, without the padding before it:
        the network gives all text one position.
        """
        self.load_encoder(Qwen3VLModel)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            text, mask = self.pipeline.encode_prompt(
                list(prompts[start : start + PROMPTS]), device=self.device, max_sequence_length=self.max_tokens
            )
            rows += [{"text": row[told].cpu()} for row, told in zip(text, mask, strict=True)]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        return decode_clip(self.vae, latents)


def check_base(source: Source) -> None:
    """Raises a UserError for Krea 2 Turbo, as its index says."""
    if source.index.get("is_distilled"):
        raise UserError(
            f"teacher.path: {source.path} is distilled already (is_distilled): it takes no guidance, and the variety "
            "that it lost cannot be learned from it; the recipe krea-2 distils the base, krea/Krea-2-Raw"
        )


def vae_stride(source: Source) -> int:
    """Returns the pixels a side of one latent."""
    return 2 ** len(source.config(AutoencoderKLQwenImage, "vae")["temperal_downsample"])


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["num_text_layers"], config["text_hidden_dim"])}


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps at a size, and 0."""
    tokens = size.height * size.width // (vae_stride(source) * PATCH) ** 2
    return stock_sigmas(source, steps, lambda config: line_mu(config, tokens))


ADAPTER = Adapter(
    Krea2Model, Krea2Codec, Krea2Transformer2DModel, AutoencoderKLQwenImage, Krea2LoraLoaderMixin,
    TextEncoder(Qwen3VLModel, PROMPTS, TEMPLATE), condition, padded=False,
    stock=Stock(
        ("guidance_scale", 0.0), evenly_shifted, pack, pack, restored, lambda _, *given: restored(*given),
        flags={"is_distilled": True},
    ),
    prefix="transformer.", sigmas=sigmas,
)  # fmt: skip
