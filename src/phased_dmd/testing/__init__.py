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
from phased_dmd.testing.prediction import (
    ModelError,
    Part,
    check_gradient,
    check_prediction,
    check_truth,
    near,
    parts_of,
    require,
)

PROMPTS = ("", "a longer prompt, of several words")
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_model(
    model: VelocityModel, codec: Codec | None = None, samples: Tensor | None = None,
    conditions: Sequence[Condition] | None = None, start: float = 1.0,
) -> None:  # fmt: skip
    """Raises ModelError with the first thing that is wrong with a model or its codec.

    samples: clean latents [n, ...] of what the teacher was trained on, as many as one call of it takes; without them
    parametrisation and time scale go unchecked, with a warning. conditions: their rows, repeated in turn where there
    are fewer (the codec's of the empty prompt; none without codec). start: the run's `plan.start`.
    Needs memory for one more copy of a network, and its gradients with adapters of rank 1.
    """
    _check_counts(model)
    _check_schedule(model, start)
    _check_guide(model)
    encoded: Sequence[Condition] = [{}]
    shapes = model.sample_shapes
    if codec is not None:
        _check_codec(codec, samples)
        encoded = codec.encode_text(PROMPTS)
        codec.free()
        shapes = shapes[:1] if codec.takes_images else shapes  # the conditions are of the first bucket
    known = conditions or encoded
    pair = [known[0], known[-1]]
    for part in parts_of(model, start):
        for shape in shapes:
            check_prediction(model, part, shape, pair)
        if part.module in model.students:
            bare = part._replace(module=_without_adapters(part.module))
            _check_modules(model, bare)
            check_gradient(model, bare, pair)
    if samples is None:
        warnings.warn("check_model: without samples, parametrisation and time scale are not checked", stacklevel=2)
        return
    found = f"samples: {list(samples.shape)} is not [n, ...] of one of sample_shapes"
    require(tuple(samples.shape[1:]) in map(tuple, model.sample_shapes), f"{found}; latents are meant, not pixels")
    rows = list(itertools.islice(itertools.cycle(conditions or encoded[:1]), len(samples)))
    for part in parts_of(model, start):
        check_truth(model, part, samples.to(device(), torch.float32), rows)


def _check_counts(model: VelocityModel) -> None:
    """Checks that there is one of everything a network, and that networks are frozen and students can be trained."""
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
        trainable = any(True for _ in student.parameters())
        require(trainable, f"students[{i}]: has no parameters, so it cannot be trained; fit a network to it")


def _check_schedule(model: VelocityModel, start: float) -> None:
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


def _check_guide(model: VelocityModel) -> None:
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


def _check_codec(codec: Codec, samples: Tensor | None) -> None:
    """Checks that rows are on the CPU and do not depend on each other, and that decoded pixels are in [0, 1]."""
    rows = codec.encode_text(PROMPTS)
    codec.free()
    require(len(rows) == len(PROMPTS), f"codec.encode_text: {len(rows)} rows for {len(PROMPTS)} prompts")
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = codec.encode_text([prompt])[0]
        for name, tensor in row.items():
            where = f"codec.encode_text: {name}"
            require(tensor.device.type == "cpu", f"{where} is on {tensor.device}, not on the CPU")
            same = tensor.shape == alone[name].shape and near(tensor, alone[name])
            require(same, f"{where} depends on the prompts beside it; rows are unpadded, `batch` pads")
    if samples is None:
        return
    few = samples[:2].to(device(), torch.float32)
    pixels = codec.decode(few)
    if pixels.shape == few.shape:
        return  # no pixels: the samples are what they are
    are_clips = pixels.ndim == 5 and pixels.shape[-1] == 3
    require(are_clips, f"codec.decode: {list(pixels.shape)}; must be [b, frames, height, width, 3]")
    low, high = pixels.min(), pixels.max()
    in_range = low >= -0.5 and high <= 1.5  # a VAE overshoots
    require(in_range, f"codec.decode: pixels from {low:.2g} to {high:.2g}; must be in [0, 1]")


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
