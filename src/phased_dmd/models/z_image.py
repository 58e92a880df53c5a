"""Reads Z-Image, for text-to-image, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from diffusers.loaders import ZImageLoraLoaderMixin
from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3Model

from phased_dmd.config.teacher import Size, ZImageTeacher
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter, Comfy, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    as_picture,
    chat_lengths,
    check_pictures,
    check_pipeline,
    decode_picture,
    evenly_shifted,
    pad_texts,
    stock_sigmas,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source
from phased_dmd.models.trust import read_json

PATCH = 2  # latents a side of one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states
TURBO_SHIFT = 3.0  # of the scheduler of Z-Image-Turbo, whose other files look like the base's; the base has 6


class ZImageModel(PipelineModel):
    """Is the `VelocityModel` of Z-Image, on latents [b, 16, 1, h, w].

    The network is told 1 - t and predicts x_0 - eps, the negative of the velocity.
    """

    def __init__(self, config: ZImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        check_base(source)
        self.most = config.norm_limit
        channels = source.config(ZImageTransformer2DModel, "transformer")["in_channels"]
        stride = vae_stride(source)
        check_pictures(config.sizes, (stride * PATCH, stride * PATCH), "Z-Image")
        shapes = [(channels, 1, size.height // stride, size.width // stride) for size in config.sizes]
        kind, targets = ZImageTransformer2DModel, config.lora_targets
        super().__init__(config, source, device, kind, targets, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, ZImageTransformer2DModel)
        return [*network.noise_refiner, *network.context_refiner, *network.layers]

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return pad_texts(rows, self.device, self.dtype)

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        lengths = condition["mask"].sum(1).tolist()
        texts = [text[:length] for text, length in zip(condition["text"], lengths, strict=True)]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            predicted = network(list(x.to(self.dtype)), (1 - t).float(), texts, return_dict=False)[0]
        return -torch.stack(list(predicted)).to(x.dtype)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        """Guides, and shortens each sample whose norm is over `norm_limit` times the conditional's, if there is one."""
        guided = super().guide(conditional, unconditional, guidance)
        if not self.most:
            return guided
        norm, most = guided.flatten(1).norm(dim=1), self.most * conditional.flatten(1).norm(dim=1)
        scale = torch.where(norm > most, most / norm, 1.0)
        return guided * scale.reshape(-1, *[1] * (guided.ndim - 1))


class ZImageCodec(PipelineCodec):
    """Encodes as the stock pipeline of Z-Image does, and decodes with its VAE."""

    def __init__(self, config: ZImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        super().__init__(config, source, device, AutoencoderKL, ["tokenizer", "text_encoder"])
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = ZImagePipeline(vae=self.vae, tokenizer=source.load(AutoTokenizer, "tokenizer"), **absent)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return chat_lengths(self.pipeline.tokenizer, prompts, thinking=True)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, the template's tokens included."""
        self.load_encoder(Qwen3Model)
        rows = []
        for start in range(0, len(prompts), PROMPTS):
            texts, _ = self.pipeline.encode_prompt(
                list(prompts[start : start + PROMPTS]), device=self.device, do_classifier_free_guidance=False,
                max_sequence_length=self.max_tokens,
            )  # fmt: skip
            rows += [{"text": text.cpu().clone()} for text in texts]
        return rows

    def decode(self, latents: Tensor) -> Tensor:
        config, latents = self.vae.config, latents[:, :, 0].to(self.vae.device, self.vae.dtype)
        return decode_picture(self.vae, latents / config["scaling_factor"] + config["shift_factor"])


def check_base(source: Source) -> None:
    """Raises a UserError for Z-Image-Turbo, by its name or by its scheduler's shift: its files look like the base's."""
    shift = read_json(source.part_folder("scheduler") / "scheduler_config.json").get("shift")
    if "turbo" in Path(source.path).name.lower() or shift == TURBO_SHIFT:
        raise UserError(
            f"teacher.path: {source.path} is Z-Image-Turbo, which is distilled already: it takes no guidance, and the "
            "variety that it lost cannot be learned from it; the recipe z-image distils the base, Tongyi-MAI/Z-Image"
        )


def vae_stride(source: Source) -> int:
    """Returns the pixels a side of one latent."""
    return 2 ** (len(source.config(AutoencoderKL, "vae")["block_out_channels"]) - 1)


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    return {"text": (tokens, config["cap_feat_dim"])}


def sigmas(source: Source, size: Size, steps: int) -> Sequence[float]:
    """Returns the times of the stock pipeline's steps at a size, and 0."""
    side = vae_stride(source) * PATCH
    tokens = (size.height // side) * (size.width // side)

    def mu(config: Mapping[str, Any]) -> float:
        lengths = config["base_image_seq_len"], config["max_image_seq_len"]
        return calculate_shift(tokens, *lengths, config["base_shift"], config["max_shift"])

    return stock_sigmas(source, steps, mu)


ADAPTER = Adapter(
    ZImageModel, ZImageCodec, ZImageTransformer2DModel, AutoencoderKL, ZImageLoraLoaderMixin,
    TextEncoder(Qwen3Model, PROMPTS), condition, padded=False,
    stock=Stock(
        ("guidance_scale", 0.0), evenly_shifted, as_picture, as_picture, lambda x, *_: x[:, :, None],
        lambda _, x, *__: x[:, :, None],
    ),
    comfy=Comfy(
        {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48]},
        ((r"z_image", "z_image_bf16"),),
        ("qwen_3_4b", "lumina2"), "ae", "EmptySD3LatentImage", "ModelSamplingAuraFlow",
    ),
    decoded=lambda shape: (*shape[:2], *shape[3:]), sigmas=sigmas,
)  # fmt: skip
