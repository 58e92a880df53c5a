"""Reads Lumina-Image 2.0, for text-to-image, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, Lumina2Pipeline, Lumina2Transformer2DModel
from diffusers.loaders import Lumina2LoraLoaderMixin
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma2Model

from phased_dmd.config.teacher import Lumina2Teacher, Size
from phased_dmd.models.adapter import Adapter, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    as_picture,
    check_pictures,
    check_pipeline,
    decode_picture,
    evenly_shifted,
    line_mu,
    pad_texts,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source

PATCH = 2  # latents a side of one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states, of the padding too


class Lumina2Model(PipelineModel):
    """Is the `VelocityModel` of Lumina-Image 2.0, on latents [b, 16, 1, h, w].

    The network is told 1 - t and predicts x_0 - eps, the negative of the velocity.
    """

    def __init__(self, config: Lumina2Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        stride = 2 ** (len(source.config(AutoencoderKL, "vae")["block_out_channels"]) - 1)
        check_pictures(config.sizes, (stride * PATCH, stride * PATCH), "Lumina-Image 2.0")
        channels = source.config(Lumina2Transformer2DModel, "transformer")["in_channels"]
        shapes = [(channels, 1, size.height // stride, size.width // stride) for size in config.sizes]
        kind, targets = Lumina2Transformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, Lumina2Transformer2DModel)
        return [*network.noise_refiner, *network.context_refiner, *network.layers]

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return pad_texts(rows, self.device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = network(
                x[:, :, 0].to(self.dtype), (1 - t).float(), condition["text"], condition["mask"].to(x.device),
                return_dict=False,
            )[0]  # fmt: skip
        return -predicted[:, :, None].to(x.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Guides, and rescales each row of a channel to the norm of the conditional's; one of zeros stays so."""
        guided = super().guide(conditional, unconditional, guidance)
        norm = guided.norm(dim=-1, keepdim=True)
        return guided * conditional.norm(dim=-1, keepdim=True) / norm.masked_fill(norm == 0, 1)


class Lumina2Codec(PipelineCodec):
    """Encodes as the stock pipeline of Lumina-Image 2.0 does, and decodes with its VAE.

    A prompt follows the system's, which the pipeline leaves out before the negative prompt.
    """

    def __init__(self, config: Lumina2Teacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        self.negative = config.negative_prompt
        super().__init__(config, source, device, AutoencoderKL, ["tokenizer", "text_encoder"], self.negative)
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = Lumina2Pipeline(vae=self.vae, tokenizer=source.load(AutoTokenizer, "tokenizer"), **absent)

    def full(self, prompt: str) -> str:
        """Returns a prompt behind the system's, and the negative prompt as it is."""
        return prompt if prompt == self.negative else f"{self.pipeline.system_prompt} <Prompt Start> {prompt}"

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        tokens = self.pipeline.tokenizer([self.full(prompt) for prompt in prompts]).input_ids
        return [len(ids) for ids in tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, the system's tokens included."""
        self.load_encoder(Gemma2Model)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            full = [self.full(prompt) for prompt in prompts[start : start + PROMPTS]]
            text, mask = self.pipeline._get_gemma_prompt_embeds(full, self.device, self.max_tokens)
            rows += [{"text": row[told.bool()].cpu()} for row, told in zip(text, mask, strict=True)]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        config, latents = self.vae.config, latents[:, :, 0].to(self.vae.device, self.vae.dtype)
        return decode_picture(self.vae, latents / config["scaling_factor"] + config["shift_factor"])


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["cap_feat_dim"])}


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps, and 0; it takes the channels for the number of tokens."""
    channels = source.config(Lumina2Transformer2DModel, "transformer")["in_channels"]
    return stock_sigmas(source, steps, lambda config: line_mu(config, channels))


ADAPTER = Adapter(
    Lumina2Model, Lumina2Codec, Lumina2Transformer2DModel, AutoencoderKL, Lumina2LoraLoaderMixin,
    TextEncoder(Gemma2Model, PROMPTS), condition, padded=False,
    stock=Stock(
        ("guidance_scale", 1.0), evenly_shifted, as_picture, as_picture, lambda x, *_: x[:, :, None],
        lambda _, x, *__: x[:, :, None], rounds=True,
    ),
    decoded=lambda shape: (*shape[:2], *shape[3:]), prefix="transformer.", sigmas=sigmas,
)  # fmt: skip
