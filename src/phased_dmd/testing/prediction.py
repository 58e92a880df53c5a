"""The checks of a network's prediction cover shape, independence of samples, gradient, and a known truth."""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, get_args

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from torch import Tensor, nn

from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.maths.schedules import Prediction, expand_like, predicted_x0, times_like
from phased_dmd.models.protocol import Condition, VelocityModel

Reading = tuple[str, str, Prediction]  # the time that the network is told, the prediction's sign and its type

SIGNAL, PROBES = (0.25, 4.0), 6  # alpha / sigma, from one to the other, that samples are noised to
TOLD = {"t": (1.0, 0.0), "1 - t": (-1.0, 1.0), "1000 t": (1000.0, 0.0), "t / 1000": (0.001, 0.0)}  # (a, b) of a t + b
BETTER, SOONER = 0.9, 0.75  # of an error: what makes another reading, and another time, the right one
LINE, POOR = 1.05, 1.25  # of a straight line's error: what a right reading keeps to, and what is none
UNIT = "where the best straight line in x_t has 1"


class ModelError(AssertionError):
    """The model or its codec is wrong, in the way that the message says."""


def require(holds: object, message: str) -> None:
    """Raises ModelError unless a requirement holds, so that each check may rely on those before it."""
    if not holds:
        raise ModelError(message)


class Part(NamedTuple):
    """A part is a network or student of a model, which serves a range of times."""

    name: str
    module: nn.Module
    low: float
    high: float

    def times(self, *fractions: float) -> Tensor:
        """Returns times within the part's range, float64 [b]."""
        share = torch.tensor(fractions, dtype=torch.float64, device=device())
        return self.low + share * (self.high - self.low)


def parts_of(model: VelocityModel, start: float) -> Iterator[Part]:
    """Yields the networks, and the students that are none of them."""
    bounds = (start, *model.switches, 0.0)
    for i, (network, student) in enumerate(zip(model.networks, model.students, strict=True)):
        yield Part(f"networks[{i}]", network, bounds[i + 1], bounds[i])
        if student is not network:
            yield Part(f"students[{i}]", student, bounds[i + 1], bounds[i])


def predict(model: VelocityModel, part: Part, x: Tensor, t: Tensor, rows: Sequence[Condition]) -> Tensor:
    """Returns the model's prediction; raises ModelError where `predict` or `batch` fails."""
    try:
        return model.predict(part.module, x, t, model.batch(rows))
    except Exception as error:  # whatever a network raises
        message = f"{part.name}: predict or batch fails for x {list(x.shape)} and t {list(t.shape)}: {error}"
        raise ModelError(message) from error


def near(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    """Tells whether the norm of a - b is small beside that of b."""
    return bool((a.double() - b.double()).norm() <= tolerance * b.double().norm())


def apart(a: Tensor, b: Tensor) -> float:
    """Returns the norm of a - b over that of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def alike(a: Condition, b: Condition) -> bool:
    """Tells whether two conditions are equal."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def tolerance_of(psi: Tensor, module: nn.Module) -> float:
    """Returns how far two computations of the same prediction may be apart, relative to its norm."""
    return 5e-2 if any(tensor.itemsize < 4 for tensor in (psi, *module.parameters())) else 1e-3


@torch.no_grad()
def check_prediction(
    model: VelocityModel, part: Part, shape: tuple[int, ...], rows: Sequence[Condition]
) -> float:  # fmt: skip
    """Checks that the prediction is finite, repeatable, told t and its condition, and independent of the other samples
    of its batch; returns how far two calls were apart, over the most that is allowed.

    rows: two conditions, which differ if there are several.
    """
    t, x = part.times(0.9, 0.6), normal(shape, range(2), "check").to(device())
    kept, where = x.clone(), f"{part.name}, shape {shape}: predict"
    psi = predict(model, part, x, t, rows)
    wrong = [name for name, tensor in model.batch(rows).items() if len(tensor) != len(rows)]
    require(not wrong, f"batch: {', '.join(wrong)} must be [b, ...] for b rows")
    whole, shapes = psi.shape == x.shape and psi.isfinite().all(), (list(x.shape), list(psi.shape))
    require(whole, f"{where} must be finite and of the shape of x, {shapes[0]}; it is {shapes[1]}")
    require(psi.dtype != torch.float64, f"{where} is float64 for x in float32: t is float64, cast it")
    require(torch.equal(x, kept), f"{where} changes x in place")
    tolerance = tolerance_of(psi, part.module)
    again = predict(model, part, x, t, rows)
    require(near(again, psi, tolerance), f"{where} is another at every call: dropout? call eval()")
    differ = check_neighbours(model, part, x, t, rows, tolerance, where)
    earlier = predict(model, part, x, part.times(0.1, 0.2), rows)
    require(not torch.equal(earlier, psi), f"{where} does not depend on t")
    return max(apart(again, psi), differ) / tolerance


def check_neighbours(
    model: VelocityModel, part: Part, x: Tensor, t: Tensor, rows: Sequence[Condition], tolerance: float, where: str
) -> float:  # fmt: skip
    """Checks that two samples x [2, ...] are predicted as alone, told two conditions in either order; returns how far
    they are from it, relative to the norm.
    """

    def alone(told: Sequence[Condition]) -> Tensor:
        return torch.cat([predict(model, part, x[i : i + 1], t[i : i + 1], told[i : i + 1]) for i in range(2)])

    orders, found = (list(rows), list(rows)[::-1]), []
    right = [alone(order) for order in orders]
    for order, own, other in zip(orders, right, right[::-1], strict=True):
        psi = predict(model, part, x, t, order)
        mixed = near(other, psi, tolerance) and not near(own, psi, tolerance)
        require(not mixed, "batch: gives a sample the condition of the one beside it")
        neighbours = "the samples beside it: padding without a mask, rows mixed up, one t for all, or no eval()"
        require(near(own, psi, tolerance), f"{where} depends on {neighbours}")
        found.append(apart(own, psi))
    ignored = torch.equal(*right) and not alike(rows[0], rows[1])
    require(not ignored, f"{where} does not depend on the condition: does batch, or predict, leave it out?")
    return max(found)


@torch.enable_grad()
def check_gradient(model: VelocityModel, part: Part, rows: Sequence[Condition]) -> str:
    """Checks that a backward reaches x and all that would be trained; says how exact it is.

    part: a copy of a student, which is changed.
    """
    student, targets, where = part.module, list(model.lora_targets), f"{part.name}: predict"
    student.requires_grad_(not targets)
    if targets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of an earlier run
            inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), student, adapter_name="check")
    t = part.times(0.5, 0.7)
    x, along = (normal(model.sample_shapes[0], range(2), "check", role).to(device()) for role in ("x", "along"))
    psi = predict(model, part, x.requires_grad_(), t, rows)
    require(psi.requires_grad, f"{where} lets no gradient through: no_grad, or a detach?")
    (psi * along).sum().backward()
    if x.grad is None:
        raise ModelError(f"{where} lets no gradient through to x, which a phase of several steps needs: a detach?")
    reached = [f".{name}" for name, p in student.named_parameters() if p.grad is not None]
    for target in [f".{target}.lora_" for target in targets] or [""]:
        require(
            any(target in name for name in reached),
            f"{where} lets no gradient through to {target[1:-6] or 'any weight'}: "
            "does it call the network that it is given, and modules rather than their weights?",
        )
    if tolerance_of(psi, student) > 1e-2:
        return "reaches all that trains; of half precision, so how exact it is was not measured"
    step = x.grad * (1e-3 * x.detach().norm() / x.grad.norm())
    with torch.no_grad():
        up, down = (predict(model, part, x + sign * step, t, rows).double() for sign in (1, -1))
    measured, told = ((up - down) * along).sum().item() / 2, (x.grad * step).sum().item()
    true = math.isclose(measured, told, rel_tol=0.1)
    require(true, f"{where}'s gradient in x is not that of what it computes: part of it is detached, or rounded")
    return f"reaches all that trains, and is off by {abs(measured - told) / abs(measured):.1g} (allowed 0.1)"


@torch.no_grad()
def check_reading(
    model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition]
) -> tuple[float, str]:  # fmt: skip
    """Checks that x_0, read from the prediction as declared, is nearer to the truth than under any other reading;
    returns its error, and says that of the next best.

    A right model's is E[x_0 | x_t], the best guess there is: no other type, sign or time can do better. Errors are in
    units of those of the best guess that is a straight line in x_t.
    """
    times = probe_times(model, part)
    means: dict[Reading, float] = {}  # over the times, geometric
    for t, (told, (a, b)) in itertools.product(times, TOLD.items()):
        for (sign, kind), error in _errors(model, part, samples, rows, t, a * t + b).items():
            means[told, sign, kind] = means.get((told, sign, kind), 1.0) * error ** (1 / len(times))
    declared, best = means["t", "", model.prediction], min(means.values())
    if best < BETTER * declared and best < LINE:
        close = [reading for reading, error in means.items() if error < 1.05 * best]
        told, sign, kind = min(close, key=lambda r: (r[0] != "t") + (r[1] != "") + (r[2] != model.prediction))
        raise ModelError(
            f"{part.name}: this looks like {sign}{kind} prediction told {told}, not {model.prediction} told t: "
            f"x_0 has an error of {best:.2g} if it is read so, of {declared:.2g} as declared, {UNIT}"
        )
    del means["t", "", model.prediction]
    told, sign, kind = min(means, key=means.__getitem__)
    of_next = f"{sign}{kind} told {told} by {means[told, sign, kind]:.2g}"
    return declared, f"{model.prediction} told t: x_0 is off by {declared:.2g}, read as {of_next} ({UNIT})"


@torch.no_grad()
def check_accuracy(
    model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition], declared: float
) -> None:  # fmt: skip
    """Checks that the error of x_0, of which `check_reading` has told the mean, is no worse than a trained network's,
    and no better when the network is told another time.
    """
    require(
        declared < POOR,
        f"{part.name}: x_0 is off by {declared:.2g}, {UNIT}: "
        "is it trained, and on latents of this scale, with these conditions?",
    )
    times = probe_times(model, part)
    for t in times:
        others = {told: _errors(model, part, samples, rows, t, told)["", model.prediction] for told in times}
        told = min(others, key=others.__getitem__)
        better = f"at t = {t:.2g} it does better told {told:.2g}: trained on another schedule or scale?"
        require(others[told] >= SOONER * others[t], f"{part.name}: {better}")


def probe_times(model: VelocityModel, part: Part) -> list[float]:
    """Returns times from little noise to much; with hardly any signal left even a trained network's x_0 is off."""
    t = part.times(*torch.linspace(0.001, 1, 1000).tolist())
    ratio = (model.schedule.alpha(t) / model.schedule.sigma(t)).log()
    most = min(math.log(SIGNAL[1]), ratio[0].item())
    least = max(min(math.log(SIGNAL[0]), most - 1), ratio[-1].item())
    return [t[(ratio - level).abs().argmin()].item() for level in torch.linspace(most, least, PROBES).tolist()]


def _errors(
    model: VelocityModel, part: Part, samples: Tensor, rows: Sequence[Condition], t: float, told: float
) -> dict[tuple[str, Prediction], float]:
    """Returns for each sign and type of prediction the mean square error of x_0, over that of the best a x_t + b."""
    eps, times = normal(samples.shape[1:], range(len(samples)), "check", "eps").to(samples), times_like(t, samples)
    alpha, sigma = model.schedule.alpha(times), model.schedule.sigma(times)
    x_t = expand_like(alpha, samples) * samples + expand_like(sigma, samples) * eps
    (v_0, c), (_, v_t) = torch.stack([samples.flatten(), x_t.flatten()]).double().cov(correction=0).tolist()
    try:
        psi = predict(model, part, x_t, times_like(told, samples), rows)
    except ModelError:  # told a time that means nothing to it
        psi = torch.full_like(x_t, torch.nan)
    found = {}
    for sign, kind in itertools.product(("", "-"), get_args(Prediction)):
        x0 = predicted_x0(-psi if sign else psi, x_t, times, model.schedule, kind)
        error = (x0 - samples).square().mean().item() / (v_0 - c**2 / v_t)
        found[sign, kind] = error if math.isfinite(error) else math.inf
    return found
