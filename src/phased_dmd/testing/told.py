"""Whether samples are told their own conditions: nothing predicts a sample better than what belongs to it."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from phased_dmd.engine.randomness import normal
from phased_dmd.maths.schedules import add_noise, predicted_x0, times_like
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.testing.prediction import BETTER, ModelError, Part, alike, predict, probe_times

MOST, LEAST = 12, 4  # conditions that are tried on all samples, and samples that tell of a mistake
STRANGE = 0.6  # of the way from the best pairing's error to a random one's: where no right condition is


@torch.no_grad()
def check_told(model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition]) -> str | None:
    """Checks that samples [n, ...] are not better predicted when they are told each other's conditions, one each.

    Conditions are exchanged in the way that makes the error least. For right ones that gains little, and each is far
    better than a random one; where they are of other samples, those that gain were hardly better than random ones.
    Says how much worse another's condition is; None with fewer than two conditions to tell.
    """
    distinct, of_sample = _distinct(rows)
    kept = [i for i, condition in enumerate(of_sample) if condition < MOST]
    if len(distinct) < 2 or len(kept) < LEAST:
        return None
    samples, owner = samples[kept], torch.tensor([of_sample[i] for i in kept])
    errors = torch.stack([_errors(model, part, samples, condition) for condition in distinct[:MOST]], 1)  # [n, c]
    of_owners = torch.stack([errors[owner == c].sum(0) for c in range(errors.shape[1])])  # [c, c]
    told, random = of_owners.diag(), (of_owners.sum(1) - of_owners.diag()) / (len(of_owners) - 1)
    best = torch.as_tensor(linear_sum_assignment(of_owners.numpy())[1])
    moved = best != torch.arange(len(best))
    own, other = told[moved].sum().item(), of_owners[moved, best[moved]].sum().item()
    strange = other < BETTER * own and own - other > STRANGE * (random[moved].sum().item() - other)
    enough = int(owner.bincount(minlength=len(best))[moved].sum()) >= LEAST
    if strange and enough:
        raise ModelError(
            f"conditions: told each other's, samples are better predicted (x_0 is then off by {other / own:.2g} of its "
            "error): are the conditions in the order of the samples, and each what its sample shows?"
        )
    worse = (random.sum() / told.sum()).item()
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
    """Returns the mean square error of x_0 for each sample [n], all told one condition, at the noisiest probe."""
    times = times_like(probe_times(model, part)[-1], samples)
    eps = normal(samples.shape[1:], range(len(samples)), "check", "told").to(samples)
    x_t = add_noise(samples, eps, times_like(0.0, samples), times, model.schedule)
    psi = predict(model, part, x_t, times, [condition] * len(samples))
    x0 = predicted_x0(psi, x_t, times, model.schedule, model.prediction)
    return (x0 - samples).square().flatten(1).mean(1).double().cpu()
