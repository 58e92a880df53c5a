"""The generator's path: where it ends, which steps it differentiates, what noise it draws, and what that implies."""

import math
from collections.abc import Sequence

import pytest
import torch
from gaussians import (
    MEAN,
    PREDICTIONS,
    SCHEDULES,
    Affine,
    alpha_sigma,
    exact_prediction,
    full,
    hermite,
    law,
    p_q,
    transition,
)
from torch import Tensor

from phased_dmd.config import Ablation
from phased_dmd.maths.losses import distribution_matching_loss, subinterval_target
from phased_dmd.maths.phases import Hop, PhasePlan
from phased_dmd.maths.rollout import aimed_at, rollout
from phased_dmd.maths.schedules import ddim_step, predicted_x0, renoise_times, times_like

schedules = pytest.mark.parametrize("name", SCHEDULES)
predictions = pytest.mark.parametrize("prediction", PREDICTIONS)
TWO_PHASES = PhasePlan.even(steps=4, phases=2, shift=3.0)  # 1, .9, .75 | .75, .5, 0


def start(prediction: str) -> float:
    """t_0: eps prediction cannot start at alpha = 0."""
    return 0.98 if prediction == "eps" else 1.0


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Where a path ends


@schedules
@predictions
@pytest.mark.parametrize(("phase", "exit_step"), [(1, None), (1, 0), (1, 1), (2, 2), (2, 3)])
def test_every_exit_lands_on_the_phase_end(name, prediction, phase, exit_step):
    """For a network that knows x_0 and eps, x is alpha_s x_0 + sigma_s eps whatever the exit, and x0 is x_0."""
    plan = PhasePlan.even(4, 2, shift=3.0, start=start(prediction))
    x_0, eps = randn(2, 5, 3)
    seen = []

    def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
        seen.append((step, t))
        p, q = p_q(prediction, *alpha_sigma(name, t[0].item()))
        return p * x_0 + q * eps

    alpha, sigma = alpha_sigma(name, plan.times[0])
    path = plan.path(phase, exit_step)
    end = rollout(predict, alpha * x_0 + sigma * eps, path, SCHEDULES[name], prediction)
    alpha_s, sigma_s = alpha_sigma(name, plan.end(phase))
    atol = 1e-12  # eps prediction from alpha(.98) = .008 on linear VP loses the most
    torch.testing.assert_close(end.x, alpha_s * x_0 + sigma_s * eps, rtol=0, atol=atol)
    torch.testing.assert_close(end.x0, x_0, rtol=0, atol=atol)
    assert [step for step, _ in seen] == [hop.step for hop in path]
    for (_, t), hop in zip(seen, path, strict=True):
        assert torch.equal(t, full(hop.t, x_0))


@schedules
@predictions
def test_many_ddim_steps_approach_the_true_map(name, prediction):
    """For Gaussian x_0 the probability flow keeps (x_t - alpha_t m) / std(x_t); the error falls as 1 / steps."""
    x = randn(6, 1) * alpha_sigma(name, 1.0)[1]
    t_0 = start(prediction)
    (m_t, v_t), (m_0, v_0) = law(name, t_0), law(name, 0.0)
    true = m_0 + math.sqrt(v_0 / v_t) * (x - m_t)

    def error(steps: int) -> float:
        path = PhasePlan.even(steps, 1, shift=2.0, start=t_0).path(1)
        lines = [exact_prediction(name, prediction, hop.t) for hop in path]
        end = rollout(lambda step, x, _: lines[step](x), x, path, SCHEDULES[name], prediction)
        return ((end.x - true).norm() / (true - MEAN).norm()).item()

    coarse, fine = error(25), error(200)
    assert coarse < 0.2
    assert 6 < coarse / fine < 10  # 8 times the steps


def test_first_step_from_pure_noise_keeps_the_noise():
    """On flow from t = 1, x_s = (1 - s) x0 + s x_1, whatever the network says."""
    x_1 = randn(5, 3)
    end = rollout(lambda _step, x, _t: 0.3 * x - 0.2, x_1, TWO_PHASES.path(1, 0), SCHEDULES["flow"], "flow")
    torch.testing.assert_close(end.x, 0.25 * end.x0 + 0.75 * x_1, rtol=0, atol=1e-15)
    torch.testing.assert_close(end.x0, 0.7 * x_1 + 0.2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("solver", ["ddim", "renoise"])
def test_low_precision_samples_continue_in_float32(solver):
    """A bf16 start and a bf16 network: coefficients and sums as in float64 to 1e-6, where bf16 has 4e-3."""
    x, z = randn(2, 64, 3).bfloat16()

    def end(x: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
        def predict(_step: int, x: Tensor, _t: Tensor) -> Tensor:
            return (x > 0).to(dtype) * 0.5

        return rollout(predict, x, TWO_PHASES.path(1), SCHEDULES["flow"], "flow", solver=solver, noise=lambda _: z).x

    low, high = end(x, z, torch.bfloat16), end(x.double(), z.double(), torch.float64)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=1e-6)


# Which steps receive gradient

SLOPES, OFFSETS = (0.3, -0.2, 0.5, 0.7), (0.1, 0.4, -0.3, 0.2)


def by_hand(path: tuple[Hop, ...], x: Tensor, recorded: tuple[int, ...]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Euler steps x + (r - t)(k x + b) of a network k x + b a step, x0, and d x / d k of the recorded steps."""
    x0, sensitivity = x, dict[int, Tensor]()
    for step, t, r in path:
        h = r - t
        if step in recorded:
            sensitivity = {j: d * (1 + h * SLOPES[step]) for j, d in sensitivity.items()}
            sensitivity[step] = h * x
        else:
            sensitivity = {}  # without gradient the step cuts what came before it
        psi = SLOPES[step] * x + OFFSETS[step]
        x, x0 = x + h * psi, x - t * psi
    return x, x0, sensitivity


@pytest.mark.parametrize(
    ("phases", "phase", "exit_step", "recorded"),
    [
        pytest.param(2, 1, None, (0, 1), id="phase 1, all"),
        pytest.param(2, 1, 0, (0,), id="phase 1, last, exit 0"),
        pytest.param(2, 1, 1, (1,), id="phase 1, last, exit 1"),
        pytest.param(2, 2, None, (2, 3), id="phase 2, all"),
        pytest.param(2, 2, 2, (2,), id="phase 2, last, exit 2"),
        pytest.param(2, 2, 3, (3,), id="phase 2, last, exit 3"),
        pytest.param(1, 1, None, (0, 1, 2, 3), id="vanilla few-step DMD"),
        pytest.param(1, 1, 2, (2,), id="DMD with SGTS"),
        pytest.param(4, 3, 2, (2,), id="a phase a step"),
        pytest.param(2, 2, None, (), id="none"),
    ],
)
def test_gradient_reaches_the_recorded_steps_only(phases, phase, exit_step, recorded):
    """`all`: every step of the phase; `last`: the exit alone; earlier phases never. Against sensitivities by hand."""
    path = PhasePlan.even(steps=4, phases=phases, shift=3.0).path(phase, exit_step)
    slopes = [torch.tensor(k, dtype=torch.float64, requires_grad=True) for k in SLOPES]
    x = randn(5, 3)
    end = rollout(
        lambda step, x, _: slopes[step] * x + OFFSETS[step], x, path, SCHEDULES["flow"], "flow", gradient_steps=recorded
    )
    expected_x, expected_x0, sensitivity = by_hand(path, x, recorded)
    torch.testing.assert_close(end.x.detach(), expected_x, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(end.x0.detach(), expected_x0, rtol=1e-13, atol=1e-14)
    assert end.x.requires_grad == bool(recorded)
    if recorded:
        end.x.sum().backward()
    for step, slope in enumerate(slopes):
        if step in recorded:
            torch.testing.assert_close(slope.grad, sensitivity[step].sum(), rtol=1e-12, atol=0)
        else:
            assert slope.grad is None


def test_recorded_steps_stay_unrecorded_under_no_grad():
    slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        end = rollout(
            lambda _step, x, _t: slope * x,
            randn(5, 3),
            TWO_PHASES.path(1),
            SCHEDULES["flow"],
            "flow",
            gradient_steps=(0, 1),
        )
    assert not end.x.requires_grad and not end.x0.requires_grad
    assert torch.is_grad_enabled()


def test_gradient_through_a_renoised_step():
    """x_s = alpha_s x0 + sigma_s z: d x_s / d k = -alpha_s t x_t for x0 = x_t - t k x_t on flow."""
    slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, z = randn(2, 5, 3)
    end = rollout(
        lambda _step, x, _t: slope * x,
        x,
        TWO_PHASES.path(1, 0),
        SCHEDULES["flow"],
        "flow",
        (0,),
        "renoise",
        lambda _: z,
    )
    end.x.sum().backward()
    torch.testing.assert_close(slope.grad, (-0.25 * x).sum(), rtol=1e-12, atol=0)


# The renoise solver


@pytest.mark.parametrize(
    ("name", "phase", "drawn"),
    [("flow", 1, [0, 1]), ("flow", 2, [0, 1, 2]), ("vp-cosine", 2, [0, 1, 2]), ("ve", 2, [0, 1, 2, 3])],
)
def test_renoise_draws_wherever_sigma_is_above_zero(name, phase, drawn):
    """Fresh noise a step, at a phase's end s > 0 too, none at sigma_r = 0; VE has sigma(0) = sigma_min > 0."""
    asked, x_0 = [], randn(4, 5, 3)  # another x_0 a step: the last call's counts

    def noise(step: int) -> Tensor:
        asked.append(step)
        return randn(5, 3, seed=step + 1)

    def predict(step: int, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(name, t[0].item())
        return (x - alpha * x_0[step]) / sigma - x_0[step]

    path = TWO_PHASES.path(phase)
    end = rollout(predict, randn(5, 3, seed=9), path, SCHEDULES[name], "flow", solver="renoise", noise=noise)
    assert asked == drawn
    alpha, sigma = alpha_sigma(name, path[-1].r)
    last = path[-1].step
    expected = alpha * x_0[last] + (sigma * randn(5, 3, seed=last + 1) if sigma > 0 else 0)
    torch.testing.assert_close(end.x, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(end.x0, x_0[last], rtol=0, atol=1e-13)


def test_a_path_without_hops_leaves_the_sample_as_it_is():
    x = randn(5, 3)
    end = rollout(lambda *_: x.new_zeros(5, 3), x, (), SCHEDULES["flow"], "flow")
    assert torch.equal(end.x, x) and torch.equal(end.x0, x)


@pytest.mark.parametrize("batch", [1, 5])
def test_renoise_needs_noise_only_above_sigma_zero(batch):
    x = randn(batch, 3)
    with pytest.raises(ValueError, match="^the renoise solver needs a source of noise$"):
        rollout(lambda _step, x, _t: x, x, TWO_PHASES.path(1), SCHEDULES["flow"], "flow", solver="renoise")
    end = rollout(lambda _step, x, _t: 0.3 * x, x, (Hop(0, 1.0, 0.0),), SCHEDULES["flow"], "flow", solver="renoise")
    torch.testing.assert_close(end.x, 0.7 * x, rtol=1e-15, atol=0)


def regress(y: Tensor, x: Tensor) -> Affine:
    """E[y | x] of two affine functions of standard normals, each (constant, coefficients...)."""
    slope = ((y[1:] @ x[1:]) / (x[1:] @ x[1:])).item()
    return Affine(slope, (y[0] - slope * x[0]).item())


@schedules
@predictions
@pytest.mark.parametrize(("solver", "part"), [("renoise", 0.2), ("renoise", 1.0), ("ddim", 0.2), ("ddim", 0.5)])
def test_renoised_ends_may_use_equation_4_and_deterministic_ones_may_not(name, prediction, solver, part):
    """Eq. 4 on (x0_hat, mixed noise) regresses to what Eq. 12 on x_s does iff x_s was renoised.

    An exact Gaussian teacher makes the two-step rollout affine in (start, noise, noise, eps): its coefficients come
    from basis vectors through `rollout`. After one deterministic step from t = 1 x0_hat is a constant: two are needed.
    """
    plan = PhasePlan.even(4, 2, shift=3.0, start=start(prediction))
    path, s = plan.path(1), plan.end(1)
    t = s + part * (plan.times[0] - s)
    basis = torch.eye(5, dtype=torch.float64)
    basis[:, 0] = 1  # rows: constant, start, noise of step 0, noise of step 1, eps
    lines = [exact_prediction(name, prediction, hop.t) for hop in path]
    sigma_start = alpha_sigma(name, plan.times[0])[1]
    end = rollout(
        lambda step, x, _: lines[step](x), sigma_start * basis[:, 1], path, SCHEDULES[name], prediction,
        solver=solver, noise=lambda step: basis[:, 2 + step],
    )  # fmt: skip
    alpha_ts, variance_ts = transition(name, s, t)
    x_t = alpha_ts * end.x + math.sqrt(variance_ts) * basis[:, 4]
    alpha, sigma = alpha_sigma(name, t)
    p, q = p_q(prediction, alpha, sigma)
    ordinary = p * end.x0 + q * (x_t - alpha * end.x0) / sigma
    target = subinterval_target(end.x, basis[:, 4], full(s, x_t), full(t, x_t), SCHEDULES[name], prediction)

    def coefficients(values: Tensor) -> Tensor:
        return torch.cat([values[:1], values[1:] - values[0]])

    x_t, ordinary, target = coefficients(x_t), coefficients(ordinary), coefficients(target)
    four, twelve = regress(ordinary, x_t), regress(target, x_t)
    difference = Affine(four.slope - twelve.slope, four.intercept - twelve.intercept)
    mean, variance = x_t[0].item(), (x_t[1:] @ x_t[1:]).item()
    relative = difference.rms(mean, variance) / twelve.rms(mean, variance)
    assert relative < 1e-11 if solver == "renoise" else relative > 1e-3


# SGTS: one phase, several exits


def test_gradient_of_the_mixture_of_exits():
    """With the fake of the same policy, SGTS descends KL(mixture of exits || real), truncated.

    Two exits of a linear generator, the first too narrow, the second too wide, x_0 ~ N(0, .8^2). The closed form is
    1/2 int dN_j log(p_mixture / p_real) on a grid, chained through each exit's own step. A fake trained on full
    rollouts, the last exit's law, gives the first exit the other sign: it descends another thing, and what is wanted,
    see `test_the_sampler_of_sgts_reaches_the_teacher`.
    """
    (t_0, t_1, s), t = TWO_PHASES.times[:3], 0.9
    narrow, wide = 0.4, 0.95  # std of x_s; real .776
    k_0 = (1 - narrow) / (t_0 - s)
    middle = 1 + (t_1 - t_0) * k_0  # of x at t_1, over z
    k_1 = (1 - wide / middle) / (t_1 - s)
    stds = narrow, wide

    alpha_ts, variance_ts = transition("flow", s, t)
    variances = [alpha_ts**2 * std**2 + variance_ts for std in stds]
    real = law("flow", t, 0.0, 0.8)[1]
    x = torch.linspace(-15, 15, 6001, dtype=torch.float64)

    def normal(variance: float, x: Tensor) -> Tensor:
        return (-(x**2) / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)

    log_ratio = (sum(normal(v, x) for v in variances) / 2 / normal(real, x)).log()
    closed = []
    for std, v, d_std in zip(stds, variances, (s - t_0, (s - t_1) * middle), strict=True):
        d_normal = normal(v, x) / 2 * (x**2 / v**2 - 1 / v) * 2 * alpha_ts**2 * std * d_std  # dN/dv dv/dstd dstd/dk
        closed.append(torch.trapezoid(d_normal * log_ratio, x).item() / 2)

    (z, eps), weight = hermite(60, 2)
    a, b = -(t + t**2 / (1 - t)), -1 / (1 - t)  # psi = a S + b x_t, of flow

    def mixture(x: Tensor, _: Tensor) -> Tensor:
        densities = [normal(v, x) for v in variances]
        score = -sum(d * x / v for d, v in zip(densities, variances, strict=True)) / sum(densities)
        return a * score + b * x

    def full_rollouts(x: Tensor, _: Tensor) -> Tensor:
        return a * -x / variances[1] + b * x

    def gradients(fake) -> list[float]:
        slopes = [torch.tensor(k, dtype=torch.float64, requires_grad=True) for k in (k_0, k_1)]
        for exit_step in TWO_PHASES.steps(1):
            path = TWO_PHASES.path(1, exit_step)
            end = rollout(
                lambda step, x, _: slopes[step] * x, z[:, None], path, SCHEDULES["flow"], "flow", (exit_step,)
            )
            assert (weight @ end.x[:, 0] ** 2).sqrt().item() == pytest.approx(stds[exit_step], rel=1e-12)
            loss, _ = distribution_matching_loss(
                end.x, eps[:, None], full(s, z), full(t, z), SCHEDULES["flow"], "flow",
                teacher=lambda x, _: a * -x / real + b * x, fake=fake, weighting="paper",
            )  # fmt: skip
            ((weight * loss).sum() / 2).backward()
        return [slope.grad.item() for slope in slopes]

    assert gradients(mixture) == pytest.approx(closed, rel=1e-7)
    assert gradients(full_rollouts)[0] * closed[0] < 0


WORLD = torch.tensor([0.5, -1.0, 0.0, 1.5]).double(), torch.tensor([0.5, 0.7, 1.0, 1.5]).double()  # means, std of x_0


def exact_flow(x: Tensor, t: Tensor, s: float, laws: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """E[eps - x_0 given x_t] for an x_s that has each of the laws (mean, std) equally often, from the score of x_t."""
    t = t[:, None]
    alpha_ts, logs, scores = (1 - t) / (1 - s), [], []
    for mean, std in laws:
        variance, distance = (alpha_ts * std) ** 2 + t**2 - (alpha_ts * s) ** 2, x - alpha_ts * mean
        logs.append(-(distance**2) / (2 * variance) - variance.log() / 2)
        scores.append(-distance / variance)
    score = (torch.stack(logs).softmax(0) * torch.stack(scores)).sum(0)
    return -(t + t**2 / (1 - t)) * score - x / (1 - t)


def distilled_world(phases: int, fake_rollout: str, iterations: int = 100) -> list[float]:
    """How far the sampler ends off the true mean and std of x_s, at most, after each phase: SGTS on a Gaussian world.

    Four steps, each an affine prediction that starts as the teacher's; exact scores of the teacher and of the law that
    the fake learns from; expectations by quadrature, so that nothing is random.
    """
    plan, (means, stds) = PhasePlan.even(4, phases, 3.0), WORLD
    slopes, intercepts = [], []
    for t in plan.times[:-1]:
        slopes.append((t - (1 - t) * stds**2) / (((1 - t) * stds) ** 2 + t**2))
        intercepts.append(-means - slopes[-1] * (1 - t) * means)
    student = [torch.stack(slopes).requires_grad_(), torch.stack(intercepts).requires_grad_()]
    (z, eps), weight = hermite(4, 2)
    z, eps, weight = (v.repeat_interleave(3) for v in (z, eps, weight / 3))
    z, eps = z[:, None].expand(-1, 4), eps[:, None].expand(-1, 4)
    u, worst = torch.tensor([1, 3, 5]).double().repeat(len(z) // 3) / 6, []

    def roll(x: Tensor, phase: int, exit_step: int) -> Tensor:
        path = plan.path(phase, exit_step)
        return rollout(
            lambda i, x, _: student[0][i] * x + student[1][i], x, path, SCHEDULES["flow"], "flow", (exit_step,)
        ).x

    def end_law(phase: int, exit_step: int) -> tuple[Tensor, Tensor]:
        """Of the exit's end: affine in the first noise."""
        with torch.no_grad():
            zero, one = roll(torch.tensor([[0.0], [1.0]]).double().expand(-1, 4), phase, exit_step)
        return zero, (one - zero).abs()

    for phase in range(1, phases + 1):
        s, exits = plan.end(phase), plan.steps(phase)
        t = renoise_times(u, s or 0.02, 1.0, 3.0)
        optimiser = torch.optim.Adam(student, lr=0.05, betas=(0.5, 0.9), fused=True)
        for i in range(iterations):
            optimiser.param_groups[0]["lr"] = 0.05 * max(0.01, 1 - i / iterations)
            laws, losses = {exit_step: end_law(phase, exit_step) for exit_step in exits}, []
            for exit_step in exits:
                seen = {"same": [*laws.values()], "full": [laws[exits[-1]]], "each": [laws[exit_step]]}[fake_rollout]
                losses.append(distribution_matching_loss(
                    roll(z, phase, exit_step), eps, full(s, z), t, SCHEDULES["flow"], "flow",
                    teacher=lambda x, t: exact_flow(x, t, 0.0, [WORLD]),
                    fake=lambda x, t, s=s, seen=seen: exact_flow(x, t, s, seen),
                )[0])  # fmt: skip
            optimiser.zero_grad()
            (weight * torch.stack(losses).mean(0)).sum().backward()
            optimiser.step()
        mean, std = end_law(phase, exits[-1])
        off = torch.cat([mean - (1 - s) * means, std - (((1 - s) * stds) ** 2 + s**2).sqrt()])
        worst.append(off.abs().max().item())
    return worst


@pytest.mark.parametrize(("phases", "fake_rollout"), [(1, None), (2, None), (4, None), (1, "each"), (2, "each")])
def test_the_sampler_of_sgts_reaches_the_teacher(phases: int, fake_rollout: str | None) -> None:
    """By the policy that a plan has unless told otherwise (None), and with a fake an exit. The teacher's own four Euler
    steps are off by .48.
    """
    policy = fake_rollout or Ablation().fake_rollout
    assert max(distilled_world(phases, policy)) < 1e-3
    assert distilled_world(phases, policy, iterations=0)[-1] == pytest.approx(0.478, abs=1e-3)


@pytest.mark.parametrize(("phases", "least"), [(1, 0.05), (2, 0.01)])
def test_a_fake_of_the_same_exits_matches_their_mixture_and_not_the_sampler(phases: int, least: float) -> None:
    assert min(distilled_world(phases, "same")) > least


@schedules
@predictions
def test_what_a_step_is_aimed_at_is_what_it_predicts(name: str, prediction: str) -> None:
    """A step's own prediction is found again from where it ends, at t = 0 too, where that is its end."""
    schedule, x, psi = SCHEDULES[name], randn(5, 3), randn(5, 3, seed=1)
    for t, r in ((0.9, 0.4), (0.6, 0.55), (0.5, 0.0)):
        t_, r_ = times_like(t, x), times_like(r, x)
        end = ddim_step(psi, x, t_, r_, schedule, prediction)
        expected = predicted_x0(psi, x, t_, schedule, prediction)
        torch.testing.assert_close(aimed_at(x, end, t, r, schedule), expected, rtol=1e-9, atol=1e-9)
