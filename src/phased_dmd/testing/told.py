"""Whether samples are told their own conditions: nothing predicts a sample better than what belongs to it."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from phased_dmd.engine.randomness import normal
from phased_dmd.maths.schedules import add_noise, predicted_x0, times_like
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.testing.prediction import BETTER, Part, alike, predict, probe_times, require

MOST, LEAST = 12, 4  # conditions that are tried on all samples, and samples that tell of a mistake
SWAPPED = 0.75  # of an error: what makes another sample's condition the right one
NOISIEST = 2  # of the probes, where conditions matter most


@torch.no_grad()
def check_told(model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition]) -> str | None:
    """Checks that samples [n, ...] are not better predicted when they are told each other's conditions, one each.

    Says how much worse they are then; None with fewer than two conditions to tell.
    """
    distinct, of_sample = _distinct(rows)
    kept = [i for i, condition in enumerate(of_sample) if condition < MOST]
    if len(distinct) < 2 or len(kept) < LEAST:
        return None
    samples, owner = samples[kept], torch.tensor([of_sample[i] for i in kept])
    errors = torch.stack([_errors(model, part, samples, condition) for condition in distinct[:MOST]], 1)  # [n, c]
    by_owner = torch.stack([errors[owner == c].sum(0) for c in range(errors.shape[1])])  # [c, c]
    counts = owner.bincount(minlength=len(by_owner))
    best = torch.as_tensor(linear_sum_assignment(by_owner.numpy())[1])
    moved = best != torch.arange(len(best))
    told, better = by_owner.diag()[moved].sum().item(), by_owner[moved, best[moved]].sum().item()
    swapped = int(counts[moved].sum()) >= LEAST and better < SWAPPED * told
    ratio = f"x_0 is off by {better / told:.2g} of what it is told their own" if moved.any() else ""
    mistaken = "are the conditions in the order of the samples, and each what its sample shows?"
    require(not swapped, f"conditions: told each other's, samples are better predicted ({ratio}): {mistaken}")
    own = by_owner.diag().sum() / len(kept)
    others = (by_owner.sum() - by_owner.diag().sum()) / (len(kept) * (len(by_owner) - 1))
    worse = (others / own).item()
    weak = "" if worse > 1 / BETTER else ", so that these samples do not tell whether conditions are their own"
    return f"told another's condition, x_0 is off by {worse:.2g} times its error{weak}"


def _distinct(rows: Sequence[Condition]) -> tuple[list[Condition], list[int]]:
    """Returns the conditions that differ, and the number of each row's."""
    known: list[Condition] = []
    numbers = []
    for row in rows:
        number = next((i for i, other in enumerate(known) if alike(row, other)), len(known))
        if number == len(known):
            known.append(row)
        numbers.append(number)
    return known, numbers


def _errors(model: VelocityModel, part: Part, samples: Tensor, condition: Condition) -> Tensor:
    """Returns the mean square error of x_0 for each sample [n], all told one condition, over the noisiest probes."""
    found, zero = torch.zeros(len(samples), dtype=torch.float64), times_like(0.0, samples)
    for t in probe_times(model, part)[-NOISIEST:]:
        eps, times = normal(samples.shape[1:], range(len(samples)), "check", "told").to(samples), times_like(t, samples)
        x_t = add_noise(samples, eps, zero, times, model.schedule)
        psi = predict(model, part, x_t, times, [condition] * len(samples))
        x0 = predicted_x0(psi, x_t, times, model.schedule, model.prediction)
        found += (x0 - samples).square().flatten(1).mean(1).double().cpu()
    return found
