"""Network calls and FLOPs of a run, from the plan: rollouts, fake updates, the guided teacher, backwards."""

from dataclasses import dataclass
from statistics import fmean

from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher, Teacher
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.loader import adapter_of
from phased_dmd.plan.measure import Call, bucket_shapes, call, itemsizes, meta_model, network_parameters, plan_of
from phased_dmd.pool import begins_with_teacher, pool_calls

TEXT_TOKENS = 192  # of a prompt, where it is not padded to the most tokens: about 140 words
ATTENTION = 2.5  # forwards of attention in its backward: two products become five, as its matrix is made again


@dataclass(frozen=True)
class Work:
    """The work of one iteration for one sample, averaged over exit steps.

    calls: of a network. forwards: the cost of these calls and their backwards, in forwards of a network.
    """

    generator_calls: float
    generator_forwards: float
    fake_calls: float
    fake_forwards: float

    @property
    def calls(self) -> float:
        return self.generator_calls + self.fake_calls

    @property
    def forwards(self) -> float:
        return self.generator_forwards + self.fake_forwards


def phase_work(
    config: Config, plan: PhasePlan, phase: int, guided: bool, score_calls: float = 1.0, attention: float = 0.0,
    anchored: bool = False,
) -> Work:  # fmt: skip
    """Returns the work of an iteration of a phase. guided: whether the teacher is called twice.

    score_calls: network calls that a sample's score takes, see `memory.score_calls`. attention: its share of a
    forward's FLOPs; without it a backward counts as the layers' alone. anchored: of an iteration that regresses the
    pool's states, without a score or a fake.
    """
    updates, checkpointing = config.fake.updates, config.engine.activation_checkpointing
    from_pool = anchored or begins_with_teacher(config, phase)
    before = 0.0 if from_pool else float(plan.steps(phase).start)  # steps of earlier phases
    steps = len(plan.steps(phase))
    exits = steps if config.plan.gradient == "all" else fmean(range(1, steps + 1))
    recorded = exits if config.plan.gradient == "all" else 1
    fakes = steps if config.ablation.fake_rollout == "full" else exits
    if not config.rollouts.reuse:
        for_fake, for_generator = updates * (before + fakes), before + exits - recorded
    elif fakes > exits:  # the generator's path is the fake's only where it exits at the last step
        for_fake, for_generator = before + fakes, exits - recorded - (steps - 1) / steps
    else:
        for_fake, for_generator = before + fakes, 0.0
    teacher = 2 if guided else 1
    differentiated = {"fisher": teacher + 1, "fisher-stop-gradient": 1}.get(config.objective, 0)
    # A forward and a backward, in forwards. The backward costs one for the gradients of activations, more in attention,
    # and one for those of the layers' weights, unless they are an adapter's. Checkpointing repeats the forward.
    backward = 1 + (ATTENTION - 1) * attention
    update = {"lora": 1 + checkpointing + backward, "full": 2 + checkpointing + backward - attention}
    scores = teacher + 1 + differentiated * (checkpointing + backward)
    if anchored:
        return Work(exits, exits - recorded + recorded * update[config.generator.weights], 0.0, 0.0)
    return Work(
        generator_calls=for_generator + recorded + (teacher + 1) * score_calls,
        generator_forwards=for_generator + recorded * update[config.generator.weights] + scores * score_calls,
        fake_calls=for_fake + updates * score_calls,
        fake_forwards=for_fake + updates * update[config.fake.weights] * score_calls,
    )


def phase_forwards(config: Config, plan: PhasePlan, phase: int, guided: bool, *more: float) -> float:
    """Returns the forwards of all iterations of a phase for a sample, anchored ones among them; see `phase_work`."""
    anchored, iterations = config.anchored(phase), config.phase_iterations(phase)
    counts = {True: anchored, False: iterations - anchored}
    works = {each: phase_work(config, plan, phase, guided, *more, anchored=each) for each in counts}
    return sum(count * works[each].forwards for each, count in counts.items())


def trained_forwards(config: Config) -> float:
    """Returns the forwards of all iterations of a run for one sample of the batch."""
    plan, guided = plan_of(config), max(meta_model(config.teacher).guidance) > 1
    return sum(phase_forwards(config, plan, phase, guided) for phase in range(1, plan.num_phases + 1))


def pool_forwards(config: Config) -> float:
    """Returns the forwards that make a run's pool, shared out over the samples of a batch as `trained_forwards` is."""
    return pool_calls(config, plan_of(config), meta_model(config.teacher).guidance) / config.batch_size


def gathered_bytes(config: Config, work: Work, gpus: int, score_calls: float) -> int:
    """Returns the bytes of weights that reach each GPU, and of gradients that leave it, in an iteration.

    FSDP2 gathers all of a network for each call of a micro-batch, and again for its backward; all gradients of a full
    fake or expert are reduced after each backward, in float32.
    """
    shards = gpus // config.engine.replicas
    item, trained = itemsizes(config.teacher)
    network = network_parameters(config.teacher)
    own = config.batch_size * config.engine.sequence_parallel / gpus
    calls = max(1.0, own / (config.engine.micro_batch or own))  # micro-batches
    updates = config.fake.updates * score_calls
    backwards = {"full": 0.0, "lora": 0.0}
    backwards[config.fake.weights] += updates
    backwards[config.generator.weights] += 1
    moved = (work.calls + sum(backwards.values())) * item + backwards["full"] * trained
    return round(calls * moved * network * (1 - 1 / shards))


def forward_flops(teacher: Teacher) -> list[int]:
    """Returns the FLOPs of one sample's forward in each resolution bucket."""
    return [each.flops for each in _forwards(teacher)]


def _forwards(teacher: Teacher) -> list[Call]:
    shapes = bucket_shapes(teacher)
    if isinstance(teacher, PipelineTeacher) and not adapter_of(teacher).padded:
        teacher = teacher.model_copy(update={"max_tokens": min(TEXT_TOKENS, teacher.max_tokens)})
    return [call(teacher, shape, 1, None) for shape in shapes]


def mean_flops(teacher: Teacher) -> tuple[float, float]:
    """Returns the FLOPs of one sample's forward, averaged over the buckets, as often as each is drawn; and attention's
    share of them.
    """
    weights = [size.weight for size in teacher.sizes] if isinstance(teacher, PipelineTeacher) else [1.0]
    forwards = _forwards(teacher)
    flops, attention = (
        sum(weight * cost for weight, cost in zip(weights, costs, strict=True)) / sum(weights)
        for costs in ([each.flops for each in forwards], [each.attention for each in forwards])
    )
    return flops, attention / flops if flops else 0.0
