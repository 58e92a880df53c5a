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
    phases: int = Field(default=2, gt=0, le=1000)
    shift: float = Field(default=5.0, ge=1e-3, le=1e3)
    start: float = Field(default=1.0, gt=0, le=1, description="t_0")
    gradient: Literal["all", "last"] = Field(
        default="last", description="through all of a phase's steps, or the exit (SGTS)"
    )
    solver: Literal["ddim", "renoise"] = "ddim"
    fake_rollout: Literal["full", "same"] = Field(
        default="full", description="of SGTS: what the finished sampler makes, or exits drawn as the generator's are"
    )
    exits: Literal["independent", "shuffled"] = Field(
        default="independent", description="of SGTS: drawn each time, or every step once before any comes again"
    )


class Renoise(Section):
    """The distribution of the re-noise time t."""

    interval: Literal["nested", "disjoint"] = Field(default="nested", description="(s_k, t_0], or up to s_{k-1} only")
    fixed: float | None = Field(default=None, gt=0, le=1, description="one t for all draws, an ablation")
    t_range: tuple[float, float] | None = None
    above_switch: bool = Field(
        default=False, description="bound t also by a teacher's switch between a phase's last step and its end"
    )
    clamp: bool = Field(default=False, description="these bounds pile t up at themselves instead of truncating")
    t_min: float = Field(default=0.02, ge=0, lt=1, description="the least t where s = 0")
    sort: bool = Field(default=False, description="in a batch, so that a micro-batch calls fewer of several networks")


class Rollouts(Section):
    """How often the generator is run for training: by default anew for every update, from the first noise on."""

    reuse: bool = Field(
        default=False, description="one run for all updates until the generator changes, its own included"
    )
    antithetic: Literal["noise", "start"] | None = Field(
        default=None, description="pairs of samples: for the fake, one sample re-noised with eps and -eps; or, for "
        "all, two from a first noise and its negative, which the fake sees re-noised alike",
    )  # fmt: skip
    pool: int = Field(
        default=0, ge=0, le=10**6, description="batches whose states at a phase's begin are kept, instead of made anew"
    )
    pool_refresh: float = Field(default=1.0, ge=0, le=1000, description="of these, made anew in an iteration")
    pool_on_disk: bool = Field(default=False, description="in the run folder, not in memory")


class Objective(Section):
    divergence: Literal["kl", "fisher", "fisher-stop-gradient"] = Field(
        default="kl", description="of the generator from the teacher; the paper's is KL"
    )
    weighting: Literal["normalised", "paper", "posterior", "public"] = Field(
        default="normalised", description="of KL's gradient; posterior: normalised without its mean over elements"
    )
    target: Literal["unbiased", "biased", "printed"] = Field(
        default="unbiased", description="the last two are ablations"
    )

    @property
    def descends(self) -> str:
        """What every result says that made it: the weighting of KL's gradient, or the divergence that has none."""
        return self.weighting if self.divergence == "kl" else self.divergence


class Optimiser(Section):
    lr: float = Field(gt=0)
    decay: Literal["constant", "linear"] = "constant"
    beta2: float = Field(default=0.999, gt=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    second_moment: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of Adam; bfloat16 is rounded at random, unbiased, and saves half of it"
    )


class Lora(Section):
    rank: int = Field(default=64, gt=0, le=2**14)
    alpha: float = Field(default=8.0, gt=0)


class Generator(Section):
    """Each phase's expert. weights: `lora` adapters on the frozen base, or a `full` copy."""

    weights: Literal["lora", "full"] = "lora"
    lora: Lora = Lora()
    optimiser: Optimiser = Optimiser(lr=5e-5)
    ema: float | None = Field(
        default=None, gt=0, lt=1,
        description="of the weights, of LoRA its two factors; what later phases, export and evaluation then use",
    )  # fmt: skip


class Fake(Section):
    """The fake score network. `lora` saves memory at a cost in quality."""

    weights: Literal["lora", "full"] = "full"
    lora: Lora = Lora()
    optimiser: Optimiser = Optimiser(lr=4e-7)
    updates: Count = Field(default=5, description="before each update of the generator")
    pull: float = Field(
        default=0.0, ge=0, le=1, description="the share of each change of the generator's weights that it makes too"
    )


class Engine(Section):
    """How a run is spread over processes and memory. A run may go on with another engine: only rounding changes."""

    micro_batch: Count | None = Field(
        default=None, description="the most samples in a network call; a process with more adds up gradients"
    )
    replicas: Count = Field(
        default=1, description="groups of processes that each hold all of the weights (HSDP); 1 shards over all"
    )
    sequence_parallel: int = Field(
        default=1, gt=0, description="processes that share each sample (Ulysses); Wan only, for clips that are too long"
    )
    activation_checkpointing: bool = Field(
        default=False, description="keep only the inputs of the repeated blocks, and compute the rest again"
    )
    offload: bool = Field(default=False, description="weights, gradients and optimisers in the host's memory")
    compile: bool = Field(default=False, description="the repeated blocks, with torch.compile")
    batched_guidance: bool = Field(
        default=False, description="the teacher with and without the prompt in one call, of twice the samples"
    )


class Config(Section):
    """A whole run. `recipes.py` holds functions that return one."""

    recipe: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._ -]*$", max_length=100, description="a name; the run's folder has it too"
    )
    teacher: Annotated[Teacher, Field(discriminator="kind")]
    plan: Plan = Plan()
    renoise: Renoise = Renoise()
    rollouts: Rollouts = Rollouts()
    objective: Objective = Objective()
    generator: Generator = Generator()
    fake: Fake = Fake()
    prompts: Location | None = Field(
        default=None, description="a shipped set's name, a txt, jsonl, csv or parquet file, or a hub data set's id"
    )
    init_experts: Location | None = Field(
        default=None, description="a run whose experts these start from, step by step"
    )
    iterations: Count = Field(default=400, description="generator updates a phase")
    phase_shares: tuple[Annotated[float, Field(gt=0, le=1000)], ...] | None = Field(
        default=None, description="a factor on `iterations` for each phase: later ones may need more"
    )
    batch_size: Count = 64
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every: Count = 10
    checkpoint_every: Count = 100
    keep_last: Count = Field(default=2, description="checkpoints; older ones are removed")
    keep_every: Count | None = Field(default=None, description="iterations whose checkpoints are kept for good")
    skips: int = Field(
        default=0, ge=0, le=10**9, description="updates with a loss or gradient that is not finite to leave out"
    )
    engine: Engine = Engine()
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    sample_every: Count | None = Field(default=100, description="iterations between previews; null makes none")

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
