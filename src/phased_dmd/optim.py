"""AdamW for beta1 = 0, the decay of the learning rate, and what a role in training carries with it."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from phased_dmd.config import Optimiser


class MomentumFreeAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with betas (0, beta2), which needs no first moment and stores none."""

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "exp_avg_sq": torch.zeros_like(p)}
                self.state[p]["step"] += 1
            self._update(group, params)
        return loss

    def _update(self, group: dict, params: list[Tensor]) -> None:
        if not params:
            return
        grads: list[Tensor] = [p.grad for p in params if p.grad is not None]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, grads, grads, 1 - group["beta2"])
        corrections = [(1 - group["beta2"] ** self.state[p]["step"].item()) ** 0.5 for p in params]
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(params, grads, denominators, -group["lr"])


def decayed(lr: float, decay: str, iteration: int, iterations: int) -> float:
    """The learning rate of an iteration (from 0): constant, or falling linearly to a hundredth."""
    return lr if decay == "constant" else lr * max(0.01, 1 - iteration / iterations)


class NonFiniteError(ArithmeticError):
    """A loss or gradient that is not finite: training stops before the optimiser's step."""


def check_finite(loss: Tensor, norm: float, parameters: dict[str, Parameter], where: str) -> None:
    """Raises NonFiniteError naming the loss or the first tensor at fault, or a RuntimeError where no gradient came.

    norm: of all gradients together, before they are clipped.
    """
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{where}: the loss is {loss.item()}")
    if norm > 0 and math.isfinite(norm):
        return
    if all(p.grad is None for p in parameters.values()):
        raise RuntimeError(f"{where}: no gradient reached any parameter; was the backward run inside its role?")
    for name, p in parameters.items():
        if p.grad is not None and not torch.isfinite(p.grad).all():
            raise NonFiniteError(f"{where}: the gradient of {name} is not finite")
    if not math.isfinite(norm):
        raise NonFiniteError(f"{where}: the norm of all gradients overflows")


class Learner:
    """One role's parameters and optimiser within a phase."""

    def __init__(
        self, role: str, parameters: dict[str, Parameter], config: Optimiser, ema: float | None = None
    ) -> None:
        self.role, self.parameters, self.config, self.ema_decay = role, parameters, config, ema
        self.optimiser = MomentumFreeAdamW(
            parameters.values(), config.lr, config.beta2, weight_decay=config.weight_decay
        )
        self.ema = {name: p.detach().clone() for name, p in parameters.items()} if ema is not None else None

    def step(self, loss: Tensor, where: str, progress: tuple[int, int]) -> float:
        """Checks, clips, updates and averages after a backward; returns the gradient's norm before clipping."""
        norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        check_finite(loss, norm.item(), self.parameters, f"{where}, {self.role}")
        clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)
        for group in self.optimiser.param_groups:
            group["lr"] = decayed(self.config.lr, self.config.decay, *progress)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ema is not None and self.ema_decay is not None:
            for name, p in self.parameters.items():
                self.ema[name].lerp_(p.detach(), 1 - self.ema_decay)
        return norm.item()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights, if there are any, in the place of the trained ones."""
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.ema or trained)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, by name."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"{self.role}/weights/{name}"] = p.detach()
            if self.ema is not None:
                tensors[f"{self.role}/ema/{name}"] = self.ema[name]
            for key, value in self.optimiser.state[p].items():
                tensors[f"{self.role}/{key}/{name}"] = value
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            p.copy_(tensors[f"{self.role}/weights/{name}"])
            if self.ema is not None:
                self.ema[name].copy_(tensors[f"{self.role}/ema/{name}"])
            keys = [key for key in ("step", "exp_avg_sq") if f"{self.role}/{key}/{name}" in tensors]
            self.optimiser.state[p] = {
                key: tensors[f"{self.role}/{key}/{name}"].to(p.device if key == "exp_avg_sq" else "cpu") for key in keys
            }
