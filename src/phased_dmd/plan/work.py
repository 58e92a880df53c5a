"""Network calls and FLOPs of a run, from the plan: rollouts, fake updates, the guided teacher, backwards."""

from dataclasses import dataclass
from statistics import fmean

from phased_dmd.config import Config
from phased_dmd.config.teacher import PipelineTeacher, QwenImageTeacher
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.plan.measure import measure, once

TEXT_TOKENS = 192  # of a prompt, where it is not padded to the most tokens: about 140 words


@dataclass(frozen=True)
class Work:
    """One iteration, on average over exits, a sample: calls of a network, and their cost in forwards with backwards."""

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


def trained_call(weights: str, checkpointing: bool) -> int:
    """A forward with its backward, in forwards.

    The backward costs one for the gradients of activations, and one more for those of weights, unless they are an
    adapter's; checkpointing repeats the forward.
    """
    return 1 + (2 if weights == "full" else 1) + checkpointing


def phase_work(config: Config, plan: PhasePlan, phase: int, guided: bool) -> Work:
    """What one iteration of a phase asks of the networks, a sample.

    guided: whether the teacher is called twice.
    """
    rollouts, updates, checkpointing = config.rollouts, config.fake.updates, config.engine.activation_checkpointing
    frozen, steps = plan.steps(phase).start, len(plan.steps(phase))  # of the phases before, and its own
    exits = steps if config.plan.gradient == "all" else fmean(range(1, steps + 1))
    recorded = exits if config.plan.gradient == "all" else 1
    fakes = steps if config.ablation.fake_rollout == "full" else exits
    runs, anew = float(updates), 1  # of the generator for the fake, and once more for its own update
    before = float(frozen)  # a run's calls of the experts before the phase
    if rollouts.reuse:
        runs, anew = 1.0, 0
    for_fake = runs * (before + fakes)
    for_generator = anew * (before + exits - recorded)
    if not anew and fakes > exits:  # its path is the fake's at the last exit alone
        for_generator = exits - recorded - (steps - 1) / steps
    teacher = 2 if guided else 1
    differentiated = {"fisher": teacher + 1, "fisher-stop-gradient": 1}.get(config.objective, 0)
    scores = teacher + 1 + differentiated * (1 + checkpointing)
    return Work(
        generator_calls=for_generator + recorded + teacher + 1,
        generator_forwards=for_generator + recorded * trained_call(config.generator.weights, checkpointing) + scores,
        fake_calls=for_fake + updates,
        fake_forwards=for_fake + updates * trained_call(config.fake.weights, checkpointing),
    )


def forward_flops(config: Config, model: VelocityModel) -> list[int]:
    """FLOPs of one sample's forward in each resolution bucket."""
    if isinstance(config.teacher, QwenImageTeacher):
        text = {"max_tokens": min(TEXT_TOKENS, config.teacher.max_tokens)}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=text)})
    network = model.students[0]
    return [
        once(
            lambda shape=shape: measure(config, model, network, shape, 1, None).flops,
            "flops", config.teacher, tuple(sorted(shape)),  # a picture on its side costs the same
        )
        for shape in model.sample_shapes
    ]  # fmt: skip


def mean_flops(config: Config, flops: list[int]) -> float:
    """Over the buckets, as often as each is drawn."""
    weights = [size.weight for size in config.teacher.sizes] if isinstance(config.teacher, PipelineTeacher) else [1.0]
    return sum(weight * cost for weight, cost in zip(weights, flops, strict=True)) / sum(weights)


def hours(flops: float, gpus: int, tflops: float, utilisation: float) -> float:
    return flops / (gpus * tflops * 1e12 * utilisation) / 3600
