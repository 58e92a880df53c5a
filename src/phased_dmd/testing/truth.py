"""What a prediction looks like, against a known truth: which type, sign and time come nearest to clean samples."""

import itertools
import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from phased_dmd.engine.randomness import normal
from phased_dmd.maths.schedules import Prediction, expand_like, predicted_x0, times_like
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.testing.parts import Complaints, ModelError, Part, call

Reading = tuple[str, str, Prediction]  # the time that the network is told, the prediction's sign and its type

SIGNAL, PROBES = (0.25, 4.0), 6  # alpha / sigma, from one to the other, that samples are noised to
TOLD = {"t": (1.0, 0.0), "1 - t": (-1.0, 1.0), "1000 t": (1000.0, 0.0), "t / 1000": (0.001, 0.0)}  # (a, b) of a t + b
BETTER, SOONER = 0.9, 0.75  # of an error: what makes another reading, and another time, the right one
LINE, POOR = 1.05, 1.25  # of a straight line's error: what a right reading keeps to, and what is none


@torch.no_grad()
def against_truth(model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition]) -> Complaints:
    """The x_0 read from the prediction as declared is nearer to the truth than under any other reading.

    A right model's is E[x_0 | x_t], the best guess there is: no other type, sign or time can do better.
    """
    times = _probes(model, part)
    means: dict[Reading, float] = {}  # over the times, geometric
    for t, (told, (a, b)) in itertools.product(times, TOLD.items()):
        for (sign, kind), error in _errors(model, part, samples, rows, t, a * t + b).items():
            means[told, sign, kind] = means.get((told, sign, kind), 1.0) * error ** (1 / len(times))
    declared, best = means["t", "", model.prediction], min(means.values())
    if best < BETTER * declared and best < LINE:
        close = [reading for reading, error in means.items() if error < 1.05 * best]
        told, sign, kind = min(close, key=lambda r: (r[0] != "t") + (r[1] != "") + (r[2] != model.prediction))
        yield (
            f"{part.name}: this looks like {sign}{kind} prediction told {told}, not {model.prediction} told t; "
            f"so read, x_0 is off by {best:.2g} of a straight line's error, and as declared by {declared:.2g}"
        )
    if not declared < POOR:
        yield (
            f"{part.name}: x_0 is off by {declared:.2g} of the error of a straight line in x_t: "
            "is it trained, and on latents of this scale, with these conditions?"
        )
    for t in times:
        others = {told: _errors(model, part, samples, rows, t, told)["", model.prediction] for told in times}
        told = min(others, key=others.__getitem__)
        if others[told] < SOONER * others[t]:
            yield f"{part.name}: at t = {t:.2g} it does better told {told:.2g}: trained on another schedule or scale?"


def _probes(model: VelocityModel, part: Part) -> list[float]:
    """Times from little noise to much: where there is hardly a signal, a trained network's x_0 is off anyway."""
    t = part.times(*torch.linspace(0.001, 1, 1000).tolist())
    ratio = (model.schedule.alpha(t) / model.schedule.sigma(t)).log()
    most = min(math.log(SIGNAL[1]), ratio[0].item())
    least = max(min(math.log(SIGNAL[0]), most - 1), ratio[-1].item())
    return [t[(ratio - level).abs().argmin()].item() for level in torch.linspace(most, least, PROBES).tolist()]


def _errors(
    model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition], t: float, told: float
) -> dict[tuple[str, Prediction], float]:
    """Mean square error of x_0, over that of the best a x_t + b, for each sign and type of the prediction at t."""
    eps, times = normal(samples.shape[1:], range(len(samples)), "check", "eps").to(samples), times_like(t, samples)
    alpha, sigma = model.schedule.alpha(times), model.schedule.sigma(times)
    x_t = expand_like(alpha, samples) * samples + expand_like(sigma, samples) * eps
    (v_0, c), (_, v_t) = torch.stack([samples.flatten(), x_t.flatten()]).double().cov(correction=0).tolist()
    try:
        psi = call(model, part, x_t, times_like(told, samples), rows)
    except ModelError:  # told a time that means nothing to it
        psi = torch.full_like(x_t, torch.nan)
    found = {}
    for sign, kind in itertools.product(("", "-"), get_args(Prediction)):
        x0 = predicted_x0(-psi if sign else psi, x_t, times, model.schedule, kind)
        error = (x0 - samples).square().mean().item() / (v_0 - c**2 / v_t)
        found[sign, kind] = error if math.isfinite(error) else math.inf
    return found
