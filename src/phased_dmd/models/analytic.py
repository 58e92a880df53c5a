"""Teachers that need no training: the exact prediction of a Gaussian mixture, and an MLP as its student."""

import copy
import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

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
from phased_dmd.models.protocol import Condition

FIT_BATCH, FIT_LR = 512, 2e-3  # of the fit of the student to the exact prediction
SCHEDULES: dict[str, Schedule] = {
    "flow": FlowSchedule(), "vp-cosine": VPSchedule("cosine"), "vp-linear": VPSchedule("linear"), "ve": VESchedule(),
}  # fmt: skip


class ExactMixture(nn.Module):
    """Predicts the exact E[p x_0 + q eps | x_t] for x_0 of the mixture sum_i w_i N(mean_i, std^2 I); std = 0: points.

    means: [modes, dims]; weights: [modes], normalised here.
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
        """Predicts psi [b, dims] at x [b, dims] and t [b] > 0; computed in float64."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        p, q = (coefficient[:, None] for coefficient in coefficients(self.prediction, alpha, sigma))
        alpha, sigma = alpha[:, None], sigma[:, None]
        variance = alpha**2 * self.std**2 + sigma**2
        offset = x.double()[:, None] - alpha[..., None] * self.means  # [b, modes, dims]
        mode = (self.weights.log() - offset.square().sum(2) / (2 * variance)).softmax(1)[..., None]
        x0 = (mode * (self.means + (alpha * self.std**2 / variance)[..., None] * offset)).sum(1)
        eps = (mode * (sigma / variance)[..., None] * offset).sum(1)
        return (p * x0 + q * eps).to(x.dtype)

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Draws x_0 [count, dims], float32."""
        mode = torch.multinomial(self.weights.cpu(), count, replacement=True, generator=rng)
        return (self.means.cpu()[mode] + self.std * torch.randn(count, self.means.shape[1], generator=rng)).float()

    def marginal(self, t: float, u: Tensor, noise: Tensor) -> Tensor:
        """Returns exact x_t [b, dims], float32, of modes that u [b], uniform in [0, 1], chooses, and of standard normal
        noise [b, dims].
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
    means = torch.tensor(config.means, dtype=torch.float64)
    weights = torch.tensor(config.weights, dtype=torch.float64) if config.weights else torch.ones(len(means))
    return ExactMixture(means, config.std, weights, SCHEDULES[config.schedule], config.prediction)


@lru_cache(maxsize=16)
def initial_student(config: AnalyticTeacher, seed: int, fit: bool) -> TimeMLP:
    """Builds the MLP, fitted to the exact prediction if `fit`; copy it, as the runs of a process share it."""
    exact, rng = build_mixture(config), generator(seed, "fit")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
        student = TimeMLP(exact.means.shape[1])
    if fit:
        fit_student(student, exact, config.fit_steps, rng)
    return student


def fit_student(student: TimeMLP, exact: ExactMixture, steps: int, rng: torch.Generator) -> None:
    """Fits the MLP to the mixture's exact prediction."""
    optimiser = torch.optim.Adam(student.parameters(), lr=FIT_LR)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(steps):
        x_0 = exact.sample(FIT_BATCH, rng)
        t = renoise_times(torch.rand(FIT_BATCH, generator=rng), 0.01, 0.999, 1.0)
        eps = torch.randn(x_0.shape, generator=rng)
        x_t = (exact.schedule.alpha(t)[:, None] * x_0 + exact.schedule.sigma(t)[:, None] * eps).float()
        loss = (student(x_t, t) - exact(x_t, t)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        decay.step()


class AnalyticModel:
    """Is the `VelocityModel` of an exact mixture. Its student is an MLP, fitted to the exact prediction if `fit`.

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
        self.sample_shapes: Sequence[tuple[int, ...]] = [(len(config.means[0]),)]
        if where.type == "meta":
            with where:
                student = TimeMLP(len(config.means[0]))
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
