"""`check_model`: whether a model of one's own keeps to the protocol; what does not is said in words."""

import copy
import itertools
import math
import re
import warnings
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import did_you_mean
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.maths.schedules import check_start
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.testing.codec import PROMPTS, check_conditions_of, check_decoding, encode
from phased_dmd.testing.passed import Passed, first_guess
from phased_dmd.testing.prediction import (
    ModelError,
    Part,
    alike,
    check_accuracy,
    check_gradient,
    check_prediction,
    check_reading,
    near,
    parts_of,
    require,
)
from phased_dmd.testing.told import check_told

MOST = 8  # prompts that a codec is asked to encode
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_model(
    model: VelocityModel, codec: Codec | None = None, samples: Tensor | None = None,
    conditions: Sequence[Condition] | None = None, start: float = 1.0, prompts: Sequence[str] | None = None,
    negative_prompt: str = "", quiet: bool = False,
) -> Passed:  # fmt: skip
    """Raises ModelError with the first thing that is wrong with a model or its codec; prints and returns what passed.

    samples: clean latents [n, ...] of what the teacher was trained on, as many as one call of it takes; without them
    parametrisation, time scale and whose the conditions are go unchecked, with a warning. conditions: their rows,
    repeated in turn where there are fewer (the codec's of the empty prompt; none without codec). start: the run's
    `plan.start`. prompts: some that the codec knows (two of the check's own); at most MOST of them are encoded, and
    negative_prompt, the run's, before them. quiet: neither print nor warn.
    Needs memory for one more copy of a network, and its gradients with adapters of rank 1.
    """
    rows = _check_counts(model) | _check_schedule(model, start) | _check_guide(model)
    encoded: Sequence[Condition] = [{}]
    shapes = model.sample_shapes
    _check_samples(model, samples)
    if codec is not None:
        texts = list(dict.fromkeys([negative_prompt, *(PROMPTS if prompts is None else prompts)]))[:MOST]
        encoded = encode(codec, texts)
        rows["codec, prompts"] = check_conditions_of(codec, texts, encoded)
        rows["codec, samples"] = check_decoding(codec, shapes[0], samples)
        shapes = shapes[:1] if codec.takes_images else shapes  # the conditions are of the first bucket
    known = conditions or encoded
    pair = [known[0], next((row for row in known if not alike(row, known[0])), known[-1])]
    for part in parts_of(model, start):
        differ = max(check_prediction(model, part, shape, pair) for shape in shapes)
        rows[f"{part.name}, calls"] = f"equal, alone and in a batch, to {differ:.1g} of what is allowed"
        if part.module in model.students:
            bare = part._replace(module=_without_adapters(part.module))
            _check_modules(model, bare)
            rows[f"{part.name}, gradient"] = check_gradient(model, bare, pair)
    if samples is None:
        rows["reading"] = "not checked: without samples nothing tells what the prediction is, and of which time"
        if not quiet:
            warnings.warn("check_model: without samples, parametrisation and time scale are not checked", stacklevel=2)
    else:
        each = list(itertools.islice(itertools.cycle(conditions or encoded[:1]), len(samples)))
        rows |= _check_on_samples(model, start, samples.to(device(), torch.float32), each)
    *guess, why = first_guess(model, 1.0 if samples is None else samples.double().std().item())
    passed = Passed(rows | {"a first guess": why}, *guess)
    if not quiet:
        print(passed)
    return passed


def _check_samples(model: VelocityModel, samples: Tensor | None) -> None:
    """Checks that samples are latents of one of the model's shapes."""
    if samples is None:
        return
    require(
        isinstance(samples, Tensor), f"samples: a tensor [n, ...] is needed, and this is a {type(samples).__name__}"
    )
    found = f"samples: {list(samples.shape)} is not [n, ...] of one of sample_shapes"
    require(tuple(samples.shape[1:]) in map(tuple, model.sample_shapes), f"{found}; latents are meant, not pixels")


def _check_on_samples(
    model: VelocityModel, start: float, samples: Tensor, rows: Sequence[Condition]
) -> dict[str, str]:  # fmt: skip
    """Checks what networks and students say of samples [n, ...], told their conditions."""
    found = {}
    for part in parts_of(model, start):
        error, found[f"{part.name}, reading"] = check_reading(model, part, samples, rows)
        if said := check_told(model, part, samples, rows):
            found[f"{part.name}, conditions"] = said
        check_accuracy(model, part, samples, rows, error)
    return found


def _check_counts(model: VelocityModel) -> dict[str, str]:
    """Checks that there is one of everything a network, and that networks are frozen and students can be trained."""
    lists: dict[str, object] = {
        "networks": model.networks, "students": model.students, "switches": model.switches, "guidance": model.guidance,
        "sample_shapes": model.sample_shapes, "lora_targets": model.lora_targets,
    }  # fmt: skip
    for name, value in lists.items():
        listed = isinstance(value, Sequence | nn.ModuleList) and not isinstance(value, str)
        require(listed, f"{name}: a list is needed, and this is {value!r}")
    of_shapes = all(isinstance(shape, Sequence) for shape in model.sample_shapes)
    require(of_shapes, f"sample_shapes: a list of shapes is needed, as [{model.sample_shapes}]")
    count = len(model.networks)
    require(count and model.sample_shapes, "networks, sample_shapes: there must be one at least of each")
    needed = {"students": (model.students, count), "guidance": (model.guidance, count)}
    for name, (found, number) in (needed | {"switches": (model.switches, count - 1)}).items():
        require(len(found) == number, f"{name}: {len(found)} for {count} network(s); there must be {number}")
    try:
        PhasePlan((1.0, 0.0), switches=tuple(model.switches))
    except ValueError as error:
        raise ModelError(str(error).removeprefix("plan: ")) from error
    least, rule = min(model.guidance), "the w of cond + w (cond - uncond) is g - 1"
    require(least >= 1, f"guidance: {least:g} is below 1, which is none; {rule}")
    for i, (network, student) in enumerate(zip(model.networks, model.students, strict=True)):
        frozen = not any(p.requires_grad for p in network.parameters())
        require(frozen, f"networks[{i}]: not frozen; call requires_grad_(False)")
        for name, module in ((f"networks[{i}]", network), (f"students[{i}]", student)):
            training = _training(module)
            require(training is None, f"{name}: in train mode{training}; call eval(): dropout and norms differ there")
        trainable = any(True for _ in student.parameters())
        require(trainable, f"students[{i}]: has no parameters, so it cannot be trained; fit a network to it")
    weights = sum(p.numel() for network in model.networks for p in network.parameters())
    return {"networks": f"{count}, frozen, not in train mode, {weights / 1e6:.3g} million weights"}


def _training(module: nn.Module) -> str | None:
    """Says which part of a network is in train mode, adapters of an earlier run apart; None where none is."""
    named = module.named_modules()
    found = next((n for n, m in named if m.training and not isinstance(m, BaseTunerLayer) and ".lora_" not in n), None)
    return found and f" ({found})"


def _check_schedule(model: VelocityModel, start: float) -> dict[str, str]:
    """Checks that alpha and sigma are float64 [b], and that their ratio falls from data to noise."""
    t = torch.linspace(0, start, 101, dtype=torch.float64, device=device())
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    for name, x in (("alpha", alpha), ("sigma", sigma)):
        double, right = x.dtype == torch.float64, x.shape == t.shape and x.isfinite().all() and (x >= 0).all()
        require(double, f"schedule.{name}: {x.dtype}; sigma_ts cancels in anything but float64")
        require(right, f"schedule.{name}: must be finite, not negative, and [b] for t [b]")
    if (rises := alpha[:-1] * sigma[1:] <= alpha[1:] * sigma[:-1]).any():
        where = f"{t[:-1][rises][0]:g}"
        raise ModelError(f"schedule: alpha / sigma must fall from t = 0, data, to 1, noise; it does not at {where}")
    try:
        check_start(model.prediction, model.schedule, start)
    except ValueError as error:
        raise ModelError(str(error)) from error
    (first, last), (low, high) = alpha[[0, -1]].tolist(), sigma[[0, -1]].tolist()
    return {"schedule": f"alpha, sigma from {first:.3g}, {low:.3g} at t = 0 to {last:.3g}, {high:.3g} at {start:g}"}


def _check_guide(model: VelocityModel) -> dict[str, str]:
    """Checks that guidance is uncond + g (cond - uncond), up to a positive factor (1 with nothing to guide)."""
    shape, g = model.sample_shapes[0], max(model.guidance)
    count = 2 + 256 // math.prod(shape)
    cond, uncond = (normal(shape, range(count), "check", role).to(device()) for role in ("c", "u"))
    rule = "it is uncond + g (cond - uncond)"
    unguided, right = model.guide(cond, uncond, 1.0), uncond + g * (cond - uncond)
    swapped, with_w = near(unguided, uncond), near(unguided, 2 * cond - uncond)
    require(not swapped, f"guide: g = 1 gives the unconditional prediction; are the two swapped? {rule}")
    require(not with_w, f"guide: this is cond + w (cond - uncond), with w = g - 1; {rule}")
    same = near(unguided, cond) and near(model.guide(cond, cond, g), cond)
    require(same, f"guide: g = 1, or two equal predictions, must give the conditional one; {rule}")
    opposite = (model.guide(cond, uncond, g) * right < 0) & (right.abs() > 1e-3)
    require(not opposite.any(), f"guide: at g = {g:g} this is no multiple of what it should be; {rule}")
    scales = ", ".join(f"{each:g}" for each in model.guidance)
    return {"guidance": f"uncond + g (cond - uncond), g = {scales}{', which is none' if g == 1 else ''}"}


def _without_adapters(student: nn.Module) -> nn.Module:
    """Returns a copy without the adapters that an earlier run has left."""
    bare = copy.deepcopy(student)
    for name, module in list(bare.named_modules()):
        if isinstance(module, BaseTunerLayer):
            bare.set_submodule(name, module.get_base_layer())
    return bare


def _check_modules(model: VelocityModel, part: Part) -> None:
    """Checks that a copy's blocks are its own, and that each LoRA target ends the names of modules to be adapted."""
    modules = {f".{name}": module for name, module in part.module.named_modules() if name}
    inside, blocks = {id(module) for module in modules.values()}, model.blocks(part.module)
    if (strange := next((i for i, block in enumerate(blocks) if id(block) not in inside), None)) is not None:
        raise ModelError(
            f"blocks: number {strange} is not inside the network that was given, which may be a copy of networks[]"
        )
    adaptable = [name for name, module in modules.items() if isinstance(module, ADAPTABLE)]
    ends = sorted({match[0] for name in adaptable if (match := re.search(r"[^.]+(\.\d+)?$", name))})  # to_q, to_out.0
    for target in model.lora_targets:
        matched, hint = [name for name in modules if name.endswith(f".{target}")], did_you_mean(target, ends)
        require(matched, f"lora_targets: {target} ends the name of no module of {part.name}{hint}")
        if wrong := next((name for name in matched if not isinstance(modules[name], ADAPTABLE)), None):
            kind = type(modules[wrong]).__name__
            raise ModelError(f"lora_targets: {target} ends {wrong[1:]}, a {kind}, which cannot be adapted{hint}")
