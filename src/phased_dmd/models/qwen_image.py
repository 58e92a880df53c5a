"""Reads Qwen-Image, for text-to-image, from a diffusers folder."""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from phased_dmd.config.teacher import QwenImageTeacher
from phased_dmd.errors import UserError
from phased_dmd.models.pipeline import PipelineCodec, PipelineModel, check_pipeline, check_sizes
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import Source

PIPELINES = ("QwenImagePipeline",)
PATCH = 2  # latents a side of one of the transformer's tokens
PROMPTS = 8  # a call of the text encoder, which keeps every layer's states and its logits


class QwenImageModel(PipelineModel):
    """Is the `VelocityModel` of Qwen-Image, on latents [b, 16, 1, h, w]: only the network sees them packed."""

    def __init__(self, config: QwenImageTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, PIPELINES)
        if source.config(QwenImageTransformer2DModel, "transformer").get("guidance_embeds"):
            raise UserError(f"teacher.path: {config.path} is distilled from its guidance already, and takes none")
        vae = source.config(AutoencoderKLQwenImage, "vae")
        stride = 2 ** len(vae["temperal_downsample"])
        for i, size in enumerate(config.sizes):
            if size.num_frames != 1:
                raise UserError(f"teacher.sizes.{i}: {size} has {size.num_frames} frames; Qwen-Image makes pictures")
        check_sizes(config.sizes, (1, stride * PATCH, stride * PATCH))
        shapes = [(vae["z_dim"], 1, size.height // stride, size.width // stride) for size in config.sizes]
        super().__init__(config, source, device, QwenImageTransformer2DModel, ["transformer"], shapes)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, QwenImageTransformer2DModel)
        return list(network.transformer_blocks)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """Pads text to [b, tokens, d] with zeros; mask [b, tokens], on the CPU, is true where there is text."""
        texts = [row["text"].to(self.device, self.dtype) for row in rows]
        lengths = torch.tensor([len(text) for text in texts])  # on the CPU, where `predict` reads it without waiting
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return {"text": pad_sequence(texts, batch_first=True), "mask": mask}

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
        check_pipeline(source, PIPELINES)
        super().__init__(config, source, device, AutoencoderKLQwenImage, ["tokenizer", "text_encoder"])
        tokenizer = source.load(Qwen2Tokenizer, "tokenizer")
        absent = {"scheduler": None, "text_encoder": None, "transformer": None}
        self.pipeline = QwenImagePipeline(vae=self.vae, tokenizer=tokenizer, **absent)  # type: ignore[arg-type]
        if config.max_tokens > (most := self.pipeline.tokenizer_max_length):
            raise UserError(f"teacher.max_tokens: {config.max_tokens} is more than Qwen-Image's {most}")

    def free(self) -> None:
        self.pipeline.text_encoder = None

    def too_long(self, prompts: Sequence[str]) -> int:
        template, dropped = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        tokens = self.pipeline.tokenizer([template.format(prompt) for prompt in prompts]).input_ids
        return sum(len(ids) - dropped > self.max_tokens for ids in tokens)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, the template's end included."""
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


def pack(x: Tensor) -> Tensor:
    """Packs latents [b, c, 1, h, w] into tokens [b, h/2 w/2, 4 c]."""
    b, c, _, h, w = x.shape
    patches = x.reshape(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, -1, c * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Unpacks tokens [b, height width, 4 c] into latents [b, c, 1, 2 height, 2 width]."""
    patches = tokens.reshape(len(tokens), height, width, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(len(tokens), -1, 1, PATCH * height, PATCH * width)
