"""`check_model`: does a model of one's own keep to the protocol? What does not is said in words."""

import copy
import itertools
import math
import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import did_you_mean
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.maths.schedules import check_start
from phased_dmd.models.protocol import Codec, Condition, VelocityModel
from phased_dmd.testing.parts import Complaints, ModelError, Part, call, near, parts_of, tolerance_of
from phased_dmd.testing.truth import against_truth

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
    for complaint in _complaints(model, codec, samples, conditions, start):
        raise ModelError(complaint)
    if samples is None:
        warnings.warn("check_model: without samples, parametrisation and time scale are not checked", stacklevel=2)


def _complaints(
    model: VelocityModel, codec: Codec | None, samples: Tensor | None,
    conditions: Sequence[Condition] | None, start: float,
) -> Complaints:  # fmt: skip
    yield from _counts(model)
    yield from _schedule(model, start)
    yield from _guide(model)
    encoded: Sequence[Condition] = [{}]
    if codec is not None:
        yield from _codec(codec, samples)
        encoded = codec.encode_text(PROMPTS)
        codec.free()
    known, shapes = conditions or encoded, model.sample_shapes
    if codec is not None and codec.takes_images:  # the conditions are of the first bucket
        shapes = shapes[:1]
    pair = [known[0], known[-1]]
    for part in parts_of(model, start):
        for shape in shapes:
            yield from _predict(model, part, shape, pair)
        if part.module in model.students:
            bare = part._replace(module=_bare_copy(part.module))
            yield from _blocks(model, bare)
            yield from _targets(model, bare)
            yield from _gradient(model, bare, pair)
    if samples is None:
        return
    if tuple(samples.shape[1:]) not in map(tuple, model.sample_shapes):
        yield f"samples: {list(samples.shape)} is not [n, ...] of one of sample_shapes; latents are meant, not pixels"
    rows = list(itertools.islice(itertools.cycle(conditions or encoded[:1]), len(samples)))
    for part in parts_of(model, start):
        yield from against_truth(model, part, samples.to(device(), torch.float32), rows)


def _counts(model: VelocityModel) -> Complaints:
    count = len(model.networks)
    if not count or not model.sample_shapes:
        yield "networks, sample_shapes: there must be one at least of each"
    for name, found, needed in (
        ("students", model.students, count),
        ("guidance", model.guidance, count),
        ("switches", model.switches, count - 1),
    ):
        if len(found) != needed:
            yield f"{name}: {len(found)} for {count} network(s); there must be {needed}"
    try:
        PhasePlan((1.0, 0.0), switches=tuple(model.switches))
    except ValueError as error:
        yield str(error).removeprefix("plan: ")
    if min(model.guidance) < 1:
        yield f"guidance: {min(model.guidance):g} is below 1, which is none; the w of cond + w (cond - uncond) is g - 1"
    for i, (network, student) in enumerate(zip(model.networks, model.students, strict=True)):
        if any(p.requires_grad for p in network.parameters()):
            yield f"networks[{i}]: not frozen; call requires_grad_(False)"
        if not any(True for _ in student.parameters()):
            yield f"students[{i}]: has no parameters, so it cannot be trained; fit a network to it"


def _schedule(model: VelocityModel, start: float) -> Complaints:
    t = torch.linspace(0, start, 101, dtype=torch.float64, device=device())
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    for name, value in (("alpha", alpha), ("sigma", sigma)):
        if value.dtype != torch.float64:
            yield f"schedule.{name}: {value.dtype}; sigma_ts cancels in anything but float64"
        if value.shape != t.shape or not value.isfinite().all() or (value < 0).any():
            yield f"schedule.{name}: must be finite, not negative, and [b] for t [b]"
    rises = alpha[:-1] * sigma[1:] <= alpha[1:] * sigma[:-1]
    if rises.any():
        yield f"schedule: alpha / sigma must fall from t = 0, data, to 1, noise; it does not at {t[:-1][rises][0]:g}"
    try:
        check_start(model.prediction, model.schedule, start)
    except ValueError as error:
        yield str(error)


def _guide(model: VelocityModel) -> Complaints:
    """Guidance is uncond + g (cond - uncond), up to a positive factor that is 1 where there is nothing to guide."""
    shape = model.sample_shapes[0]
    count = 2 + 256 // math.prod(shape)
    cond, uncond = (normal(shape, range(count), "check", role).to(device()) for role in ("c", "u"))
    rule = "it is uncond + g (cond - uncond)"
    g = max(model.guidance)
    unguided, right = model.guide(cond, uncond, 1.0), uncond + g * (cond - uncond)
    if near(unguided, uncond):
        yield f"guide: g = 1 gives the unconditional prediction; are the two swapped? {rule}"
    if near(unguided, 2 * cond - uncond):
        yield f"guide: this is cond + w (cond - uncond), with w = g - 1; {rule}"
    if not near(unguided, cond) or not near(model.guide(cond, cond, g), cond):
        yield f"guide: g = 1, or two equal predictions, must give the conditional one; {rule}"
    if ((model.guide(cond, uncond, g) * right < 0) & (right.abs() > 1e-3)).any():
        yield f"guide: at g = {g:g} this is no multiple of what it should be; {rule}"


def _codec(codec: Codec, samples: Tensor | None) -> Complaints:
    rows = codec.encode_text(PROMPTS)
    codec.free()
    if len(rows) != len(PROMPTS):
        yield f"codec.encode_text: {len(rows)} rows for {len(PROMPTS)} prompts"
    for prompt, row in zip(PROMPTS, rows, strict=True):
        alone = codec.encode_text([prompt])[0]
        for name, tensor in row.items():
            if tensor.device.type != "cpu":
                yield f"codec.encode_text: {name} is on {tensor.device}, not on the CPU"
            if tensor.shape != alone[name].shape or not near(tensor, alone[name]):
                yield f"codec.encode_text: {name} depends on the prompts beside it; rows are unpadded, `batch` pads"
    if samples is None:
        return
    few = samples[:2].to(device(), torch.float32)
    pixels = codec.decode(few)
    if pixels.shape == few.shape:
        return  # no pixels: the samples are what they are
    if pixels.ndim != 5 or pixels.shape[-1] != 3:
        yield f"codec.decode: {list(pixels.shape)}; must be [b, frames, height, width, 3]"
    if pixels.min() < -0.5 or pixels.max() > 1.5:  # a VAE overshoots
        yield f"codec.decode: pixels from {pixels.min():.2g} to {pixels.max():.2g}; must be in [0, 1]"


def _blocks(model: VelocityModel, part: Part) -> Complaints:
    """part: a copy, whose blocks must be its own."""
    inside = {id(module) for module in part.module.modules() if module is not part.module}
    for i, block in enumerate(model.blocks(part.module)):
        if id(block) not in inside:
            yield f"blocks: number {i} is not inside the network that was given, which may be a copy of networks[]"


def _bare_copy(student: nn.Module) -> nn.Module:
    """A copy without the adapters that an earlier run has left."""
    bare = copy.deepcopy(student)
    for name, module in list(bare.named_modules()):
        if isinstance(module, BaseTunerLayer):
            bare.set_submodule(name, module.get_base_layer())
    return bare


def _targets(model: VelocityModel, part: Part) -> Complaints:
    """Each LoRA target ends the name of modules, all of which can be adapted."""
    modules = {f".{name}": module for name, module in part.module.named_modules() if name}
    ends = sorted({_end(name) for name, module in modules.items() if isinstance(module, ADAPTABLE)})
    for target in model.lora_targets:
        matched = [name for name in modules if name.endswith(f".{target}")]
        if not matched:
            yield f"lora_targets: {target} ends the name of no module of {part.name}{did_you_mean(target, ends)}"
        for wrong in [name for name in matched if not isinstance(modules[name], ADAPTABLE)]:
            kind = type(modules[wrong]).__name__
            cannot = f"lora_targets: {target} ends {wrong[1:]}, a {kind}, which cannot be adapted"
            yield f"{cannot}{did_you_mean(target, ends)}"


def _end(name: str) -> str:
    """The end of a module's name that says what it is: to_q, to_out.0."""
    *rest, last = name.split(".")
    return f"{rest[-1]}.{last}" if last.isdigit() and rest else last


@torch.no_grad()
def _predict(model: VelocityModel, part: Part, shape: tuple[int, ...], rows: Sequence[Condition]) -> Complaints:
    t, x = part.times(0.9, 0.6), normal(shape, range(2), "check").to(device())
    kept, where = x.clone(), f"{part.name}, shape {shape}: predict"
    psi = call(model, part, x, t, rows)
    if wrong := [name for name, tensor in model.batch(rows).items() if len(tensor) != len(rows)]:
        yield f"batch: {', '.join(wrong)} must be [b, ...] for b rows"
    if psi.shape != x.shape or not psi.isfinite().all():
        yield f"{where} must be finite and of the shape of x, {list(x.shape)}; it is {list(psi.shape)}"
    if psi.dtype == torch.float64:
        yield f"{where} is float64 for x in float32: t is float64, cast it"
    if not torch.equal(x, kept):
        yield f"{where} changes x in place"
    tolerance = tolerance_of(psi, part.module)
    if not near(call(model, part, x, t, rows), psi, tolerance):
        yield f"{where} is another at every call: dropout? call eval()"
    alone = torch.cat([call(model, part, x[i : i + 1], t[i : i + 1], rows[i : i + 1]) for i in range(2)])
    if not near(alone, psi, tolerance):
        yield f"{where} depends on the samples beside it: padding without a mask, one t for all, or no eval()"
    if torch.equal(call(model, part, x, part.times(0.1, 0.2), rows), psi):
        yield f"{where} does not depend on t"


@torch.enable_grad()
def _gradient(model: VelocityModel, part: Part, rows: Sequence[Condition]) -> Complaints:
    """A backward through predict reaches x and all that would be trained, in a copy of a student that is changed."""
    student, targets, where = part.module, list(model.lora_targets), f"{part.name}: predict"
    student.requires_grad_(not targets)
    if targets:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # of an earlier run
            inject_adapter_in_model(LoraConfig(r=1, target_modules=targets), student, adapter_name="check")
    t = part.times(0.5, 0.7)
    x, along = (normal(model.sample_shapes[0], range(2), "check", role).to(device()) for role in ("x", "along"))
    psi = call(model, part, x.requires_grad_(), t, rows)
    if not psi.requires_grad:
        yield f"{where} lets no gradient through: no_grad, or a detach?"
    (psi * along).sum().backward()
    if x.grad is None:
        yield f"{where} lets no gradient through to x, which a phase of several steps needs: a detach?"
        return
    reached = [f".{name}" for name, p in student.named_parameters() if p.grad is not None]
    for target in [f".{target}.lora_" for target in targets] or [""]:
        if not any(target in name for name in reached):
            yield (
                f"{where} lets no gradient through to {target[1:-6] or 'any weight'}: "
                "does it call the network that it is given, and modules rather than their weights?"
            )
    if tolerance_of(psi, student) > 1e-2:
        return
    step = x.grad * (1e-3 * x.detach().norm() / x.grad.norm())
    with torch.no_grad():
        up, down = (call(model, part, x + sign * step, t, rows).double() for sign in (1, -1))
    if not math.isclose(((up - down) * along).sum() / 2, (x.grad * step).sum(), rel_tol=0.1):
        yield f"{where}'s gradient in x is not that of what it computes: part of it is detached, or rounded"
