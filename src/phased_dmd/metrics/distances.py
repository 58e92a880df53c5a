"""Distances between sets of samples, and the spread within one."""

import numpy as np
import torch
from torch import Tensor

Moments = tuple[Tensor, Tensor]  # mean [d], covariance [d, d]


def moments(features: Tensor) -> Moments:
    """Mean [d] and covariance [d, d] of features [n, d], float64."""
    return features.double().mean(0), torch.atleast_2d(features.double().T.cov())


def frechet(a: Moments, b: Moments) -> float:
    """Fréchet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians (mean, covariance)."""
    (mean_a, cov_a), (mean_b, cov_b) = ((m.double().numpy(), c.double().numpy()) for m, c in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)
    apart = ((mean_a - mean_b) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(middle).sum()
    return max(0.0, float(apart))


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(mean [d], basis [d, count]) of vectors [n, d]: their directions of largest variance."""
    mean = vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, directions[:count].T


def class_entropy(labels: Tensor, classes: int) -> float:
    """Entropy in nats of the histogram of labels [n]; at most log(classes)."""
    share = labels.bincount(minlength=classes).double() / len(labels)
    return float(-torch.special.xlogy(share, share).sum())


def pairwise_cosine(features: Tensor) -> float:
    """Mean cosine over all pairs of features [n, d]: 1 is no diversity."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    n = len(unit)
    return float(((unit @ unit.T).sum() - n) / (n * (n - 1)))


def mode_histogram_kl(samples: Tensor, means: Tensor, weights: Tensor) -> float:
    """KL(samples' histogram over the nearest of `means` || weights) in nats; samples [n, d], means [m, d]."""
    nearest = torch.cdist(samples.double(), means.double()).argmin(1)
    share = nearest.bincount(minlength=len(means)).double() / len(samples)
    return float((torch.special.xlogy(share, share) - torch.special.xlogy(share, weights.double())).sum())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of samples [n, d], without bias; 0 for equal laws."""
    a, b = a.double(), b.double()

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return float(2 * torch.cdist(a, b).mean() - within(a) - within(b))
