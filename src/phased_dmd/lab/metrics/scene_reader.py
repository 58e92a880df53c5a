"""Reads scenes: which colours are there, and of each its digit, its place and its motion before the panning camera.

Colours are the key: a digit is the pixels of its hue, and its own network reads what they show.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.checkpoint import load_tensors
from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS, DigitClassifier
from phased_dmd.lab.metrics.scenes import CELLS, COLOURS, HEIGHT, PANS, STRIPES, WIDTH, Scene

WEIGHTS = Path(__file__).parents[2] / "assets" / "scenes.safetensors"
OUTPUTS = len(COLOURS) * (1 + len(WORDS) + len(CELLS))  # of the network over whole frames: what `targets` holds
CROP, CROP_SIDE = 21, 32  # pixels of a frame about a digit, and of the picture of it that is classified
FAINT, FULL = 0.2, 0.8  # shares of a colour's saturation at which a pixel is not, and is wholly, of the digit
LEAST = 6.0  # pixels that a digit has at least
VISIBLE = 0.9  # share of its most pixels that a digit shows in a frame that tells where it is
GREY = 0.05  # distance from grey at which a pixel is none of the background
Readings = dict[str, Tensor]


@dataclass(frozen=True)
class SceneReader:
    """The two networks: of digits cut out of frames [n, 1, 32, 32], and of whole frames [n, 3, 32, 48]."""

    digits: DigitClassifier
    frames: DigitClassifier

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Readings:
        """Reads pictures or clips [n, f, 32, 48, 3] in [0, 1].

        By colour: `present` [n, 4], `label` and `cell` [n, 4]; of clips also `velocity` [n, 4, 2], before the
        background, and the camera's `pan` [n], in pixels a frame (right, down).
        """
        masks = colour_masks(pixels)
        position, weight, present = places(masks)
        velocity, middle = line(position, weight)
        cells = torch.tensor(list(CELLS.values()))
        found = {"present": present, "cell": torch.cdist(middle, cells).argmin(2)}
        found["label"] = self._labels(masks, position, weight, present)
        if pixels.shape[1] > 1:
            found["pan"] = -background_motion(pixels)
            found["velocity"] = velocity + torch.stack([found["pan"], 0 * found["pan"]], 1)[:, None]
        return found

    def _labels(self, masks: Tensor, position: Tensor, weight: Tensor, present: Tensor) -> Tensor:
        """Returns the classes [n, 4] by the mean log-probability over the frames that show the digit."""
        shown = (weight > 0) & present[:, None]  # [n, f, 4]
        scores = torch.zeros(*shown.shape, len(WORDS))
        if shown.any():
            crops = cut_out(masks[shown], position[shown])
            scores[shown] = torch.cat([self.digits(part)[1].log_softmax(1) for part in crops.split(512)])
        return scores.sum(1).argmax(2)


def load_reader() -> tuple[SceneReader, dict[str, Tensor], dict[str, dict[str, float]]]:
    """Loads the shipped reader, the moments of its features of held-out scenes, and its accuracies."""
    tensors, header = load_tensors(WEIGHTS)
    networks = {"digits": DigitClassifier(), "frames": DigitClassifier(3, (HEIGHT, WIDTH), OUTPUTS)}
    for name, network in networks.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        network.load_state_dict(own)
        network.eval()
    real = {key.removeprefix("real."): tensor for key, tensor in tensors.items() if key.startswith("real.")}
    return SceneReader(**networks), real, header["accuracies"]


def colour_masks(pixels: Tensor) -> Tensor:
    """Returns how much of each pixel is of each colour, [n, f, 4, h, w], of clips [n, f, h, w, 3]: none or one is."""
    palette = torch.tensor(list(COLOURS.values()))
    hues = palette - palette.mean(1, keepdim=True)
    away = pixels.float() - pixels.float().mean(4, keepdim=True)
    along = away @ F.normalize(hues, dim=1).T  # [n, f, h, w, 4]
    nearest = F.one_hot(along.argmax(4), len(COLOURS))
    share = ((along / hues.norm(dim=1) - FAINT) / (FULL - FAINT)).clamp(0, 1)
    return (share * nearest).permute(0, 1, 4, 2, 3)


def places(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each colour's centroid [n, f, 4, 2] from the centre, a frame's weight [n, f, 4], and `present` [n, 4].

    Frames in which much of a digit is hidden, or beyond the edge, weigh nothing.
    """
    mass = masks.sum((3, 4))
    x, y = (torch.arange(side) - (side - 1) / 2 for side in (WIDTH, HEIGHT))
    right, down = (masks.sum(3) * x).sum(3), (masks.sum(4) * y).sum(3)
    position = torch.stack([right, down], 3) / mass[..., None].clamp(min=1e-6)
    most = mass.amax(1)
    weight = ((mass / most[:, None].clamp(min=1e-6)) >= VISIBLE).float()
    return position, weight, most >= LEAST


def line(position: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Fits a line to centroids [n, f, 4, 2] by weight [n, f, 4]: (velocity, place in the middle frame), [n, 4, 2]."""
    f = position.shape[1]
    time, w = (torch.arange(f) - (f - 1) / 2)[:, None], weight / weight.sum(1, keepdim=True).clamp(min=1e-6)
    mean_time, mean = (w * time).sum(1), (w[..., None] * position).sum(1)
    apart = w * (time - mean_time[:, None])
    spread = (apart * (time - mean_time[:, None])).sum(1)
    velocity = (apart[..., None] * position).sum(1) / spread[..., None].clamp(min=1e-6)
    return velocity, mean - mean_time[..., None] * velocity


def background_motion(pixels: Tensor) -> Tensor:
    """Returns the motion of the stripes [n] in pixels a frame to the right, by their phase in each frame."""
    n, f, h, w, _ = pixels.shape
    grey = pixels.float().mean(4)
    weight = (1 - (pixels.float() - grey[..., None]).norm(dim=4) / GREY).clamp(min=0)
    turn = 2 * torch.pi * torch.arange(w) / STRIPES
    waves = torch.stack([torch.ones(w), turn.cos(), turn.sin()], 1)  # [w, 3]
    column = weight.sum(2).reshape(n * f, w, 1)
    normal = waves.T @ (column * waves) + 1e-4 * torch.eye(3)
    found = torch.linalg.solve(normal, waves.T @ (weight * grey).sum(2).reshape(n * f, w, 1)).reshape(n, f, 3)
    wave = torch.complex(found[..., 1], found[..., 2])
    turns = (wave[:, 1:] * wave[:, :-1].conj()).angle()
    phase = torch.cat([torch.zeros(n, 1), turns.cumsum(1)], 1)
    time = torch.arange(f) - (f - 1) / 2
    return (phase * time).sum(1) / time.square().sum() * STRIPES / (2 * torch.pi)


def cut_out(masks: Tensor, position: Tensor, warp: Tensor | None = None) -> Tensor:
    """Cuts digits out of masks [m, 32, 48] about positions [m, 2] from the centre: [m, 1, 32, 32].

    warp: matrices [m, 2, 2] that the picture's coordinates are multiplied by, for training.
    """
    size = torch.tensor([WIDTH, HEIGHT])
    square = (torch.eye(2) if warp is None else warp) * (CROP / size)[:, None]
    theta = torch.cat([square.expand(len(masks), 2, 2), (2 * position / size)[..., None]], dim=2)
    grid = F.affine_grid(theta, [len(masks), 1, CROP_SIDE, CROP_SIDE], align_corners=False)
    return F.grid_sample(masks[:, None], grid, align_corners=False)


def truth(scenes: Sequence[Scene]) -> Readings:
    """Returns what scenes name, in the form of a reader's readings; of what is not there, or not named, -1.

    `direction`, `speed` [n, 4] and `pan` [n] are indices here.
    """
    tables = {"label": list(WORDS), "cell": list(CELLS), "direction": list(DIRECTIONS), "speed": list(SPEEDS)}
    found = {name: torch.full((len(scenes), len(COLOURS)), -1) for name in tables}
    present = torch.zeros(len(scenes), len(COLOURS), dtype=torch.bool)
    for i, scene in enumerate(scenes):
        for digit in scene.digits:
            if digit.colour is not None:
                j = list(COLOURS).index(digit.colour)
                present[i, j] = True
                for name, table in tables.items():
                    if (value := vars(digit)[name]) is not None:
                        found[name][i, j] = table.index(value)
    pans = [-1 if scene.pan is None else list(PANS).index(scene.pan) for scene in scenes]
    return {"present": present, **found, "pan": torch.tensor(pans)}


def named_motion(readings: Readings) -> Readings:
    """Returns the readings of clips with motion by its names: `direction`, `speed` [n, 4] and `pan` [n] are indices."""
    velocity, pan = readings["velocity"], readings["pan"]
    speeds, pans = torch.tensor(list(SPEEDS.values())), torch.tensor(list(PANS.values()))
    return readings | {
        "direction": (velocity @ torch.tensor(list(DIRECTIONS.values())).T).argmax(2),
        "speed": (velocity.norm(dim=2)[..., None] - speeds).abs().argmin(2),
        "pan": (pan[:, None] - pans).abs().argmin(1),
    }
