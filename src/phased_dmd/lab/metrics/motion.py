"""Motion of clips [n, f, h, w, 3] in [0, 1], two frames at least: optical flow, and VBench's dynamic degree."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.engine.world import device
from phased_dmd.errors import UserError

Flow = Callable[[Tensor, Tensor], Tensor]  # of two frames [h, w, 3]: (right, down) in pixels, [h, w, 2]
DIS, RAFT = "OpenCV DIS", "RAFT, torchvision"  # names of flows, to stand beside every number made with them
LEAST_SIDE = 12  # pixels, of the longer side: the least that DIS takes
FASTEST = 0.05  # share of a frame's pixels
BASE_FPS = 8.0


def dis_flow(first: Tensor, second: Tensor) -> Tensor:
    """Returns the flow [h, w, 2] between two frames [h, w, 3] by OpenCV's dense inverse search (extra `eval`)."""
    if max(first.shape[:2]) < LEAST_SIDE:
        raise UserError(f"optical flow: frames of {first.shape[0]} x {first.shape[1]} pixels; {LEAST_SIDE} at least")
    a, b = ((frame.mean(2).clamp(0, 1) * 255).round().byte().cpu().numpy() for frame in (first, second))
    return torch.from_numpy(_dis().calc(a, b, np.zeros((*a.shape, 2), np.float32)))


def clip_flows(pixels: Tensor, flow: Flow = dis_flow) -> Tensor:
    """Returns the mean absolute optical flow between neighbouring frames of each clip, [n] pixels a frame."""
    return torch.tensor([[float(speed.mean()) for speed in _speeds(clip, flow)] for clip in pixels]).mean(1)


def dynamic_clips(pixels: Tensor, fps: float, flow: Flow = dis_flow) -> Tensor:
    """Says which clips are dynamic, [n] bool, by VBench's rule; VBench states their share in percent, with RAFT's flow.

    Frames are taken at about 8 a second. Between two neighbours, the speed is the mean of the fastest 5 % of the
    pixels; it counts where it exceeds 6 pixels for a shorter side of 256 (and more for fewer than 8 frames a second).
    A clip of m taken frames is dynamic if m/4 pairs count. Of two frames the rule asks for none; here it is one.
    """
    taken = pixels[:, :: max(1, round(fps / BASE_FPS))]
    threshold = 6 * min(pixels.shape[2:4]) / 256 * max(1.0, BASE_FPS / fps)
    enough = max(1, round(taken.shape[1] / 4))
    counts = [sum(_fastest(speed) > threshold for speed in _speeds(clip, flow)) for clip in taken]
    return torch.tensor(counts) >= enough


def _speeds(clip: Tensor, flow: Flow) -> Iterator[Tensor]:
    """Yields the length of the flow between neighbouring frames of a clip [f, h, w, 3], each [h, w]."""
    return (flow(first, second).norm(dim=2) for first, second in itertools.pairwise(clip))


def _fastest(speed: Tensor) -> float:
    return float(speed.flatten().double().topk(max(1, int(FASTEST * speed.numel()))).values.mean())


def load_flow(name: str) -> tuple[Flow, str]:
    """Loads the flow `dis` or `raft` and the name that stands beside its numbers; raises UserError for other names."""
    if name == "dis":
        return dis_flow, DIS
    if name == "raft":
        return _raft(), RAFT
    raise UserError(f"flow: {name!r} is neither dis nor raft")


def _raft() -> Flow:
    """Loads torchvision's RAFT, trained on C_T_SKHT_V2; frames are enlarged where a side is below 128 pixels."""
    try:
        from torchvision.models.optical_flow import Raft_Large_Weights, raft_large  # type: ignore[import-not-found]

        network = raft_large(weights=Raft_Large_Weights.C_T_SKHT_V2).eval().to(device())
    except (ImportError, OSError, RuntimeError) as error:  # a torchvision that does not fit torch is a RuntimeError
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"flow: raft needs torchvision and its weights ({reason})") from error

    @torch.no_grad()
    def flow(first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[:2]
        size = [8 * max(16, math.ceil(side / 8)) for side in (height, width)]  # its stride, and the least it takes
        pair = torch.stack([first, second]).to(device()).permute(0, 3, 1, 2).clamp(0, 1)
        a, b = (F.interpolate(pair, size, mode="bilinear") * 2 - 1).split(1)
        found = F.interpolate(network(a, b)[-1], (height, width), mode="bilinear")[0]
        scale = torch.tensor([width / size[1], height / size[0]], device=found.device)
        return (found * scale[:, None, None]).permute(1, 2, 0).cpu()

    return flow


@cache
def _dis() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise UserError("optical flow: OpenCV is not installed; pip install 'phased-dmd[eval]'") from error
    return cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
