"""Pictures, clips, contact sheets and scatter plots on disk; pictures are read as a viewer shows them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, ImageSequence
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.errors import UserError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # none of them runs another program
ON_THEIR_SIDE = (5, 6, 7, 8)  # values of EXIF's orientation
PNG_EXIF = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # chunks that may come behind the pixels
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
MEDIA = (".png", ".jpg", ".jpeg", ".webp", ".gif", *VIDEOS)
CLIP_SIZE = 128  # pixels a side, at least, of a written clip
COUNT = "frames"  # after their number, in a written clip: WebP joins equal frames into a longer one
FRAMES = 9  # of a clip, at most, among thumbnails
MARGIN = 0.6  # about the points that axes are laid around


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens a picture file. What is wrong with it, inside the block too, is a UserError; Pillow warns of nothing."""
    try:
        if not path.is_file():
            holder = next((parent for parent in path.parents if parent.is_file()), None)
            raise OSError(f"it is inside {holder}; save it as a file of its own" if holder else "no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as picture:
                yield picture
    except Exception as error:  # Pillow's plugins raise OSError, ValueError, SyntaxError, its own: all mean a bad file
        raise UserError(f"{path}: cannot be read as a picture ({' '.join(str(error).split())})") from error


def as_shown(picture: Image.Image) -> Image.Image:
    """Returns a picture in RGB: turned as its EXIF says, 16 bits of grey scaled to 8, and what is transparent on white.

    White is what pages and most viewers put behind a picture; the colours stored under transparency are whatever a
    program left there, and nobody has seen them. Numbers without a white of their own are a ValueError.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        numbers = np.asarray(picture).astype(np.int64)
        if numbers.min() < 0 or numbers.max() > 65535:
            raise ValueError("its pixels are numbers beyond 16 bits; save it with 8 or 16 bits")
        grey = (numbers + 128) // 257
        grey[numbers == picture.info.get("transparency")] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def read_picture(path: Path) -> Image.Image:
    """Reads a picture, or an animation's first frame, in RGB as it is shown."""
    with opened(path) as picture:
        return as_shown(picture)


def shown_size(path: Path) -> tuple[int, int]:
    """Returns the width and height of a picture as it is shown; from the file's head where that tells."""
    with opened(path) as picture:
        if picture.format == "TIFF":  # Pillow turns these itself, some versions the size alone beforehand
            return as_shown(picture).size
        if picture.format == "PNG" and not any(name in path.read_bytes() for name in PNG_EXIF):
            return picture.size
        turned = picture.getexif().get(ExifTags.Base.Orientation) in ON_THEIR_SIDE
        return (picture.height, picture.width) if turned else picture.size


def read_media(path: Path) -> tuple[Tensor, float | None]:
    """Reads a picture, animation or video as [f, h, w, 3] in [0, 1], and its frames a second, None for a picture.

    Raises UserError for a file that cannot be read.
    """
    if path.suffix.lower() in VIDEOS:
        return _read_video(path)
    frames, milliseconds = [], []
    with opened(path) as file:
        marked = file.info.get("xmp", b"").decode(errors="ignore").removesuffix(f" {COUNT}")
        for frame in ImageSequence.Iterator(file):
            frames.append(np.asarray(as_shown(frame)))
            milliseconds.append(frame.info.get("duration", 0))
    count, total = int(marked) if marked.isdigit() else len(frames), sum(milliseconds)
    if len(frames) == 1:
        repeats = [count]
    elif count > len(frames):
        repeats = [round(length * count / total) for length in milliseconds]
    else:
        repeats = [1] * len(frames)
    pixels = torch.from_numpy(np.repeat(np.stack(frames), repeats, 0)).float() / 255
    return pixels, 1000 * count / total if total and count > 1 else None


def _read_video(path: Path) -> tuple[Tensor, float | None]:
    try:
        import cv2
    except ImportError as error:
        raise UserError(f"{path}: a video needs OpenCV; pip install 'phased-dmd[eval]'") from error
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1][..., ::-1])
    if not frames:
        raise UserError(f"{path}: cannot be read as a video")
    return torch.from_numpy(np.stack(frames)).float() / 255, capture.get(cv2.CAP_PROP_FPS) or None


def to_bytes(pixels: Tensor) -> Tensor:
    """Scales [0, 1] to the whole numbers 0, ..., 255."""
    return (pixels.clamp(0, 1) * 255).round().byte()


def to_images(frames: Tensor) -> list[Image.Image]:
    """Turns [n, h, w, 3] in [0, 1] into images."""
    return [Image.fromarray(frame) for frame in to_bytes(frames).numpy()]


def enlarged(frames: Tensor, factor: int) -> Tensor:
    """Repeats every pixel of frames [n, h, w, 3] so often to each side."""
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def shrunk(frames: Tensor, most: int) -> Tensor:
    """Shrinks frames [n, h, w, 3] that are higher than `most` pixels to that height."""
    h, w = frames.shape[1:3]
    if h <= most:
        return frames
    size = max(1, most), max(1, round(w * most / h))
    return F.interpolate(frames.permute(0, 3, 1, 2), size, mode="bilinear", antialias=True).permute(0, 2, 3, 1)


def thumbnails(pixels: Tensor, most: int) -> Tensor:
    """Returns bytes [n, k, h, w, 3] of clips [n, f, h, w, 3]: frames spread over each, at most `most` pixels high."""
    n, f = pixels.shape[:2]
    few = pixels[:, torch.linspace(0, f - 1, min(f, FRAMES)).round().long()]
    return to_bytes(shrunk(few.flatten(0, 1), most)).unflatten(0, (n, -1))


def strip(frames: Tensor, most: int | None = None) -> Image.Image:
    """Lays frames [f, h, w, 3] side by side. most: pixels of their height; higher ones are shrunk."""
    shown = shrunk(frames, most or frames.shape[1])
    return to_images(torch.cat(list(shown), 1)[None])[0]


def save_image(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def save_clip(frames: Tensor, path: Path, fps: float) -> None:
    """Writes a clip [f, h, w, 3] as a looping animated WebP; a small one enlarged without smoothing, and lossless."""
    factor = max(1, round(CLIP_SIZE / frames.shape[1]))
    first, *rest = to_images(enlarged(frames, factor))
    path.parent.mkdir(parents=True, exist_ok=True)
    first.save(
        path, save_all=True, append_images=rest, duration=round(1000 / fps), loop=0, lossless=factor > 1,
        xmp=f"{len(frames)} {COUNT}".encode(),
    )  # fmt: skip


def save_points(path: Path, clouds: Mapping[str, Tensor], about: Tensor) -> None:
    """Plots samples [n, 1] as histograms, or [n, 2] as scatter plots, side by side under their names.

    about: [m, 1] or [m, 2], what the axes of every picture are laid around.
    """
    from matplotlib.figure import Figure

    figure = Figure((3.2 * len(clouds), 3.2), layout="constrained")
    panels = figure.subplots(1, len(clouds), squeeze=False, sharey=True)[0]
    low, high = about.min(0).values - MARGIN, about.max(0).values + MARGIN
    for panel, (name, points) in zip(panels, clouds.items(), strict=True):
        if points.shape[1] == 1:
            panel.hist(points[:, 0].numpy(), bins=100)
        else:
            panel.scatter(points[:, 0].numpy(), points[:, 1].numpy(), s=2, alpha=0.4)
            panel.set_aspect("equal")
            panel.set_ylim(low[1].item(), high[1].item())
        panel.set_xlim(low[0].item(), high[0].item())
        panel.set_title(name, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
