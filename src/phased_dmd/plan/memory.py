"""Bytes on each GPU: weights, gradients and optimisers in shards, activations, and blocks gathered whole."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from phased_dmd.config import Config, Lora, renoise_interval
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.networks.roles import FAKE, TEACHER, expert_role
from phased_dmd.plan.bare import bytes_of, largest
from phased_dmd.plan.measure import Forward, adapter_parameters, measure, most_common_dtype, once

RESERVE = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, fragments; not measured
PREFETCHED = 2  # blocks gathered at a time: the one that computes, and the next
PACKED = {"int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}  # bytes of a weight; nf4 has a scale for 64, itself packed
Measure = Callable[[int, Lora | None], Forward]  # samples a call, and what is trained, at the largest bucket


class Trained(NamedTuple):
    """Numbers of parameters that a role adds, and those among them that a gradient reaches."""

    parameters: int
    learning: int


@dataclass(frozen=True)
class Network:
    """One base network: parameters, of its largest block and outside of blocks too, bytes, and what can train on it."""

    parameters: int
    bytes: int
    block: int
    rest: int
    itemsize: int  # of what computes
    full: Trained
    generator_adapter: Trained
    fake_adapter: Trained

    @property
    def trained_itemsize(self) -> int:
        """Bytes of a number that is trained: at least float32."""
        return max(4, self.itemsize)


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU in a phase, and on the host for each of them.

    preview: what is there in a preview in the place of gradients and activations.
    """

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    preview: int
    host: int

    @property
    def gpu(self) -> int:
        states, gradients = (0, 0) if self.host else (self.weights + self.optimiser, self.gradients)
        return self.gathered + states + max(self.activations + gradients, self.preview)


def describe(config: Config, model: VelocityModel, index: int, forward: Measure) -> Network:
    """A base network, with the adapters that the config would give it; a teacher's networks are alike."""
    network, teacher = model.students[index], model.networks[index]
    parameters = sum(p.numel() for p in network.parameters())
    frozen = bytes_of(list(network.parameters()))
    if isinstance(config.teacher, PipelineTeacher) and config.teacher.quantise:
        layers = [m for block in model.blocks(network) for m in block.modules() if isinstance(m, nn.Linear)]
        weights = [layer.weight for layer in layers]
        frozen -= bytes_of(weights) - round(PACKED[config.teacher.quantise] * sum(w.numel() for w in weights))
    if teacher is not network:
        frozen += bytes_of(list(teacher.parameters()))
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks(network)]

    def adapter(lora: Lora) -> Trained:
        count = once(lambda: adapter_parameters(model, network, lora), "adapter", config.teacher, index, lora)
        return Trained(count, forward(1, lora).learning)

    return Network(
        parameters, frozen, max(sizes, default=0), parameters - sum(sizes), most_common_dtype(network).itemsize,
        full=Trained(parameters, forward(1, None).learning),
        generator_adapter=adapter(config.generator.lora) if model.lora_targets else Trained(0, 0),
        fake_adapter=adapter(config.fake.lora) if model.lora_targets else Trained(0, 0),
    )  # fmt: skip


def expert_of(config: Config, plan: PhasePlan, networks: list[Network], phase: int) -> Trained:
    """What a phase's expert trains."""
    own = [networks[expert.network] for expert in plan.experts(phase)]
    return _sum([n.full if config.generator.weights == "full" else n.generator_adapter for n in own])


def fake_of(config: Config, plan: PhasePlan, networks: list[Network], phase: int) -> Trained:
    """What a phase's fake trains."""
    own = [networks[index] for index in plan.fakes(phase, renoise_interval(config, plan, phase).support)]
    return _sum([n.full if config.fake.weights == "full" else n.fake_adapter for n in own])


def _sum(parts: list[Trained]) -> Trained:
    return Trained(sum(part.parameters for part in parts), sum(part.learning for part in parts))


def parameters_by_role(config: Config, plan: PhasePlan, networks: list[Network]) -> dict[str, int]:
    """Numbers of parameters: the frozen teacher, each phase's expert, and each phase's fake."""
    roles = {TEACHER: sum(network.parameters for network in networks)}
    for phase in range(1, plan.num_phases + 1):
        roles[expert_role(phase)] = expert_of(config, plan, networks, phase).parameters
        roles[f"{FAKE}_{phase}"] = fake_of(config, plan, networks, phase).parameters
    return roles


def states(config: Config, plan: PhasePlan, networks: list[Network], phase: int) -> tuple[int, int, int]:
    """Bytes of all weights, gradients and optimisers of a phase, over all shards.

    Gradients are those of the fake or of the expert, whichever are more: neither are kept while the other trains.
    """
    item = networks[0].trained_itemsize
    expert, fake = expert_of(config, plan, networks, phase), fake_of(config, plan, networks, phase)
    built = range(1, (plan.num_phases if config.generator.weights == "lora" else phase) + 1)
    experts = sum(expert_of(config, plan, networks, other).parameters for other in built)
    average = expert.parameters if config.generator.ema is not None else 0
    weights = sum(network.bytes for network in networks) + item * (experts + fake.parameters + average)
    second_moment = 2 if config.optimiser.second_moment == "bfloat16" else item
    optimiser = second_moment * (expert.parameters + fake.parameters)
    return weights, item * max(expert.learning, fake.learning), optimiser


def shards(config: Config, gpus: int) -> int:
    """GPUs that one copy of everything is spread over."""
    return gpus // config.engine.replicas


def micro_batch(config: Config, gpus: int) -> int:
    """Samples in a network call of one GPU."""
    samples = math.ceil(config.batch_size * config.engine.sequence_parallel / gpus)
    return min(config.engine.micro_batch or samples, samples)


def kept(config: Config, forward: Forward, calls: int = 1) -> int:
    """Bytes of activations at the height of the backward of that many calls in one graph, of a GPU's share of it."""
    if config.engine.activation_checkpointing:
        whole = calls * forward.checkpointed + forward.block
    else:
        whole = calls * forward.saved
    return whole // config.engine.sequence_parallel


def activations(config: Config, plan: PhasePlan, phase: int, batch: int, forward: Measure) -> int:
    """The more of the generator's graph, of one call or all of the phase's, and the fake's.

    A Fisher divergence's guided teacher and fake have graphs of their own, one after the other, while the generator's
    waits.
    """
    generator = config.generator.lora if config.generator.weights == "lora" else None
    fake = config.fake.lora if config.fake.weights == "lora" else None
    own = kept(config, forward(batch, generator), len(plan.steps(phase)) if config.plan.gradient == "all" else 1)
    scored, guided = kept(config, forward(batch, fake)), kept(config, forward(batch, generator), 2)
    beside = {"fisher": max(guided, scored), "fisher-stop-gradient": scored}.get(config.objective, 0)
    return max(own + beside, scored)


def gathered(config: Config, networks: list[Network], gpus: int) -> int:
    """Bytes of weights that FSDP2 holds whole at a time, with the gradients of the block that is computed.

    Blocks are gathered in the dtype that computes; what stands around them as it is kept, and autocast copies it.
    On one GPU nothing is sharded, and autocast copies all that is trained in float32 and computes in less.
    """
    network = max(networks, key=lambda network: network.parameters)
    full = "full" in (config.fake.weights, config.generator.weights)
    stored, item = network.trained_itemsize if full else network.itemsize, network.itemsize
    copied = item if item < stored else 0
    if gpus == 1 and not config.engine.offload:
        return network.parameters * copied
    gradients = network.block * (copied + stored) if full else 0
    return PREFETCHED * network.block * item + network.rest * (stored + copied) + gradients


def phase_memory(
    config: Config, plan: PhasePlan, networks: list[Network], phase: int, gpus: int, forward: Measure,
    preview: int,
) -> Memory:  # fmt: skip
    """Bytes on each GPU in a phase. preview: bytes, without an EMA's."""
    own = [math.ceil(size / shards(config, gpus)) for size in states(config, plan, networks, phase)]
    if config.sample_every is not None and config.generator.ema is not None:  # the trained weights are set aside
        aside = expert_of(config, plan, networks, phase).parameters * networks[0].trained_itemsize
        preview += math.ceil(aside / shards(config, gpus))
    return Memory(
        *own,
        gathered=gathered(config, networks, gpus),
        activations=activations(config, plan, phase, micro_batch(config, gpus), forward),
        preview=preview,
        host=sum(own) if config.engine.offload else 0,
    )


def measured(config: Config, model: VelocityModel) -> Measure:
    """Forwards at the largest bucket, each measured once."""
    shape, network = largest(model.sample_shapes), model.students[0]

    def forward(batch: int, lora: Lora | None) -> Forward:
        return once(
            lambda: measure(config, model, network, shape, batch, lora), "forward", config.teacher, shape, batch, lora
        )

    return forward
