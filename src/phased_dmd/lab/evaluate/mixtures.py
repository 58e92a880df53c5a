"""The measures of an analytic teacher's samples: all is compared with the exact mixture."""

import torch
from torch import Tensor

from phased_dmd.lab.metrics.distances import mode_histogram_kl
from phased_dmd.lab.metrics.intervals import Statistic
from phased_dmd.models.analytic import ExactMixture

REFERENCE_SEED = 1_000_000  # of the exact samples


def mixture_statistics(points: Tensor, exact: ExactMixture) -> dict[str, Statistic]:
    """KL of the histogram over the modes, energy distance to as many exact samples, mean distance to a mode.

    points: [n, d].
    """
    points, means, weights = points.double(), exact.means.cpu(), exact.weights.cpu()
    reference = exact.sample(len(points), torch.Generator().manual_seed(REFERENCE_SEED)).double()
    nearest = torch.cdist(points, means).min(1).values
    across, within = torch.cdist(points, reference).mean(1), torch.cdist(points, points)
    of_reference = float(torch.cdist(reference, reference).sum() / (len(points) * (len(points) - 1)))

    def energy(keep: Tensor) -> float:
        """2 E|x - y| - E|x - x'| - E|y - y'| without bias: 0 for equal laws."""
        kept = torch.zeros(len(points), dtype=torch.float64).index_fill(0, keep, 1)
        own = kept @ within @ kept / (len(keep) * (len(keep) - 1))
        return float(2 * across[keep].mean() - own) - of_reference

    return {
        "mode_histogram_kl": lambda keep: mode_histogram_kl(points[keep], means, weights),
        "energy_distance": energy,
        "distance_to_nearest_mode": lambda keep: float(nearest[keep].mean()),
    }
