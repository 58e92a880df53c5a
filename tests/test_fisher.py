"""The Fisher divergence against closed forms and in training; guidance in one call; a fake that is pulled along."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gaussians import (
    SCHEDULES,
    Affine,
    alpha_sigma,
    exact_prediction,
    exact_x_s,
    full,
    hermite,
    law,
    p_q,
    transition,
)
from PIL import Image
from pipelines import CAPTIONS, build, teacher
from recorded import Recorded, distill_own, watched_steps, weights
from safetensors.torch import load_file
from tiny import TinyCodec, TinyWan, draw
from torch import Tensor

from phased_dmd import step
from phased_dmd.config import Config
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.maths.losses import score_matching_loss, subinterval_target
from phased_dmd.maths.schedules import add_noise
from phased_dmd.models.analytic import build_mixture
from phased_dmd.models.loader import load_model
from phased_dmd.models.protocol import VelocityModel, rows
from phased_dmd.networks.build import add_expert, add_fake, build_system
from phased_dmd.networks.roles import FAKE, TEACHER
from phased_dmd.recipes import resolve
from phased_dmd.sampling import loading
from phased_dmd.train import distill

POINTS = [(0.75, 0.9), (0.75, 0.76), (0.3, 0.6), (0.0, 0.5), (0.0, 0.9)]
KINDS = [("flow", "flow"), ("flow", "x0"), ("vp-cosine", "v"), ("vp-linear", "eps"), ("ve", "x0"), ("ve", "v")]
on_gaussians = pytest.mark.parametrize(("name", "prediction"), KINDS)


# Against the closed form: x_0 ~ N(.7, .8^2), and a generator that makes x_s ~ N(m, c^2)


class Gaussian:
    """A generator x_s = m + c z, its marginal at t, and the exact teacher and fake there."""

    def __init__(self, name: str, prediction: str, s: float, t: float) -> None:
        self.name, self.prediction, self.s, self.t = name, prediction, s, t
        mean, variance = law(name, s)
        self.m, self.c = (0.35, 0.96) if s == 0 else (mean - 0.05, 1.2 * math.sqrt(variance))
        self.alpha_ts, self.variance_ts = transition(name, s, t)
        self.mu, self.v = law(name, t)
        self.m_t, self.v_t = self.alpha_ts * self.m, (self.alpha_ts * self.c) ** 2 + self.variance_ts
        alpha, sigma = alpha_sigma(name, t)
        p, q = p_q(prediction, alpha, sigma)
        self.a = -sigma * (alpha * q - sigma * p) / alpha  # psi = a score + b x_t
        self.teacher = exact_prediction(name, prediction, t)
        self.fake = Affine(-self.a / self.v_t + p / alpha, self.a * self.m_t / self.v_t)

    def chain(self, on_mean: float, on_variance: float) -> tuple[float, float]:
        """From the marginal's moments to (m, c)."""
        return self.alpha_ts * on_mean, 2 * self.alpha_ts**2 * self.c * on_variance

    def fisher(self) -> tuple[float, float]:
        """The gradient of E (S_T - S_G)^2 = ((m_t - mu) / v)^2 + v_t (1 / v_t - 1 / v)^2."""
        return self.chain(2 * (self.m_t - self.mu) / self.v**2, 1 / self.v**2 - 1 / self.v_t**2)

    def kullback_leibler(self) -> tuple[float, float]:
        """The gradient of [v_t + (m_t - mu)^2] / 2v - ln(v_t) / 2."""
        return self.chain((self.m_t - self.mu) / self.v, (1 / self.v - 1 / self.v_t) / 2)

    def expected(self, loss: Callable[..., Tensor]) -> list[float]:
        """The gradient in (m, c) of the expectation of loss(x_s, eps, s, t), by quadrature: exact for squares."""
        (z, eps), weight = hermite(4, 2)
        generator = torch.tensor([self.m, self.c], dtype=torch.float64, requires_grad=True)
        x_s = (generator[0] + generator[1] * z)[:, None]
        losses = loss(x_s, eps[:, None], full(self.s, x_s), full(self.t, x_s))
        return torch.autograd.grad((weight * losses).sum(), generator)[0].tolist()

    def found(self, divergence: str) -> list[float]:
        """As the generator's update computes it."""
        grads: list[bool] = []

        def loss(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
            def real(x: Tensor, *_: Any) -> Tensor:
                grads.append(torch.is_grad_enabled())
                return self.teacher(x)

            model = SimpleNamespace(schedule=SCHEDULES[self.name], prediction=self.prediction)
            config = SimpleNamespace(objective=divergence)
            asked: Any = SimpleNamespace(
                model=model, config=config,
                roles=SimpleNamespace(active=lambda role: nullcontext()),
            )  # fmt: skip
            batch: Any = SimpleNamespace(system=asked, s=s, t=t, eps=eps)
            return step.fisher_loss(batch, x_s, real, self.fake)

        found = self.expected(loss)
        assert grads == [divergence == "fisher"]
        return found


@on_gaussians
@pytest.mark.parametrize(("s", "t"), POINTS)
def test_the_gradient_is_that_of_the_fisher_divergence(name: str, prediction: str, s: float, t: float) -> None:
    """Sign and size, in units of the native prediction and with Eq. 13's clamp; 1 where x_s is clean."""
    case = Gaussian(name, prediction, s, t)
    unit = alpha_sigma(name, t)[1] ** 2 if name == "ve" else 1.0
    weight = 1.0 if s == 0 and name != "ve" else min(1.0, 10 * case.variance_ts / unit)
    expected = [weight * case.a**2 * slope for slope in case.fisher()]
    assert case.found("fisher") == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(
    ("s", "t", "divergence", "figures"),
    [
        (0.75, 0.9, "fisher", (-0.0240, 0.0431)), (0.0, 0.5, "fisher", (-1.041, 0.776)),
        (0.0, 0.5, "kl", (-0.213, 0.086)),
    ],
)  # fmt: skip
def test_figures_of_the_closed_form(s: float, t: float, divergence: str, figures: tuple[float, float]) -> None:
    """Found on another occasion, in part by sampling: the generator is 1.2 times too wide, and off the mean."""
    case = Gaussian("flow", "flow", s, t)
    closed = case.fisher() if divergence == "fisher" else case.kullback_leibler()
    assert closed == pytest.approx(figures, abs=1.1e-3 if s == 0 else 6e-5)


@pytest.mark.parametrize(("s", "t"), POINTS)
def test_simpler_forms_are_not_the_fisher_gradient(s: float, t: float) -> None:
    """|T - F|^2 through x_t alone lacks the change of the fake; and the target must keep its graph."""
    case = Gaussian("flow", "flow", s, t)
    schedule = SCHEDULES["flow"]

    def naive(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        x_t = add_noise(x_s, eps, s, t, schedule)
        return (case.teacher(x_t) - case.fake(x_t)).square()[:, 0]

    def detached(x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        x_t, y = add_noise(x_s, eps, s, t, schedule), subinterval_target(x_s.detach(), eps, s, t, schedule, "flow")
        return ((case.teacher(x_t) - y).square() - (case.fake(x_t) - y).square())[:, 0]

    right = [case.a**2 * slope for slope in case.fisher()]
    for wrong in (naive, detached):
        assert case.expected(wrong)[1] != pytest.approx(right[1], rel=0.1)


@on_gaussians
@pytest.mark.parametrize(("s", "t"), POINTS)
def test_the_stop_gradient_form_descends_the_kl(name: str, prediction: str, s: float, t: float) -> None:
    """Its gradient is the KL's times the slope of a posterior mean, on Gaussians one positive number."""
    case = Gaussian(name, prediction, s, t)
    found, kl = case.found("fisher-stop-gradient"), case.kullback_leibler()
    ratio = found[0] / kl[0]
    assert ratio > 0 and found[1] == pytest.approx(ratio * kl[1], rel=1e-7)


def test_the_stop_gradient_form_at_a_clean_s_is_on_x0() -> None:
    """d E |sg(x0_T) - x0_F|^2: the difference of scores times sigma^2 / alpha, twice, times alpha dx0_F/dx_t."""
    case, slope = Gaussian("flow", "flow", 0.0, 0.5), 0.5 * 0.96**2 / (0.25 * 0.96**2 + 0.25)
    expected = [2 * 0.5 * slope * partial for partial in case.kullback_leibler()]
    assert case.found("fisher-stop-gradient") == pytest.approx(expected, rel=1e-9)
    assert expected[0] / expected[1] == pytest.approx(-0.819 / 0.329, rel=5e-3)  # figures found on another occasion


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("s", "t"), POINTS)
def test_sgmds_second_term_moves_a_generator_that_is_right(name: str, s: float, t: float) -> None:
    """Why there is no objective of SGMD's: the gradient of E |E_T - E_F|^2 - lambda |sg(x_s) - E_F|^2 in the spread c,
    of a fake that is right, is 2 lambda k alpha_ts c sigma_ts^2 / v_t where the generator has the teacher's law, k the
    slope of E_F; and it vanishes at c^2 = (1 - lambda) c_T^2 - lambda sigma_ts^2 / alpha_ts^2, if that is above 0.
    """
    (mean, variance), (alpha_ts, variance_ts), weight = law(name, s), transition(name, s, t), 0.1
    teacher, ((z, eps), odds) = exact_x_s(name, s, t), hermite(4, 2)

    def slope(c: float) -> float:
        v_t = (alpha_ts * c) ** 2 + variance_ts
        k, spread = alpha_ts * c**2 / v_t, torch.tensor(c, dtype=torch.float64, requires_grad=True)
        x_s = mean + spread * z
        x_t = alpha_ts * x_s + math.sqrt(variance_ts) * eps
        own = mean + k * (x_t - alpha_ts * mean)
        loss = (own - teacher(x_t.detach())) ** 2 - weight * (own - x_s.detach()) ** 2
        found = torch.autograd.grad((odds * loss).sum(), spread)[0].item()
        return found / (2 * weight * k * alpha_ts * c * variance_ts / v_t)

    assert slope(math.sqrt(variance)) == pytest.approx(1, rel=1e-7)
    end = (1 - weight) * variance - weight * variance_ts / alpha_ts**2
    if end > 0:
        assert slope(math.sqrt(end)) == pytest.approx(0, abs=1e-7)


# On networks


Wan = Callable[..., tuple[Config, TinyWan]]


@pytest.fixture
def wan(tmp_path: Path) -> Wan:
    """A run of nano-t2i in four steps and two phases, and its teacher: two tiny random Wans with guidance 2."""
    (tmp_path / "prompts.txt").write_text("a seven\na handwritten digit\nseven\n")

    def make(**overrides: Any) -> tuple[Config, TinyWan]:
        base = {
            "prompts": str(tmp_path / "prompts.txt"), "fake.updates": 2, "generator.lora.rank": 3, "plan.phases": 2,
            "generator.lora.alpha": 6, "batch_size": 4, "iterations": 2, "log_every": 1, "sample_every": None,
            "plan.gradient": "last",
            "generator.lr": 0.03,
        }  # fmt: skip
        config = resolve("nano-t2i", base | {key.replace("__", "."): value for key, value in overrides.items()})
        return config, TinyWan(2, (0.9,), guidance=2.0)

    return make


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("divergence", ["fisher", "fisher-stop-gradient", "normalised"])
def test_only_the_generator_has_gradients_after_its_update(divergence: str, kind: str, wan: Wan) -> None:
    """Though teacher and fake are differentiated down to their inputs: not one of their parameters has a gradient."""
    config, model = wan(objective=divergence, fake__weights=kind)
    asked = build_system(config, model, TinyCodec().encode_text([""])[0])
    add_expert(asked, 1, trainable=True)
    if kind == "lora":
        asked.roles.add(FAKE, [0, 1], config.fake.lora, seed=1)
    else:
        add_fake(asked, 1, None)
    for i, p in enumerate(asked.roles.parameters(FAKE).values()):
        p.data += 0.1 * draw(*p.shape, seed=i).to(p.device)
    rows = TinyCodec().encode_text(["one", "seven", "digit", "a one"])
    table: Any = SimpleNamespace(eligible=lambda bucket: range(4), row=lambda index, bucket: rows[index])
    batch = step.draw(asked, 1, 0, 0, range(4), [1.0], table)
    assert batch.networks == [0, 1]
    with asked.roles.active("phase_1"):
        step.expert_loss(batch, {})[0].backward()
    assert any(p.grad is not None and p.grad.any() for p in asked.roles.parameters("phase_1").values())
    assert all(p.grad is None for p in asked.roles.parameters(FAKE).values())
    assert all(p.requires_grad for p in asked.roles.parameters(FAKE).values())
    frozen = [p for network in model.networks for name, p in network.named_parameters() if "lora" not in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


def test_teacher_and_fake_are_differentiated_with_guidance_and_route(wan: Wan) -> None:
    """The loss of the guided teacher minus the fake's: its value, and its slope through both branches of the teacher,
    against networks that are called one by one. What checkpointing computes again has each role's own adapters.
    """
    config, model = wan(objective="fisher", fake__weights="lora", fake__lora__rank=3)
    bare = [copy.deepcopy(network).double() for network in model.networks]
    for network in model.networks:
        network.double().enable_gradient_checkpointing()
    asked = build_system(config, model, TinyCodec().encode_text([""])[0])
    asked.roles.add(FAKE, [0, 1], config.fake.lora, seed=1)
    for i, p in enumerate(asked.roles.parameters(FAKE).values()):
        p.data = 0.1 * draw(*p.shape, seed=i, dtype=torch.float64).to(p.device)
    x = draw(4, 16, 1, 4, 4, seed=1, dtype=torch.float64).to(device()).requires_grad_()
    texts, empty = (
        model.batch(TinyCodec().encode_text(prompts))["text"].double()
        for prompts in (["one", "seven", "digit", "a one"], [""])
    )
    asked.negative["text"] = asked.negative["text"].double()
    rows = [{"text": text} for text in texts]
    table: Any = SimpleNamespace(eligible=lambda bucket: [0], row=lambda index, bucket: rows[0])
    batch = step.draw(asked, 1, 0, 0, range(4), [1.0], table)
    batch = dataclasses.replace(batch, condition={"text": texts})
    eps, s, t = batch.eps, batch.s, batch.t

    def called(network: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, t: network(x, t, batch.condition, batch.networks)

    found = step.fisher_loss(batch, x, called(asked.teacher), called(asked.fake))

    def alone(predict: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def each(x: Tensor, t: Tensor) -> Tensor:
            parts = [predict(int(t[i] < 0.9), x[i : i + 1], t[i : i + 1], texts[i : i + 1]) for i in range(4)]
            return torch.cat(parts)

        return each

    def guided(network: int, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with_it, without = (bare[network](x, t * 1000, each, return_dict=False)[0] for each in (text, empty))
        return 2 * with_it - without

    def faked(network: int, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return asked.roles.predict(FAKE, network, x, t, {"text": text})

    arguments = x, eps, s, t, model.schedule, model.prediction
    real = score_matching_loss(alone(guided), *arguments)
    with asked.roles.active(FAKE):
        own = score_matching_loss(alone(faked), *arguments)
        slope = torch.autograd.grad((real - own).sum(), x)[0]
    torch.testing.assert_close(found, real - own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], slope, rtol=1e-4, atol=1e-6)
    assert slope.abs().max() > 1e-3


SMALL = {
    "teacher.means": [[-1.0], [1.0]], "teacher.std": 0.3, "teacher.fit_steps": 300, 
    "fake.updates": 3, "batch_size": 64, "sample_every": None,
    "plan.shift": 3.0, "generator.lr": 2e-3, "fake.lr": 4e-3,
}  # fmt: skip


def toy(**overrides: Any) -> Config:
    """toy-1d, made quick, on two modes."""
    return resolve("toy-1d", SMALL | {key.replace("__", "."): value for key, value in overrides.items()})


@pytest.mark.parametrize("divergence", ["fisher", "fisher-stop-gradient"])
def test_training_brings_the_samples_nearer_to_the_mixture(divergence: str, tmp_path: Path) -> None:
    """The mean distance of sorted samples from sorted points of the exact mixture (Wasserstein's), before and after."""

    def distance(config: Config) -> float:
        run = distill(config, tmp_path / str(config.iterations), quiet=True)
        samples = loading.load(run)([""] * 4000, range(4000))
        exact = build_mixture(config.teacher).sample(4000, torch.Generator().manual_seed(1))
        return (samples.sort(0).values - exact.sort(0).values).abs().mean().item()

    before = distance(toy(iterations=1, generator__lr=1e-9))
    after = distance(toy(iterations=80, objective=divergence))
    assert after < 0.6 * before, (before, after)


# Guidance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: build(name, tmp_path_factory.mktemp(name))


@pytest.mark.parametrize(
    "name", ["wan21_t2v", "wan22_t2v", "wan21_i2v", "ti2v_5b", "qwen_image", "qwen_image_21", "krea_2", "lumina_2"]
)
def test_guided_samples_do_not_depend_on_those_beside_them(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """In float64, over texts of several lengths, longer and shorter than the negative one's, and first frames."""
    section, changes = teacher(name, folder(name)), {"dtype": "float64"}
    changes |= {"first_frame": True} if name == "ti2v_5b" else {}
    section = type(section).model_validate(section.model_dump() | changes)
    Image.effect_noise((section.sizes[0].width, section.sizes[0].height), 64).save(tmp_path / "frame.png")
    bare, codec = load_model(section, 0)
    model = Recorded(bare)
    texts = codec.encode_text([*CAPTIONS, "a", "a red fox in the snow at night, two boats asleep"])
    if codec.takes_images:
        texts = [text | codec.encode_picture("", tmp_path / "frame.png", 0) for text in texts]
    negatives = codec.encode_text(["", CAPTIONS[3], "a boat at night asleep in the snow, low quality, grey"])
    x = draw(len(texts), *model.sample_shapes[0], seed=1, dtype=torch.float64).to(device())
    t = torch.tensor([0.95, 0.9, 0.88, 0.3, 0.7, 0.99], dtype=torch.float64, device=device())
    lengths = {len(row["text"]) for row in (*texts, *negatives)}
    assert len(lengths) > 4
    guided = []
    for negative in negatives:
        asked = build_system(Config(teacher=section, recipe="tiny", prompts="nano-t2i"), model, negative)
        model.calls.clear()
        for index in (torch.arange(6), torch.tensor([2])):
            guided.append(asked.teacher(x[index], t[index], rows(model.batch(texts), index)))
        assert sum(len(call.x) for call in model.calls) == 2 * 7
        assert {call.role for call in model.calls} == {TEACHER}
        assert len(model.calls) == (len(model.networks) + 1) * 2
        together, alone = guided[-2:]
        torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)
    assert (guided[0] - guided[2]).abs().max() > 1e-3  # another negative text leads elsewhere


# A fake that is pulled along


Weights = dict[str, Tensor]


def pulls(config: Config, run: Path, bare: VelocityModel) -> Iterator[tuple[Weights, Weights, Weights]]:
    """Around each update of the generator: the fake before it, and after it as a checkpoint holds it; the change of the
    expert's weights, those of the base that its adapters change included, as peft merges them.
    """
    names = [list(weights(student, number)) for number, student in enumerate(bare.students)]
    model, experts = Recorded(bare, run), {}
    model.then = lambda call, network, _: experts.update({call.role: network})
    fakes: list[Tensor] = []
    steps: list[tuple[str, list[Tensor], Weights]] = []

    def merged(role: str) -> Weights:
        if config.generator.weights == "full":
            return weights(experts[role])
        return {
            f"{number}.{name}.weight": module.get_delta_weight(role).detach().to("cpu", copy=True)
            for number, student in enumerate(bare.students)
            for name, module in student.named_modules()
            if role in getattr(module, "lora_A", {})
        }

    def before(role: str, _: Any) -> None:
        if role != FAKE:
            steps.append((role, list(fakes), merged(role)))

    def after(role: str, group: dict[str, Any]) -> None:
        if role == FAKE:
            fakes[:] = [p.detach().to("cpu", copy=True) for p in group["params"]]
        else:
            *_, change = steps[-1]
            change |= {name: p - change[name] for name, p in merged(role).items()}

    with watched_steps(before, after):
        every = config.model_copy(update={"checkpoint_every": 1, "keep_last": "all"})
        distill_own(every, run, model, TinyCodec())
    folders = sorted((run / "checkpoints").iterdir())
    for (role, fake, change), folder in zip(steps, folders, strict=True):
        assert folder.name.startswith(role.replace("_", "-"))
        saved = {name: p for file in folder.glob("*.safetensors") for name, p in load_file(file).items()}
        after_it = {key.split("/")[2]: p for key, p in saved.items() if key.startswith(f"{FAKE}/weights/")}
        held = [name for own in names for name in own if name in after_it]
        yield dict(zip(held, fake, strict=True)), after_it, change


@pytest.mark.parametrize("kind", ["toy", "wan"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_fake_makes_its_share_of_the_generators_change(share: float, kind: str, wan: Wan, tmp_path: Path) -> None:
    """Full weights of both; and an adapter's change, merged, on a full fake."""
    config, model = (toy(fake__pull=share, iterations=2), None) if kind == "toy" else wan(fake__pull=share)
    bare: Any = model or load_model(config.teacher, config.seed)[0]
    count = 0
    for before, after, change in pulls(config, tmp_path / "run", bare):
        moved = [name for name in change if name in before and change[name].any()]
        assert len(moved) > 3 and not change.keys() - before.keys() - {n for n in change if n.startswith("1.")}
        assert before.keys() == after.keys()
        for name in before:
            if share and name in moved:
                assert not torch.equal(after[name], before[name])
                torch.testing.assert_close(after[name], before[name] + share * change[name], rtol=0, atol=2e-6)
            else:
                assert torch.equal(after[name], before[name])
        count += 1
    assert count == 2 * config.iterations


def test_a_fake_of_adapters_cannot_be_pulled(wan: Wan) -> None:
    with pytest.raises(UserError, match="fake.pull: needs fake.weights=full"):
        wan(fake__pull=0.5, fake__weights="lora")
