"""Bytes on each GPU: weights, gradients and optimisers in shards, activations, and blocks gathered whole."""

import itertools
import math
from dataclasses import dataclass

from torch import nn

from phased_dmd.config import Config, Fake, Generator, renoise_interval
from phased_dmd.config.teacher import PipelineTeacher, Teacher
from phased_dmd.networks.roles import FAKE, TEACHER, expert_role
from phased_dmd.plan.measure import (
    cached,
    itemsizes,
    largest_block,
    largest_call,
    meta_model,
    network_parameters,
    plan_of,
)
from phased_dmd.plan.preview import preview_cost

RESERVE = 0.08  # of a GPU's memory: CUDA's context, NCCL's buffers, fragments; not measured
PREFETCHED = 2  # blocks gathered at a time: the one that computes, and the next
PACKED = {"int8": 1.0, "nf4": 0.5 + (1 + 4 / 256) / 64}  # bytes of a weight; nf4 has a scale for 64, itself packed


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU in a phase, and on the host for each GPU.

    training: the most of gradients and activations at a time. preview: bytes that a preview needs in their place.
    """

    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int
    training: int
    preview: int
    host: int

    @property
    def gpu(self) -> int:
        """Returns the bytes on the GPU in all."""
        states = 0 if self.host else self.weights + self.optimiser
        return self.gathered + states + max(self.training, self.preview)


@cached
def network_bytes(teacher: Teacher) -> int:
    """Returns the bytes of each of a teacher's frozen networks, which are alike, with what is trained in its place."""
    model = meta_model(teacher)
    total = sum(p.nbytes for p in {*model.students[0].parameters(), *model.networks[0].parameters()})
    if isinstance(teacher, PipelineTeacher) and teacher.quantise:
        blocks = model.blocks(model.networks[0])
        weights = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
        packed = round(PACKED[teacher.quantise] * sum(weight.numel() for weight in weights))
        total += packed - sum(weight.nbytes for weight in weights)
    return total


@cached
def block_parameters(teacher: Teacher) -> int:
    """Returns the number of parameters of a network's largest block."""
    model = meta_model(teacher)
    return max((sum(p.numel() for p in block.parameters()) for block in model.blocks(model.students[0])), default=0)


def networks(config: Config, phase: int) -> tuple[int, int]:
    """Returns on how many networks a phase trains an expert, and on how many a fake.

    A fake that is an adapter is one for all phases, on the networks of each; a full one is none where all is anchored.
    """
    plan = plan_of(config)
    if config.fake.weights == "full" and not config.matches(phase):
        return len(plan.experts(phase)), 0
    phases = [phase] if config.fake.weights == "full" else range(1, plan.num_phases + 1)
    fakes = {network for k in phases for network in plan.fakes(k, renoise_interval(config, plan, k).support)}
    return len(plan.experts(phase)), len(fakes)


def parameters_by_role(config: Config) -> dict[str, int]:
    """Returns numbers of parameters: of the frozen teacher, and of each phase's expert and fake."""
    roles = {TEACHER: len(meta_model(config.teacher).students) * network_parameters(config.teacher)}
    for phase in range(1, config.plan.phases + 1):
        experts, fakes = networks(config, phase)
        roles[expert_role(phase)] = experts * largest_call(config, 1, config.generator).trained
        roles[f"{FAKE}_{phase}"] = fakes * largest_call(config, 1, config.fake).trained
    return roles


def states(config: Config, phase: int) -> tuple[int, int, int]:
    """Returns the bytes of all weights, gradients and optimisers of a phase, over all shards.

    Gradients are those of the fake or of the expert, whichever are more: neither are kept while the other trains.
    """
    (experts, fakes), item = networks(config, phase), itemsizes(config.teacher)[1]
    expert, fake = largest_call(config, 1, config.generator), largest_call(config, 1, config.fake)
    built = range(1, (config.plan.phases if config.generator.weights == "lora" else phase) + 1)
    copies = sum(networks(config, other)[0] for other in built) + (experts if config.generator.ema is not None else 0)
    frozen = len(meta_model(config.teacher).networks) * network_bytes(config.teacher)
    weights = frozen + item * (copies * expert.trained + fakes * fake.trained)
    reached = min(fakes, 1) if config.renoise.network == "update" else fakes  # fakes that an update has gradients of
    gradients = item * max(experts * expert.learning, reached * fake.learning)
    moment = 2 if config.optimiser.second_moment == "bfloat16" else item
    return weights, gradients, moment * (experts * expert.trained + fakes * fake.trained)


def checkpoint_bytes(config: Config, phase: int) -> int:
    """Returns the bytes of a checkpoint of a phase: weights, average and second moments of its expert and its fake."""
    (experts, fakes), item = networks(config, phase), itemsizes(config.teacher)[1]
    moment = 2 if config.optimiser.second_moment == "bfloat16" else item
    expert = experts * largest_call(config, 1, config.generator).trained
    averaged = expert if config.generator.ema is not None else 0
    return item * averaged + (item + moment) * (expert + fakes * largest_call(config, 1, config.fake).trained)


def micro_batch(config: Config, gpus: int) -> int:
    """Returns the number of samples in a network call of one GPU."""
    samples = math.ceil(config.batch_size * config.engine.sequence_parallel / gpus)
    return min(config.engine.micro_batch or samples, samples)


def scoring_shares(config: Config, phase: int, gpus: int) -> list[float]:
    """Returns the share of a phase's re-noise times that each network scores, of those that one update calls.

    Where networks are sharded every process calls each, on a sample of no consequence if it has none of its own.
    """
    if config.renoise.network == "update" or gpus == 1:
        return [1.0]
    plan = plan_of(config)
    parts = renoise_interval(config, plan, phase).parts(plan.switches, config.plan.shift)
    return [b - a for a, b in itertools.pairwise(parts)]


def score_calls(config: Config, phase: int, gpus: int) -> float:
    """Returns the mean number of network calls that a sample's score takes: above 1 where some have no consequence."""
    shares, own = scoring_shares(config, phase, gpus), micro_batch(config, gpus)
    everyone = own * gpus // config.engine.sequence_parallel
    return 1 + sum((1 - share) ** own - (1 - share) ** everyone for share in shares) / own


def activations(config: Config, phase: int, gpus: int) -> int:
    """Returns the bytes that wait for backwards: the more of the generator's graph and the fake's.

    The generator's graph is one call, or all calls of a phase. A Fisher divergence adds graphs of the guided teacher
    and of the fake, one after the other, while the generator's waits.
    """

    def graph(role: Generator | Fake, calls: int = 1, more: int = 0) -> int:
        """Returns the bytes of some calls' graph, and of that of as many `more` samples: each is a call of its own."""
        one, alone = (largest_call(config, batch, role) for batch in (micro_batch(config, gpus), 1))
        block = largest_block(config, micro_batch(config, gpus), role)
        copies = autocast_copies(config.teacher, role) if gpus == 1 and not config.engine.offload else 0
        if config.engine.activation_checkpointing:  # copies go with the call that made them
            whole = calls * (one.checkpointed + more * alone.checkpointed) + max(block, copies)
        else:
            whole = calls * (one.saved + more * alone.saved + copies)
        return whole // config.engine.sequence_parallel

    steps = config.plan.steps // config.plan.phases
    more = len(scoring_shares(config, phase, gpus)) - 1  # samples of no consequence
    own = graph(config.generator, steps if config.plan.gradient == "all" else 1)
    if not config.matches(phase):
        return own
    fake = graph(config.fake, more=more)
    if config.objective == "fisher":
        own += max(graph(config.generator, 2, more), fake)
    elif config.objective == "fisher-stop-gradient":
        own += fake
    return max(own, fake)


def autocast_copies(teacher: Teacher, role: Generator | Fake) -> int:
    """Returns the bytes of the copies that autocast makes of all weights that train in float32, on one GPU: it keeps
    them until the call ends, and the graph, if it is not checkpointed, until the backward. FSDP2 gathers blocks in the
    dtype that computes.
    """
    item, trained = itemsizes(teacher)
    return network_parameters(teacher) * item if role.weights == "full" and item < trained else 0


def training(config: Config, phase: int, gpus: int, gradients: int) -> int:
    """Returns the most bytes of activations and gradients at a time.

    While a backward goes from block to block, gradients come and activations go: all of the ones meet no more than a
    block's of the others. Of several micro-batches, gradients of the first are there throughout the second.
    """
    own, waiting = micro_batch(config, gpus), activations(config, phase, gpus)
    if own < math.ceil(config.batch_size * config.engine.sequence_parallel / gpus):
        return waiting + gradients
    block = max(largest_block(config, own, role) for role in (config.generator, config.fake))
    return max(waiting, gradients + block // config.engine.sequence_parallel)


def gathered(config: Config, gpus: int) -> int:
    """Returns the bytes of weights that FSDP2 holds whole at a time, with the gradients of the block before.

    Blocks are gathered in the dtype that computes; what stands around them is gathered when they are not. Gradients of
    a block come in that dtype as its activations go; in the one that is trained they are on their way to the shards
    while the next block computes. On one GPU nothing is sharded.
    """
    if gpus == 1 and not config.engine.offload:
        return 0
    item, trained = itemsizes(config.teacher)
    full, block = "full" in (config.fake.weights, config.generator.weights), block_parameters(config.teacher)
    return block * (PREFETCHED * item + (trained if full else 0))


def phase_memory(config: Config, phase: int, gpus: int) -> Memory:
    """Returns the bytes on each of some GPUs in a phase."""
    shards = gpus // config.engine.replicas
    weights, gradients, optimiser = (math.ceil(size / shards) for size in states(config, phase))
    shown = preview_cost(config, gpus).memory
    if config.sample_every is not None and config.generator.ema is not None:  # the trained weights are set aside
        expert = networks(config, phase)[0] * largest_call(config, 1, config.generator).trained
        shown += math.ceil(expert * itemsizes(config.teacher)[1] / shards)
    host = weights + gradients + optimiser if config.engine.offload else 0
    most = training(config, phase, gpus, 0 if host else gradients)
    around = gathered(config, gpus), activations(config, phase, gpus), most
    return Memory(weights, gradients, optimiser, *around, preview=shown, host=host)
