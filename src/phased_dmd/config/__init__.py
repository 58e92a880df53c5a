"""Describes a run in typed fields: frozen pydantic models, free of torch.

The text below a field is its help: `phased-dmd config` and docs/configuration.md print it.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from phased_dmd.config.teacher import AnalyticTeacher, Count, Location, PipelineTeacher, Section, Teacher
from phased_dmd.maths.phases import PhasePlan, RenoiseInterval

FISHER = ("fisher", "fisher-stop-gradient")  # the objectives that are no KL divergence
Method = Literal["dmd", "dmd-sgts", "phased", "phased-sgts"]


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


class Plan(Section):
    """Sets the few-step grid and splits it into phases (Sec. 2.2, 2.3)."""

    steps: int = Field(default=4, gt=0, le=1000)
    """Network calls in which the distilled generator makes a sample."""
    phases: int = Field(default=2, gt=0, le=1000)
    """Phases that the steps are split into, each with experts of its own; must divide the steps."""
    shift: float = Field(default=5.0, ge=1e-3, le=1e3)
    """Time shift k: evenly spaced times u become k u / (1 + (k - 1) u), more of them near noise where k is above 1."""
    start: float = Field(default=1.0, gt=0, le=1)
    """Time t_0 at which sampling starts; 1 is pure noise."""
    gradient: Literal["all", "last"] = "last"
    """Steps of a phase that the generator's gradient flows through: all, or one drawn exit step (SGTS)."""


class Ablation(Section):
    """Replaces parts of the method, as the paper's ablations and this project's own do."""

    solver: Literal["ddim", "renoise"] = "ddim"
    """Step from a predicted sample to the next time: along the predicted noise (ddim), or with new noise (renoise)."""
    fake_rollout: Literal["full", "same"] = "full"
    """Samples that the fake learns from under SGTS: what the finished sampler makes, or exits as the generator's."""
    target: Literal["unbiased", "biased", "rollout", "printed"] = "unbiased"
    """Target of the fake's score matching: Eq. 13, with x_s for x_0, with the rollout's x_0 (TDM), or as printed."""
    renoise: Literal["nested", "disjoint"] | float = "nested"
    """Re-noise times of a phase: from its end to the start t_0 (nested) or to its begin (disjoint), or one number."""

    @field_validator("renoise", mode="before")
    @classmethod
    def _interval_or_time(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (0 < value <= 1 if number else value in ("nested", "disjoint")):
            raise ValueError("must be 'nested', 'disjoint' or a time in (0, 1]")
        return value


class Renoise(Section):
    """Sets the time t that generated samples are noised to again, where teacher and fake score them."""

    above_switch: Literal["clamp", "truncate"] | None = None
    """Bounds a phase's t to the range of the network that runs its last step: t below is moved up, or not drawn."""
    network: Literal["sample", "update"] = "sample"
    """Draws which of a teacher's networks scores samples: for each of them, or one for a whole update, at less work."""


class Rollouts(Section):
    """Sets how often the generator is run for training; by default anew for every update, from the first noise on."""

    reuse: bool = False
    """Runs the generator once an iteration, for the fake's updates and its own; else anew for each."""
    antithetic: Literal["start"] | None = None
    """Draws samples in pairs, the second from the negative of the first one's noise; null draws each by itself."""
    start: Literal["experts", "teacher"] = "experts"
    """Whose samples a phase behind the first begins with: the frozen experts', or the teacher's own at that time."""
    pool: int = Field(default=1024, gt=0, le=10**9, multiple_of=2)
    """The teacher's trajectories that are made once, and kept on disk, for rollouts.start and anchor.updates."""


class Anchor(Section):
    """Regresses experts on the teacher's own trajectories, without a fake, before they match its distribution."""

    updates: Annotated[
        tuple[Annotated[int, Field(ge=0, le=10**9)], ...], Field(min_length=1), BeforeValidator(_one_or_more)
    ] = (0,)
    """Updates of an expert, the first ones of its phase, that are such a regression; one number, or one a phase."""


class Optimiser(Section):
    """Sets what the AdamW of generator and fake share; its betas are 0 and .999, its weight decay is .01."""

    decay: Literal["constant", "linear"] = "constant"
    """Course of the learning rates over a phase: constant, or linear down to 0."""
    clip: float = Field(default=1.0, gt=0)
    """Norm that a larger gradient is scaled down to."""
    second_moment: Literal["float32", "bfloat16"] = "float32"
    """Number format of AdamW's second moment; bfloat16 is rounded at random, without bias, and saves half of it."""


class Lora(Section):
    """Sets the size of LoRA adapters, where weights are lora."""

    rank: int = Field(default=64, gt=0, le=2**14)
    """Rank of each LoRA adapter."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale of LoRA adapters, whose output is multiplied by alpha / rank."""


class Generator(Section):
    """Describes the few-step generator, which has one expert for each phase and network."""

    weights: Literal["lora", "full"] = "lora"
    """What each expert trains: LoRA adapters on the frozen base, or a full copy of it."""
    lora: Lora = Lora()
    lr: float = Field(default=5e-5, gt=0)
    """Learning rate of the generator's experts."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of an expert's weights, which later phases, export and evaluation use; null: none."""


class Fake(Section):
    """Describes the fake score network, which follows the distribution of the generator's samples."""

    weights: Literal["lora", "full"] = "full"
    """What the fake trains: a full copy of the base, or LoRA adapters on it, which save memory and lose quality."""
    lora: Lora = Lora()
    lr: float = Field(default=4e-7, gt=0)
    """Learning rate of the fake."""
    updates: Count = 5
    """Updates of the fake before each update of the generator."""
    pull: float = Field(default=0.0, ge=0, le=1)
    """Share of each change of the generator's weights that is added to the fake's weights too; needs a full fake."""


class Engine(Section):
    """Sets how a run is spread over processes and memory. A run may go on with another: only rounding changes."""

    micro_batch: Count | None = None
    """Most samples in one network call; a process with more adds up gradients. Null sets no limit."""
    replicas: Count = 1
    """Groups of processes that each hold all of the weights (HSDP); 1 shards them over all processes."""
    sequence_parallel: int = Field(default=1, gt=0)
    """Processes that share each sample (Ulysses), for clips too long for one GPU; Wan only."""
    activation_checkpointing: bool = False
    """Keeps only the inputs of the networks' blocks for the backward pass, and computes the rest again."""
    offload: bool = False
    """Keeps weights, gradients and optimisers in the host's memory, which saves the GPU's and is slow."""
    compile: bool = False
    """Compiles the networks' blocks with torch.compile."""


class Config(Section):
    """Describes a whole run. `recipes.py` holds functions that return one."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$", max_length=100)
    """Name of the run, from which its folder gets one by default."""
    teacher: Annotated[Teacher, Field(discriminator="kind")]
    plan: Plan = Plan()
    renoise: Renoise = Renoise()
    rollouts: Rollouts = Rollouts()
    anchor: Anchor = Anchor()
    generator: Generator = Generator()
    fake: Fake = Fake()
    optimiser: Optimiser = Optimiser()
    ablation: Ablation = Ablation()
    prompts: Location | None = None
    """Training prompts: a shipped set's name, a txt, jsonl, csv or parquet file, or OWNER/NAME, a hub's data set."""
    init_experts: Annotated[tuple[Location, ...], Field(min_length=1), BeforeValidator(_one_or_more)] | None = None
    """What experts start from: a run or an export, or LoRA files, one a network, noisiest first; null: the base."""
    objective: Literal["normalised", "projected", "paper", "posterior", "public", "fisher", "fisher-stop-gradient"] = (
        "normalised"
    )
    """What the generator descends: KL by a weighting of its gradient (Eq. 11 is paper, PDMD projected), or Fisher's."""
    iterations: Count = 400
    """Generator updates in a phase."""
    phase_shares: tuple[Annotated[float, Field(gt=0, le=1000)], ...] | None = None
    """Factors on the iterations, one for each phase: later ones may need more. Null makes all phases alike."""
    batch_size: Count = 64
    """Samples in each update, over all processes."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every random draw."""
    log_every: Count = 10
    """Iterations between two lines of metrics.jsonl."""
    checkpoint_every: Count = 100
    """Iterations between two checkpoints."""
    checkpoint_minutes: float | None = Field(default=30, gt=0, allow_inf_nan=False)
    """Most minutes of work that a kill may cost, or one update if that is longer; null counts iterations alone."""
    keep_last: Count | Literal["all"] = 2
    """Newest checkpoints that an unfinished run keeps (one when it is done), or all of checkpoint_every for good."""
    skips: int = Field(default=0, ge=0, le=10**9)
    """Updates of a phase with a loss or gradient that is not finite, to leave out before the run stops."""
    engine: Engine = Engine()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Services that the metrics go to beside metrics.jsonl, each by its name."""
    sample_every: Count | None = 100
    """Iterations between two previews; null makes none."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        phase_plan(self)
        analytic, pipeline = (isinstance(self.teacher, kind) for kind in (AnalyticTeacher, PipelineTeacher))
        weights = (self.generator.weights, self.fake.weights)
        if self.phase_shares is not None and len(self.phase_shares) != self.plan.phases:
            given = f"{len(self.phase_shares)} of them for {self.plan.phases} phases"
            raise ValueError(f"phase_shares: {given}; null makes all phases alike")
        if len(self.anchor.updates) not in (1, self.plan.phases):
            raise ValueError(f"anchor.updates: {len(self.anchor.updates)} of them for {self.plan.phases} phases")
        if analytic and "lora" in weights:
            raise ValueError("generator.weights, fake.weights: an analytic teacher has only 'full' students")
        points = self.teacher.means if isinstance(self.teacher, AnalyticTeacher) else "none"
        if not isinstance(points, str) and len(points[0]) == 1 and self.objective == "projected":
            raise ValueError("objective: projected leaves nothing of a gradient in one dimension")
        if analytic and self.prompts is not None:
            raise ValueError("prompts: an analytic teacher takes none")
        if getattr(self.teacher, "quantise", None) is not None:
            if "full" in weights:
                raise ValueError("teacher.quantise: full weights cannot be copied from it; fake.weights=lora is needed")
            if self.engine.offload or self.engine.replicas > 1 or self.engine.sequence_parallel > 1:
                raise ValueError("teacher.quantise: a packed network stays whole on one GPU, without engine.offload")
        if self.rollouts.antithetic and (self.batch_size % 2 or (self.engine.micro_batch or 0) % 2):
            raise ValueError("rollouts.antithetic: needs an even batch_size, and engine.micro_batch if there is one")
        if self.ablation.target == "rollout" and self.ablation.solver == "renoise":
            raise ValueError("ablation.target: rollout goes with ablation.solver=ddim, whose steps it reads x_0 off")
        if self.fake.pull and self.fake.weights == "lora":
            raise ValueError("fake.pull: needs fake.weights=full")
        if self.objective in FISHER and self.engine.sequence_parallel > 1:
            raise ValueError("objective: a Fisher divergence does not go with engine.sequence_parallel")
        if pipeline and self.prompts is None:
            raise ValueError("prompts: this teacher needs a prompt set")
        return self

    @property
    def method(self) -> Method | Literal["phased-all"]:
        """Returns what to call {phases} x {gradient}; the paper has no name for several steps a phase with gradient."""
        if self.plan.phases == 1:
            return "dmd" if self.plan.gradient == "all" else "dmd-sgts"
        if self.plan.phases == self.plan.steps:
            return "phased"
        return "phased-sgts" if self.plan.gradient == "last" else "phased-all"

    @property
    def kept(self) -> tuple[int, int | None]:
        """Returns how many of the newest checkpoints are kept, and of every how many iterations, if any, for good."""
        return (1, self.checkpoint_every) if self.keep_last == "all" else (self.keep_last, None)

    def phase_iterations(self, phase: int) -> int:
        """Returns the generator updates of a phase."""
        share = 1.0 if self.phase_shares is None else self.phase_shares[phase - 1]
        return max(1, round(self.iterations * share))

    def anchored(self, phase: int) -> int:
        """Returns how many of a phase's generator updates, its first ones, regress the teacher's trajectories."""
        updates = self.anchor.updates
        return min(updates[phase - 1 if len(updates) > 1 else 0], self.phase_iterations(phase))

    def matches(self, phase: int) -> bool:
        """Says whether any of a phase's generator updates matches distributions, which needs a fake."""
        return self.anchored(phase) < self.phase_iterations(phase)

    @property
    def updates(self) -> int:
        """Counts the generator updates of all phases."""
        return sum(self.phase_iterations(phase) for phase in range(1, self.plan.phases + 1))


def phase_plan(config: Config, switches: Sequence[float] = ()) -> PhasePlan:
    """Returns the plan over a teacher's switches; a phase that is left without re-noise times is a ValueError."""
    given = config.plan
    plan = PhasePlan.even(given.steps, given.phases, given.shift, given.start, switches)
    for phase in range(1, plan.num_phases + 1):
        renoise_interval(config, plan, phase)
    return plan


def renoise_interval(config: Config, plan: PhasePlan, phase: int) -> RenoiseInterval:
    """Returns where a phase's re-noise times lie; nothing left is a ValueError."""
    return RenoiseInterval.of(plan, phase, config.ablation.renoise, config.renoise.above_switch)
