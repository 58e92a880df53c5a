"""Reads the bases of FLUX.2 klein, for text-to-image, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.loaders import Flux2LoraLoaderMixin
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle
from transformers import AutoTokenizer, Qwen3ForCausalLM

from phased_dmd.config.teacher import Flux2KleinTeacher, Size
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    as_picture,
    as_tokens,
    chat_lengths,
    check_pictures,
    check_pipeline,
    decode_picture,
    evenly_shifted,
    from_tokens,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source

PATCH = 2  # latents of the VAE a side of one of ours, which is one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states and its logits


class Flux2KleinModel(PipelineModel):
    """Is the `VelocityModel` of FLUX.2 klein, on latents [b, 128, 1, h, w]: the VAE's in patches, normalised by its
    batch norm's statistics.
    """

    def __init__(self, config: Flux2KleinTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        shape = source.config(Flux2Transformer2DModel, "transformer")
        check_base(source, shape)
        stride = token_stride(source)
        check_pictures(config.sizes, (stride, stride), "FLUX.2 klein")
        shapes = [(shape["in_channels"], 1, size.height // stride, size.width // stride) for size in config.sizes]
        kind, targets = Flux2Transformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, Flux2Transformer2DModel)
        return [*network.transformer_blocks, *network.single_transformer_blocks]

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """Stacks text [b, tokens, d], all of full length: the network attends to its padding."""
        return {"text": torch.stack([row["text"] for row in rows]).to(self.device, self.dtype)}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        text, (height, width) = condition["text"], x.shape[-2:]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                as_tokens(x).to(self.dtype), text, t.float(), positions(height, width, 1).to(x.device),
                positions(1, 1, text.shape[1]).to(x.device), return_dict=False,
            )[0]  # fmt: skip
        return from_tokens(velocity, height, width).to(x.dtype)


class Flux2KleinCodec(PipelineCodec):
    """Encodes as the stock pipeline of FLUX.2 klein does, and decodes with its VAE."""

    def __init__(self, config: Flux2KleinTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        super().__init__(config, source, device, AutoencoderKLFlux2, ["tokenizer", "text_encoder"])
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = Flux2KleinPipeline(vae=self.vae, tokenizer=source.load(AutoTokenizer, "tokenizer"), **absent)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return chat_lengths(self.pipeline.tokenizer, prompts, thinking=False)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, three layers' states side by side, with those of the padding."""
        self.load_encoder(Qwen3ForCausalLM)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            text, _ = self.pipeline.encode_prompt(
                list(prompts[start : start + PROMPTS]), device=self.device, max_sequence_length=self.max_tokens
            )
            rows += [{"text": row.cpu().clone()} for row in text]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        latents = latents[:, :, 0].to(self.vae.device, self.vae.dtype)
        mean, std = statistics(self.vae)
        return decode_picture(self.vae, pixel_shuffle(latents * std + mean, PATCH))


def check_base(source: Source, shape: Mapping[str, Any]) -> None:
    """Raises a UserError for a base that is distilled already, as its index or its transformer's shape says."""
    if source.index.get("is_distilled"):
        raise UserError(
            f"teacher.path: {source.path} is distilled already (is_distilled): it takes no guidance, and the variety "
            "that it lost cannot be learned from it; the recipes flux2-klein-4b and flux2-klein-9b distil the bases"
        )
    if shape["guidance_embeds"]:
        raise UserError(f"teacher.path: {source.path} is distilled from its guidance already, and takes none")


def token_stride(source: Source) -> int:
    """Returns the pixels a side of one token."""
    return PATCH * 2 ** (len(source.config(AutoencoderKLFlux2, "vae")["block_out_channels"]) - 1)


def statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Returns the mean and the standard deviation of the VAE's latents in patches, [1, channels, 1, 1] each."""
    std = torch.sqrt(vae.bn.running_var + vae.config["batch_norm_eps"])
    return vae.bn.running_mean.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)


def positions(height: int, width: int, length: int) -> Tensor:
    """Returns the positions [tokens, 4] of a picture's tokens, or of a text's: time, height, width and length."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(length))


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["joint_attention_dim"])}


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps at a size, and 0: the shift depends on their number, too."""
    side = token_stride(source)
    tokens = (size.height // side) * (size.width // side)
    return stock_sigmas(source, steps, lambda _: compute_empirical_mu(tokens, steps))


def returned(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Returns the latents of the VAE, which the stock pipeline gives, as ours."""
    mean, std = statistics(pipeline.vae)
    return ((pixel_unshuffle(latents, PATCH) - mean) / std)[:, :, None]


ADAPTER = Adapter(
    Flux2KleinModel, Flux2KleinCodec, Flux2Transformer2DModel, AutoencoderKLFlux2, Flux2LoraLoaderMixin,
    TextEncoder(Qwen3ForCausalLM, PROMPTS, options={"output_hidden_states": True, "use_cache": False}), condition,
    padded=True,
    stock=Stock(
        ("guidance_scale", 1.0), evenly_shifted, as_picture, as_tokens, from_tokens, returned,
        flags={"is_distilled": True},
    ),
    decoded=lambda shape: (shape[0], shape[1] // PATCH**2, shape[3] * PATCH, shape[4] * PATCH),
    prefix="transformer.", sigmas=sigmas,
)  # fmt: skip
