"""Schedules, transitions, prediction types, the deterministic step and re-noise times, against closed forms."""

import itertools
import math
import re

import pytest
import torch
from gaussians import (
    MEAN,
    PREDICTIONS,
    SCHEDULES,
    STD,
    alpha_sigma,
    exact_prediction,
    full,
    law,
    p_q,
    transition,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from scipy.integrate import quad

from phased_dmd.config.overrides import build
from phased_dmd.errors import UserError
from phased_dmd.maths.schedules import (
    VESchedule,
    VPSchedule,
    add_noise,
    check_start,
    coefficients,
    ddim_step,
    determinant,
    expand_like,
    predicted_x0,
    renoise_times,
    times_like,
)
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.networks.build import build_system, load_teacher

schedules = pytest.mark.parametrize("name", SCHEDULES)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Schedules


@schedules
def test_schedule_values(name):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = tensor(*[alpha_sigma(name, time)[0] for time in t.tolist()])
    torch.testing.assert_close(SCHEDULES[name].alpha(t), expected, rtol=1e-14, atol=0)
    expected = tensor(*[alpha_sigma(name, time)[1] for time in t.tolist()])
    torch.testing.assert_close(SCHEDULES[name].sigma(t), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_linear_vp_integrates_its_beta(t):
    """alpha = exp(-1/2 int beta), beta rising linearly from .1 to 20, the integral by quadrature."""
    integral, _ = quad(lambda time: 0.1 + (20 - 0.1) * time, 0, t)
    assert VPSchedule("linear").alpha(tensor(t)).item() == pytest.approx(math.exp(-integral / 2), rel=1e-13)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_vp_preserves_variance(kind):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    schedule = VPSchedule(kind)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-15)


@schedules
def test_signal_to_noise_falls_strictly(name):
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert (SCHEDULES[name].alpha(t) / SCHEDULES[name].sigma(t)).diff()[1:].max() < 0


@schedules
def test_clean_end_and_noisy_end(name):
    """VE is never clean: sigma(0) = sigma_min > 0. Cosine alpha(1) is 6e-17 in floating point, not 0."""
    schedule, zero, one = SCHEDULES[name], tensor(0.0), tensor(1.0)
    assert schedule.alpha(zero).item() == 1
    assert schedule.sigma(zero).item() == (0.02 if name == "ve" else 0)
    assert schedule.sigma(one).item() == pytest.approx(10 if name == "ve" else 1, rel=5e-5)
    if name == "vp-cosine":
        assert 0 < schedule.alpha(one).item() < 1e-16


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (2.0, 2.0)])
def test_ve_needs_increasing_positive_bounds(bounds):
    message = f"VESchedule: needs 0 < sigma_min < sigma_max, got {bounds[0]}, {bounds[1]}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        VESchedule(*bounds)


def test_schedules_made_without_arguments():
    """The cosine; and sigma from .02 to 10, as in Karras et al.'s models of small pictures."""
    t = tensor(0.0, 0.3, 1.0)
    torch.testing.assert_close(VPSchedule().alpha(t), torch.cos(t * math.pi / 2), rtol=1e-15, atol=0)
    assert VESchedule().sigma(tensor(0.0, 1.0)).tolist() == pytest.approx([0.02, 10.0], rel=1e-15)
    assert VESchedule(0.5).sigma(tensor(0.0, 1.0)).tolist() == pytest.approx([0.5, 10.0], rel=1e-15)


def test_vp_kind_is_checked():
    """By its annotation already where jaxtyping's import hook is on."""
    with pytest.raises((ValueError, TypeCheckError), match="'sine'") as error:
        VPSchedule("sine")
    assert error.type is TypeCheckError or str(error.value) == "VPSchedule: kind is 'cosine' or 'linear', not 'sine'"


# Transitions


@st.composite
def three_times(draw):
    s, u, t = sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)))
    return s * 0.99, 0.99 * u + 0.004, 0.99 * t + 0.01  # gaps of .004 at least; t may be 1


@schedules
@given(times=three_times())
@settings(max_examples=50, deadline=None)
def test_transitions_compose(name, times):
    """Eq. 2: alpha_ts alpha_s = alpha_t, alpha_ts^2 sigma_s^2 + sigma_ts^2 = sigma_t^2, and s -> u -> t is s -> t."""
    schedule = SCHEDULES[name]
    s, u, t = (tensor(time) for time in times)
    alpha_ts, sigma_ts = schedule.transition(s, t)
    alpha_us, sigma_us = schedule.transition(s, u)
    alpha_tu, sigma_tu = schedule.transition(u, t)
    close = {"rtol": 1e-11, "atol": 1e-15}
    torch.testing.assert_close(alpha_ts * schedule.alpha(s), schedule.alpha(t), **close)
    torch.testing.assert_close((alpha_ts * schedule.sigma(s)) ** 2 + sigma_ts**2, schedule.sigma(t) ** 2, **close)
    torch.testing.assert_close(alpha_tu * alpha_us, alpha_ts, **close)
    torch.testing.assert_close((alpha_tu * sigma_us) ** 2 + sigma_tu**2, sigma_ts**2, **close)


@schedules
@pytest.mark.parametrize(("gap", "tolerance"), [(1e-2, 1e-12), (1e-6, 1e-8), (1e-9, 1e-5)])
@pytest.mark.parametrize("s", [0.3, 0.75, 5 / 6])
def test_transition_keeps_its_digits_near_s(name, s, gap, tolerance):
    """sigma_ts^2 cancels: float64 keeps an error of about an ulp over t - s, float32 would leave nothing at 1e-9."""
    t = s + gap
    alpha_ts, sigma_ts = SCHEDULES[name].transition(tensor(s), tensor(t))
    expected_alpha, expected_variance = transition(name, s, t)
    assert alpha_ts.item() == pytest.approx(expected_alpha, rel=1e-14)
    assert (sigma_ts**2).item() == pytest.approx(expected_variance, rel=tolerance)


@schedules
def test_transition_is_finite_up_to_the_last_ulp(name):
    """At one ulp above s the variance may round to 0 but never below: no NaN. At t = 1 it is finite."""
    s = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alpha_ts, sigma_ts = SCHEDULES[name].transition(s, torch.nextafter(s, torch.ones_like(s)))
    assert alpha_ts.isfinite().all() and sigma_ts.isfinite().all()
    alpha_ts, sigma_ts = SCHEDULES[name].transition(s, torch.ones_like(s))
    assert alpha_ts.isfinite().all() and (sigma_ts > 0).all()


@schedules
def test_coefficients_of_float32_times_are_float64(name):
    """Those of the same times in float64, to the last digit."""
    schedule, t = SCHEDULES[name], torch.tensor([0.1, 0.5, 0.9])
    for function in (schedule.alpha, schedule.sigma, schedule.clamp_unit):
        assert function(t).dtype == torch.float64
        assert torch.equal(function(t), function(t.double()))


def test_float32_times_are_computed_in_float64():
    s, t = torch.tensor([0.75]), torch.tensor([0.7500001])
    alpha_ts, sigma_ts = SCHEDULES["flow"].transition(s, t)
    expected = transition("flow", s.item(), t.item())
    assert alpha_ts.dtype == sigma_ts.dtype == torch.float64
    assert (alpha_ts.item(), (sigma_ts**2).item()) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise_of_low_precision_samples_has_float64_coefficients(dtype):
    """x_s = 0 and eps = 1 read off sigma_ts at t - s = 1e-9, which float32 coefficients would make 0."""
    x_s, eps = torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    x_t = add_noise(x_s, eps, tensor(0.75), tensor(0.75 + 1e-9), SCHEDULES["flow"])
    assert x_t.dtype == torch.float32
    expected = math.sqrt(transition("flow", 0.75, 0.75 + 1e-9)[1])
    assert x_t.tolist()[0] == pytest.approx([expected] * 3, rel=1e-6)


@schedules
def test_add_noise_has_the_law_of_x_t(name):
    """Mean and variance of x_t through x_s, read off the linear map; they are those of alpha_t x_0 + sigma_t eps."""
    for s, t in ((0.0, 0.5), (0.3, 0.5), (0.75, 1.0)):
        basis = torch.eye(2, dtype=torch.float64)
        on_x_s, on_eps = add_noise(basis[0], basis[1], tensor(s, s), tensor(t, t), SCHEDULES[name]).tolist()
        m_s, v_s = law(name, s)
        assert (on_x_s * m_s, on_x_s**2 * v_s + on_eps**2) == pytest.approx(law(name, t), rel=1e-13)


def test_coefficients_broadcast_over_the_samples():
    """One coefficient a sample, whatever follows the batch axis."""
    x = torch.ones(2, 3, 4)
    assert torch.equal(expand_like(tensor(2.0, 3.0), x) * x, torch.stack([2 * torch.ones(3, 4), 3 * torch.ones(3, 4)]))
    assert torch.equal(times_like(0.3, x), tensor(0.3, 0.3))
    assert torch.equal(times_like(tensor(0.3), x), tensor(0.3, 0.3))
    elsewhere = x.to("meta")
    assert times_like(0.3, elsewhere).device == expand_like(tensor(2.0, 3.0), elsewhere).device == elsewhere.device


# Prediction types


@pytest.mark.parametrize(
    ("name", "prediction", "t"),
    [
        (name, prediction, t)
        for name, prediction, t in itertools.product(SCHEDULES, PREDICTIONS, (0.02, 0.3, 0.75, 0.9999, 1.0))
        if prediction != "eps" or alpha_sigma(name, t)[0] > 1e-6  # else x_0 is not determined
    ],
)
def test_prediction_pairs_are_inverse(name, prediction, t):
    """(x_0, eps) -> (x_t, psi) -> x_0; t = 1 included, but for eps prediction on flow and cosine."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    x_0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, psi = alpha * x_0 + sigma * eps, p * x_0 + q * eps
    arguments = psi, x_t, full(t, x_t), SCHEDULES[name], prediction
    condition = (abs(alpha) + abs(sigma) + abs(p) + abs(q)) ** 2 / abs(alpha * q - sigma * p)
    close = {"rtol": 0, "atol": 4e-16 * 4 * condition}
    torch.testing.assert_close(predicted_x0(*arguments), x_0, **close)


@schedules
@pytest.mark.parametrize("t", [0.02, 0.3, 0.75, 1.0])
def test_determinants(name, t):
    """D = alpha q - sigma p, written out for each type."""
    alpha, sigma = alpha_sigma(name, t)
    table = {"flow": alpha + sigma, "x0": -sigma, "eps": alpha, "v": alpha**2 + sigma**2}
    for prediction, expected in table.items():
        computed = determinant(prediction, tensor(alpha), tensor(sigma)).item()
        assert computed == pytest.approx(expected, rel=1e-14)


def test_an_unknown_prediction_is_refused():
    """By its annotation already where jaxtyping's import hook is on."""
    with pytest.raises((ValueError, TypeCheckError), match="'score'") as error:
        coefficients("score", tensor(0.5), tensor(0.5))
    assert error.type is TypeCheckError or str(error.value) == "prediction: 'score' is none of flow, x0, eps, v"


@schedules
@predictions
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_prediction_is_an_affine_map_of_the_score(name, prediction, t):
    """psi = a S + b x_t, a = -sigma D/alpha, b = p/alpha, with S of the mixture {-1,0,1,2} by autograd of log p."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    points = tensor(-1.0, 0.0, 1.0, 2.0)
    x = torch.linspace(-3, 3, 41, dtype=torch.float64, requires_grad=True)
    log_density = torch.logsumexp(-((x[:, None] - alpha * points) ** 2) / (2 * sigma**2), 1)
    (score,) = torch.autograd.grad(log_density.sum(), x)
    x = x.detach()
    exact = ExactMixture(points[:, None], 0.0, torch.ones(4), SCHEDULES[name], prediction)
    expected = -sigma * (alpha * q - sigma * p) / alpha * score + p / alpha * x
    torch.testing.assert_close(exact(x[:, None], full(t, x))[:, 0], expected, rtol=1e-9, atol=1e-10)


@schedules
@predictions
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9, 1.0])
def test_exact_prediction_of_one_gaussian(name, prediction, t):
    """`ExactMixture` with one mode against the regression of p x_0 + q eps on x_t; also at t = 1."""
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    exact = ExactMixture(torch.tensor([[MEAN]], dtype=torch.float64), STD, torch.ones(1), SCHEDULES[name], prediction)
    expected = exact_prediction(name, prediction, t)(x)
    torch.testing.assert_close(exact(x[:, None], full(t, x))[:, 0], expected, rtol=1e-12, atol=1e-13)


# The deterministic step


@schedules
@predictions
@pytest.mark.parametrize(("t", "r"), [(0.98, 0.8), (0.8, 0.4), (0.8, 0.7999), (0.3, 0.0)])
def test_ddim_step_is_exact_for_known_pairs(name, prediction, t, r):
    """x_r = alpha_r x_0 + sigma_r eps from psi = p x_0 + q eps."""
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    x_0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, psi = alpha * x_0 + sigma * eps, p * x_0 + q * eps
    alpha_r, sigma_r = alpha_sigma(name, r)
    x_r = ddim_step(psi, x_t, full(t, x_t), full(r, x_t), SCHEDULES[name], prediction)
    atol = 1e-14 if name != "vp-linear" else 1e-12  # alpha(.98) = .008: eps prediction divides by it
    torch.testing.assert_close(x_r, alpha_r * x_0 + sigma_r * eps, rtol=0, atol=atol)


@schedules
@pytest.mark.parametrize("prediction", ["flow", "x0", "v"])
def test_ddim_step_from_pure_noise(name, prediction):
    """t = 1, cosine alpha(1) = 6e-17 included."""
    alpha, sigma = alpha_sigma(name, 1.0)
    p, q = p_q(prediction, alpha, sigma)
    x_0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t, psi = alpha * x_0 + sigma * eps, p * x_0 + q * eps
    alpha_r, sigma_r = alpha_sigma(name, 5 / 6)
    x_r = ddim_step(psi, x_t, full(1.0, x_t), full(5 / 6, x_t), SCHEDULES[name], prediction)
    torch.testing.assert_close(x_r, alpha_r * x_0 + sigma_r * eps, rtol=0, atol=5e-14)


@pytest.mark.parametrize(("t", "r"), [(1.0, 15 / 16), (0.8, 0.4), (0.625, 0.0)])
def test_ddim_step_on_flow_is_euler(t, r):
    x, psi = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = ddim_step(psi, x, full(t, x), full(r, x), SCHEDULES["flow"], "flow")
    torch.testing.assert_close(step, x + (r - t) * psi, rtol=0, atol=1e-15)


@predictions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ddim_step_of_low_precision_samples_has_float64_coefficients(prediction, dtype):
    """x_t = 0 and psi = 1 read off the coefficient of psi at t - r = 1e-9: float32 coefficients would make it 0."""
    t, r = 0.75 + 1e-9, 0.75
    x, psi = torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype)
    step = ddim_step(psi, x, full(t, x), full(r, x), SCHEDULES["flow"], prediction)
    d = {"flow": 1.0, "x0": -t, "eps": 1 - t, "v": (1 - t) ** 2 + t**2}[prediction]
    assert step.tolist()[0] == pytest.approx([(r - t) / d] * 3, rel=2e-6)


@schedules
@predictions
def test_bfloat16_samples_are_computed_in_float32(name, prediction):
    """The result for bf16 inputs is that of the same numbers in float64 to float32's precision, not to bf16's 4e-3."""
    generator = torch.Generator().manual_seed(0)
    x, psi = torch.randn(2, 64, 3, generator=generator).bfloat16()
    t, r = full(0.8, x), full(0.4, x)
    for function in (
        lambda psi, x: ddim_step(psi, x, t, r, SCHEDULES[name], prediction),
        lambda psi, x: predicted_x0(psi, x, t, SCHEDULES[name], prediction),
        lambda psi, x: add_noise(x, psi, r, t, SCHEDULES[name]),
    ):
        low, high = function(psi, x), function(psi.double(), x.double())
        assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
        torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=1e-6 * high.abs().max().item())


# Where eps prediction may start


@pytest.mark.parametrize(
    ("name", "t_0", "alpha"),
    [("flow", 1.0, "0.0e+00"), ("flow", 0.9999, "1.0e-04"), ("vp-cosine", 1.0, "6.1e-17"), ("flat", 1.0, "9.9e-04")],
)
def test_eps_prediction_cannot_start_at_pure_noise(name, t_0, alpha):
    """Refused with alpha(t_0) below 1e-3, which catches cosine's alpha(1) = 6e-17 too; "flat" has one alpha."""
    schedule = SCHEDULES.get(name, constant_alpha(0.00099))
    message = f"plan.start: eps prediction cannot start at t = {t_0:g}, where alpha is {alpha}; start below 1"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_start("eps", schedule, t_0)


def constant_alpha(alpha: float) -> VESchedule:
    """A schedule whose signal has one size at every t."""
    schedule = VESchedule()
    schedule.alpha = lambda t: torch.full_like(t, alpha)
    return schedule


def test_eps_prediction_may_start_where_alpha_is_a_thousandth():
    """The bound itself is allowed; and so is flow's .999, whose alpha is above it in float64 and below in float32."""
    check_start("eps", constant_alpha(1e-3), 1.0)
    check_start("eps", SCHEDULES["flow"], 0.999)


@pytest.mark.parametrize(
    ("name", "prediction", "t_0"),
    [
        ("flow", "eps", 0.98),
        ("vp-cosine", "eps", 0.98),
        ("vp-linear", "eps", 1.0),  # alpha(1) = .0066
        ("ve", "eps", 1.0),
        *[(name, prediction, 1.0) for name in ("flow", "vp-cosine") for prediction in ("flow", "x0", "v")],
    ],
)
def test_every_other_start_is_allowed(name, prediction, t_0):
    """Allowed is what can be inverted: a prediction from the start gives x_0 back."""
    check_start(prediction, SCHEDULES[name], t_0)
    alpha, sigma = alpha_sigma(name, t_0)
    p, q = p_q(prediction, alpha, sigma)
    x_0 = predicted_x0(tensor(2 * p + 3 * q), tensor(2 * alpha + 3 * sigma), tensor(t_0), SCHEDULES[name], prediction)
    assert x_0.item() == pytest.approx(2, abs=1e-10)


def analytic(schedule: str, prediction: str, **sections: dict) -> dict:
    teacher = {"kind": "analytic", "means": [[0.0], [1.0]], "schedule": schedule, "prediction": prediction}
    quick = {"fit_steps": 1}
    return {"recipe": "test", "teacher": teacher | quick, "generator": {"weights": "full"}, **sections}


@pytest.mark.parametrize("schedule", ["flow", "vp-cosine"])
def test_a_system_refuses_eps_prediction_from_pure_noise(schedule):
    """A config knows no schedule's numbers: it is the system that refuses, and allows what can be inverted."""
    config = build(analytic(schedule, "eps", plan={"start": 1.0}))
    with pytest.raises(UserError, match=r"^plan\.start: eps prediction cannot start at t = 1, where alpha is \d.\de"):
        load_teacher(config)
    for allowed, start in (
        (analytic(schedule, "eps", plan={"start": 0.98}), 0.98),
        (analytic("vp-linear", "eps"), 1.0),
        (analytic("ve", "eps"), 1.0),
        (analytic(schedule, "flow"), 1.0),
    ):
        config = build(allowed)
        system = build_system(config, load_teacher(config)[0], {})
        assert system.plan.times[0] == start and system.model.prediction == allowed["teacher"]["prediction"]


# Re-noise times


def grid(count: int = 200_000) -> torch.Tensor:
    """r at the midpoints of [0, 1): fractions of draws become exact to 1 / count."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize(("low", "high"), [(0.02, 1.0), (0.75, 1.0), (5 / 6, 0.9375)])
def test_renoise_times_are_uniform_in_raw_time(low, high, shift):
    r = grid(1000)
    t = renoise_times(r, low, high, shift)

    def raw(time):
        return time / (shift - (shift - 1) * time)

    torch.testing.assert_close((raw(high) - raw(t)) / (raw(high) - raw(low)), r, rtol=0, atol=1e-12)
    assert t.dtype == torch.float64


@pytest.mark.parametrize(("low", "fraction"), [(0.98, 0.093), (0.02, 1 - 0.004)])
def test_renoise_mass_at_the_ends(low, fraction):
    """At shift 5, P(t > .98) = 9.3 % and P(t < .02) = .4 %."""
    t = renoise_times(grid(), 1e-9, 1.0, 5.0)
    assert (t > low).double().mean().item() == pytest.approx(fraction, abs=5e-4)


@pytest.mark.parametrize(
    ("bound", "atom", "clamped_mean", "truncated_mean"),
    [(0.875, 0.167, 0.934, 0.946), (0.9, 0.286, 0.940, 0.956)],
)
def test_truncated_and_clamped_range(bound, atom, clamped_mean, truncated_mean):
    """At shift 5 and s = .8333: the atoms of Wan2.2's clamp, and the mean of t both ways."""
    clamped = renoise_times(grid(), 5 / 6, 1.0, 5.0, bound)
    assert clamped.min().item() == bound
    assert (clamped == bound).double().mean().item() == pytest.approx(atom, abs=5e-4)
    assert clamped.mean().item() == pytest.approx(clamped_mean, abs=6e-4)
    truncated = renoise_times(grid(), bound, 1.0, 5.0)
    assert truncated.min().item() > bound
    assert truncated.mean().item() == pytest.approx(truncated_mean, abs=6e-4)
    assert truncated.diff().abs().min().item() > 0  # no two alike: no atom
    raw = truncated / (5 - 4 * truncated)
    lower = bound / (5 - 4 * bound)  # .5833 and .6429
    torch.testing.assert_close((1 - raw) / (1 - lower), grid(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.75])
def test_a_floor_at_or_below_the_interval_moves_nothing(floor):
    assert torch.equal(renoise_times(grid(9), 0.75, 1.0, 5.0, floor), renoise_times(grid(9), 0.75, 1.0, 5.0))


@pytest.mark.parametrize(("low", "high"), [(5 / 6, 1.0), (0.75, 0.98)])
def test_r_0_is_the_upper_bound_itself(low, high):
    assert renoise_times(tensor(0.0), low, high, 5.0).item() == pytest.approx(high, abs=1e-15)


@schedules
@given(s=st.floats(0.01, 0.98), above=st.floats(0.01, 1), shift=st.floats(0.5, 10))
@settings(max_examples=50, deadline=None)
def test_renoise_time_lies_above_s_and_not_above_the_bound(name, s, above, shift):
    """t > s even for the largest r below 1 that a generator gives, t <= the bound at r = 0; sigma_ts is finite."""
    r, high = tensor(math.nextafter(1, 0), 1 - 2**-24, 0.5, 0.0), s + above * (1 - s)
    t = renoise_times(r, s, high, shift)
    assert (t > s).all() and (t <= high).all()
    assert SCHEDULES[name].transition(full(s, t), t)[1].isfinite().all()


def test_at_a_floor_that_is_the_upper_bound_all_times_pile_up():
    assert renoise_times(grid(10), 0.75, 0.9, 5.0, 0.9).tolist() == [0.9] * 10


@pytest.mark.parametrize(("low", "high", "floor", "above"), [
    (0.75, 0.75, 0.0, 0.75), (0.9, 0.75, 0.0, 0.9), (0.5, 0.75, 0.8, 0.8), (0.5, 0.75, math.nextafter(0.75, 1), 0.75),
])  # fmt: skip
def test_an_interval_without_times_is_an_error(low, high, floor, above):
    with pytest.raises(ValueError, match=f"^renoise: no time is left between {above:g} and {high:g}$"):
        renoise_times(tensor(0.5), low, high, 5.0, floor)
