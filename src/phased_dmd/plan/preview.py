"""What a preview holds and costs beside the weights: calls without gradient, and the decode of what they end at.

Counted on tensors without data, as in `measure`: the most bytes that are there at a time.
"""

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher, QwenImageTeacher
from phased_dmd.maths.phases import Hop
from phased_dmd.maths.rollout import rollout
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.models.source import BareSource, skeleton
from phased_dmd.plan.bare import bytes_of, condition_of, image_shapes, largest
from phased_dmd.plan.measure import adapted, most_common_dtype, once, over_blocks
from phased_dmd.sampling.sampler import preview_batch, preview_size

FRAMES = 3, 4  # of latents, by which a VAE that decodes one after the other has reached its stride
COPIES = 3  # of the pixels, while a codec makes [0, 1] of them


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors made inside, each storage once, and the most there were; `network`'s are not."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return made

    def _freed(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


@dataclass(frozen=True)
class Decode:
    """weights: bytes. held: the most bytes at a time. flops: of all samples."""

    weights: int
    held: int
    flops: int


@dataclass(frozen=True)
class Preview:
    """In a process of several: its samples, the bytes that it needs beside the networks, and FLOPs.

    call: FLOPs of one network call of one sample; decode: of all samples.
    """

    samples: int
    memory: int
    call: int
    decode: int


def preview_bucket(model: VelocityModel) -> int:
    """The resolution bucket of previews: the first; where first frames decide which are drawn, the largest may be."""
    shapes = list(model.sample_shapes)
    return shapes.index(largest(shapes)) if image_shapes(model.networks[0], shapes[0]) else 0


def previews(config: Config, model: VelocityModel, flops: list[int]) -> Callable[[Config, int], Preview]:
    """What a preview needs, by the config and the number of GPUs. flops: of a forward in each bucket.

    Of the config, only what `advice` may change, and the batch, may be another one.
    """
    bucket = preview_bucket(model)
    shape = model.sample_shapes[bucket]
    total = 512 if config.prompts is None and len(shape) == 1 else preview_size(shape)

    def preview(config: Config, gpus: int) -> Preview:
        if config.sample_every is None:
            return Preview(0, 0, 0, 0)
        ways = config.engine.sequence_parallel
        share = math.ceil(total * ways / gpus)
        batch = min(preview_batch(config, shape), share)
        calls, decode = rolled(config, model, shape, batch), decoded(config, shape, batch)
        memory = decode.weights + share * math.prod(shape) * 4 + max(calls // ways, decode.held)
        return Preview(share, memory, flops[bucket] // ways, decode.flops * share // batch)

    return preview


def rolled(config: Config, model: VelocityModel, shape: tuple[int, ...], batch: int) -> int:
    """The most bytes that a rollout of a batch holds at a time, beside the networks."""
    lora = config.generator.lora if config.generator.weights == "lora" else None

    def count(network: nn.Module) -> tuple[int, ...]:
        network.requires_grad_(False)
        if lora is not None:
            adapted(network, lora, model.lora_targets)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            network.to_empty(device="cpu")
        with torch.no_grad(), Peak(network) as peak:
            with fake:
                x = torch.zeros(batch, *shape)
                condition = condition_of(config, network, shape, batch, most_common_dtype(network))
            if "text" in condition:
                condition["mask"] = torch.ones(condition["text"].shape[:2], dtype=torch.bool)
            step = (Hop(0, 1.0, 0.9),)
            rollout(
                lambda _step, x, t: model.predict(network, x, t, condition), x, step, model.schedule, model.prediction
            )
        return (peak.most,)

    held = once(lambda: over_blocks(model, model.students[0], count)[0], "rolled", config.teacher, lora, shape, batch)
    return held + batch * math.prod(shape) * 4  # the last step's


def decoded(config: Config, shape: tuple[int, ...], batch: int) -> Decode:
    """Of latents of a shape; of clips by a few frames, since more cost the same each."""
    if not isinstance(config.teacher, PipelineTeacher):
        return Decode(0, 0, 0)
    kind = AutoencoderKLQwenImage if isinstance(config.teacher, QwenImageTeacher) else AutoencoderKLWan
    about = json.dumps(BareSource(config.teacher).config(kind, "vae"))
    if shape[1] <= FRAMES[1]:
        weights, held, pixels, flops = _decode(kind, about, (batch, *shape))
    else:
        few, more = (_decode(kind, about, (batch, shape[0], frames, *shape[2:])) for frames in FRAMES)
        rest = shape[1] - FRAMES[0]
        weights, held, pixels, flops = (a + rest * (b - a) for a, b in zip(few, more, strict=True))
    return Decode(weights, max(held, COPIES * pixels), flops)


@cache
def _decode(kind: Any, config: str, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Bytes of weights, the most that a decode holds at a time, bytes of its pixels, and FLOPs."""
    vae = skeleton(kind, json.loads(config), torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        vae.to_empty(device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as flops, Peak(vae) as peak:
        with fake:
            latents = torch.zeros(shape)
        pixels = vae.decode(latents + 0)[0]  # type: ignore[operator] of diffusers; a codec scales them first
    return bytes_of(list(vae.parameters())), peak.most, bytes_of([pixels]), flops.get_total_flops()
