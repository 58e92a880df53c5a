"""What a preview needs beside the weights: calls without gradient, and the decode of what they end at.

Counted on tensors without data, as in `measure`: the most bytes that are there at a time.
"""

import functools
import json
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from phased_dmd.config import Config, Lora
from phased_dmd.config.teacher import PipelineTeacher, Teacher
from phased_dmd.maths.phases import Hop, PhasePlan
from phased_dmd.maths.rollout import rollout
from phased_dmd.models.loader import adapter_of
from phased_dmd.models.source import BareSource, quiet, skeleton
from phased_dmd.plan.measure import (
    FAKE_CPU,
    PeakBytes,
    WithoutData,
    adapter,
    bucket_shapes,
    cached,
    condition_shapes,
    fake_inputs,
    fake_networks,
    largest,
    meta_model,
)
from phased_dmd.plan.work import forward_flops
from phased_dmd.sampling.previews import base_calls, preview_count, shows_base
from phased_dmd.sampling.sampler import preview_batch

FRAMES = 3, 4  # of latents: by the third, a VAE that decodes one after the other costs the same for each
COPIES = 3  # of the pixels, while a codec brings them to [0, 1]


class PreviewCost(NamedTuple):
    """The cost of a preview to one process: bytes beside the networks, FLOPs of one step and of the decode."""

    memory: int
    step: int
    decode: int


def preview_cost(config: Config, gpus: int) -> PreviewCost:
    """Returns what a preview costs each of some GPUs.

    Its resolution bucket is the first; where first frames decide which one is drawn, the largest is counted.
    """
    if config.sample_every is None:
        return PreviewCost(0, 0, 0)
    teacher, shapes = config.teacher, bucket_shapes(config.teacher)
    bucket = largest(shapes) if "image" in condition_shapes(teacher, shapes[0]) else 0
    shape, ways = shapes[bucket], config.engine.sequence_parallel
    share = math.ceil(preview_count(config, shape) * ways / gpus)
    batch = min(preview_batch(config, shape), share)
    steps, (vae, decode, flops) = (
        rollout_bytes(teacher, adapter(config.generator), shape, batch),
        decode_cost(teacher, shape, batch),
    )
    memory = vae + share * math.prod(shape) * 4 + max(steps // ways, decode)
    return PreviewCost(memory, share * (forward_flops(teacher)[bucket] // ways), flops * share // batch)


def base_steps(config: Config, plan: PhasePlan, phase: int) -> int:
    """Returns the network calls that the base's part of a phase's previews takes for each sample, once; 0 without."""
    shape, guidance = bucket_shapes(config.teacher)[0], meta_model(config.teacher).guidance
    count = preview_count(config, shape)
    shown = config.sample_every is not None and shows_base(config, plan, guidance, phase, count)
    return base_calls(config, plan, guidance, phase) if shown else 0


@cached
def rollout_bytes(teacher: Teacher, lora: Lora | None, shape: tuple[int, ...], batch: int) -> int:
    """Returns the most bytes that a rollout of a batch holds at a time, beside the networks."""
    model = meta_model(teacher)

    def peak(network: nn.Module) -> int:
        with torch.no_grad(), WithoutData(), PeakBytes(network) as counted:
            x, condition = fake_inputs(teacher, shape, batch)
            step = (Hop(0, 1.0, 0.9),)
            rollout(lambda _, x, t: model.predict(network, x, t, condition), x, step, model.schedule, model.prediction)
        return counted.most

    before = batch * math.prod(shape) * 4  # what the step before ended at
    return before + sum(weight * peak(network) for weight, network in fake_networks(teacher, lora, train=False))


def decode_cost(teacher: Teacher, shape: tuple[int, ...], batch: int) -> tuple[int, int, int]:
    """Returns the cost of decoding latents: bytes of the VAE's weights, the most other bytes at a time, and FLOPs.

    That of long clips follows from a few frames.
    """
    if not isinstance(teacher, PipelineTeacher):
        return 0, 0, 0
    weights, peak, pixels, flops = _over_frames(teacher, shape, batch)
    return weights, max(peak, COPIES * pixels), flops


def encode_cost(teacher: PipelineTeacher, shape: tuple[int, ...], takes_images: bool) -> tuple[int, int]:
    """Returns the bytes of the VAE's weights, and the most others while it encodes a clip that begins with a first
    frame, if the teacher takes one. shape: of its latents.
    """
    if not takes_images:
        return _over_frames(teacher, shape, 1)[0], 0
    weights, peak, pixels, _ = _over_frames(teacher, shape, 1, encode=True)
    return weights, peak + pixels  # the clip is put together from a frame and from zeros


def _over_frames(teacher: PipelineTeacher, shape: tuple[int, ...], batch: int, encode: bool = False) -> list[int]:
    """Returns what `_count_codec` counts of latents [batch, *shape]; further frames cost as much as the fourth."""
    adapter = adapter_of(teacher)
    vae = json.dumps(BareSource(teacher).config(adapter.vae, "vae"))
    frames = [min(shape[1], most) for most in FRAMES]
    few, more = (
        _count_codec(adapter.vae, vae, adapter.decoded((batch, shape[0], length, *shape[2:])), encode)
        for length in frames
    )
    return [a + (shape[1] - frames[0]) * (b - a) for a, b in zip(few, more, strict=True)]


@functools.cache
def _count_codec(kind: Any, config: str, shape: tuple[int, ...], encode: bool) -> tuple[int, int, int, int]:
    """Returns bytes of weights, the most other bytes that coding latents of a shape holds, those of pixels, and FLOPs.

    encode: code the pixels that they come from, not the latents.
    """
    with quiet():
        vae: Any = skeleton(kind, json.loads(config), torch.float32)
    with FAKE_CPU:
        vae.to_empty(device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, PeakBytes(vae) as peak:
        with FAKE_CPU:
            given = torch.zeros(_clip(vae.config, shape) if encode else shape)
        coded = vae.encode(given)[0] if encode else vae.decode(given + 0)[0]  # a codec scales latents first
    pixels = given if encode else coded
    return sum(p.nbytes for p in vae.parameters()), peak.most, pixels.nbytes, flops.get_total_flops()


def _clip(config: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the pixels of latents [b, c, f, h, w] of a video VAE of that configuration."""
    batch, _, length, height, width = shape
    space, time = config.get("scale_factor_spatial", 8), config.get("scale_factor_temporal", 4)
    return batch, 3, (length - 1) * time + 1, height * space, width * space
