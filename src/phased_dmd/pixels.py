"""Measures of pixels [n, f, h, w, 3] in [0, 1] that need no network: sharpness, contrast, colour, motion of the ink."""

import torch
from torch import Tensor


def high_frequency_energy(pixels: Tensor) -> float:
    """Returns the mean power of the grey frames above half the Nyquist frequency."""
    grey = pixels.mean(4)
    power = torch.fft.fft2(grey, norm="ortho").abs() ** 2
    rows, columns = (torch.fft.fftfreq(size).abs() for size in grey.shape[-2:])
    high = torch.maximum(rows[:, None], columns[None]) > 0.25
    return float(power[..., high].mean())


def contrast(pixels: Tensor) -> float:
    """Returns the mean over frames of the standard deviation of grey values."""
    return float(pixels.mean(4).flatten(2).std(2).mean())


def sharpness(pixels: Tensor) -> float:
    """Returns the mean over frames of the variance of the grey values' Laplacian (4 neighbours, borders left out)."""
    grey = pixels.mean(4)
    inner = grey[..., 1:-1, 1:-1]
    sides = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return float((sides - 4 * inner).flatten(2).var(2, correction=0).mean())


def saturation(pixels: Tensor) -> float:
    """Returns the mean saturation of the HSV model, (max - min) / max over the channels; grey and black have 0."""
    most, least = pixels.clamp(0, 1).amax(4), pixels.clamp(0, 1).amin(4)
    return float(((most - least) / most.clamp(min=1e-6)).mean())


def likeness(pixels: Tensor) -> float:
    """Returns the mean cosine of two of the samples, each less its own mean: 1 where all are one picture.

    A single sample is a ValueError.
    """
    if len(pixels) < 2:
        raise ValueError("likeness: is of two samples or more")
    flat = pixels.flatten(1).double()
    flat = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
    return float(((flat @ flat.T).sum() - len(flat)) / (len(flat) * (len(flat) - 1)))


def displacement(pixels: Tensor) -> Tensor:
    """Returns how far the ink's centre moves from a clip's first third to its last, [n, 2] pixels (right, down)."""
    ink = pixels.mean(4).clamp(min=0) ** 2  # squared, so that faint background counts little
    mass = ink.sum((2, 3)).clamp(min=1e-6)
    down, right = (torch.arange(size, dtype=ink.dtype) for size in ink.shape[-2:])
    centre = torch.stack([(ink.sum(2) * right).sum(2) / mass, (ink.sum(3) * down).sum(2) / mass], 2)  # [n, f, 2]
    third = max(1, centre.shape[1] // 3)
    return centre[:, -third:].mean(1) - centre[:, :third].mean(1)
