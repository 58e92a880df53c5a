"""The shipped clips whose mixture is an exact teacher, and the transformer over frames that is its student."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from phased_dmd.checkpoint import load_tensors

CLIPS = Path(__file__).parents[1] / "assets" / "clips.safetensors"  # `phased-dmd teach clips` makes it
FREQUENCIES = 8  # of the sines and cosines of t
Factors = Callable[[Tensor], tuple[Tensor, Tensor]]


class Clips(NamedTuple):
    """Real digits that move, a clip for each digit, direction and speed.

    pixels: [clips, frames, height, width] in [-1, 1], float64. digit, direction: [clips], whole numbers; directions
    are right, left, down and up. speed: [clips], pixels a frame.
    """

    pixels: Tensor
    digit: Tensor
    direction: Tensor
    speed: Tensor


def load_clips(path: Path = CLIPS) -> Clips:
    """Reads the clips that the package ships, or those of a file that `phased-dmd teach clips` wrote."""
    tensors, _ = load_tensors(path)
    return Clips(tensors["pixels"].double() / 127.5 - 1, tensors["digit"], tensors["direction"], tensors["speed"])


class Block(nn.Module):
    """Attention over all frames of a clip and an MLP on each, whose inputs the time scales and shifts."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Returns what states x [b, frames, width] become at times embedded as [b, width]."""
        scale, shift, scale_mlp, shift_mlp = self.modulate(time)[:, None].chunk(4, 2)
        parts = self.project(self.norm(x) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)


class ClipTransformer(nn.Module):
    """Predicts c(t) x + d(t) mean, whose mean [b, frames, height, width] a small transformer over frames finds.

    Each frame has weights in and out of its own: the mixture's clips all begin at the same time.
    """

    def __init__(
        self, shape: Sequence[int], factors: Factors, width: int = 128, layers: int = 2, heads: int = 4
    ) -> None:  # fmt: skip
        """Takes the shape of a clip, (frames, height, width).

        factors: returns c and d [b] at t [b]; with those of a Gaussian the network has its mean alone to find.
        """
        super().__init__()
        self.factors = factors
        frames, pixels = shape[0], math.prod(shape[1:])
        self.embed = nn.Parameter(torch.randn(frames, pixels, width) / pixels**0.5)
        self.place = nn.Parameter(torch.zeros(frames, width))
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Parameter(torch.zeros(frames, width, pixels))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicts [b, frames, height, width] at x of the same shape and t [b]."""
        phase = t[:, None].to(x.dtype) * math.pi * torch.arange(1, FREQUENCIES + 1, device=x.device)
        time = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        states = torch.einsum("bfp,fpc->bfc", x.flatten(2), self.embed) + self.place
        for block in self.blocks:
            states = block(states, time)
        mean = torch.einsum("bfc,fcp->bfp", self.norm(states), self.head).view(x.shape)
        of_x, of_mean = (factor.to(x.dtype).view(-1, 1, 1, 1) for factor in self.factors(t))
        return of_x * x + of_mean * mean
