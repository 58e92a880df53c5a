"""Teachers that need no training: the exact prediction of a Gaussian mixture, and the networks fitted to it."""

import copy
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from phased_dmd.config.teacher import AnalyticTeacher
from phased_dmd.engine.randomness import generator
from phased_dmd.engine.world import device
from phased_dmd.maths.schedules import (
    FlowSchedule,
    Prediction,
    Schedule,
    VESchedule,
    VPSchedule,
    coefficients,
    renoise_times,
)
from phased_dmd.models.exact_clips import ClipTransformer, load_clips
from phased_dmd.models.protocol import Condition

FIT_BATCH, FIT_LR = 512, 2e-3  # of the fit of the student to the exact prediction
CLIP_FIT: dict[str, Any] = {"batch": 64, "lr": 2e-3, "shift": 3.0}  # of clips: noise near t = 1 decides which
SCHEDULES: dict[str, Schedule] = {
    "flow": FlowSchedule(), "vp-cosine": VPSchedule("cosine"), "vp-linear": VPSchedule("linear"), "ve": VESchedule(),
}  # fmt: skip


class ExactMixture(nn.Module):
    """Predicts the exact E[p x_0 + q eps | x_t] for x_0 of the mixture sum_i w_i N(mean_i, std^2 I); std = 0: points.

    means: [modes, ...], of points [modes, dims] or of clips; weights: [modes], normalised here.
    """

    def __init__(self, means: Tensor, std: float, weights: Tensor, schedule: Schedule, prediction: Prediction) -> None:
        super().__init__()
        self.register_buffer("means", means.double())
        self.register_buffer("weights", weights.double() / weights.double().sum())
        self.means: Tensor
        self.weights: Tensor
        self.std, self.schedule = std, schedule
        self.prediction: Prediction = prediction

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts psi [b, ...] at x [b, ...] and t [b] > 0; computed in float64.

        |x - alpha mean|^2 is taken without |x|^2, which is the same for all modes, so that no [b, modes, dims] is made.
        """
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        variance = alpha**2 * self.std**2 + sigma**2
        flat, means = x.double().flatten(1), self.means.flatten(1)
        near = (alpha * (flat @ means.T) - alpha**2 * means.square().sum(1) / 2) / variance
        mean = (self.weights.log() + near).softmax(1) @ means  # of the modes, by their probabilities given x
        of_x, of_mean = (factor[:, None] for factor in self.factors(t))
        return (of_x * flat + of_mean * mean).view(x.shape).to(x.dtype)

    def factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Returns [b] each what psi is of x and of the mean, for a single Gaussian: psi = c x + d mean."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        p, q = coefficients(self.prediction, alpha, sigma)
        of_x = (p * alpha * self.std**2 + q * sigma) / (alpha**2 * self.std**2 + sigma**2)
        return of_x, p - alpha * of_x

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Draws x_0 [count, ...], float32."""
        mode = torch.multinomial(self.weights.cpu(), count, replacement=True, generator=rng)
        noise = torch.randn(count, *self.means.shape[1:], generator=rng)
        return (self.means.cpu()[mode] + self.std * noise).float()

    def marginal(self, t: float, u: Tensor, noise: Tensor) -> Tensor:
        """Returns exact x_t [b, ...], float32, of modes that u [b], uniform in [0, 1], chooses, and of standard normal
        noise [b, ...].
        """
        time = torch.tensor([t], dtype=torch.float64)
        alpha, sigma = self.schedule.alpha(time), self.schedule.sigma(time)
        mode = torch.searchsorted(self.weights.cumsum(0), u.double(), right=True).clamp(max=len(self.weights) - 1)
        return (alpha * self.means[mode] + ((alpha * self.std) ** 2 + sigma**2).sqrt() * noise).float()


class TimeMLP(nn.Module):
    """Predicts with a SiLU MLP over (x, sines and cosines of t)."""

    FREQUENCIES = 8

    def __init__(self, dims: int, hidden: int = 128, layers: int = 4) -> None:
        super().__init__()
        widths = [dims + 2 * self.FREQUENCIES, *[hidden] * layers]
        body = [(nn.Linear(a, b), nn.SiLU()) for a, b in itertools.pairwise(widths)]
        self.net = nn.Sequential(*itertools.chain.from_iterable(body), nn.Linear(hidden, dims))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts [b, dims] at x [b, dims] and t [b]."""
        phase = t[:, None].to(x.dtype) * math.pi * torch.arange(1, self.FREQUENCIES + 1, device=x.device)
        return self.net(torch.cat([x, phase.sin(), phase.cos()], 1))


def build_mixture(config: AnalyticTeacher) -> ExactMixture:
    """Builds the exact teacher that a config describes."""
    means = load_clips().pixels if config.means == "clips" else torch.tensor(config.means, dtype=torch.float64)
    weights = torch.tensor(config.weights, dtype=torch.float64) if config.weights else torch.ones(len(means))
    return ExactMixture(means, config.std, weights, SCHEDULES[config.schedule], config.prediction)


@lru_cache(maxsize=16)
def initial_student(config: AnalyticTeacher, seed: int, fit: bool) -> nn.Module:
    """Builds the student, fitted to the exact prediction if `fit`; copy it, as the runs of a process share it."""
    exact, rng = build_mixture(config), generator(seed, "fit")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        student = build_student(exact)
    if fit:
        fit_student(student, exact, config.fit_steps, rng, **(CLIP_FIT if config.means == "clips" else {}))
    return student


def build_student(exact: ExactMixture) -> nn.Module:
    """Builds the untrained network that is fitted to a mixture: an MLP of points, a transformer of clips."""
    shape = exact.means.shape[1:]
    return TimeMLP(*shape) if len(shape) == 1 else ClipTransformer(shape, exact.factors)


def fit_student(
    student: nn.Module, exact: ExactMixture, steps: int, rng: torch.Generator, batch: int = FIT_BATCH,
    lr: float = FIT_LR, shift: float = 1.0,
) -> None:  # fmt: skip
    """Fits the student to the mixture's exact prediction, at shifted times."""
    optimiser = torch.optim.Adam(student.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(steps):
        x_0 = exact.sample(batch, rng)
        t = renoise_times(torch.rand(batch, generator=rng), 0.01, 0.999, shift)
        eps = torch.randn(x_0.shape, generator=rng)
        alpha, sigma = (of(t).view(-1, *[1] * (x_0.ndim - 1)) for of in (exact.schedule.alpha, exact.schedule.sigma))
        x_t = (alpha * x_0 + sigma * eps).float()
        loss = (student(x_t, t) - exact(x_t, t)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()


class AnalyticModel:
    """Is the `VelocityModel` of an exact mixture. Its student is a network fitted to the exact prediction if `fit`.

    where: the device, by default the accelerator or the CPU; on the meta device nothing has values.
    """

    guidance: Sequence[float] = (1.0,)
    switches: Sequence[float] = ()
    lora_targets: Sequence[str] = ()

    def __init__(self, config: AnalyticTeacher, seed: int, fit: bool = True, where: torch.device | None = None) -> None:
        where = where or device()
        self.exact = build_mixture(config)
        self.schedule = self.exact.schedule
        self.prediction: Prediction = config.prediction
        self.sample_shapes: Sequence[tuple[int, ...]] = [tuple(self.exact.means.shape[1:])]
        if where.type == "meta":
            with where:
                student = build_student(self.exact)
        else:
            student = copy.deepcopy(initial_student(config, seed, fit))  # pyright: ignore[reportArgumentType] (frozen)
        self.students: Sequence[nn.Module] = [student.eval().to(where)]
        self.networks: Sequence[nn.Module] = [self.exact.eval().to(where)]

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return ()

    def batch(self, rows: Sequence[Condition]) -> Condition:
        return {}

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        return network(x, t)

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return conditional


class PlainCodec:
    """The `Codec` of a model without prompts or pixels: it encodes nothing, and returns samples as they are."""

    fingerprint = ""
    takes_images = False

    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        return [{} for _ in prompts]

    def too_long(self, prompts: Sequence[str]) -> int:
        return 0

    def fits(self, image: Path) -> list[int]:
        return []

    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        return {}

    def free(self) -> None:
        pass

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class ClipCodec(PlainCodec):
    """The `Codec` of an exact mixture of clips, whose samples are grey values in [-1, 1] and what is around them."""

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)[..., None].repeat(1, 1, 1, 1, 3)
