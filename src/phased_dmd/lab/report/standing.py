"""Where a run stands, as far as the files of its folder tell: whether it is trained, how far, and how long it takes."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from phased_dmd.checkpoint import RunFolder, is_held
from phased_dmd.config import Config

RECENT = 20  # rows of timing.jsonl that tell how long an iteration takes now
PATIENCE = 180  # seconds without a word after which a run is taken for stopped where its disk has no locks
State = Literal["finished", "training", "stopped", "failed"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Progress:
    """Is a phase's progress: updates of the generator, as far as they are logged, of how many, and seconds of each."""

    phase: int
    done: int
    total: int
    pace: float | None

    @property
    def left(self) -> float | None:
        """Returns the seconds that are left at this pace."""
        return None if self.pace is None else self.pace * (self.total - self.done)


@dataclass(frozen=True)
class Standing:
    """Says where a run stands. words: the same in a sentence. troubles: what went wrong, a sentence each."""

    state: State
    words: str
    phases: Sequence[Progress]
    troubles: Sequence[str]


def stand(folder: RunFolder, config: Config, metrics: Sequence[Row], now: float) -> Standing:
    """Returns where a run stands at a time, in seconds since 1970."""
    timing = folder.timing()
    phases = [_progress(folder, config, phase, metrics, timing) for phase in range(1, config.plan.phases + 1)]
    failures = _failures(folder, phases)
    quiet = now - folder.last_word()
    held = is_held(folder.lock_path)
    if folder.finished(config):
        state: State = "finished"
    elif held or (held is None and quiet < PATIENCE):
        state = "training"
    else:
        state = "failed" if failures else "stopped"
    troubles = failures if state == "failed" else []
    return Standing(state, _words(state, config, phases, quiet), phases, [*troubles, *_left_out(metrics)])


def _progress(folder: RunFolder, config: Config, phase: int, metrics: Sequence[Row], timing: Sequence[Row]) -> Progress:
    total = config.phase_iterations(phase)
    done = max((row["iteration"] for row in metrics if row["phase"] == phase), default=0)
    seconds = [row["seconds"] for row in timing if row["phase"] == phase and "pool_calls" not in row]
    pace = statistics.median(seconds[-RECENT:]) if seconds else None
    return Progress(phase, total if folder.expert_path(phase).exists() else done, total, pace)


def _failures(folder: RunFolder, phases: Sequence[Progress]) -> list[str]:
    """Says which updates ended the run because a number was not finite, unless it has gone on beyond them since."""
    done = {each.phase: each.done for each in phases if each.done < each.total}
    return [
        f"{point}: a loss or a gradient was not finite, and the run ended. A learning rate may be too high, "
        f"generator.lr or fake.lr; the state before it is in failures/{point.name}"
        for point in folder.failures()
        if point.iteration >= done.get(point.phase, point.iteration + 1)
    ]


def _left_out(metrics: Sequence[Row]) -> list[str]:
    """Says how many updates were left out, see `skips`: each phase's last row has its count."""
    counts = {row["phase"]: row.get("skipped", 0) for row in metrics}
    return [
        f"phase {phase}: updates left out because a loss or a gradient was not finite: {count}"
        for phase, count in counts.items()
        if count
    ]


def _words(state: State, config: Config, phases: Sequence[Progress], quiet: float) -> str:
    if state == "finished":
        return f"Finished: {config.updates} updates in {len(phases)} phase{'s' * (len(phases) > 1)}."
    begun = [each for each in phases if 0 < each.done < each.total] or [e for e in phases if e.done < e.total][:1]
    named = [f"phase {each.phase} of {len(phases)}, iteration {each.done} of {each.total}" for each in begun]
    places = " and ".join(named)
    ago = f"Last line {duration(quiet)} ago."
    match state:
        case "training" if not any(each.done for each in phases):
            return f"Begun: no update is logged yet; prompts are encoded and networks loaded first. {ago}"
        case "training":
            return f"Training: {places}. {_remaining(phases, begun)}{ago}"
        case "failed":
            return f"Failed in {places}."
    return f"Stopped in {places}; the command that began it goes on from its last checkpoint. {ago}"


def _remaining(phases: Sequence[Progress], begun: Sequence[Progress]) -> str:
    """Says how long the phase and the run take yet, later phases at the pace of the last one that has any."""
    paces = [each.pace for each in phases if each.pace is not None]
    own = [each.left for each in begun if each.left is not None]
    if not paces or not own:
        return ""
    later = sum((each.pace or paces[-1]) * (each.total - each.done) for each in phases if each not in begun)
    of_phase, of_run = duration(max(own)), duration(sum(own) + later)
    if not later:
        return f"About {of_phase} left. "
    longer = ", if later phases take no longer" if any(each.pace is None for each in phases) else ""
    return f"About {of_phase} left in this phase, {of_run} in all{longer}. "


def duration(seconds: float) -> str:
    """Writes a time in the two units that say most."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, hours = round(whole / 60), whole // 3600
    if hours == 0 and minutes < 60:
        return f"{minutes} min"
    days, minutes = minutes // 1440, minutes % 60
    hours = round(whole / 3600) % 24 if days else round(whole / 60) // 60
    return f"{days} d {hours} h" if days else f"{hours} h {minutes} min"
