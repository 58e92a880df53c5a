"""The two losses against closed forms: Gaussians by linear algebra, the mixture {-1, 0, 1, 2} by quadrature."""

import math
from typing import Any

import pytest
import torch
from gaussians import (
    PREDICTIONS,
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
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from phased_dmd.maths.losses import (
    biased_target,
    distribution_matching_loss,
    fisher_stop_gradient_loss,
    matching_gradient,
    printed_target,
    rollout_target,
    score_matching_loss,
    score_matching_weight,
    subinterval_target,
    without_component,
    x0_residual,
)
from phased_dmd.maths.schedules import add_noise, renoise_times
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.recipes import resolve

S = (0.0, 0.3, 0.75, 5 / 6)
AGREEMENT = {"teacher_error", "fake_error", "gap"}
WEIGHTINGS = ("normalised", "projected", "paper", "posterior", "public")
schedules = pytest.mark.parametrize("name", SCHEDULES)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def gradient_of(*arguments: Any, **more: Any) -> Tensor:
    return matching_gradient(*arguments, **more)[0]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def times(s: float, t: float, like: Tensor) -> tuple[Tensor, Tensor]:
    return full(s, like), full(t, like)


# The subinterval target


def coefficients_of(target, name: str, prediction: str, s: float, t: float) -> tuple[float, float]:
    """The linear map (x_s, eps) -> target, read off at x_s = 1, eps = 0 and at x_s = 0, eps = 1."""
    one, zero = torch.eye(2, dtype=torch.float64)
    return tuple(target(one, zero, *times(s, t, one), SCHEDULES[name], prediction).tolist())


def regression(target, name: str, prediction: str, s: float, t: float) -> Affine:
    """E[target | x_t] from the joint Gaussian law of (x_s, eps), x_t = alpha_ts x_s + sigma_ts eps."""
    on_x_s, on_eps = coefficients_of(target, name, prediction, s, t)
    alpha_ts, variance_ts = transition(name, s, t)
    (m_s, v_s), (m_t, v_t) = law(name, s), law(name, t)
    slope = (on_x_s * alpha_ts * v_s + on_eps * math.sqrt(variance_ts)) / v_t
    return Affine(slope, on_x_s * m_s - slope * m_t)


def error(target, name: str, prediction: str, s: float, t: float) -> float:
    """Root mean square over x_t of the regression's error, relative to the prediction's own."""
    learned, exact = regression(target, name, prediction, s, t), exact_prediction(name, prediction, t)
    difference = Affine(learned.slope - exact.slope, learned.intercept - exact.intercept)
    return difference.rms(*law(name, t)) / exact.rms(*law(name, t))


@schedules
@predictions
@pytest.mark.parametrize("s", S)
@pytest.mark.parametrize("part", [1e-4, 0.02, 0.3, 0.9, 1.0])
def test_regression_of_the_target_is_the_marginal_prediction(name, prediction, s, part):
    """Eq. 12, 15 and their twins at t = s + part (1 - s); t = 1 and cosine's alpha(1) = 6e-17 included."""
    tolerance = 1e-10 if part == 1e-4 else 1e-12  # sigma_ts^2 loses digits near s
    assert error(subinterval_target, name, prediction, s, s + part * (1 - s)) < tolerance


@schedules
@predictions
@pytest.mark.parametrize("s", S[1:])
@pytest.mark.parametrize("part", [0.1, 0.4])
def test_regression_of_the_biased_target_is_not(name, prediction, s, part):
    """Sec. 2.3.2: x_s in the place of x_0 is off by more than 10 % at s of .75 and .8333, by percents at .3."""
    assert error(biased_target, name, prediction, s, s + part * (1 - s)) > (0.1 if s > 0.5 else 0.01)


@schedules
@predictions
@pytest.mark.parametrize("s", S)
@pytest.mark.parametrize("part", [0.1, 0.4])
def test_regression_of_the_rollouts_target_is_right_with_new_noise_alone(name, prediction, s, part):
    """TDM's target: p x_0 + q (mixed noise), where x_s = alpha_s x_0 + sigma_s e with e drawn; of the exact flow, by
    which x_s is a function of the x_0 that is read off it, it is off by percents, but at a clean s.
    """
    t = s + part * (1 - s)
    (a, sigma), exact, (nodes, weight) = alpha_sigma(name, s), exact_prediction(name, prediction, t), hermite(3, 3)
    mean, variance = law(name, s)
    x0 = 0.7 + 0.8 * nodes[0]
    drawn, flowed = a * x0 + sigma * nodes[1], mean + math.sqrt(variance) * nodes[0]

    def off(x_s: Tensor) -> float:
        given = x_s[:, None], nodes[2][:, None], *times(s, t, x_s), SCHEDULES[name]
        y, x_t = rollout_target(*given, prediction, x0[:, None])[:, 0], add_noise(*given)[:, 0]
        rest = y - exact(x_t)
        moments = [(weight * rest * by).sum().item() for by in (torch.ones_like(x_t), x_t)]
        return max(abs(moment) for moment in moments)

    assert off(drawn) < 1e-12
    assert off(flowed) > 1e-3 if s > 0 else off(flowed) < 0.02  # of VE, x_s is never clean


@schedules
@pytest.mark.parametrize("prediction", ["flow", "x0", "v"])
@pytest.mark.parametrize("s", S[1:])
@pytest.mark.parametrize("part", [0.1, 0.4])
def test_regression_of_the_printed_target_is_not(name, prediction, s, part):
    """Eq. 13 as printed has the wrong sign on x_s (eps prediction has no x_s term, so nothing to print wrong)."""
    assert error(printed_target, name, prediction, s, s + part * (1 - s)) > 0.5


@pytest.mark.parametrize(
    ("target", "intercept", "slope"),
    [(subinterval_target, -0.772, 1.024), (printed_target, 0.466, 3.385)],
)
def test_regression_numbers_of_equation_13(target, intercept, slope):
    """At s .75, t .9, x_0 ~ N(.7, .8^2); the printed form's numbers were found by sampling, hence .004."""
    line = regression(target, "flow", "flow", 0.75, 0.9)
    assert (line.intercept, line.slope) == pytest.approx((intercept, slope), abs=4e-3)


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.75, 0.9), (5 / 6, 1.0)])
def test_flow_target_is_equation_12(s, t):
    """((alpha_s^2 sigma_t + alpha_t sigma_s^2) / (alpha_s^2 sigma_ts)) eps - x_s / alpha_s, written for flow."""
    sigma_ts = math.sqrt(transition("flow", s, t)[1])
    expected = -1 / (1 - s), ((1 - s) ** 2 * t + (1 - t) * s**2) / ((1 - s) ** 2 * sigma_ts)
    assert coefficients_of(subinterval_target, "flow", "flow", s, t) == pytest.approx(expected, rel=1e-13)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.4), (0.3, 0.5), (0.75, 0.9), (5 / 6, 1.0)])
def test_target_coefficients(name, prediction, s, t):
    """Eq. 12, Eq. 15 and their twins: the coefficients of x_s, and of eps times sigma_ts."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = alpha_sigma(name, s), alpha_sigma(name, t)
    sigma_ts = math.sqrt(transition(name, s, t)[1])
    table = {
        "flow": (-1 / alpha_s, sigma_t + alpha_t * sigma_s**2 / alpha_s**2),
        "x0": (1 / alpha_s, -alpha_t * sigma_s**2 / alpha_s**2),
        "eps": (0.0, sigma_t),
        "v": (-sigma_t / alpha_s, alpha_t * sigma_t * (alpha_s**2 + sigma_s**2) / alpha_s**2),
    }
    on_x_s, on_eps = coefficients_of(subinterval_target, name, prediction, s, t)
    assert (on_x_s, on_eps * sigma_ts) == pytest.approx(table[prediction], rel=1e-10, abs=1e-15)


POINTS = torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)


def mixture_regression(target, name: str, prediction: str, s: float, t: float, x_t: Tensor) -> Tensor:
    """E[target | x_t] for x_0 uniform on the four points, by summing over x_s: a grid, or the points at sigma_s = 0."""
    alpha_s, sigma_s = alpha_sigma(name, s)
    alpha_ts, variance_ts = transition(name, s, t)
    if sigma_s == 0:
        x_s, density = alpha_s * POINTS, torch.ones(4, dtype=torch.float64)
    else:
        x_s = torch.linspace(-alpha_s - 9 * sigma_s, 2 * alpha_s + 9 * sigma_s, 4001, dtype=torch.float64)
        density = (-((x_s[:, None] - alpha_s * POINTS) ** 2) / (2 * sigma_s**2)).exp().sum(1)
    means = []
    for x in x_t.tolist():
        eps = (x - alpha_ts * x_s) / math.sqrt(variance_ts)
        weight = density * (-(eps**2) / 2).exp()
        y = target(x_s, eps, *times(s, t, x_s), SCHEDULES[name], prediction)
        means.append((weight * y).sum() / weight.sum())
    return torch.stack(means)


def mixture_prediction(name: str, prediction: str, t: float, x_t: Tensor) -> Tensor:
    """E[p x_0 + q eps | x_t] for x_0 uniform on the four points, by their posterior weights."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    eps = (x_t[:, None] - alpha * POINTS) / sigma
    posterior = (-(eps**2) / 2).softmax(1)
    return (posterior * (p * POINTS + q * eps)).sum(1)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.3, 0.5), (0.75, 0.78), (5 / 6, 0.95), (5 / 6, 1.0)])
def test_regression_of_the_target_on_the_exact_mixture(name, prediction, s, t):
    """Eq. 12 and its twins hold not only for Gaussians; and `ExactMixture` is that regression."""
    scale = alpha_sigma(name, t)[0] + alpha_sigma(name, t)[1]
    x_t = scale * torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    exact = mixture_prediction(name, prediction, t, x_t)
    close = {"rtol": 0, "atol": 1e-9}
    regressed = mixture_regression(subinterval_target, name, prediction, s, t, x_t)
    torch.testing.assert_close(regressed, exact, **close)
    model = ExactMixture(POINTS[:, None], 0.0, torch.ones(4), SCHEDULES[name], prediction)
    torch.testing.assert_close(model(x_t[:, None], full(t, x_t))[:, 0], exact, **close)


@pytest.mark.parametrize("prediction", ["flow", "x0", "v"])
@pytest.mark.parametrize("target", [biased_target, printed_target])
def test_regression_of_the_wrong_targets_on_the_exact_mixture(prediction, target):
    x_t = torch.linspace(-2.5, 2.5, 11, dtype=torch.float64)
    exact = mixture_prediction("flow", prediction, 0.9, x_t)
    assert (mixture_regression(target, "flow", prediction, 0.75, 0.9, x_t) - exact).abs().max() > 0.5


@pytest.mark.parametrize("name", ["flow", "vp-cosine", "vp-linear"])
@predictions
def test_biased_target_is_right_at_a_clean_s(name, prediction):
    """There it is Eq. 4 itself; at s > 0 it has the same coefficients, with x_s for x_0."""
    assert error(biased_target, name, prediction, 0.0, 0.4) < 1e-14
    for s in (0.0, 0.3):
        coefficients = coefficients_of(biased_target, name, prediction, s, 0.4)
        assert coefficients == pytest.approx(p_q(prediction, *alpha_sigma(name, 0.4)), rel=1e-14)


@pytest.mark.parametrize("name", ["flow", "vp-cosine", "vp-linear"])
@predictions
def test_printed_target_is_the_unbiased_one_at_a_clean_s(name, prediction):
    """There Eq. 13 is Eq. 4, bit for bit; the tiniest s > 0 flips x_s. In a batch each sample by its own s."""
    for t in (0.02, 0.4, 1.0):
        unbiased = coefficients_of(subinterval_target, name, prediction, 0.0, t)
        assert coefficients_of(printed_target, name, prediction, 0.0, t) == unbiased
    x_s, eps = randn(2, 2, 3)
    s, t = torch.tensor([[0.0, 1e-6], [0.4, 0.4]], dtype=torch.float64)
    arguments = x_s, eps, s, t, SCHEDULES[name], prediction
    printed, unbiased = printed_target(*arguments), subinterval_target(*arguments)
    assert torch.equal(printed[0], unbiased[0])
    p = p_q(prediction, *alpha_sigma(name, 0.4))[0]
    flipped = unbiased[1] - 2 * p / alpha_sigma(name, 1e-6)[0] * x_s[1]
    torch.testing.assert_close(printed[1], flipped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["flow", "x0", "v"])
def test_printed_target_is_wrong_on_ve_even_at_0(prediction):
    """sigma(0) = sigma_min > 0: x_s is never clean, and x_s has the other sign throughout."""
    on_x_s, on_eps = coefficients_of(subinterval_target, "ve", prediction, 0.0, 0.4)
    assert coefficients_of(printed_target, "ve", prediction, 0.0, 0.4) == pytest.approx((-on_x_s, on_eps), rel=1e-13)


# The fake's loss


class Net(nn.Module):
    """A small float32 network of (x_t, t)."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), t[:, None].to(x.dtype)], 1)).reshape(x.shape)


@pytest.mark.parametrize("prediction", ["flow", "x0", "eps", "v"])
@pytest.mark.parametrize("name", ["flow", "vp-cosine", "vp-linear"])
def test_at_a_clean_s_the_loss_is_ordinary_matching_bit_for_bit(name, prediction):
    """Eq. 4, in float32: mean |net(alpha x_0 + sigma eps) - (p x_0 + q eps)|^2, values and gradients."""
    x_0, eps = randn(2, 64, 3, 2, dtype=torch.float32)
    t = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(min=0.02)
    alpha, sigma = SCHEDULES[name].alpha(t), SCHEDULES[name].sigma(t)
    p, q = {"flow": (-1, 1), "x0": (1, 0), "eps": (0, 1), "v": (-sigma, alpha)}[prediction]
    alpha, sigma, p, q = (
        torch.as_tensor(c, dtype=torch.float32).expand(64)[:, None, None] for c in (alpha, sigma, p, q)
    )
    plain_net, net = Net(), Net()
    plain = (plain_net(alpha * x_0 + sigma * eps, t) - (p * x_0 + q * eps)).square().flatten(1).mean(1)
    plain.sum().backward()
    loss = score_matching_loss(net, x_0, eps, torch.zeros_like(t), t, SCHEDULES[name], prediction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, plain)
    for ours, ordinary in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert ordinary.grad.abs().sum() > 0
        assert torch.equal(ours.grad, ordinary.grad)


@schedules
@pytest.mark.parametrize("s", S)
def test_weight(name, s):
    """min(1, 10 sigma_ts^2); VE min(1, 10 sigma_ts^2 / sigma_t^2); 1 where x_s is clean, which VE's never is."""
    parts = (1e-3, 0.01, 0.1, 0.5, 1.0)
    t = torch.tensor([s + part * (1 - s) for part in parts], dtype=torch.float64)
    weight = score_matching_weight(full(s, t), t, SCHEDULES[name])
    expected = [
        1.0
        if s == 0 and name != "ve"
        else min(1.0, 10 * transition(name, s, time)[1] / (alpha_sigma(name, time)[1] ** 2 if name == "ve" else 1))
        for time in t.tolist()
    ]
    assert weight.tolist() == pytest.approx(expected, rel=1e-9)
    assert weight.dtype == torch.float64
    assert (weight[0] < 1) == (s > 0 or name == "ve")  # the clamp bites somewhere


@pytest.mark.parametrize(("s", "bite"), [(0.75, 0.7671), (5 / 6, 0.8436)])
def test_where_the_clamp_bites(s, bite):
    """10 sigma_ts^2 < 1 on flow below t = .7671 for s = .75 and .8436 for .8333."""
    t = torch.tensor([bite - 1e-4, bite + 1e-4], dtype=torch.float64)
    weight = score_matching_weight(full(s, t), t, SCHEDULES["flow"])
    assert weight[0] < 1 and weight[1] == 1


@predictions
def test_loss_is_the_clamped_equation_13(prediction):
    """clamp(1/sigma_ts^2, 0, 10) mean |sigma_ts psi - sigma_ts target|^2 per sample, each with its own s and t."""
    x_s, eps = randn(2, 4, 3, 2)
    s = torch.tensor([0.0, 0.75, 0.75, 5 / 6], dtype=torch.float64)
    t = torch.tensor([0.4, 0.76, 0.9, 0.84], dtype=torch.float64)
    net = Affine(0.3, -0.2)
    loss = score_matching_loss(net, x_s, eps, s, t, SCHEDULES["flow"], prediction)
    for i, (s_i, t_i) in enumerate(zip(s.tolist(), t.tolist(), strict=True)):
        alpha_ts, variance_ts = transition("flow", s_i, t_i)
        sigma_ts = math.sqrt(variance_ts)
        on_x_s, on_eps = coefficients_of(subinterval_target, "flow", prediction, s_i, t_i)
        psi = net(alpha_ts * x_s[i] + sigma_ts * eps[i])
        residual = sigma_ts * psi - sigma_ts * (on_x_s * x_s[i] + on_eps * eps[i])
        clamp = min(1 / variance_ts, 10) if s_i > 0 else 1 / variance_ts  # no clamp at a clean s
        assert loss[i].item() == pytest.approx(clamp * residual.square().mean().item(), rel=1e-10)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
@pytest.mark.parametrize("s", [0.0, 0.75])
@pytest.mark.parametrize("target", [subinterval_target, biased_target, printed_target])
def test_losses_have_the_samples_dtype_but_float32_at_least(target, s, dtype, expected):
    """The times and coefficients in float64 do not leak into the losses."""
    x_s, eps = randn(2, 5, 3, dtype=dtype)
    net, (s, t) = Affine(0.3, -0.2), times(s, 0.9, x_s)
    assert score_matching_loss(net, x_s, eps, s, t, SCHEDULES["flow"], "flow", target).dtype == expected
    generator_loss, _ = distribution_matching_loss(x_s, eps, s, t, SCHEDULES["flow"], "flow", net, Affine(0.5, 0.1))
    assert generator_loss.dtype == expected


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.75, 0.76), (5 / 6, 0.95)])
def test_the_exact_prediction_minimises_the_loss(name, prediction, s, t):
    """The gradient of the expected loss, by Gauss-Hermite quadrature (exact here), is 0 at the marginal prediction."""
    m_s, v_s = law(name, s)
    (z, eps), weight = hermite(3, 2)
    x_s = m_s + math.sqrt(v_s) * z
    exact = exact_prediction(name, prediction, t)

    def gradient(target) -> float:
        line = torch.tensor(exact, dtype=torch.float64, requires_grad=True)
        loss = score_matching_loss(
            lambda x_t, _: line[0] * x_t + line[1],
            x_s[:, None], eps[:, None], *times(s, t, x_s), SCHEDULES[name], prediction, target,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad((weight * loss).sum(), line)
        return gradient.abs().max().item()

    assert gradient(subinterval_target) < 1e-11
    if s > 0 and prediction != "eps":
        assert gradient(biased_target) > 1e-3
        assert gradient(printed_target) > 1e-3


@predictions
@pytest.mark.parametrize(("s", "t"), [(5 / 6, 5 / 6 + 0.004), (0.75, 0.754)])
def test_pairing_eps_with_minus_eps(prediction, s, t):
    """The pair keeps the mean gradient; at t - s = .004 its variance is well below two draws'.

    Exact moments by Gauss-Hermite.
    """
    m_s, v_s = law("flow", s)
    (z, eps), weight = hermite(5, 2)  # the gradient is of degree 2, its square of degree 4
    x_s = m_s + math.sqrt(v_s) * z

    def gradients(eps: Tensor) -> Tensor:
        """Of each sample's loss in (slope, intercept), [n, 2], away from the minimum."""
        line = torch.tensor([0.9, -0.4], dtype=torch.float64).expand(len(z), 2).clone().requires_grad_()
        loss = score_matching_loss(
            lambda x_t, _: line[:, :1] * x_t + line[:, 1:],
            x_s[:, None], eps[:, None], *times(s, t, x_s), SCHEDULES["flow"], prediction,
        )  # fmt: skip
        return torch.autograd.grad(loss.sum(), line)[0]

    single, pair = gradients(eps), (gradients(eps) + gradients(-eps)) / 2
    mean = weight @ single
    torch.testing.assert_close(weight @ pair, mean, rtol=1e-10, atol=1e-12)
    ratio = (weight @ (pair - mean) ** 2) / (weight @ (single - mean) ** 2 / 2)
    assert ratio.max().item() < 0.5


# The generator's gradient


def score_form(name: str, prediction: str, t: float, mean: float, variance: float) -> Affine:
    """psi = a S + b x_t of a Gaussian p(x_t): a = -sigma D / alpha, b = p / alpha (Eq. 5 for flow)."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    a = -sigma * (alpha * q - sigma * p) / alpha
    return Affine(-a / variance + p / alpha, a * mean / variance)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.0, 0.8), (0.75, 0.8), (0.75, 0.9)])
def test_paper_gradient_is_that_of_the_kl_divergence(name, prediction, s, t):
    """Generator x_s = m + c z: d KL(p_t^G || p_t) / d(m, c) in closed form, sign and size, alike for all types."""
    m, c = -0.3, 0.5
    alpha_ts, variance_ts = transition(name, s, t)
    mu, v = law(name, t)
    m_g, v_g = alpha_ts * m, (alpha_ts * c) ** 2 + variance_ts
    expected = (
        alpha_ts * (m_g - mu) / v,
        alpha_ts**2 * c * (1 / v - 1 / v_g),
    )  # of [v_g + (m_g - mu)^2] / 2v - ln(v_g) / 2

    (z, eps), weight = hermite(3, 2)
    generator = torch.tensor([m, c], dtype=torch.float64, requires_grad=True)
    x_s = generator[0] + generator[1] * z
    loss, _ = distribution_matching_loss(
        x_s[:, None], eps[:, None], *times(s, t, x_s), SCHEDULES[name], prediction,
        exact_prediction(name, prediction, t), score_form(name, prediction, t, m_g, v_g), "paper",
    )  # fmt: skip
    (gradient,) = torch.autograd.grad((weight * loss).sum(), generator)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-9)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.75, 0.9), (5 / 6, 1.0)])
def test_paper_weight(name, prediction, s, t):
    """Eq. 11: w = alpha_ts alpha_t / (sigma_t D), read off at T = 1, F = 0; it vanishes with alpha_t at t = 1."""
    (alpha, sigma), (alpha_ts, _) = alpha_sigma(name, t), transition(name, s, t)
    if prediction == "eps":
        if alpha < 1e-6:
            return  # the plan refuses eps prediction there
        expected = alpha_ts / sigma
    elif prediction == "x0":
        expected = -alpha_ts * alpha / sigma**2
    elif prediction == "v":
        expected = alpha_ts * alpha / (sigma * (alpha**2 + sigma**2))
    else:
        expected = alpha_ts * alpha / (alpha * sigma + sigma**2)
    x_s, eps = randn(2, 2, 3)
    gradient = gradient_of(
        x_s, eps, *times(s, t, x_s), SCHEDULES[name], prediction, Affine(0, 1), Affine(0, 0), "paper"
    )
    torch.testing.assert_close(gradient, torch.full_like(x_s, expected), rtol=1e-12, atol=1e-18)


def of_two_gaussians(name, prediction, s, t):
    """The arguments of `matching_gradient` at x_s, of exact predictions for two laws; x_s, and E[x_s | x_t] by the
    joint Gaussian law of the teacher's x_0, and of the fake's.
    """
    x_s, eps = randn(2, 5, 3, 2)
    laws = (), (-0.2, 0.4)
    predictions = [exact_prediction(name, prediction, t, *law) for law in laws]
    alpha_ts, variance_ts = transition(name, s, t)
    x_t = alpha_ts * x_s + math.sqrt(variance_ts) * eps
    means = [exact_x_s(name, s, t, *law)(x_t) for law in laws]
    return (x_s, eps, *times(s, t, x_s), SCHEDULES[name], prediction, *predictions), x_s, *means


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.02), (0.0, 0.5), (0.3, 0.5), (0.75, 0.7501), (5 / 6, 0.95), (5 / 6, 1.0)])
def test_normalised_gradient_is_the_difference_of_posterior_means(name, prediction, s, t):
    """(E_F[x_s | x_t] - E_T[x_s | x_t]) / mean |x_s - E_T[x_s | x_t]|, the means from joint Gaussian laws; `posterior`
    is what stands above the stroke.

    Finite at t = 1, where it is right to the last digit, and near s, for every type that is determined there.
    """
    if prediction == "eps" and alpha_sigma(name, t)[0] < 1e-6:
        return
    arguments, x_s, real, fake = of_two_gaussians(name, prediction, s, t)
    expected = (fake - real) / (x_s - real).abs().mean((1, 2), keepdim=True).clamp(min=1e-4)
    torch.testing.assert_close(gradient_of(*arguments), expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradient_of(*arguments, "posterior"), fake - real, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["flow", "vp-cosine", "vp-linear"])
@predictions
@pytest.mark.parametrize("t", [0.02, 0.5, 0.98])
def test_normalised_at_a_clean_s_is_the_public_form(name, prediction, t):
    """(x0_F - x0_T) / mean |x_0 - x0_T|: by hand, and as the public weighting with the generator's x_0 = x_s."""
    x_0, eps = randn(2, 5, 3, 2)
    alpha, sigma = alpha_sigma(name, t)
    teacher, fake = exact_prediction(name, prediction, t), exact_prediction(name, prediction, t, -0.2, 0.4)
    arguments = x_0, eps, *times(0.0, t, x_0), SCHEDULES[name], prediction, teacher, fake
    x_t = alpha * x_0 + sigma * eps
    x0_teacher, x0_fake = exact_prediction(name, "x0", t)(x_t), exact_prediction(name, "x0", t, -0.2, 0.4)(x_t)
    expected = (x0_fake - x0_teacher) / (x_0 - x0_teacher).abs().mean((1, 2), keepdim=True)
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(gradient_of(*arguments, "normalised"), expected, **close)
    torch.testing.assert_close(gradient_of(*arguments, "public", x0_generator=x_0), expected, **close)


def test_weights_at_phase_onset():
    """The weight on x0_F - x0_T at four t: 64 dimensions of std .1 to 1.5, s .8333.

    At onset the generator from t = 1 predicts E[x_0] = 0. The public weight explodes, the normalised one does not;
    the table's t are rounded, hence 8 %.
    """
    s, std = 5 / 6, torch.logspace(math.log10(0.1), math.log10(1.5), 64, dtype=torch.float64)
    noise, eps = randn(2, 2000, 64)
    x_s, flow = s * noise, SCHEDULES["flow"]
    table = {
        "normalised": (0.07, 0.23, 0.25, 0.25),
        "paper": (0.22, 0.037, 0.0015),  # the last, 3e-5, has one digit
        "public": (16, 39, 192, 1440),
    }
    for weighting, expected in table.items():
        for t, weight in zip((0.839, 0.927, 0.985, 0.998), expected, strict=False):
            v_t = ((1 - t) * std) ** 2 + t**2
            slope = (t - (1 - t) * std**2) / v_t
            gradient = gradient_of(
                x_s, eps, *times(s, t, x_s), flow, "flow",
                lambda x, _, slope=slope: slope * x, lambda x, _, slope=slope: slope * x - 0.05,
                weighting, x0_generator=torch.zeros_like(x_s),
            )  # fmt: skip
            assert (gradient / (0.05 * t)).mean().item() == pytest.approx(weight, rel=0.08)  # x0_F - x0_T = .05 t


def test_floor_of_the_normaliser():
    """A teacher that knows x_0 exactly: the difference 1e-6 is divided by 1e-4, not by 0."""
    x_0, eps = randn(2, 3, 4)
    arguments = x_0, eps, *times(0.0, 0.5, x_0), SCHEDULES["flow"], "x0", lambda *_: x_0, lambda *_: x_0 + 1e-6
    expected = torch.full_like(x_0, 1e-2)
    torch.testing.assert_close(gradient_of(*arguments), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient_of(*arguments, "public", x0_generator=x_0), expected, rtol=1e-9, atol=0)


def test_normaliser_is_per_sample():
    """Ten times the distance to the teacher in one sample divides that sample's gradient alone by ten."""
    x_0, eps = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    away = torch.tensor([[1.0], [10.0]], dtype=torch.float64)
    gradient = gradient_of(
        x_0, eps, *times(0.0, 0.5, x_0), SCHEDULES["flow"], "x0", lambda *_: x_0 - away, lambda *_: x_0 - away + 1
    )
    torch.testing.assert_close(gradient, (1 / away).expand(2, 4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@predictions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_gradient_where_teacher_and_fake_agree(weighting, prediction, dtype):
    x_s, eps = randn(2, 5, 3, dtype=dtype)
    x_s.requires_grad_()
    net = Affine(0.3, -0.2)
    loss, _ = distribution_matching_loss(
        x_s, eps, *times(0.75, 0.9, x_s), SCHEDULES["flow"], prediction, net, net, weighting, torch.zeros_like(x_s)
    )
    loss.sum().backward()
    assert torch.equal(x_s.grad, torch.zeros_like(x_s))
    assert torch.equal(loss, torch.zeros_like(loss))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@predictions
def test_gradient_of_the_loss(weighting, prediction):
    """d loss_i / d x_s = `matching_gradient` / elements a sample, loss = .5 mean gradient^2; T and F get none."""
    x_s, eps = randn(2, 5, 3, 2)
    x_s.requires_grad_()
    s, t = full(0.75, x_s), torch.linspace(0.76, 0.99, 5, dtype=torch.float64)
    teacher_scale, fake_scale = torch.tensor([0.3, 0.5], dtype=torch.float64).unbind()
    teacher_scale.requires_grad_()
    fake_scale.requires_grad_()
    arguments = (
        x_s, eps, s, t, SCHEDULES["flow"], prediction,
        lambda x, _: teacher_scale * x, lambda x, _: fake_scale * x - 0.1, weighting, randn(5, 3, 2, seed=1),
    )  # fmt: skip
    gradient = gradient_of(*arguments)
    assert not gradient.requires_grad and gradient.abs().min() > 0
    loss, _ = distribution_matching_loss(*arguments)
    torch.testing.assert_close(loss, 0.5 * gradient.square().mean((1, 2)), rtol=1e-9, atol=0)
    loss.sum().backward()
    torch.testing.assert_close(x_s.grad, gradient / 6, rtol=1e-9, atol=1e-14)
    assert teacher_scale.grad is None and fake_scale.grad is None


def test_public_weighting_needs_the_generators_prediction():
    x_s, eps = randn(2, 5, 3)
    net = Affine(0.3, -0.2)
    message = "the public weighting needs the generator's own x_0 prediction, x0_generator"
    with pytest.raises(ValueError, match=f"^{message}$"):
        gradient_of(x_s, eps, *times(0.75, 0.9, x_s), SCHEDULES["flow"], "flow", net, net, "public")


def test_an_unknown_weighting_is_refused():
    """By its annotation already where jaxtyping's import hook is on."""
    x_s, eps = randn(2, 5, 3)
    net = Affine(0.3, -0.2)
    with pytest.raises((ValueError, TypeCheckError), match="'Fisher'") as error:
        gradient_of(x_s, eps, *times(0.75, 0.9, x_s), SCHEDULES["flow"], "flow", net, net, "Fisher")
    message = "weighting: 'Fisher' is none of normalised, projected, paper, posterior, public"
    assert error.type is TypeCheckError or str(error.value) == message


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_samples_are_weighed_in_float32(weighting, dtype):
    """At t - s = 1e-7, where float32 coefficients have lost their digits: the same numbers in float64 to 1e-4."""
    x_s, eps, x0_generator = randn(3, 5, 64, dtype=dtype)
    s, t = times(0.75, 0.75 + 1e-7, x_s)

    def gradient(x_s: Tensor, eps: Tensor, x0_generator: Tensor) -> Tensor:
        return gradient_of(
            x_s, eps, s, t, SCHEDULES["flow"], "flow", Affine(0.3, -0.2), Affine(0.5, 0.1), weighting, x0_generator
        )

    low, high = gradient(x_s, eps, x0_generator), gradient(x_s.double(), eps.double(), x0_generator.double())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-4, atol=1e-4 * high.abs().max().item())


def test_low_precision_loss_is_computed_in_float32():
    """bf16 x_s: x_t, target and mean as in float64 to 1e-5, where bf16 has 4e-3."""
    x_s, eps = randn(2, 5, 64, dtype=torch.bfloat16)
    s, t = times(0.75, 0.7501, x_s)
    losses = [
        score_matching_loss(Affine(0.3, -0.2), a, b, s, t, SCHEDULES["flow"], "flow")
        for a, b in ((x_s, eps), (x_s.double(), eps.double()))
    ]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_teacher_and_fake_see_the_renoised_sample_at_its_time(weighting):
    """Both are called once, on x_t = alpha_ts x_s + sigma_ts eps, without graph, and with t."""
    x_s, eps = randn(2, 5, 3)
    x_s.requires_grad_()
    s, t = times(0.75, 0.9, x_s)
    x_t, seen = add_noise(x_s.detach(), eps, s, t, SCHEDULES["flow"]), []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append((x, time))
        return x

    distribution_matching_loss(x_s, eps, s, t, SCHEDULES["flow"], "flow", network, network, weighting, x_s.detach())
    assert len(seen) == 2
    for x, time in seen:
        assert torch.equal(x, x_t) and torch.equal(time, t) and not x.requires_grad


# The projection (PDMD)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.0, 0.9), (0.3, 0.5), (0.75, 0.76), (5 / 6, 0.95)])
@pytest.mark.parametrize("own", [(0.35, 1.1), (-0.2, 0.4)], ids=["perfect", "imperfect"])
def test_the_mean_of_the_residual_is_the_fakes_error(name, prediction, s, t, own):
    """r = E_F[x_s | x_t] - x_s of a generator x_s that comes of x_0 ~ N(.35, 1.1^2), and of a fake of another law: zero
    for its own, else E_F[x_s | x_t] - E[x_s | x_t]. All is affine in x_t, so that two moments say it.
    """
    (m, v), (z, eps), weight = law(name, s, 0.35, 1.1), *hermite(3, 2)
    x_s, s_, t_ = m + math.sqrt(v) * z[:, None], full(s, z), full(t, z)
    x_t = add_noise(x_s, eps[:, None], s_, t_, SCHEDULES[name])
    psi, variance_ts = exact_prediction(name, prediction, t, *own)(x_t), transition(name, s, t)[1]
    kappa = alpha_sigma(name, s)[0] * variance_ts / alpha_sigma(name, t)[1] ** 2
    r = kappa * x0_residual(psi, x_s, eps[:, None], s_, t_, SCHEDULES[name], prediction)
    torch.testing.assert_close(r, exact_x_s(name, s, t, *own)(x_t) - x_s, rtol=1e-7, atol=1e-9)
    error = exact_x_s(name, s, t, *own)(x_t) - exact_x_s(name, s, t, 0.35, 1.1)(x_t)
    for factor in (torch.ones_like(x_t), x_t):
        found, expected = ((weight[:, None] * factor * of).sum().item() for of in (r, error))
        assert found == pytest.approx(expected, rel=1e-7, abs=1e-9)
    assert (error.abs().max() > 1e-3) == (own != (0.35, 1.1))


def test_the_projection_is_idempotent_and_orthogonal():
    """Sample by sample, at any scale of `along`; it never turns x by more than 90 degrees."""
    x, along = randn(2, 6, 3, 4)
    left = without_component(x, along)
    torch.testing.assert_close((left * along).sum((1, 2)), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(without_component(left, along), left, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close((x - left).square().sum((1, 2)) + left.square().sum((1, 2)), x.square().sum((1, 2)))
    assert ((x * left).sum((1, 2)) > 0).all()
    share = (x * along).sum((1, 2), keepdim=True) / along.square().sum((1, 2), keepdim=True)
    torch.testing.assert_close(left, x - share * along, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(without_component(x, 1e-9 * along), left, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(without_component(along, along), torch.zeros_like(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nothing_is_removed_along_zero(dtype):
    """Nor much along what is rounding, whose direction says nothing."""
    x = randn(2, 3, dtype=dtype)
    assert torch.equal(without_component(x, torch.zeros_like(x)), x)
    torch.testing.assert_close(without_component(x, 1e-30 * randn(2, 3, seed=1, dtype=dtype)), x)


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.02), (0.0, 0.5), (0.3, 0.5), (0.75, 0.7501), (5 / 6, 0.95)])
def test_projected_is_normalised_without_its_component_along_the_residual(name, prediction, s, t):
    """d - (<d, r> / <r, r>) r, by posterior means from joint Gaussian laws; at s = 0 those of x_0 itself, the published
    form. The divisor is that of `normalised`. Its figures: |r| / |d|, and the removed share of |d|^2.
    """
    arguments, x_s, real, fake = of_two_gaussians(name, prediction, s, t)
    d, r = fake - real, fake - x_s
    on, length = (d * r).sum((1, 2), keepdim=True), r.square().sum((1, 2), keepdim=True)
    expected = (d - on / length * r) / (x_s - real).abs().mean((1, 2), keepdim=True).clamp(min=1e-4)
    found, figures = matching_gradient(*arguments, "projected")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    d, r = ((each * each).sum((1, 2)) for each in (d, r))
    torch.testing.assert_close(figures.pop("residual_ratio"), (r / d).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(figures.pop("removed_share"), on.flatten() ** 2 / (d * r), rtol=1e-6, atol=1e-12)
    assert set(figures) == set(distribution_matching_loss(*arguments)[1]) == AGREEMENT


@schedules
@predictions
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.3, 0.5), (5 / 6, 0.95)])
def test_errors_of_teacher_and_fake_are_those_of_posterior_means(name, prediction, weighting, s, t):
    """|E_T[x_s | x_t] - x_s|^2, |E_F[x_s | x_t] - x_s|^2 and |E_F - E_T|^2, the means from joint Gaussian laws."""
    arguments, x_s, real, fake = of_two_gaussians(name, prediction, s, t)
    _, figures = matching_gradient(*arguments, weighting, x_s)
    for found, difference in (("teacher_error", real - x_s), ("fake_error", fake - x_s), ("gap", fake - real)):
        torch.testing.assert_close(figures[found], difference.square().mean((1, 2)), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.5), (0.75, 0.9)])
def test_errors_say_how_much_of_its_way_the_fake_has_gone(part, s, t):
    """(teacher - fake) / gap is (2 - l) / l, where the fake's mean has gone the part l of the way from the teacher's to
    that of the generator's own law; on 200,000 samples of that law.
    """
    own_law = -0.2, 0.4
    x_0, *noise = randn(3, 200_000, 1)
    alpha, sigma = alpha_sigma("flow", s)
    x_s = alpha * (own_law[0] + own_law[1] * x_0) + sigma * noise[0]
    teacher, own = (exact_prediction("flow", "flow", t, *law) for law in ((), own_law))

    def fake(x_t: Tensor, time: Tensor) -> Tensor:
        return teacher(x_t) + part * (own(x_t) - teacher(x_t))

    _, figures = matching_gradient(x_s, noise[1], *times(s, t, x_s), SCHEDULES["flow"], "flow", teacher, fake)
    found = {key: value.mean().item() for key, value in figures.items()}
    gone = (found["teacher_error"] - found["fake_error"]) / found["gap"]
    assert gone == pytest.approx((2 - part) / part, abs=0.15)


def test_figures_where_fake_and_teacher_agree():
    """|d| counts as 1e-4 where it is shorter: r = -x_0 = -1 is 10,000 times as long, and nothing is removed of it."""
    x_0, eps = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    for distance, share in ((0.0, 0.0), (1e-5, 1e-2)):
        _, figures = matching_gradient(
            x_0, eps, *times(0.0, 0.5, x_0), SCHEDULES["flow"], "x0", lambda *_, by=distance: 0 * x_0 - by,
            lambda *_: 0 * x_0, "projected",
        )  # fmt: skip
        assert figures["residual_ratio"].tolist() == pytest.approx([1e4] * 2)
        assert figures["removed_share"].tolist() == pytest.approx([share] * 2)


# The Fisher divergence's form that stops at the teacher


@schedules
@predictions
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.3, 0.6), (0.75, 0.9)])
def test_fisher_stop_gradient_loss_is_the_square_of_posterior_means(name, prediction, s, t):
    """mean (E_F[x_s | x_t] - E_T[x_s | x_t])^2 a sample, the means from joint Gaussian laws; d / d x_s has
    alpha_ts d E_F / d x_t alone. Neither network gets a gradient, and the teacher sees no graph of x_t.
    """
    x_s, eps = randn(2, 5, 3, 2)
    x_s.requires_grad_()
    teacher, fake = exact_prediction(name, prediction, t), exact_prediction(name, prediction, t, -0.2, 0.4)
    graphs = []

    def seen(x: Tensor, time: Tensor) -> Tensor:
        graphs.append(torch.is_grad_enabled())
        assert torch.equal(time, full(t, x))
        return teacher(x)

    loss = fisher_stop_gradient_loss(seen, fake, x_s, eps, *times(s, t, x_s), SCHEDULES[name], prediction)
    alpha_ts, variance_ts = transition(name, s, t)
    x_t = (alpha_ts * x_s + math.sqrt(variance_ts) * eps).detach()
    real, own = exact_x_s(name, s, t), exact_x_s(name, s, t, -0.2, 0.4)
    difference = own(x_t) - real(x_t)
    torch.testing.assert_close(loss, difference.square().mean((1, 2)), rtol=1e-8, atol=1e-14)
    loss.sum().backward()
    slope = 2 / 6 * difference * own.slope * alpha_ts
    torch.testing.assert_close(x_s.grad, slope, rtol=1e-8, atol=1e-8 * slope.abs().max().item())
    assert graphs == [False]


def test_fisher_stop_gradient_loss_of_low_precision_samples_is_in_float32():
    x_s, eps = randn(2, 5, 64, dtype=torch.bfloat16)
    s, t = times(0.75, 0.9, x_s)
    low, high = (
        fisher_stop_gradient_loss(Affine(0.3, -0.2), Affine(0.5, 0.1), a, b, s, t, SCHEDULES["flow"], "flow")
        for a, b in ((x_s, eps), (x_s.double(), eps.double()))
    )
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=0)


def descended(weighting: str, iterations: int = 150, batch: int = 128) -> tuple[float, float]:
    """(m, sigma) that a generator m + sigma z of 16 dimensions ends at, for two modes (.7 at -1, .3 at 1; std .4).

    Exact scores of both; m and sigma are means over the last third of the descent.
    """
    rng, world = torch.Generator().manual_seed(0), ((0.7, -1.0, 0.4), (0.3, 1.0, 0.4))  # weight, mean, std

    def flow(x: Tensor, t: Tensor, modes) -> Tensor:
        t = t[:, None]
        logs, scores = [], []
        for share, mean, std in modes:
            variance, distance = ((1 - t) * std) ** 2 + t**2, x - (1 - t) * mean
            logs.append(math.log(share) - ((distance**2).sum(1, keepdim=True) / variance + 16 * variance.log()) / 2)
            scores.append(-distance / variance)
        score = (torch.stack(logs).softmax(0) * torch.stack(scores)).sum(0)
        return -(t + t**2 / (1 - t)) * score - x / (1 - t)

    student, tail = torch.tensor([-0.4, 1.0], dtype=torch.float64, requires_grad=True), []
    optimiser = torch.optim.Adam([student], lr=0.03, betas=(0.5, 0.99))
    for i in range(iterations):
        optimiser.param_groups[0]["lr"] = 0.03 * max(0.02, 1 - i / iterations)
        z, eps = (torch.randn(batch, 16, generator=rng, dtype=torch.float64) for _ in range(2))
        t = renoise_times(torch.rand(batch, generator=rng, dtype=torch.float64), 0.02, 1.0, 1.0)
        m, sigma = student
        own = [(1.0, m.item(), sigma.item())]
        optimiser.zero_grad()
        distribution_matching_loss(
            m + sigma * z, eps, full(0.0, z), t, SCHEDULES["flow"], "flow", lambda x, t: flow(x, t, world),
            lambda x, t, own=own: flow(x, t, own), weighting,
        )[0].mean().backward()  # fmt: skip
        optimiser.step()
        tail.append(student.detach().clone())
    m, sigma = torch.stack(tail[iterations * 2 // 3 :]).mean(0).tolist()
    return m, sigma


def test_where_a_generator_cannot_reach_the_law_the_weighting_moves_the_end() -> None:
    """The figures of docs/equations.md: `normalised` and `paper` have one fixed point only where F can equal T."""
    assert descended("paper") == pytest.approx((-0.998, 0.400), abs=0.002)
    assert descended("normalised") == pytest.approx((-0.89, 0.41), abs=0.01)


@pytest.mark.parametrize(("dims", "low", "high"), [(1, 0.45, 0.65), (2, 0.1, 0.25), (16, 0.01, 0.03)])
def test_in_one_dimension_normalised_rests_on_a_few_samples(dims: int, low: float, high: float) -> None:
    """The share of 1 % of the samples in the weight of all, of a unit Gaussian at s = .5, t = .75. `paper` and
    `posterior` have 1 %.
    """
    x_s, eps = randn(20_000, dims, seed=1) * law("flow", 0.5, 0.0, 1.0)[1] ** 0.5, randn(20_000, dims, seed=2)
    teacher = exact_prediction("flow", "flow", 0.75, 0.0, 1.0)
    shares = {}
    for weighting in ("normalised", "paper", "posterior"):
        gradient = gradient_of(
            x_s, eps, full(0.5, x_s), full(0.75, x_s), SCHEDULES["flow"], "flow", teacher,
            lambda x, t: teacher(x, t) + 1, weighting,
        )[:, 0].abs()  # fmt: skip
        shares[weighting] = (gradient.sort(descending=True).values[:200].sum() / gradient.sum()).item()
    assert low < shares["normalised"] < high
    assert (shares["paper"], shares["posterior"]) == pytest.approx((0.01, 0.01))


def test_toy_1d_descends_a_weighting_that_is_none_of_a_few_samples() -> None:
    assert resolve("toy-1d", {}).objective == "posterior"
