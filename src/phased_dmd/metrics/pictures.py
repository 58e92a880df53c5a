"""What can be read off pixels without a network: sharpness, contrast, motion. Pixels [n, f, h, w, 3] in [0, 1]."""

import itertools

import numpy as np
import torch
from torch import Tensor


def high_frequency_energy(pixels: Tensor) -> float:
    """Mean power of the grey frames above half the Nyquist frequency."""
    grey = pixels.mean(4)
    power = torch.fft.fft2(grey, norm="ortho").abs() ** 2
    rows, columns = (torch.fft.fftfreq(size).abs() for size in grey.shape[-2:])
    high = torch.maximum(rows[:, None], columns[None]) > 0.25
    return float(power[..., high].mean())


def contrast(pixels: Tensor) -> float:
    """Mean over frames of the standard deviation of grey values."""
    return float(pixels.mean(4).flatten(2).std(2).mean())


def optical_flow(pixels: Tensor) -> float:
    """Mean absolute optical flow between neighbouring frames in pixels, by OpenCV's DIS; needs the extra `eval`."""
    import cv2

    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    frames = (pixels.mean(4).clamp(0, 1) * 255).round().byte().numpy()
    norms = [
        np.linalg.norm(estimator.calc(a, b, np.zeros((*a.shape, 2), np.float32)), axis=2).mean()
        for clip in frames
        for a, b in itertools.pairwise(clip)
    ]
    return float(np.mean(norms))


def displacement(pixels: Tensor) -> Tensor:
    """Motion of the ink's centre from the first third of a clip to its last, [n, 2] pixels (right, down)."""
    ink = pixels.mean(4).clamp(min=0) ** 2  # squared, so that faint background counts little
    mass = ink.sum((2, 3)).clamp(min=1e-6)
    down, right = (torch.arange(size, dtype=ink.dtype) for size in ink.shape[-2:])
    centre = torch.stack([(ink.sum(2) * right).sum(2) / mass, (ink.sum(3) * down).sum(2) / mass], 2)  # [n, f, 2]
    third = max(1, centre.shape[1] // 3)
    return centre[:, -third:].mean(1) - centre[:, :third].mean(1)
