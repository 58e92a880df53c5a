"""What a page finds: the calls that a generator takes, and how much of the gap that few steps leave it has closed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from phased_dmd.lab.evaluate import HEADINGS, Measurement
from phased_dmd.lab.metrics.formats import number
from phased_dmd.lab.report.numbers import combine
from phased_dmd.lab.report.runs import Group

DECISIVE = ("frechet_features", "frechet_features_paired", "frechet_video_paired", "energy_distance")  # the first there


class Closed(NamedTuple):
    """Says which share of the base's loss in few steps a generator is spared, with half of its 95 % interval.

    measure: the distance that says so. share: None where the base loses nothing in few steps that shows. own, few: the
    measurement of the generator, and of the base in few steps.
    """

    measure: str
    share: float | None
    half_width: float | None
    own: Measurement
    few: Measurement

    @property
    def worse(self) -> bool:
        """Says whether the generator is farther from the base than the base in as few steps, beyond both intervals."""
        return _low(self.own) > max(0.0, _high(self.few))


class Finding(NamedTuple):
    """Is a sentence of a page, and its tone: good, bad, or none."""

    words: str
    tone: str = ""


def closed(group: Group, name: str) -> Closed | None:
    """Returns what a method closed of the gap on a prompt set; None where nothing decisive was measured."""
    run = group.runs[0]
    few = run.sets[name]["rows"].get(f"base, {run.config.plan.steps} steps", {})
    own = combine([each.measurements(name, each.row) for each in group.runs])
    measure = next((measure for measure in DECISIVE if measure in own and measure in few), None)
    if measure is None:
        return None
    a, b = _gap(own[measure]), _gap(few[measure])
    if _low(few[measure]) <= 0:
        return Closed(measure, None, None, own[measure], few[measure])
    widths = [own[measure]["gap_half_width"], few[measure]["gap_half_width"]]
    half = None if None in widths else math.hypot(widths[0] / b, a * widths[1] / b**2)  # type: ignore[operator]
    return Closed(measure, 1 - a / b, half, own[measure], few[measure])


def tone(found: Closed | None) -> str:
    """Returns good where the generator is nearer to the base than few steps of that beyond both intervals, bad where it
    is farther, and nothing in between.
    """
    if found is None:
        return ""
    return "bad" if found.worse else "good" if _high(found.own) < _low(found.few) else ""


def find(groups: Sequence[Group]) -> list[Finding]:
    """Returns a sentence for each method that is evaluated, which says its prompt sets one after the other."""
    return [_sentence(group, len(groups) > 1) for group in groups]


def _sentence(group: Group, named: bool) -> Finding:
    run = group.runs[0]
    known = {name: found for name in run.sets if (found := closed(group, name))}
    calls = f"{group.label}: {_calls(group)}" if named else _calls(group)
    several = len(run.sets) > 1

    def listed(sets: Mapping[str, Closed], say: Callable[[Closed, str], str]) -> str:
        return " and ".join(say(found, f" on “{name}”" if several else "") for name, found in sets.items())

    if worse := {name: found for name, found in known.items() if found.worse}:
        text = f"{calls}, and worse than the base in as few steps: {listed(worse, _distances)}"
        return Finding(f"{text} ({_measure(worse)})", "bad")
    shares = {name: found for name, found in known.items() if found.share is not None}
    if not shares:
        return Finding(f"{calls}; the base in as few steps is as good, as far as this evaluation tells")
    gap = f"of the gap between {run.config.plan.steps} steps of the base and {run.config.teacher.base_steps}"
    good = {tone(found) for found in shares.values()} == {"good"}
    return Finding(f"{calls}: closes {listed(shares, _share)} {gap} ({_measure(shares)})", "good" if good else "")


def _measure(sets: Mapping[str, Closed]) -> str:
    """Returns the title of the decisive measure, which is the same in all prompt sets of an evaluation."""
    return HEADINGS[next(iter(sets.values())).measure][0]


def _calls(group: Group) -> str:
    """Returns the network calls of a method beside the base's."""
    of_set = next(iter(group.runs[0].sets.values()))
    rows: Mapping[str, Mapping[str, Measurement]] = of_set["rows"]
    own, base = (rows[row].get("network_calls") for row in (group.runs[0].row, of_set["base"]))
    if own is None or base is None:
        return f"{group.runs[0].config.plan.steps} steps instead of {of_set['base'].removeprefix('base, ')}"
    return f"{own['value']:g} network calls instead of {base['value']:g}"


def _share(found: Closed, on: str) -> str:
    """Returns the share of a gap that is closed, and says where none is beyond doubt."""
    assert found.share is not None
    half = f" ± {number(100 * found.half_width, 2)}" if found.half_width else ""
    share = f"{number(100 * found.share, scale=100 * (found.half_width or 0))}{half} %"
    return f"{share}{on}" if tone(found) == "good" else f"nothing that shows{on} ({share})"


def _distances(found: Closed, on: str) -> str:
    """Returns how far the generator is from the base, and how far few steps of the base are."""
    return f"{number(_gap(found.own))} from it{on}, where that is {number(max(0.0, _gap(found.few)))}"


def _gap(one: Measurement) -> float:
    assert one["gap"] is not None
    return one["gap"]


def _low(one: Measurement) -> float:
    return _gap(one) - (one["gap_half_width"] or 0)


def _high(one: Measurement) -> float:
    return _gap(one) + (one["gap_half_width"] or 0)
