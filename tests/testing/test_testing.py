"""`check_model`: right models of every type, schedule and family pass; each wrong one is told what is wrong with it."""

import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussians import SCHEDULES
from tiny import TinyCodec, TinyWan, draw
from torch import Tensor, nn

from phased_dmd.config.teacher import AnalyticTeacher, WanTeacher
from phased_dmd.engine.world import device
from phased_dmd.lab.teach.mnist import image_batch, load_digits
from phased_dmd.maths.schedules import Schedule, VPSchedule
from phased_dmd.models.analytic import AnalyticModel, ExactMixture, PlainCodec
from phased_dmd.models.loader import load_model
from phased_dmd.models.pipeline import statistics
from phased_dmd.testing import ModelError, check_model

MEANS, STD = torch.tensor([[-1.0, -0.5], [1.0, 0.0], [0.5, 1.5]]), 0.3
DATA = Path(__file__).parents[2] / "data" / "mnist_5k.csv.gz"
Condition = dict[str, Tensor]


class Network(nn.Module):
    """The exact prediction on the network's own time scale, behind a linear layer that changes nothing."""

    def __init__(self, schedule: Schedule, prediction: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.exact = ExactMixture(MEANS, STD, torch.ones(len(MEANS)), schedule, prediction)
        self.norm, self.out, self.scale = nn.LayerNorm(2), nn.Linear(2, 2), scale
        nn.init.eye_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.exact(x, t / self.scale))


class Model:
    """A right `VelocityModel`; `scale` is what both network and wrapper count time in."""

    switches: Sequence[float] = ()
    lora_targets: Sequence[str] = ("out",)
    sample_shapes: Sequence[tuple[int, ...]] = ((2,),)

    def __init__(self, schedule: str = "flow", prediction: Any = "flow", scale: float = 1.0) -> None:
        self.schedule, self.prediction, self.scale = SCHEDULES[schedule], prediction, scale
        network = Network(self.schedule, prediction, scale)
        self.networks: list[nn.Module] = [network.eval().requires_grad_(False).to(device())]
        self.students, self.guidance = self.networks, [3.0]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(x, t * self.scale)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return unconditional + guidance * (conditional - unconditional)


def samples(count: int = 256) -> Tensor:
    exact = ExactMixture(MEANS, STD, torch.ones(len(MEANS)), SCHEDULES["flow"], "flow")
    return exact.sample(count, torch.Generator().manual_seed(0))


def start(prediction: str) -> float:
    return 0.98 if prediction == "eps" else 1.0


# ---------------------------------------------------------------- right models


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", ["flow", "x0", "eps", "v"])
def test_an_exact_model_passes(schedule: str, prediction: str) -> None:
    model = Model(schedule, prediction, scale=1000.0)
    passed = check_model(model, PlainCodec(), samples(), start=start(prediction))
    assert passed.rows["networks[0], reading"].startswith(f"{prediction} told t: x_0 is off by ")
    assert [name for name, _ in model.networks[0].named_modules()] == ["", "exact", "norm", "out"]  # no adapter left
    assert not any(p.requires_grad or p.grad is not None for p in model.networks[0].parameters())


def test_an_exact_model_with_a_fitted_student_passes() -> None:
    teacher = AnalyticTeacher(means=MEANS.tolist(), std=STD, fit_steps=300)
    check_model(AnalyticModel(teacher, seed=0), PlainCodec(), samples())


def test_a_badly_fitted_student_is_seen() -> None:
    teacher = AnalyticTeacher(means=MEANS.tolist(), std=STD, fit_steps=2)
    with pytest.raises(ModelError, match=r"students\[0\]: "):
        check_model(AnalyticModel(teacher, seed=0), PlainCodec(), samples())


def test_models_of_one_teacher_share_the_fit_but_no_weights() -> None:
    teacher = AnalyticTeacher(means=MEANS.tolist(), std=STD, fit_steps=2)
    first, second, other = (AnalyticModel(teacher, seed=seed).students[0].state_dict() for seed in (0, 0, 1))
    name = next(iter(first))
    assert first[name].equal(second[name]) and not first[name].equal(other[name])
    first[name].zero_()
    assert second[name].any() and AnalyticModel(teacher, seed=0).students[0].state_dict()[name].equal(second[name])


@pytest.mark.parametrize("change", ["rescaled guidance", "half precision", "scattered targets"])
def test_what_is_only_unusual_passes(change: str) -> None:
    model = Model()
    if change == "rescaled guidance":  # to the conditional norm, as Qwen-Image's
        plain = model.guide

        def guide(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
            guided = plain(conditional, unconditional, guidance)
            return guided * conditional.norm(dim=1, keepdim=True) / guided.norm(dim=1, keepdim=True)

        model.guide = guide
    elif change == "half precision":
        model.predict = lambda network, x, t, condition: network(x, t).bfloat16()
    else:
        block = nn.Sequential(nn.Linear(2, 2).requires_grad_(False))
        model.networks[0].add_module("block", block.eval().to(device()))
        model.lora_targets, forward = ("out", "block.0"), model.predict
        model.predict = lambda network, x, t, c: forward(network, x, t, c) + 1e-3 * network.get_submodule("block")(x)
    check_model(model, samples=samples())


def test_nano_passes_on_digits_through_its_own_vae() -> None:
    model, codec = load_model(WanTeacher(path="nano", guidance=(1.5,), max_tokens=16), seed=0)
    digits, _ = load_digits(DATA)
    pixels, captions, _ = image_batch(digits, 16, torch.Generator().manual_seed(0))
    latents = codec.vae.encode(pixels.to(device()), return_dict=False)[0].mode()
    mean, std = statistics(codec.vae)
    latents, conditions = (latents.cpu() - mean) / std, codec.encode_text(captions)
    check_model(model, codec, latents, conditions)
    with pytest.raises(ModelError, match="conditions: told each other's, samples are better predicted"):
        check_model(model, codec, latents, [*conditions[1:], conditions[0]])


def test_several_networks_pass_each_on_its_own_times() -> None:
    """The first, from .6 on, is wrong below, the second above: neither is asked there."""

    class Half(Network):
        def __init__(self, low: float, high: float) -> None:
            super().__init__(SCHEDULES["flow"], "flow")
            self.low, self.high = low, high

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            mine = ((t >= self.low) & (t <= self.high))[:, None]
            return torch.where(mine, super().forward(x, t), 100 * x)

    model = Model()
    halves = [Half(*part).eval() for part in ((0.6, 1), (0, 0.6))]
    model.networks = model.students = [half.requires_grad_(False).to(device()) for half in halves]
    model.switches, model.guidance = [0.6], [3.0, 2.0]
    check_model(model, samples=samples())
    model.switches = [0.3]
    with pytest.raises(ModelError, match=r"networks\[0\]: "):
        check_model(model, samples=samples())


def test_a_random_network_passes_with_a_warning_where_no_samples_are_given() -> None:
    with pytest.warns(UserWarning, match="without samples, parametrisation and time scale are not checked"):
        check_model(TinyWan(), TinyCodec())


# ---------------------------------------------------------------- what a prediction looks like


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("truth", "declared"), [*itertools.permutations(["flow", "x0", "eps", "v"], 2)])
def test_another_type_than_declared_is_named(schedule: str, truth: str, declared: Any) -> None:
    model = Model(schedule, truth)
    model.prediction = declared
    with pytest.raises(ModelError, match=f"looks like {truth} prediction told t, not {declared} told t"):
        check_model(model, samples=samples(), start=0.98)


@pytest.mark.parametrize("prediction", ["flow", "x0", "eps", "v"])
@pytest.mark.parametrize(
    ("told", "called"),
    [
        (lambda net, x, t: -net(x, 1000 * t), "-{} prediction told t"),
        (lambda net, x, t: net(x, t), "{} prediction told 1000 t"),
        (lambda net, x, t: net(x, 1000 * (1 - t)), "{} prediction told 1 - t"),
        (lambda net, x, t: -net(x, 1000 * (1 - t)), "-{} prediction told 1 - t"),
        (lambda net, x, t: net(x, 1e6 * t), "{} prediction told t / 1000"),
    ],
    ids=["sign", "unscaled", "reversed", "reversed sign", "scaled twice"],
)
def test_a_wrong_sign_or_time_is_named(prediction: Any, told: Callable[..., Tensor], called: str) -> None:
    """A network trained on 0 .. 1000, in wrappers that get that wrong."""
    model = Model("flow", prediction, scale=1000.0)
    model.predict = lambda network, x, t, condition: told(network, x, t)
    with pytest.raises(ModelError, match=f"looks like {called.format(prediction)}, not {prediction} told t"):
        check_model(model, samples=samples(), start=0.98)


def test_another_schedule_than_the_networks_is_seen() -> None:
    model = Model("vp-linear", "eps")
    model.schedule = VPSchedule("cosine")
    with pytest.raises(ModelError, match="better told .*: trained on another schedule or scale"):
        check_model(model, samples=samples(), start=0.98)


@pytest.mark.parametrize(
    ("scale", "message"), [(0.6, "better told .*: trained on another schedule or scale"), (0.2, "x_0 is off by")]
)
def test_latents_of_another_scale_are_seen(scale: float, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_model(Model(), samples=samples() * scale)


def test_samples_that_are_decoded_to_themselves_must_be_points() -> None:
    """A preview would fail on them, after the first updates."""
    with pytest.raises(ModelError, match=r"codec.decode: \[1, 16, 1, 4, 4\]; must be \[b, frames, height, width, 3\]"):
        check_model(TinyWan(), type("Still", (PlainCodec,), {"encode_text": TinyCodec.encode_text})())


def test_samples_that_are_no_tensor_are_refused() -> None:
    with pytest.raises(ModelError, match="samples: a tensor .* is needed, and this is a ndarray"):
        check_model(Model(), samples=samples().numpy())  # type: ignore[arg-type]


def test_pixels_in_the_place_of_latents_are_seen() -> None:
    with pytest.raises(ModelError, match="latents are meant, not pixels"):
        check_model(Model(), samples=torch.rand(4, 3, 8, 8))


# ---------------------------------------------------------------- what else can be wrong


class Rising(VPSchedule):
    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(1 - t)

    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(1 - t)


class Single(VPSchedule):
    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t).float()


class Infinite(VPSchedule):
    def sigma(self, t: Tensor) -> Tensor:
        return super().sigma(t).log()


def networks(count: int) -> list[nn.Module]:
    return Model().networks * count


def half_trained() -> nn.Module:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    network[1].train()
    return network


def with_norm(network: nn.Module, x: Tensor, t: Tensor, training: bool) -> Tensor:
    return nn.functional.batch_norm(network(x, t), None, None, training=training) if len(x) > 1 else network(x, t)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "students": ({"students": []}, "students: 0 for 1 network"),
    "guidance count": ({"guidance": [3.0, 3.0]}, r"guidance: 2 for 1 network\(s\); there must be 1"),
    "guidance of none": ({"guidance": [0.0]}, "guidance: 0 is below 1, which is none; the w of cond .* is g - 1"),
    "switch count": ({"switches": [0.5]}, "switches: 1 for 1 network"),
    "switch order": (
        {"networks": networks(3), "students": networks(3), "guidance": [1.0] * 3, "switches": [0.2, 0.8]},
        r"switches must decrease inside \(0, 1\)",
    ),
    "no shapes": ({"sample_shapes": []}, "sample_shapes: there must be one"),
    "thawed": ({"networks": [nn.Linear(2, 2)]}, r"networks\[0\]: not frozen"),
    "train mode": (
        {"networks": [nn.Sequential(nn.Dropout(0.1)).train()]}, r"networks\[0\]: in train mode; call eval\(\)"
    ),
    "train mode of a part": (
        {"students": [half_trained()]}, r"students\[0\]: in train mode \(1\)"
    ),
    "one guidance": ({"guidance": 2.0}, "guidance: a list is needed, and this is 2.0"),
    "one shape": ({"sample_shapes": (2,)}, r"sample_shapes: a list of shapes is needed, as \[\(2,\)\]"),
    "no student": ({"students": [Network(VPSchedule(), "flow").eval().exact]}, r"students\[0\]: has no parameters"),
    "schedule's direction": ({"schedule": Rising()}, "schedule: alpha / sigma must fall from t = 0, data"),
    "schedule's precision": ({"schedule": Single()}, "schedule.alpha: torch.float32"),
    "schedule's values": ({"schedule": Infinite()}, "schedule.sigma: must be finite"),
    "eps at alpha = 0": ({"schedule": VPSchedule(), "prediction": "eps"}, "eps prediction cannot start at t = 1"),
    "w for g": ({"guide": lambda c, u, w: c + w * (c - u)}, r"guide: this is cond \+ w \(cond - uncond\)"),
    "swapped": ({"guide": lambda u, c, g: u + g * (c - u)}, "guide: g = 1 gives the unconditional .* swapped"),
    "not affine": ({"guide": lambda c, u, g: c * g}, "guide: g = 1, or two equal predictions, must give"),
    "squared": ({"guide": lambda c, u, g: u + g * g * (c - u)}, "guide: at g = 3 this is no multiple"),
    "target": ({"lora_targets": ["outt"]}, r"lora_targets: outt ends .* no module of networks\[0\]; did you mean out"),
    "target's kind": ({"lora_targets": ["norm"]}, "norm ends norm, a LayerNorm, which cannot be adapted; one of out"),
    "unused target": ({"lora_targets": ["out", "spare"]}, "lets no gradient through to spare"),
    "raises": ({"predict": lambda n, x, t, c: n(x, t.view(1))}, "predict or batch fails for x"),
    "batch": ({"batch": lambda rows: {"text": torch.zeros(1, 2)}}, r"batch: text must be \[b, ...\] for b rows"),
    "shape": ({"predict": lambda n, x, t, c: n(x, t)[:, :1]}, r"of the shape of x, \[2, 2\]; it is \[2, 1\]"),
    "not finite": ({"predict": lambda n, x, t, c: n(x, t).log()}, "must be finite"),
    "double": ({"predict": lambda n, x, t, c: n(x, t) * (1 + 0 * t[:, None])}, "float64 for x in float32"),
    "in place": ({"predict": lambda n, x, t, c: n(x.mul_(0.5), t)}, "changes x in place"),
    "dropout": ({"predict": lambda n, x, t, c: nn.functional.dropout(n(x, t))}, "another at every call: dropout"),
    "one t": ({"predict": lambda n, x, t, c: n(x, t[:1].expand(len(x)))}, "depends on the samples beside it"),
    "neighbours": ({"predict": lambda n, x, t, c: n(x, t) - x.mean(0)}, "depends on the samples beside it"),
    "no t": ({"predict": lambda n, x, t, c: n(x, torch.full_like(t, 0.5))}, "does not depend on t"),
    "no_grad": ({"predict": torch.no_grad()(lambda n, x, t, c: n(x, t))}, "lets no gradient through: no_grad"),
    "detached x": ({"predict": lambda n, x, t, c: n(x.detach(), t)}, "lets no gradient through to x"),
    "partly detached": ({"predict": lambda n, x, t, c: n(x, t) + n(x.detach(), t)}, "part of it is detached"),
    "its own network": ({"predict": lambda n, x, t, c: networks(1)[0](x, t)}, "call the network that it is given"),
    "the weights": (
        {"predict": lambda n, x, t, c: n.exact(x, t) @ n.get_parameter("out.base_layer.weight").T
         if hasattr(n.out, "base_layer") else n(x, t)},
        "lets no gradient through to out: .* modules rather than their weights",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name: str) -> None:
    changes, message = WRONG[name]
    torch.manual_seed(0)  # dropout's
    model = Model()
    model.networks[0].add_module("spare", nn.Linear(2, 2).eval().requires_grad_(False).to(device()))
    for attribute, value in changes.items():
        setattr(model, attribute, value)
    with pytest.raises(ModelError, match=message):
        check_model(model)


# ---------------------------------------------------------------- conditions and codecs


class Told(Model):
    """Told a text, whose mean is added; rows of unequal length are padded with zeros and masked."""

    masked = True

    def batch(self, rows: Sequence[Condition]) -> Condition:
        text = nn.utils.rnn.pad_sequence([row["text"] for row in rows], batch_first=True)
        lengths = torch.tensor([len(row["text"]) for row in rows])
        mask = (torch.arange(text.shape[1]) < lengths[:, None]).to(text)
        return {"text": text.to(device()), "mask": mask.to(device())}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        weight = condition["mask"] if self.masked else torch.ones_like(condition["mask"])
        return network(x, t) + (condition["text"] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


class Words(PlainCodec):
    """A row [words + 1, 2] a prompt, and grey pixels."""

    pad, scale, device = False, (0.25, 0.5), "cpu"

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        rows = [draw(len(prompt.split()) + 1, 2, seed=len(prompt)) for prompt in prompts]
        longest = max(map(len, rows)) if self.pad else 0
        padded = [torch.cat([row, torch.zeros(max(longest - len(row), 0), 2)]) for row in rows]
        return [{"text": row.to(self.device)} for row in padded]

    def decode(self, latents: Tensor) -> Tensor:
        pixels = latents.mean(1).clamp(-1, 1) * self.scale[0] + self.scale[1]
        return pixels[:, None, None, None, None].expand(-1, 1, 4, 4, 3)


def test_text_of_unequal_length_must_not_leak_between_samples() -> None:
    model = Told()
    with pytest.warns(UserWarning, match="without samples"):
        check_model(model, Words())
    model.masked = False
    with pytest.raises(ModelError, match="depends on the samples beside it: padding without a mask"):
        check_model(model, Words())


def test_the_samples_conditions_are_told() -> None:
    """Rows that shift the prediction: right with zeros, wrong with what belongs to other samples."""
    model = Told()
    check_model(model, samples=samples(), conditions=[{"text": torch.zeros(3, 2)}])
    with pytest.raises(ModelError):
        check_model(
            model, samples=samples(), conditions=[{"text": torch.zeros(3, 2)}, {"text": torch.full((2, 2), 2.0)}]
        )


class Labelled(Model):
    """Told which of the mixture's modes a sample is of, and exact for each of them."""

    order: Sequence[int] = (0, 1, 2)  # of the modes that labels stand for

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return {"label": torch.stack([row["label"] for row in rows]).to(device())}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        own = [
            ExactMixture(MEANS[[mode]], STD, torch.ones(1), self.schedule, self.prediction).to(x.device)(x, t)
            for mode in self.order
        ]
        picked = nn.functional.one_hot(condition["label"][:, 0].long(), 3)[..., None]
        exact = (torch.stack(own, 1) * picked).sum(1).to(x.dtype)
        return network.out(exact)  # type: ignore[operator] a linear layer that changes nothing


def labelled(count: int = 96) -> tuple[Tensor, list[Condition]]:
    """Samples of the three modes in turn, and the label of each."""
    labels = torch.arange(count) % 3
    points = MEANS[labels] + STD * draw(count, 2, seed=1)
    return points, [{"label": torch.tensor([float(label)])} for label in labels]


def test_samples_told_their_own_conditions_pass_and_the_margin_is_the_modes() -> None:
    points, conditions = labelled()
    passed = check_model(Labelled(), samples=points, conditions=conditions)
    found = re.search(r"x_0 is off by (.*) times its error", passed.rows["networks[0], conditions"])
    assert found and float(found[1]) > 3  # modes are 1.5 to 2.1 apart, and .3 wide


@pytest.mark.parametrize("mistake", ["rolled by one", "a swapped label map", "two labels swapped"])
def test_conditions_of_other_samples_are_seen(mistake: str) -> None:
    model, (points, conditions) = Labelled(), labelled()
    if mistake == "rolled by one":
        conditions = [*conditions[1:], conditions[0]]
    else:
        model.order = (1, 2, 0) if mistake == "a swapped label map" else (1, 0, 2)
    with pytest.raises(ModelError, match="conditions: told each other's, samples are better predicted"):
        check_model(model, samples=points, conditions=conditions)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda rows: rows[::-1], "batch: gives a sample the condition of the one beside it"),
        (lambda rows: sorted(rows, key=lambda row: len(row["text"])), "batch: gives a sample the condition of the one"),
        (lambda rows: rows[:1] * len(rows), "depends on the samples beside it: .*rows mixed up"),
    ],
    ids=["reversed", "sorted by length", "the first for all"],
)
def test_a_batch_that_mixes_rows_up_is_seen(batch: Callable[..., Any], message: str) -> None:
    model = Told()
    right = model.batch
    model.batch = lambda rows: right(batch(rows))
    with pytest.raises(ModelError, match=message):
        check_model(model, Words(), quiet=True)


def test_a_condition_that_changes_nothing_is_seen() -> None:
    model = Told()
    model.predict = lambda network, x, t, condition: network(x, t)
    with pytest.raises(ModelError, match="does not depend on the condition: does batch, or predict, leave it out"):
        check_model(model, Words(), quiet=True)


class Closed(Words):
    """Knows three prompts, and no others."""

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        if unknown := set(prompts) - {"none", "a one", "a big two"}:
            raise KeyError(unknown.pop())
        return super().encode_text(prompts)


def test_a_codec_is_asked_for_the_users_prompts() -> None:
    """In place of the check's own, and of the empty one."""
    with pytest.raises(ModelError, match="fails for '', what is told in place of a prompt: give another negative_p"):
        check_model(Told(), Closed(), quiet=True)
    with pytest.raises(ModelError, match="fails for 'a longer .* words', the check's own: give yours as prompts"):
        check_model(Told(), Closed(), negative_prompt="none", quiet=True)
    with pytest.raises(ModelError, match="encode_text: fails for 'a three'; KeyError"):
        check_model(Told(), Closed(), prompts=["a one", "a three"], negative_prompt="none", quiet=True)
    passed = check_model(Told(), Closed(), prompts=["a one", "a big two"], negative_prompt="none", quiet=True)
    assert passed.rows["codec, prompts"] == "3 prompts, each encoded as alone"


def test_what_passed_is_printed_with_its_margins(capsys: pytest.CaptureFixture[str]) -> None:
    passed = check_model(Model(), PlainCodec(), samples())
    assert capsys.readouterr().out == f"{passed}\n"
    first, *lines = str(passed).splitlines()
    assert first == "check_model: passed" and len(lines) == len(passed.rows) == 9
    assert check_model(Model(), PlainCodec(), samples(), quiet=True) == passed
    assert not capsys.readouterr().out


def test_without_samples_a_quiet_check_says_what_is_unchecked() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_model(Model(), quiet=True).rows["reading"].startswith("not checked: without samples")


@pytest.mark.parametrize(("schedule", "shift"), [("flow", 1.0), ("vp-cosine", 1.0), ("vp-linear", 0.35), ("ve", 1.7)])
def test_the_first_guess_at_a_shift_is_where_signal_and_noise_are_equal(schedule: str, shift: float) -> None:
    """Of samples of unit variance: t / (1 - t) at t = .5, .5, .26 (log alpha = -log(2) / 2) and log(50) / log(500)."""
    model = Model(schedule)
    assert check_model(model, quiet=True).shift == shift
    points = samples()
    ratio = points.std().item()
    wide = check_model(Model("flow"), samples=points, quiet=True)
    assert wide.shift == pytest.approx(ratio, rel=0.06)  # t with (1 - t) ratio = t


@pytest.mark.parametrize(
    ("schedule", "prediction", "begin"),
    [("flow", "eps", 0.99), ("vp-cosine", "eps", 0.99), ("vp-cosine", "v", 1.0), ("ve", "eps", 1.0)],
)
def test_the_first_guess_at_a_start_leaves_eps_prediction_some_signal(
    schedule: str, prediction: str, begin: float
) -> None:  # fmt: skip
    """alpha / sigma is .0101 at .99 of flow, .0157 of cosine, and .1 at 1 of VE."""
    assert check_model(Model(schedule, prediction), start=0.98, quiet=True).start == begin


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("pad", True, "encode_text: text depends on the prompts beside it"),
        ("device", "meta", "encode_text: text is on meta, not on the CPU"),
        ("encode_text", lambda prompts: [{}], "encode_text: 1 rows for 2 prompts"),
        ("decode", lambda latents: torch.ones(len(latents), 1, 4, 4), r"decode: \[2, 1, 4, 4\]; must be \[b, frames"),
        ("decode", lambda latents: torch.ones(1, 1, 4, 4, 3), r"decode: \[1, 1, 4, 4, 3\]; must be \[b, frames"),
        ("decode", lambda latents: latents[:, None], r"decode: \[2, 1, 2\]; must be \[b, frames"),
        ("scale", (1.0, 0.0), "decode: pixels from .*; must be in"),
        ("scale", (127.5, 127.5), "decode: pixels from .*; must be in"),
    ],
)
def test_a_wrong_codec_is_told_what_is_wrong(attribute: str, value: Any, message: str) -> None:
    codec = Words()
    setattr(codec, attribute, value)
    with pytest.raises(ModelError, match=message):
        check_model(Told(), codec, samples().sort(0).values[[0, -1]])  # black and white
