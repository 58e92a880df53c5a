"""How well pictures fit their prompts: the cosine of a CLIP model's two embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from phased_dmd.engine.world import device
from phased_dmd.lab.metrics.features import check_settings, loading, name_of, preprocess
from phased_dmd.models.source import REPORTED, check_loaded


@dataclass(frozen=True)
class Alignment:
    """A model that compares samples with prompts, and the name that stands beside every number made with it."""

    name: str
    embed_pictures: Callable[[Tensor], Tensor]  # [b, 3, h, w] in [0, 1] on the device to [b, d]
    embed_texts: Callable[[Sequence[str]], Tensor]

    @torch.no_grad()
    def __call__(self, pixels: Tensor, texts: Sequence[str]) -> Tensor:
        """Returns the mean over frames of the cosine [n], on the CPU, of samples [n, f, h, w, 3] and prompts."""
        frames = [self.embed_pictures(one.to(device()).permute(0, 3, 1, 2).clamp(0, 1)) for one in pixels]
        pictures = torch.stack([normalize(f.float(), dim=1).mean(0) for f in frames])
        return (pictures * normalize(self.embed_texts(texts).float(), dim=1)).sum(1).cpu()


def load_alignment(source: str) -> Alignment:
    """Loads a CLIP model of transformers by its hub id or local folder; raises UserError that says what is missing."""
    from transformers import AutoTokenizer, CLIPModel, ImageProcessingMixin

    where = f"alignment: {source}"
    with loading(f"{where} is no hub id or folder of a CLIP model that loads"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = CLIPModel.from_pretrained(source, use_safetensors=True, **REPORTED)  # type: ignore[misc] a pair when asked
    check_loaded(where, model, report)
    check_settings(settings, where)
    model.eval().to(device())

    def embed_texts(texts: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(device())
        return model.get_text_features(**tokens).pooler_output

    return Alignment(
        f"{name_of(source)}, clip",
        lambda pictures: model.get_image_features(pixel_values=preprocess(pictures, settings)).pooler_output,
        embed_texts,
    )
