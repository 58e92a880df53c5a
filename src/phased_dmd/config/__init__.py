"""The typed description of a run: frozen pydantic models, free of torch."""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from phased_dmd.config.teacher import AnalyticTeacher, Count, Location, PipelineTeacher, Section, Teacher
from phased_dmd.maths.phases import PhasePlan, renoise_range

Method = Literal["dmd", "dmd-sgts", "phased", "phased-sgts"]


class Plan(Section):
    """The few-step grid and its phases (Sec. 2.2, 2.3)."""

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
    solver: Literal["ddim", "renoise"] = "ddim"
    """Step from a predicted sample to the next time: along the predicted noise (ddim), or with new noise (renoise)."""
    fake_rollout: Literal["full", "same"] = "full"
    """Samples that the fake learns from under SGTS: what the finished sampler makes, or exits as the generator's."""
    exits: Literal["independent", "shuffled"] = "independent"
    """Exit steps of SGTS: drawn anew for each update, or from a shuffled deck of all steps."""


class Renoise(Section):
    """The distribution of the time t that samples are noised to again, for the fake and for the generator."""

    interval: Literal["nested", "disjoint"] = "nested"
    """Interval of a phase's re-noise times: from its end to the start t_0 (nested), or to its own begin (disjoint)."""
    fixed: float | None = Field(default=None, gt=0, le=1)
    """One re-noise time for all draws; null draws it from the interval."""
    t_range: tuple[float, float] | None = None
    """Bounds on the re-noise times beside the interval's own; null sets none."""
    above_switch: bool = False
    """Bounds a phase's re-noise times to the range of the teacher's network that runs its last step."""
    clamp: bool = False
    """Moves re-noise times that are out of bounds onto the bound; else none are drawn there."""
    t_min: float = Field(default=0.02, ge=0, lt=1)
    """Least re-noise time of the last phase, which ends at 0."""
    sort: bool = False
    """Sorts a batch by re-noise time, so that each micro-batch calls fewer of a teacher's several networks."""


class Rollouts(Section):
    """How often the generator is run for training; by default anew for every update, from the first noise on."""

    reuse: bool = False
    """Runs the generator once an iteration, for the fake's updates and its own; else anew for each."""
    antithetic: Literal["noise", "start"] | None = None
    """Draws samples in pairs, from a first noise and its negative (start); null draws each by itself."""
    pool: int = Field(default=0, ge=0, le=10**6)
    """Batches whose states at a phase's begin are kept and used again; 0 makes all anew."""
    pool_refresh: float = Field(default=1.0, ge=0, le=1000)
    """Batches of the pool that are made anew in an iteration."""
    pool_on_disk: bool = False
    """Keeps the pool in the run folder, not in memory."""


class Objective(Section):
    """What the generator and the fake descend."""

    divergence: Literal["kl", "fisher", "fisher-stop-gradient"] = "kl"
    """Divergence of the generator from the teacher that the generator descends; the paper's is kl."""
    weighting: Literal["normalised", "paper", "posterior", "public"] = "normalised"
    """Weighting of the KL's gradient; the paper's is Eq. 11."""
    target: Literal["unbiased", "biased", "printed"] = "unbiased"
    """Target of the fake's score matching within a subinterval: Eq. 13, with x_s for x_0, or Eq. 13 as printed."""

    @property
    def descends(self) -> str:
        """Returns what every result says that made it: the weighting of KL's gradient, or the other divergence."""
        return self.weighting if self.divergence == "kl" else self.divergence


class Optimiser(Section):
    """AdamW without a first moment, beta1 = 0."""

    lr: float = Field(gt=0)
    """Learning rate of AdamW."""
    decay: Literal["constant", "linear"] = "constant"
    """Course of the learning rate over a phase: constant, or linear down to 0."""
    beta2: float = Field(default=0.999, gt=0, lt=1)
    """Decay rate of AdamW's second moment."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of AdamW, in units of the learning rate."""
    clip: float = Field(default=1.0, gt=0)
    """Norm that a larger gradient is scaled down to."""
    second_moment: Literal["float32", "bfloat16"] = "float32"
    """Number format of AdamW's second moment; bfloat16 is rounded at random, without bias, and saves half of it."""


class Lora(Section):
    """The size of LoRA adapters, where weights are lora."""

    rank: int = Field(default=64, gt=0, le=2**14)
    """Rank of each LoRA adapter."""
    alpha: float = Field(default=8.0, gt=0)
    """Scale of LoRA adapters, whose output is multiplied by alpha / rank."""


class Generator(Section):
    """The few-step generator, of one expert a phase and network."""

    weights: Literal["lora", "full"] = "lora"
    """What each expert trains: LoRA adapters on the frozen base, or a full copy of it."""
    lora: Lora = Lora()
    optimiser: Optimiser = Optimiser(lr=5e-5)
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of a moving average of an expert's weights, which later phases, export and evaluation use; null: none."""


class Fake(Section):
    """The fake score network, which follows the distribution of the generator's samples."""

    weights: Literal["lora", "full"] = "full"
    """What the fake trains: a full copy of the base, or LoRA adapters on it, which save memory and lose quality."""
    lora: Lora = Lora()
    optimiser: Optimiser = Optimiser(lr=4e-7)
    updates: Count = 5
    """Updates of the fake before each update of the generator."""
    pull: float = Field(default=0.0, ge=0, le=1)
    """Share of each change of the generator's weights that is added to the fake's weights too; needs a full fake."""


class Engine(Section):
    """How a run is spread over processes and memory. A run may go on with another engine: only rounding changes."""

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
    batched_guidance: bool = False
    """Calls the teacher with and without the prompt in one batch of twice the samples, not in two calls."""


class Config(Section):
    """A whole run. `recipes.py` holds functions that return one."""

    recipe: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$", max_length=100)
    """Name of the run, from which its folder gets one by default."""
    teacher: Annotated[Teacher, Field(discriminator="kind")]
    plan: Plan = Plan()
    renoise: Renoise = Renoise()
    rollouts: Rollouts = Rollouts()
    objective: Objective = Objective()
    generator: Generator = Generator()
    fake: Fake = Fake()
    prompts: Location | None = None
    """Training prompts: a shipped set's name, a txt, jsonl, csv or parquet file, or OWNER/NAME, a hub's data set."""
    init_experts: Location | None = None
    """Run folder whose experts this run's start from, step by step; null starts them from the base."""
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
    keep_last: Count = 2
    """Newest checkpoints that are kept; older ones are removed."""
    keep_every: Count | None = None
    """Iterations between two checkpoints that are kept for good; null keeps none."""
    skips: int = Field(default=0, ge=0, le=10**9)
    """Updates of a phase with a loss or gradient that is not finite, to leave out before the run stops."""
    engine: Engine = Engine()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Services that the metrics go to beside metrics.jsonl, each by its name."""
    sample_every: Count | None = 100
    """Iterations between two previews; null makes none."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.phase_plan()
        if self.phase_shares is not None and len(self.phase_shares) != self.plan.phases:
            given = f"{len(self.phase_shares)} of them for {self.plan.phases} phases"
            raise ValueError(f"phase_shares: {given}; null makes all phases alike")
        analytic = isinstance(self.teacher, AnalyticTeacher)
        if analytic and (self.generator.weights == "lora" or self.fake.weights == "lora"):
            raise ValueError("generator.weights, fake.weights: an analytic teacher has only 'full' students")
        if self.renoise.clamp and self.renoise.t_range is None and not self.renoise.above_switch:
            raise ValueError("renoise.clamp: needs a renoise.t_range or renoise.above_switch")
        if analytic and self.prompts is not None:
            raise ValueError("prompts: an analytic teacher takes none")
        quantised = isinstance(self.teacher, PipelineTeacher) and self.teacher.quantise is not None
        if quantised and (self.generator.weights == "full" or self.fake.weights == "full"):
            raise ValueError("teacher.quantise: full weights cannot be copied from it; fake.weights=lora is needed")
        if self.renoise.sort and self.rollouts.pool:
            raise ValueError("renoise.sort: with a rollouts.pool, the same samples would always get the same times")
        if self.rollouts.antithetic and (self.batch_size % 2 or (self.engine.micro_batch or 0) % 2):
            raise ValueError("rollouts.antithetic: needs an even batch_size, and engine.micro_batch if there is one")
        if self.fake.pull and self.fake.weights == "lora":
            raise ValueError("fake.pull: needs fake.weights=full")
        if self.objective.divergence != "kl" and self.engine.sequence_parallel > 1:
            raise ValueError("objective.divergence: only 'kl' goes with engine.sequence_parallel")
        if isinstance(self.teacher, PipelineTeacher) and self.prompts is None:
            raise ValueError("prompts: this teacher needs a prompt set")
        return self

    @property
    def method(self) -> Method | Literal["phased-all"]:
        """The name of {phases} x {gradient}; the paper has none for several steps a phase, all with gradient."""
        if self.plan.phases == 1:
            return "dmd" if self.plan.gradient == "all" else "dmd-sgts"
        if self.plan.phases == self.plan.steps:
            return "phased"
        return "phased-sgts" if self.plan.gradient == "last" else "phased-all"

    def phase_iterations(self, phase: int) -> int:
        """Generator updates of a phase."""
        if self.phase_shares is None:
            return self.iterations
        return max(1, round(self.iterations * self.phase_shares[phase - 1]))

    @property
    def updates(self) -> int:
        """Generator updates in all."""
        return sum(self.phase_iterations(phase) for phase in range(1, self.plan.phases + 1))

    def phase_plan(self, switches: Sequence[float] = ()) -> PhasePlan:
        """The plan over a teacher's switches; a phase that is left without re-noise times is a ValueError."""
        plan = PhasePlan.even(self.plan.steps, self.plan.phases, self.plan.shift, self.plan.start, switches)
        for phase in range(1, plan.num_phases + 1):
            self.interval(plan, phase)
        return plan

    def interval(self, plan: PhasePlan, phase: int) -> tuple[float, float]:
        """(low, high], where a phase's re-noise times are drawn before `t_range`; nothing left is a ValueError."""
        s = plan.end(phase)
        low = s if s > 0 else self.renoise.t_min
        high = plan.times[0] if self.renoise.interval == "nested" else plan.begin(phase)
        renoise_range(low, high, self.t_range(plan, phase), self.renoise.clamp)
        if self.renoise.fixed is not None and not s < self.renoise.fixed <= plan.times[0]:
            raise ValueError(
                f"renoise.fixed: {self.renoise.fixed:g} is outside ({s:g}, {plan.times[0]:g}] of phase {phase}"
            )
        return low, high

    def t_range(self, plan: PhasePlan, phase: int) -> tuple[float, float] | None:
        """The bounds on a phase's re-noise times: `renoise.t_range`, and with above_switch `PhasePlan.floor`."""
        floor = plan.floor(phase) if self.renoise.above_switch else 0.0
        if floor == 0:
            return self.renoise.t_range
        low, high = self.renoise.t_range or (0.0, 1.0)
        return max(low, floor), high

    def support(self, plan: PhasePlan, phase: int) -> tuple[float, float]:
        """The least interval that holds every re-noise time of a phase: `PhasePlan.fakes` needs no more."""
        if self.renoise.fixed is not None:
            return self.renoise.fixed, self.renoise.fixed
        low, high = self.interval(plan, phase)
        least, most = self.t_range(plan, phase) or (low, high)
        return max(low, least), min(high, most)
