"""What a run's experts start from, where that is not the base: another run, an export, or public LoRA files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, phase_plan
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import NEAR, PhasePlan
from phased_dmd.models.loader import adapter_of
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.networks.build import lora_of
from phased_dmd.networks.change import Change, check_change, describe_loss, expert_change, parameter_shapes, start_from
from phased_dmd.sampling.loading import EXPORT, read
from phased_dmd.sampling.lora_files import find_file, read_changes

Changes = Callable[[int], dict[int, Change]]  # of the networks that a phase trains, by their numbers


def initial_expert(config: Config, model: VelocityModel, phase: int, fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors that a phase's expert starts from; fresh: those that it has as it was added.

    It computes what `init_experts` does there: a run's or an export's expert that serves the step nearest to the
    phase's first one on that network, or what LoRA files make of the network; see `start_from` for other ranks.
    """
    with _naming_the_field():
        return start_from(fresh, read_initial(config, model)[0](phase), lora_of(config.generator))


def check_initial(config: Config, model: VelocityModel) -> None:
    """Reads what all experts start from. Raises UserError where it does not fit, and warns of what is lost of it."""
    lora, said = lora_of(config.generator), []
    with _naming_the_field():
        changes, times = read_initial(config, model)
        for phase in range(1, config.plan.phases + 1):
            for network, change in changes(phase).items():
                if change.whole and lora:
                    raise UserError("its experts are full weights, from which no adapter can start")
                if lost := describe_loss(change, lora, model.lora_targets):
                    said.append(f"lost of the change of network {network}, by its norm: {lost}")
    plan = phase_plan(config, model.switches)
    begins = [plan.begin(phase) for phase in range(1, plan.num_phases + 1)]
    if times and any(min(abs(t - begin) for t in times) > NEAR for begin in begins):
        at, of = (", ".join(f"{t:.4g}" for t in each) for each in (begins, times))
        said.append(f"phases begin at {at}, and its steps at {of}; each starts from the expert of the nearest")
    for line in dict.fromkeys(said):  # LoRA files say the same of every phase
        warn(f"init_experts: {line}")


def read_initial(config: Config, model: VelocityModel) -> tuple[Changes, Sequence[float]]:
    """Returns what `init_experts` holds, by phase, and the times of its steps, which LoRA files do not tell.

    Raises UserError where it is not there, or not for this model.
    """
    places, plan = [Path(place) for place in config.init_experts or ()], phase_plan(config, model.switches)
    if any(map(is_ours, places)):
        if len(places) > 1:
            raise UserError(f"{len(places)} places; a run, or an export, holds the experts of all networks by itself")
        return _of_ours(config, model, places[0], plan)
    original = adapter_of(config.teacher).original if isinstance(config.teacher, PipelineTeacher) else ()
    found = read_changes(places, model.students, original)
    return lambda phase: {expert.network: found[expert.network] for expert in plan.experts(phase)}, ()


def _of_ours(
    config: Config, model: VelocityModel, place: Path, plan: PhasePlan
) -> tuple[Changes, Sequence[float]]:  # fmt: skip
    """Returns the changes of a run or an export, and the times of its steps."""
    other, experts, _ = read(place, getattr(config.teacher, "path", None) if (place / EXPORT).exists() else None)
    there, shapes = phase_plan(other, model.switches), [parameter_shapes(network) for network in model.students]

    def of_network(phase: int, network: int) -> Change:
        begin = next(plan.times[step] for step in plan.steps(phase) if plan.expert(step).network == network)
        steps = [step for step in range(there.num_steps) if there.expert(step).network == network]
        if not steps:
            raise UserError(f"{place}: has no expert on network {network}")
        nearest = there.expert(min(steps, key=lambda step: abs(there.times[step] - begin)))
        own = f"{network}."
        tensors = {name.removeprefix(own): t for name, t in experts(nearest.phase).items() if name.startswith(own)}
        try:
            if not tensors:
                raise UserError(f"it holds nothing of network {network}")
            change = expert_change(tensors, lora_of(other.generator))
            check_change(change, shapes[network])
        except ValueError as error:
            raise UserError(f"{place}: expert of phase {nearest.phase}: {error}") from error
        return change

    def changes(phase: int) -> dict[int, Change]:
        return {expert.network: of_network(phase, expert.network) for expert in plan.experts(phase)}

    return changes, there.times[:-1]


def is_ours(place: Path) -> bool:
    """Says whether a place is a folder of a run or of an export."""
    return (place / EXPORT).exists() or RunFolder(place).config_path.exists()


def initial_files(config: Config) -> list[Path]:
    """Returns the files that `init_experts` leads to, in an order that is theirs wherever they lie."""
    files = []
    for place in map(Path, config.init_experts or ()):
        if (place / EXPORT).exists():
            files += [place / EXPORT, *sorted(place.rglob("*.safetensors"))]
        else:
            files += sorted((place / "experts").glob("phase-*")) if is_ours(place) else [find_file(place)]
    return files


@contextmanager
def _naming_the_field() -> Iterator[None]:
    """Begins what is wrong with `init_experts` with its name."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"init_experts: {error}") from error
