"""MomentumFreeAdamW against torch's own AdamW and closed forms; the learning rate's decay; the guard before a step."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from phased_dmd.config import Optimiser
from phased_dmd.networks.optim import (
    Learner,
    MomentumFreeAdamW,
    NonFiniteError,
    _round_at_random,
    check_finite,
    decayed,
)


class Net(nn.Module):
    """`late` takes part from step 20 on, `odd` in every second step: else they have no gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
            self.late, self.odd = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.to(dtype)

    def loss(self, step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(16, 5, generator=rng, dtype=torch.float64).to(self.late.dtype)
        out = self.body(x)
        if step >= 20:
            out = out + self.late
        if step % 2:
            out = out * self.odd
        return ((out - x[:, :3].sin() * (1 + step % 7)) ** 2).mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("weight_decay", [0.01, 0.0])
def test_equals_adamw_without_momentum(dtype: torch.dtype, tolerance: float, weight_decay: float) -> None:
    ours, theirs = Net(dtype), Net(dtype)
    optimiser = MomentumFreeAdamW(ours.parameters(), lr=3e-3, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs.parameters(), lr=3e-3, betas=(0.0, 0.999), weight_decay=weight_decay)
    start = [p.detach().clone() for p in ours.parameters()]
    for step in range(100):
        for net, opt in ((ours, optimiser), (theirs, reference)):
            for group in opt.param_groups:
                group["lr"] = 3e-3 * (1 - step / 200)
            opt.zero_grad()
            net.loss(step).backward()
            assert (net.late.grad is None) == (step < 20) and (net.odd.grad is None) == (step % 2 == 0)
            opt.step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=tolerance)
    assert all((p - q).abs().max() > 0.05 for p, q in zip(ours.parameters(), start, strict=True))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        mine, other = optimiser.state[p], reference.state[q]
        torch.testing.assert_close(mine["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-5, atol=0)
        assert mine["step"] == other["step"]  # late: 80, odd: 50, not 100
    assert {float(optimiser.state[p]["step"]) for p in ours.parameters()} == {100.0, 80.0, 50.0}


class Launched(TorchDispatchMode):
    """Counts the operations that launch a kernel, or one for a list of tensors, which those that only look do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and "prim::" not in func._schema.name
        return func(*args, **(kwargs or {}))


def test_an_update_launches_as_much_for_many_tensors_as_for_few() -> None:
    """The norm, the clip, the step and the average: each is one pass over all tensors."""

    def launched(tensors: int) -> int:
        weights = {str(i): nn.Parameter(torch.ones(3)) for i in range(tensors)}
        learner = Learner("fake", weights, Optimiser(clip=0.1), lr=1e-3, ema=0.9)
        for p in weights.values():
            p.grad = torch.ones(3)
        with Launched() as found:
            learner.clip(learner.checked_norm(0.0, "here"))
            learner.step(0)
        return found.count

    assert launched(200) == launched(3) < 25


class Waits(TorchDispatchMode):
    """Counts where a number is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_a_measured_step_is_that_of_the_first_matrix_over_its_norm() -> None:
    """AdamW's first step without momentum: lr times the sign, and the decay; of weights of 2 it is (.1 + .002) / 2."""
    weights = {"bias": nn.Parameter(torch.full((3,), 9.0)), "matrix": nn.Parameter(torch.full((3, 2), 2.0))}
    learner = Learner("fake", weights, Optimiser(), lr=0.1)
    for p in weights.values():
        p.grad = torch.ones_like(p)
    with Waits() as waits:
        step = learner.step(0, measured=True)
    assert isinstance(step, Tensor) and step.item() == pytest.approx((0.1 + 0.1 * 0.01 * 2) / 2, rel=1e-5)
    assert waits.count == 0, "a number is read where a line is written, not in the update"
    assert learner.step(1) is None


def test_stores_no_first_moment() -> None:
    net = Net(torch.float32)
    optimiser = MomentumFreeAdamW(net.parameters(), lr=1e-3)
    for step in range(20, 23):
        net.loss(step).backward()
        optimiser.step()
    stored = [t for state in optimiser.state.values() for t in state.values() if t.numel() > 1]
    assert sum(t.numel() for t in stored) == sum(p.numel() for p in net.parameters())


def test_a_second_moment_in_bfloat16_serves_weights_of_any_type() -> None:
    """A float64 weight takes the step of a float32 one: of the same gradient, rounded by the same draw."""
    moved = {}
    for dtype in (torch.float32, torch.float64):
        p = nn.Parameter(torch.ones(64, dtype=dtype))
        optimiser = MomentumFreeAdamW([p], lr=0.1, second_moment=torch.bfloat16)
        for _ in range(3):
            p.grad = torch.linspace(-1, 1, 64, dtype=torch.float32).to(dtype)
            optimiser.step()
        moved[dtype] = p.detach().float()
    assert not torch.equal(moved[torch.float64], torch.ones(64))
    torch.testing.assert_close(moved[torch.float64], moved[torch.float32], rtol=1e-2, atol=1e-2)


def test_a_second_moment_in_bfloat16_keeps_its_small_steps() -> None:
    """v -> .999 v + .001 g^2 from 0 towards 1: rounded to nearest, it stops where .001 of the rest is half an ulp."""
    p, nearest = nn.Parameter(torch.zeros(4096)), torch.zeros((), dtype=torch.bfloat16)
    optimiser = MomentumFreeAdamW([p], lr=0.0, second_moment=torch.bfloat16, seed=3)
    for _ in range(2000):
        p.grad = torch.ones(4096)
        optimiser.step()
        nearest = (0.999 * nearest.float() + 0.001).bfloat16()
    v = optimiser.state[p]["exp_avg_sq"]
    expected = 1 - 0.999**2000  # .865; one rounding is off by at most 2^-9, of thousands independent ones
    assert v.dtype == torch.bfloat16 and nearest < 0.4
    assert abs(v.float().mean() - expected) < 0.005
    assert (v.float() - expected).abs().max() < 0.25


def test_random_rounding_is_unbiased_and_seeded() -> None:
    x = torch.tensor([1.0, 1.0 + 2**-9, 3.14159, 1e-12, 0.0]).expand(20_000, 5)
    rounded = _round_at_random(x.contiguous(), seed=1).float()
    assert (rounded[:, 0] == 1).all() and (rounded[:, 4] == 0).all()
    relative = (rounded.mean(0) / x[0] - 1)[:4]
    assert relative.abs().max() < 4 * 2**-7 / 2 / 20_000**0.5
    assert torch.equal(_round_at_random(x.contiguous(), seed=1).float(), rounded)
    assert not torch.equal(_round_at_random(x.contiguous(), seed=2).float(), rounded)


def test_first_step_is_the_gradients_sign() -> None:
    """At step 1 the bias-corrected second moment is g^2: p -> (1 - lr wd) p - lr g/(|g| + eps)."""
    p = nn.Parameter(torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64))
    gradient = torch.tensor([1e-3, -5.0, 200.0, 0.0], dtype=torch.float64)
    expected = p.detach() * (1 - 0.1 * 0.01) - 0.1 * gradient / (gradient.abs() + 1e-8)
    p.grad = gradient
    MomentumFreeAdamW([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


def test_groups_keep_their_own_settings() -> None:
    """A group with learning rate 0 stands still while the other follows AdamW."""
    still, moving, reference = (nn.Parameter(torch.tensor([1.0, 2.0])) for _ in range(3))
    optimiser = MomentumFreeAdamW([{"params": [still], "lr": 0.0}, {"params": [moving], "beta2": 0.9}], lr=0.1)
    theirs = torch.optim.AdamW([reference], lr=0.1, betas=(0.0, 0.9))
    for scale in (1.0, -3.0, 0.5):
        for p in (still, moving, reference):
            p.grad = scale * torch.tensor([0.3, -0.7])
        optimiser.step()
        theirs.step()
    assert still.tolist() == [1.0, 2.0]
    torch.testing.assert_close(moving, reference, rtol=0, atol=1e-6)


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    p, reference = nn.Parameter(torch.tensor([3.0])), nn.Parameter(torch.tensor([3.0]))
    optimiser, theirs = MomentumFreeAdamW([p], lr=0.1), torch.optim.AdamW([reference], lr=0.1, betas=(0.0, 0.999))

    def closure(q: nn.Parameter, opt: torch.optim.Optimizer) -> float:
        opt.zero_grad()
        loss = (q**2).sum()
        loss.backward()
        return loss.item()

    with torch.no_grad():
        assert optimiser.step(lambda: closure(p, optimiser)) == 9.0
    theirs.step(lambda: closure(reference, theirs))
    torch.testing.assert_close(p, reference, rtol=0, atol=1e-6)


def test_linear_decay_falls_to_a_hundredth() -> None:
    assert [decayed(2.0, "constant", i, 4) for i in range(4)] == [2.0] * 4
    assert [decayed(2.0, "linear", i, 4) for i in range(4)] == [2.0, 1.5, 1.0, 0.5]
    assert decayed(2.0, "linear", 990, 1000) == pytest.approx(0.02)
    assert decayed(2.0, "linear", 999, 1000) == pytest.approx(0.02)  # the floor: 1/1000 would be .002


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_check_finite_names_the_tensor_at_fault(bad: float) -> None:
    a, b = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))
    a.grad, b.grad = torch.ones(2, 3), torch.ones(4)
    named, fine = {"body.a": a, "head.b": b}, 1.0
    check_finite(fine, 10**0.5, named, "phase 2, iteration 3, fake")
    with pytest.raises(NonFiniteError, match=r"^phase 2, iteration 3, fake: the loss is (nan|-?inf)$"):
        check_finite(bad, 10**0.5, named, "phase 2, iteration 3, fake")
    b.grad[2] = bad
    with pytest.raises(NonFiniteError, match=r"^phase 2, iteration 3, fake: the gradient of head\.b is not finite$"):
        check_finite(fine, abs(bad), named, "phase 2, iteration 3, fake")


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_check_finite_notices_a_norm_that_overflows(norm: float) -> None:
    """Each gradient is finite, all of them together are not."""
    a = nn.Parameter(torch.zeros(2))
    a.grad = torch.full((2,), 1e30)
    with pytest.raises(NonFiniteError, match=r"^here: the norm of all gradients overflows$"):
        check_finite(1.0, norm, {"a": a}, "here")


def test_check_finite_needs_a_gradient_somewhere() -> None:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="no gradient reached any parameter"):
        check_finite(1.0, 0.0, {"a": a, "b": b}, "here")
    b.grad = torch.zeros(2)
    check_finite(1.0, 0.0, {"a": a, "b": b}, "here")
