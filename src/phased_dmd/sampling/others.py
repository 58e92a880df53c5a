"""Public few-step LoRA files are sampled on their recipe's base and a grid of their own, as a run is."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from phased_dmd.config import Config
from phased_dmd.config.overrides import changed
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import step_times
from phased_dmd.models.loader import adapter_of, bare_model
from phased_dmd.networks.build import load_expert, load_teacher, lora_of
from phased_dmd.networks.change import Change, start_from
from phased_dmd.networks.roles import expert_role
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.loading import untrained
from phased_dmd.sampling.lora_files import read_changes
from phased_dmd.sampling.sampler import Sampler


def load_loras(
    config: Config, files: Sequence[Path], sigmas: Sequence[float] = (), base: str | None = None, bucket: int = 0,
    prompts: Sequence[Prompt] = (),
) -> Sampler:  # fmt: skip
    """Returns a sampler of a recipe's teacher with others' LoRA files, one a network, noisiest first.

    sigmas: the times of its steps, falling from 1 at most; those of the recipe's grid by default. base: the teacher's
    folder or hub id, in place of the recipe's. prompts: see `untrained`. Biases, norms and tables that a file changes,
    too, make its experts full copies of the base, which need more memory. Raises UserError for what the user can mend.
    """
    if not isinstance(config.teacher, PipelineTeacher):
        raise UserError(f"--lora: {config.recipe} has no networks of a pipeline")
    plan, teacher = config.plan, {"path": base or config.teacher.path}
    original = adapter_of(config.teacher).original
    times = tuple(sigmas) or step_times(plan.steps, plan.shift, plan.start)[:-1]
    check_times(times)
    one_phase = {"steps": len(times), "phases": 1, "gradient": "all"}
    config = changed(config, {"plan": one_phase, "teacher": teacher, "phase_shares": None, "init_experts": None})
    changes = read_changes(files, bare_model(config.teacher, config.seed).students, original)
    config = changed(config, of_changes(changes))
    sampler = untrained(config, load_teacher(config, fit=False), bucket, prompts, (*times, 0.0))
    system, role = sampler.system, expert_role(1)
    start = start_from(system.roles.state(role), dict(enumerate(changes)), lora_of(config.generator))
    load_expert(system, 1, start, "--lora")
    return sampler


def check_times(times: Sequence[float]) -> None:
    """Raises a UserError where the times of steps do not fall from 1 at most to above 0."""
    if not all(1 >= a > b for a, b in itertools.pairwise((*times, 0.0))):
        raise UserError(f"--sigmas: {', '.join(f'{t:g}' for t in times)} do not fall from 1 at most to above 0")


def parse_sigmas(text: str) -> tuple[float, ...]:
    """Returns the times that `1,.9375,.8333,.625` stands for; a 0 at the end, where a sampler stops, is left out."""
    try:
        times = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--sigmas: {text!r} is not of the form 1,.9375,.8333,.625") from error
    return tuple(times[:-1] if times[-1:] == [0.0] else times)


def of_changes(changes: Sequence[Change]) -> dict[str, object]:
    """Returns the fields of a config whose experts can hold these changes as they are."""
    if any(change.differences for change in changes):
        return {"generator.weights": "full"}
    rank = max(len(a) for change in changes for a, _ in change.layers.values())
    layers = sorted({layer for change in changes for layer in change.layers})
    return {
        "generator.weights": "lora", "generator.lora": {"rank": rank, "alpha": float(rank)},
        "teacher.lora_targets": layers,
    }  # fmt: skip
