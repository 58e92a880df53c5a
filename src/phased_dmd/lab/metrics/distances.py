"""Distances between sets of samples, and measures of how far the samples of one set are spread."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.engine.world import device
from phased_dmd.errors import UserError

ROUNDING = 1e-12  # the rounding error of a difference of traces, in units of their sum
Moments = tuple[Tensor, Tensor]  # mean [d], covariance [d, d]
PictureDistance = Callable[[Tensor, Tensor], float]  # of two pictures [h, w, 3] in [0, 1]
LPIPS = "LPIPS, AlexNet"  # the name of `lpips`, to stand beside every number made with it


def moments(features: Tensor) -> Moments:
    """Returns the mean [d] and covariance [d, d] of features [n, d], in float64."""
    return features.double().mean(0), torch.atleast_2d(features.double().T.cov())


def frechet(a: Moments, b: Moments) -> float:
    """Returns the Fréchet distance |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two Gaussians."""
    (mean_a, cov_a), (mean_b, cov_b) = ((m.double().numpy(), c.double().numpy()) for m, c in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    middle = np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(min=0)
    spread = np.trace(cov_a) + np.trace(cov_b)
    apart = ((mean_a - mean_b) ** 2).sum() + spread - 2 * np.sqrt(middle).sum()
    return float(apart) if apart > ROUNDING * spread else 0.0


def principal_components(vectors: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Returns the mean [d] of vectors [n, d] and their directions of largest variance [d, count]."""
    mean = vectors.mean(0)
    _, _, directions = torch.linalg.svd(vectors - mean, full_matrices=False)
    return mean, directions[:count].T


def class_entropy(labels: Tensor, classes: int) -> float:
    """Returns the entropy in nats of the histogram of labels [n]; it is log(classes) at most."""
    share = labels.bincount(minlength=classes).double() / len(labels)
    return float(torch.special.entr(share).sum())


def pairwise_cosine(features: Tensor) -> float:
    """Returns the mean cosine over all pairs of features [n, d]: 1 is no diversity. Zeros have 0 with all others."""
    unit = F.normalize(features.double(), dim=1)
    cosines, n = unit @ unit.T, len(unit)
    return float((cosines.sum() - cosines.trace()) / (n * (n - 1)))


def lpips() -> PictureDistance:
    """Loads torchmetrics' perceptual distance LPIPS; raises UserError where it or its weights cannot be loaded."""
    try:
        from torchmetrics.image.lpip import (  # type: ignore[import-not-found]
            LearnedPerceptualImagePatchSimilarity,
        )

        metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device())
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision that does not fit torch is a RuntimeError
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"lpips: needs torchmetrics, torchvision and AlexNet's weights ({reason})") from error

    @torch.no_grad()
    def distance(a: Tensor, b: Tensor) -> float:
        batches = (picture.to(device()).float().clamp(0, 1).permute(2, 0, 1)[None] for picture in (a, b))
        return float(metric(*batches))

    return distance


def mode_histogram_kl(samples: Tensor, means: Tensor, weights: Tensor) -> float:
    """Returns KL(histogram of samples [n, d] over the nearest of the means [m, d] || weights [m]) in nats."""
    return histogram_kl(torch.cdist(samples.double(), means.double()).argmin(1), weights)


def histogram_kl(labels: Tensor, law: Tensor) -> float:
    """Returns KL(histogram of labels [n], whole numbers from 0 || their law [kinds]) in nats."""
    share = labels.bincount(minlength=len(law)).double() / len(labels)
    return float((torch.special.xlogy(share, share) - torch.special.xlogy(share, law.double())).sum())
