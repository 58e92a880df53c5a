"""The digit classifier of the evaluation, which reads the digit of a picture and gives the features it reads it by."""

from pathlib import Path

import torch
from torch import Tensor, nn

from phased_dmd.checkpoint import load_tensors

WEIGHTS = Path(__file__).parents[2] / "assets" / "digits.safetensors"
FEATURES = 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"right": (1.0, 0.0), "left": (-1.0, 0.0), "down": (0.0, 1.0), "up": (0.0, -1.0)}
SPEEDS = {"slowly": 0.6, "fast": 1.3}  # pixels a frame


class DigitClassifier(nn.Module):
    """A small convolutional network over pictures [n, channels, *size] in [0, 1], by default grey digits."""

    def __init__(self, channels: int = 1, size: tuple[int, int] = (32, 32), outputs: int = 10) -> None:
        super().__init__()
        widths = (channels, 16, 32, 64)
        blocks = [
            (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.body = nn.Sequential(*[layer for block in blocks for layer in block], nn.Flatten())
        self.features = nn.Sequential(nn.Linear(64 * (size[0] // 8) * (size[1] // 8), FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, outputs)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Returns features [n, 64] and logits [n, outputs]."""
        features = self.features(self.body(pictures))
        return features, self.head(features)


def load_classifier() -> tuple[DigitClassifier, dict[str, Tensor], float]:
    """Loads the shipped classifier, the mean and covariance of its features of held-out digits, and its accuracy."""
    tensors, header = load_tensors(WEIGHTS)
    real = {name.removeprefix("real."): tensors.pop(name) for name in ("real.mean", "real.covariance")}
    classifier = DigitClassifier()
    classifier.load_state_dict(tensors)
    return classifier.eval(), real, header["held_out_accuracy"]


@torch.no_grad()
def classify(classifier: DigitClassifier, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Reads pictures or clips [n, f, h, w, 3]: features [n, 64] and log-probabilities [n, 10], averaged over frames."""
    n, f, h, w, _ = pixels.shape
    grey = pixels.mean(4).reshape(n * f, 1, h, w)
    parts = [classifier(part) for part in grey.split(512)]
    features, logits = (torch.cat([part[i] for part in parts]) for i in range(2))
    return features.reshape(n, f, -1).mean(1), logits.log_softmax(1).reshape(n, f, -1).mean(1)
