"""The stages of a run, one after the other, and what each holds: on a GPU, in the host's memory, on disk."""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import CLIPVisionModel

from phased_dmd.checkpoint.folders import FILE_BYTES
from phased_dmd.conditions import CHUNK
from phased_dmd.config import Config
from phased_dmd.config.teacher import AnyPipeline, PipelineTeacher
from phased_dmd.models.loader import adapter_of
from phased_dmd.models.pipeline import DTYPES
from phased_dmd.models.source import META, BareSource
from phased_dmd.models.trust import read_json
from phased_dmd.networks.roles import expert_role
from phased_dmd.plan.measure import FAKE_CPU, PeakBytes, bucket_shapes, cached, condition_shapes, largest, meta_model
from phased_dmd.plan.memory import checkpoint_bytes, itemsizes, network_bytes, parameters_by_role, phase_memory
from phased_dmd.plan.preview import encode_cost

FILES_AT_ONCE = 4  # of a checkpoint, that the host of a process holds: their tensors, and their bytes
Options = frozenset[tuple[str, Any]]  # of a call
Simulated = Mapping[int, Mapping[str, int]]  # bytes on each GPU of the updates that were simulated, by phase and name


class Stage(NamedTuple):
    """Says what a part of a run holds at most: bytes on each GPU, and of the host's memory for each; bytes on disk.

    phase: None for all. What is loaded, and an expert, are on the host of the first process alone.
    """

    name: str
    phase: int | None
    gpu: int
    host: int
    disk: int


def stages(config: Config, gpus: int, simulated: Simulated | None = None) -> Iterator[Stage]:
    """Yields the stages of a run on some GPUs. simulated: what is taken in the place of planned updates."""
    teacher, shards = config.teacher, gpus // config.engine.replicas
    if isinstance(teacher, PipelineTeacher):
        weights, most = encoding(teacher)
        yield Stage("encoding", None, weights + most, weights, 0)
        away, each = config.engine.offload, network_bytes(teacher)
        count = len(meta_model(teacher).networks)
        on_host = each * count if gpus > 1 or away else network_bytes(teacher.model_copy(update={"quantise": None}))
        yield Stage("loading", None, 0 if away else math.ceil(count * each / shards), on_host, 0)
    for phase in range(1, config.plan.phases + 1):
        memory = phase_memory(config, phase, gpus)
        held = 0 if memory.host else memory.weights + memory.optimiser
        updates = (simulated or {}).get(phase) or {"updates": held + memory.gathered + memory.training}
        for name, size in updates.items():
            yield Stage(name, phase, size, memory.host, 0)
        if memory.preview:
            yield Stage("preview", phase, held + memory.gathered + memory.preview, memory.host, 0)
        saved, expert = checkpoint_bytes(config, phase), parameters_by_role(config)[expert_role(phase)]
        # A process writes its shards file by file; disk is needed for the last checkpoints, the new one, and all kept.
        newest, every = config.kept
        counts = {k: config.phase_iterations(k) // every for k in range(1, phase + 1)} if every else {}
        kept = sum(count * checkpoint_bytes(config, k) for k, count in counts.items())
        copied = min(math.ceil(saved / gpus), FILES_AT_ONCE * FILE_BYTES)
        yield Stage("checkpoint", phase, held, memory.host + copied, kept + (newest + 1) * saved)
        written = expert * itemsizes(teacher)[1]  # gathered, and written, by the first process alone
        yield Stage("expert", phase, held, memory.host + written, written)


@cached
def encoding(teacher: AnyPipeline) -> tuple[int, int]:
    """Returns the bytes of the encoders and the VAE, which are there before the networks, and the most others."""
    source, text, shapes = BareSource(teacher), adapter_of(teacher).encoder, bucket_shapes(teacher)
    prompts, options = (text.prompts or CHUNK, teacher.max_tokens + text.template), frozenset(text.options.items())
    weights, most = _count_encoder(text.kind, _part(source, "text_encoder"), DTYPES[teacher.dtype], prompts, options)
    takes_images = "image" in condition_shapes(teacher, shapes[0])
    vae, encoded = encode_cost(teacher, shapes[largest(shapes)], takes_images)
    if source.has("image_encoder"):
        weights += _count_encoder(CLIPVisionModel, _part(source, "image_encoder"), torch.float32, None)[0]
    return weights + vae, max(most, encoded)


def _part(source: BareSource, name: str) -> str:
    return json.dumps(read_json(source.part_folder(name) / "config.json"))


@functools.cache
def _count_encoder(
    kind: Any, config: str, dtype: torch.dtype, shape: tuple[int, int] | None, options: Options = frozenset()
) -> tuple[int, int]:  # fmt: skip
    """Returns the bytes of an encoder's weights, and the most others while it reads prompts x tokens, if any."""
    with META:
        encoder = kind(kind.config_class(**json.loads(config))).to(dtype).eval().requires_grad_(False)
    weights = sum(p.nbytes for p in encoder.parameters())
    if shape is None:
        return weights, 0
    with FAKE_CPU:
        encoder.to_empty(device="cpu")
        ids = torch.zeros(shape, dtype=torch.long)
    with torch.no_grad(), PeakBytes(encoder) as peak:
        encoder(input_ids=ids, attention_mask=ids + 1, **dict(options))
    return weights, peak.most
