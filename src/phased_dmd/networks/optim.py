"""What trains a role: AdamW for beta1 = 0, the decay of its rate, the running average and the check for NaN."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

from phased_dmd.config import Optimiser
from phased_dmd.engine.collectives import all_reduce_max
from phased_dmd.engine.randomness import seed_of
from phased_dmd.engine.world import rank

CLIP_EPS = 1e-6  # torch scales by clip / (norm + this), or by 1 at most


class MomentumFreeAdamW(torch.optim.Optimizer):
    """`torch.optim.AdamW` with betas (0, beta2), which needs no first moment and stores none.

    second_moment: the dtype it is stored in. In bfloat16 steps of 1 - beta2 are lost if rounded to nearest: there it is
    rounded up or down at random, from the seed and the step, so that its mean is right.
    """

    def __init__(
        self,
        params: Iterable[Parameter],
        lr: float,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        second_moment: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta2": beta2, "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        for group in self.param_groups:
            for p in group["params"]:
                dtype = second_moment if second_moment == torch.bfloat16 else p.dtype
                step = torch.zeros((), device=p.device)
                self.state[p] = {"step": step, "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient, in one pass over memory; each process its shards alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            weights, grads = [_own(p) for p in params], [_own(p.grad) for p in params if p.grad is not None]
            steps, stored = [self.state[p]["step"] for p in params], [_own(self.state[p]["exp_avg_sq"]) for p in params]
            squares = [v.to(g.dtype) for v, g in zip(stored, grads, strict=True)]
            adamw(  # the gradients stand in the place of the first moments, which are equal to them at beta1 = 0
                weights, grads, grads, squares, [], steps, fused=True, amsgrad=False, maximize=False,
                lr=group["lr"], beta1=0.0, beta2=group["beta2"], eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip
            rounded = [i for i, (v, square) in enumerate(zip(stored, squares, strict=True)) if v is not square]
            counts = torch.stack(steps).tolist() if rounded else []  # one wait for the device, not one a tensor
            for i in rounded:
                seed = seed_of(self.seed, i, int(counts[i]), rank())
                stored[i].copy_(_round_at_random(squares[i].to(torch.float32), seed))
        return loss


def _own(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, sharing its memory; a tensor that is not sharded is returned itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _round_at_random(x: Tensor, seed: int) -> Tensor:
    """Rounds float32 to bfloat16, up or down at random, with the odds that make the mean x."""
    rng = torch.Generator(x.device).manual_seed(seed)
    dropped = torch.randint(0, 1 << 16, x.shape, generator=rng, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + dropped) & ~0xFFFF).view(torch.float32).to(torch.bfloat16)


def decayed(lr: float, decay: str, iteration: int, iterations: int) -> float:
    """Returns the learning rate of an iteration (from 0): constant, or falling linearly to a hundredth of `lr`."""
    return lr if decay == "constant" else lr * max(0.01, 1 - iteration / iterations)


class NonFiniteError(ArithmeticError):
    """Says that a loss or gradient is not finite; it is raised before the optimiser's step."""


def check_finite(loss: float, norm: float, parameters: dict[str, Parameter], where: str) -> None:
    """Raises NonFiniteError naming the loss or the first tensor at fault, or a RuntimeError where no gradient came.

    loss, norm: over all processes, norm of all gradients together, before they are clipped.
    """
    if not math.isfinite(loss):
        raise NonFiniteError(f"{where}: the loss is {loss}")
    if norm > 0 and math.isfinite(norm):
        return
    if all(p.grad is None for p in parameters.values()):
        raise RuntimeError(f"{where}: no gradient reached any parameter; was the backward run inside its role?")
    for name, p in parameters.items():
        if p.grad is not None and all_reduce_max(not torch.isfinite(_own(p.grad)).all()):
            raise NonFiniteError(f"{where}: the gradient of {name} is not finite")
    if not math.isfinite(norm):
        raise NonFiniteError(f"{where}: the norm of all gradients overflows")


class Learner:
    """Holds what trains one role in a phase: its parameters, its optimiser and, if asked for, their running average."""

    def __init__(
        self, role: str, parameters: dict[str, Parameter], config: Optimiser, lr: float, ema: float | None = None,
        iterations: int = 1, seed: int = 0,
    ) -> None:  # fmt: skip
        """Starts from a new optimiser. lr: at the first of the phase's iterations. ema: the decay of the average."""
        self.role, self.parameters, self.config, self.lr, self.ema_decay = role, parameters, config, lr, ema
        self.iterations = iterations
        second_moment = torch.bfloat16 if config.second_moment == "bfloat16" else torch.float32
        self.optimiser = MomentumFreeAdamW(
            parameters.values(), lr, second_moment=second_moment, seed=seed_of(seed, role)
        )
        self._matrix = max(parameters.values(), key=lambda p: p.ndim)  # the first of them
        self.ema = {name: p.detach().clone() for name, p in parameters.items()} if ema is not None else None

    def checked_norm(self, loss: float, where: str) -> Tensor:
        """Returns the norm of all gradients together; a NonFiniteError says that it or the loss is not finite.

        loss: over all processes. where: the phase and iteration, for the message.
        """
        norm = get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).cpu()  # the device is waited for once
        check_finite(loss, norm.item(), self.parameters, f"{where}, {self.role}")
        return norm

    def clip(self, norm: Tensor) -> None:
        """Scales all gradients down where their norm exceeds the clip."""
        if norm + CLIP_EPS > self.config.clip:  # else it would multiply all gradients by 1
            clip_grads_with_norm_(self.parameters.values(), self.config.clip, norm)

    def step(self, iteration: int, measured: bool = False) -> Tensor | None:
        """Updates the weights at the learning rate of this iteration (from 0), and their average.

        Returns, if measured, how far the first matrix among them went, as the norm of its change over its own norm: a
        tensor on the device, which is not waited for.
        """
        matrix = self._matrix.detach()
        before = matrix.clone() if measured else None
        for group in self.optimiser.param_groups:
            group["lr"] = decayed(self.lr, self.config.decay, iteration, self.iterations)
        self.optimiser.step()
        if self.ema is not None and self.ema_decay is not None:
            averages = [_own(self.ema[name]) for name in self.parameters]
            torch._foreach_lerp_(averages, [_own(p.detach()) for p in self.parameters.values()], 1 - self.ema_decay)
        if before is None:
            return None
        change, size = (matrix - before).norm(), before.norm()
        if isinstance(change, DTensor) and isinstance(size, DTensor):
            change, size = change.full_tensor(), size.full_tensor()
        return change / size.clamp(min=torch.finfo(size.dtype).tiny)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averaged weights, if there are any, in the place of the trained ones inside the context."""
        if self.ema is None:
            yield
            return
        trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self.put(self.ema)
            yield
        finally:
            self.put(trained)

    @torch.no_grad()
    def put(self, weights: dict[str, Tensor]) -> None:
        """Overwrites the role's parameters."""
        for name, p in self.parameters.items():
            p.copy_(weights[name])

    def state(self) -> dict[str, Tensor]:
        """Returns the very tensors, no copies, that a resumed run must find as they are, by name."""
        tensors = {}
        for name, p in self.parameters.items():
            tensors[f"{self.role}/weights/{name}"] = p.detach()
            if self.ema is not None:
                tensors[f"{self.role}/ema/{name}"] = self.ema[name]
            for key, value in self.optimiser.state[p].items():
                tensors[f"{self.role}/{key}/{name}"] = value
        return tensors
