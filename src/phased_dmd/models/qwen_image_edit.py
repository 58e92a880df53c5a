"""Reads Qwen-Image-Edit (Plus), which changes a picture as a prompt asks, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImageEditPlusPipeline, QwenImageTransformer2DModel
from diffusers.loaders import QwenImageLoraLoaderMixin
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer, Qwen2VLProcessor
from transformers.processing_utils import ProcessorMixin

from phased_dmd.config.teacher import QwenImageEditTeacher
from phased_dmd.media import read_picture
from phased_dmd.models.adapter import Adapter, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    check_pipeline,
    decode_clip,
    evenly_shifted,
    fitting_sizes,
    pad_texts,
)
from phased_dmd.models.protocol import NEGATIVE, Condition
from phased_dmd.models.qwen_image import PATCH, QwenImageModel, pack, restored, sigmas, unpack
from phased_dmd.models.source import Source

STRIDE = 8  # pixels a side of a latent of Qwen-Image's VAE, for `plan`
TEMPLATE = 64  # tokens that the pipeline puts before each prompt


class QwenImageEditModel(QwenImageModel):
    """Is the `VelocityModel` of Qwen-Image-Edit: Qwen-Image's, told a picture as further tokens (`image`, its latents
    [b, 16, 1, h, w]), and in the text.
    """

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """Pads the prompts' texts, and those of the negative prompt beside each picture."""
        if not rows[0]:
            return {}  # without a picture there is no text
        negative = pad_texts([{"text": row[f"{NEGATIVE}text"]} for row in rows], self.device, self.dtype)
        image = torch.stack([row["image"] for row in rows]).to(self.device, torch.float32)  # as exact as x
        told = pad_texts(rows, self.device, self.dtype) | {"image": image}
        return told | {NEGATIVE + name: part for name, part in negative.items()}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        mask, image = condition["mask"], condition["image"]
        shapes = [(1, part.shape[-2] // PATCH, part.shape[-1] // PATCH) for part in (x, image)]
        _, height, width = shapes[0]
        tokens = torch.cat([pack(x), pack(image.to(x.dtype))], dim=1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                tokens.to(self.dtype), condition["text"], None if mask.all() else mask.to(x.device), t.float(),
                [shapes] * len(x), return_dict=False,
            )[0]  # fmt: skip
        return unpack(velocity[:, : height * width], height, width).to(x.dtype)


class PictureProcessor(Qwen2VLProcessor):
    """Is the stock pipeline's processor for prompts with pictures: that for clips needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([self.image_token, self.video_token])


class QwenImageEditCodec(PipelineCodec):
    """Encodes as the stock pipeline of Qwen-Image-Edit does, and decodes with its VAE. Like it, it cuts nothing off."""

    takes_images = True

    def __init__(self, config: QwenImageEditTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        self.sizes, self.negative = config.sizes, config.negative_prompt
        parts = ["tokenizer", "processor", "text_encoder", "vae"]
        about = [str(size) for size in config.sizes], self.negative
        super().__init__(config, source, device, AutoencoderKLQwenImage, parts, *about)
        absent: Any = {"scheduler": None, "text_encoder": None, "transformer": None}
        tokenizer, processor = source.load(Qwen2Tokenizer, "tokenizer"), source.load(PictureProcessor, "processor")
        self.pipeline = QwenImageEditPlusPipeline(vae=self.vae, tokenizer=tokenizer, processor=processor, **absent)

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in self.pipeline.tokenizer(list(prompts)).input_ids]

    def too_long(self, prompts: Sequence[str]) -> int:
        return 0  # nothing is cut off

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns nothing: a prompt is read beside its picture."""
        return [{} for _ in prompts]

    def fits(self, image: Path) -> list[int]:
        return fitting_sizes(image, self.sizes)

    @torch.no_grad()
    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        """Returns text and negative_text [tokens, d], and image [16, 1, h, w]: the picture in the bucket's shape."""
        self.load_encoder(Qwen2_5_VLForConditionalGeneration)
        shown, size, processor = read_picture(picture), self.sizes[bucket], self.pipeline.image_processor
        small, large = (calculate_dimensions(area, size.width / size.height) for area in AREAS)
        seen: Any = [processor.resize(shown, small[1], small[0])]
        texts = [self.pipeline.encode_prompt([text], seen, self.device)[0][0].cpu() for text in (prompt, self.negative)]
        pixels = processor.preprocess(shown, large[1], large[0]).unsqueeze(2).to(self.device, self.vae.dtype)
        latents = self.pipeline._encode_vae_image(pixels, None)[0].cpu()  # type: ignore[arg-type] nothing is drawn
        return {"text": texts[0], f"{NEGATIVE}text": texts[1], "image": latents}

    def decode(self, latents: Tensor) -> Tensor:
        return decode_clip(self.vae, latents)


AREAS = (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
)  # in pixels, of a picture as the text encoder and as the VAE are given it


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`."""
    width, height = calculate_dimensions(VAE_IMAGE_SIZE, shape[-1] / shape[-2])
    text = (tokens, config["joint_attention_dim"])
    return {
        "text": text, f"{NEGATIVE}text": text, "image": (shape[0], 1, height // STRIDE, width // STRIDE),
    }  # fmt: skip


ADAPTER = Adapter(
    QwenImageEditModel, QwenImageEditCodec, QwenImageTransformer2DModel, AutoencoderKLQwenImage,
    QwenImageLoraLoaderMixin, TextEncoder(Qwen2_5_VLForConditionalGeneration, 1, TEMPLATE), condition, padded=False,
    stock=Stock(
        ("true_cfg_scale", 1.0), evenly_shifted, pack, pack, restored, lambda _, *given: restored(*given), alone=True,
        parts=lambda source: {"processor": source.load(PictureProcessor, "processor")},
    ),
    takes_images=lambda _teacher, _source: True, alike=4, sigmas=sigmas,
)  # fmt: skip
