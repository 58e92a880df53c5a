"""What makes a config that of a run that is there already, and how much longer the run may become."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.checkpoint.folders import Point
from phased_dmd.config import Config
from phased_dmd.errors import UserError

# Fields of the config in which the same run may differ.
CADENCES = {"log_every", "sample_every", "checkpoint_every", "checkpoint_minutes"}
MAY_DIFFER = {"engine", "keep_last", "skips", "trackers", *CADENCES}
PLACES = {"prompts": True, "teacher": {"path": True, "revision": True}, "init_experts": True}  # compared by content
LENGTH = {"iterations", "phase_shares"}  # see `refuse_length`
LONGEST = 60  # characters of a value that is shown


class Reached(NamedTuple):
    """Says how far a phase has come: whether it has its expert, and its newest checkpoint, if there is one."""

    phase: int
    finished: bool
    newest: Point | None


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Names the first field in which two nested mappings differ, and both its values."""
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    key = "kind" if "kind" in differing else differing[0]
    if isinstance(a.get(key), Mapping) and isinstance(b.get(key), Mapping):
        return f"{key}.{first_difference(a[key], b[key])}"
    values = (json.dumps(of.get(key), ensure_ascii=False) for of in (a, b))
    there, here = (text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in values)
    return f"{key} is {there} there, {here} here"


def other_than(config: Config, begun: Config) -> str | None:
    """Returns what makes a config another run than the one that was begun, length and places apart; None if nothing."""
    left_out = {**PLACES, **dict.fromkeys(MAY_DIFFER | LENGTH, True)}
    mine, theirs = (each.model_dump(mode="json", exclude=left_out) for each in (config, begun))
    return None if mine == theirs else first_difference(theirs, mine)


def lengths(config: Config) -> tuple[int, ...]:
    """Returns the iterations of each phase."""
    return tuple(config.phase_iterations(phase) for phase in range(1, config.plan.phases + 1))


def length_flags(iterations: int, shares: Sequence[float] | None) -> str:
    """Returns the flags that give a run so many iterations."""
    return f"--iterations {iterations}" + (
        f" --set phase_shares=[{','.join(f'{share:.6g}' for share in shares)}]" if shares else ""
    )


def refuse_length(path: Path, config: Config, begun: Config, reached: Reached) -> None:
    """Raises a UserError where a phase would not end as if the run had had the config's iterations from its start.

    begun: the config that the run had.
    """
    phase, finished, newest = reached
    now, was = config.phase_iterations(phase), begun.phase_iterations(phase)
    if now == was or not (finished or newest):
        return
    where, asked = f"iterations: phase {phase} of {path}", f"{now} are asked for"
    if finished and phase < config.plan.phases:
        shares = begun.phase_shares or (1.0,) * config.plan.phases
        flags = length_flags(begun.iterations, (*shares[:-1], lengths(config)[-1] / begun.iterations))
        raise UserError(f"{where} is done with {was}, and {asked}; `{flags}` makes the last phase alone longer")
    done = was if finished else newest.iteration if newest else 0
    if now < done:
        shorter = f"`phased-dmd promote {path}@phase-{phase}/{now}` takes the expert as it was then"
        raise UserError(f"{where} is at {done}, and {asked}; {shorter}, where that checkpoint is kept")
    if newest is None:
        onward = f"--init-experts {path} begins another run with its experts"
        raise UserError(f"{where} is done, and has no checkpoint to go on to {now} from; {onward}")
    if begun.optimiser.decay == "linear":
        rates = f"had learning rates that fall over {was} iterations; over {now} they would have been others"
        flags = f"--output NEW {length_flags(config.iterations, config.phase_shares)}"
        branch = f"`phased-dmd branch {path}@phase-{phase}/{newest.iteration} {flags}`"
        raise UserError(f"{where} {rates}; {branch} goes on from there all the same")
    if config.anchored(phase) != begun.anchored(phase):
        raise UserError(f"{where} is anchored in all of its {was} iterations, and {asked}; begin another run")


def refuse_contents(path: Path, file: Path, contents: Mapping[str, tuple[str, str]]) -> None:
    """Raises a UserError where something is not what the run's file of hashes says; see `RunFolder.compare`."""
    try:
        kept = dict(json.loads(file.read_bytes()))
    except ValueError as error:
        raise UserError(f"{file}: damaged ({error})") from error
    for name, (words, found) in contents.items():
        if kept.get(name, found) != found:  # of a branch the file lacks what is another run's
            was = f"{words} is not what it was when {path} was begun"
            raise UserError(f"{was}; bring that back, or take another --output")
