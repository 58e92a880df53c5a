"""Whether a run is healthy: figures of its updates, and rules that say in words what they mean.

The expert's update asks teacher and fake at x_t, noised from a sample x_s that the generator has just drawn. Both are
denoisers of its law there: what no denoiser can know is in both errors, and their difference is free of it. With
T = E_T[x_s | x_t], F = E_F[x_s | x_t] and the right mean M = E[x_s | x_t] under the generator's own law, in the mean
teacher_error - fake_error = |T - M|^2 - |F - M|^2, while gap = |T - F|^2. See docs/health.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, pvariance
from typing import Any

from torch import Tensor

from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher, PipelineTeacher
from phased_dmd.pixels import contrast, high_frequency_energy, likeness, saturation
from phased_dmd.recipes import RECIPES

COUNT = "updates"
THIRDS = 3
Row = Mapping[str, Any]


def add(sums: dict[str, float], figures: Mapping[str, float | None]) -> None:
    """Adds an update's figures to the sums since the last line of metrics; those of one that was left out have none."""
    there = {name: value for name, value in figures.items() if value is not None}
    for name, value in there.items():
        sums[name] = sums.get(name, 0.0) + value
    if there:
        sums[COUNT] = sums.get(COUNT, 0.0) + 1


def line(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Returns the figures of a line of metrics: means since the last one, with `fake_gain` and `distance`.

    The fake's error in a third of the phase's times is None where no t fell into it.
    """
    parts = {f"share_{third}" for third in range(1, THIRDS + 1)}
    found: dict[str, float | None] = {
        name: sums[name] / sums[COUNT] for name in sorted(sums) if name != COUNT and name not in parts
    }
    for third in range(1, THIRDS + 1):
        if (share := f"share_{third}") in sums:
            error = f"fake_error_{third}"
            found[error] = sums[error] / sums[share] if sums[share] else None
    if "gap" in sums:
        found |= {"fake_gain": gain([found]), "distance": distance([found])}
    return found


def gain(rows: Sequence[Row]) -> float | None:
    """Returns (teacher_error - fake_error) / gap over lines; None where the fake is the teacher.

    It is 1 for a fake that is right, (2 - l) / l for one that has gone the part l of the way from the teacher to it,
    between -1 and 0 for one that errs at random more than the teacher errs, and below -1 for one that errs as the
    teacher does, only farther.
    """
    gap = sum(row["gap"] for row in rows)
    return sum(row["teacher_error"] - row["fake_error"] for row in rows) / gap if gap > 0 else None


def distance(rows: Sequence[Row]) -> float | None:
    """Returns |T - M|^2, the square of how far the teacher lies from the generator's own law, of a fake on its way.

    It is gap (1 + gain)^2 / 4 in the mean over lines: what gain and gap are at a part l of the way, solved for the
    whole way.
    """
    if (found := gain(rows)) is None:
        return None
    return sum(row["gap"] for row in rows) / len(rows) * max(0.0, 1 + found) ** 2 / 4


def spread(rows: Sequence[Row]) -> float:
    """Returns the standard error of `gain` by the jackknife over lines; infinite for fewer than four."""
    count, ahead = len(rows), [row["teacher_error"] - row["fake_error"] for row in rows]
    if count < 4:
        return math.inf
    gaps = [row["gap"] for row in rows]
    left = [(sum(ahead) - a) / (sum(gaps) - g) for a, g in zip(ahead, gaps, strict=True)]
    return math.sqrt((count - 1) * pvariance(left))


@dataclass(frozen=True)
class Finding:
    """Is what a rule found. cause: its name. words: what is wrong, and what to do. evidence: the figures."""

    cause: str
    words: str
    evidence: str
    phase: int
    iteration: int

    def __str__(self) -> str:
        where = f"phase {self.phase}, iteration {self.iteration}: " if self.phase else ""
        return f"{where}{self.words} ({self.evidence})"


@dataclass(frozen=True)
class Rule:
    """Is one rule. sign: returns the evidence in words from the lines of one phase so far, or None.

    settled: it looks at the settings, and says nothing of the figures.
    """

    cause: str
    words: str
    sign: Callable[[Sequence[Row], Config], str | None]
    settled: bool = False


# What looks at the figures takes it that the fake begins as the teacher itself. That of an exact mixture is a network
# fitted to it: where the generator is right from the start, all that is seen is how well it was fitted.
SIGMAS = 2.5  # standard errors that a gain must lie beyond a bound
STILL = 1e-9  # of a tensor's norm: an update of the fake that rounding swallows
RANDOM, FAINT = -1.0, 2.5e-4  # the least gain of random errors; a gap over the fake's error, below which no gain tells
FARTHER, OPENED = 1.5, 2.0  # times the phase's first distance and gap; a fake that begins to follow opens the gap alone
STRIDE, FULL_STRIDE = 0.2, 0.006  # of a matrix's norm: more than an update may change of an adapter's, or a network's
OVERFLOW = 25.0  # mean square of predicted latents, which a VAE scales to about 1
CLIPPED = 0.9  # share of updates
DEPARTURE = 2.0  # times the recipe's own


def _stands_still(rows: Sequence[Row], config: Config) -> str | None:
    steps = [row["fake_step"] for row in rows if row.get("fake_step") is not None]
    return f"an update changes it by {max(steps):.1g} of itself" if len(steps) > 1 and max(steps) < STILL else None


def _scored(rows: Sequence[Row], config: Config) -> list[Row]:
    """Returns the lines whose figures can be judged: not those of anchored updates, nor of a fitted fake."""
    return [row for row in rows if row.get("gap")] if not isinstance(config.teacher, AnalyticTeacher) else []


def _surely_behind(rows: Sequence[Row], config: Config) -> float | None:
    """Returns the gain of a phase if it is surely below 0."""
    seen = _scored(rows, config)
    found, error = gain(seen), spread(seen)
    return None if found is None or found + SIGMAS * error >= 0 else found


def _is_drawn_away(rows: Sequence[Row], config: Config) -> str | None:
    found, seen = _surely_behind(rows, config), _scored(rows, config)
    if found is None or found >= RANDOM:
        return None
    share = fmean(row["gap"] for row in seen) / fmean(row["fake_error"] for row in seen)
    return f"fake_gain is {found:.2f}, which no random errors make" if share > FAINT else None


def _rushes(rows: Sequence[Row], config: Config) -> str | None:
    bound, widest = _stride(config, config.fake.weights), _widest(rows, "fake_step")
    found = _surely_behind(rows, config)
    if widest > bound or (found is not None and widest > bound / 2):
        worse = "" if found is None else f", and fake_gain is {found:.2f}"
        return f"an update changes its first matrix by {widest:.2g} of itself{worse}"
    return None


def _strides(rows: Sequence[Row], config: Config) -> str | None:
    widest = _widest(rows, "generator_step")
    wide = widest > _stride(config, config.generator.weights)
    return f"an update changes its first matrix by {widest:.2g} of itself" if wide else None


def _widest(rows: Sequence[Row], name: str) -> float:
    """Returns the longest logged step of a network."""
    return max((row[name] for row in rows if row.get(name) is not None), default=0.0)


def _stride(config: Config, weights: str) -> float:
    """Returns what an update may change of a matrix; there is no bound for a network that is no pipeline's."""
    if not isinstance(config.teacher, PipelineTeacher):
        return math.inf
    return STRIDE if weights == "lora" else FULL_STRIDE


def _moves_away(rows: Sequence[Row], config: Config) -> str | None:
    seen = _scored(rows, config)
    if len(seen) < 3:
        return None
    apart = [(distance([row]) or 0.0, row["gap"]) for row in seen]
    pairs = list(pairwise(apart[1:]))  # two lines in a row, by the lesser of each figure: one alone may be chance
    farther = max(min(a[0], b[0]) for a, b in pairs) / max(apart[0][0], apart[0][1] / 2)
    opened = max(min(a[1], b[1]) for a, b in pairs) / apart[0][1]
    if farther < FARTHER or opened < OPENED:
        return None
    return f"since the phase began the gap has opened {opened:.1f} times, and the distance grown {farther:.1f} times"


def _grows(rows: Sequence[Row], config: Config) -> str | None:
    size = max((row["size"] for row in rows if row.get("size") is not None), default=0.0)
    return f"predicted samples have a mean square of {size:.3g}" if size > OVERFLOW else None


def _is_clipped(rows: Sequence[Row], config: Config) -> str | None:
    shares = [row["clipped"] for row in rows if row.get("clipped") is not None]
    return f"{fmean(shares):.0%} of its updates" if len(shares) > 3 and fmean(shares) > CLIPPED else None


def _departs(field: str, value: Callable[[Config], float]) -> Callable[[Sequence[Row], Config], str | None]:
    def sign(rows: Sequence[Row], config: Config) -> str | None:
        if config.recipe not in RECIPES:
            return None
        own, recipes = value(config), value(RECIPES[config.recipe]())
        if max(own / recipes, recipes / own) <= DEPARTURE:
            return None
        return f"{field} is {own:g}, and {recipes:g} in the recipe {config.recipe}"

    return sign


def _guidance(config: Config) -> float:
    return max(config.teacher.guidance) if isinstance(config.teacher, PipelineTeacher) else 1.0


RULES = (
    Rule("overflow", "numbers grow towards overflow: lower generator.lr", _grows),
    Rule("still", "the fake stands still: raise fake.lr", _stands_still),
    Rule("target", "the fake is drawn away from the generator's samples: is its target right? "
         "ablation.target=unbiased is", _is_drawn_away),
    Rule("fake rate", "the fake learns too fast to stay right: lower fake.lr", _rushes),
    Rule("generator rate", "the generator moves away from the teacher: lower generator.lr, or raise fake.updates",
         lambda rows, config: _strides(rows, config) or _moves_away(rows, config)),
    Rule("clipped", "nearly all updates of the generator are clipped: lower generator.lr, or raise optimiser.clip",
         _is_clipped),
    Rule("guidance", "samples will be over-saturated if guidance is too high",
         _departs("teacher.guidance", _guidance), settled=True),
    Rule("shift", "the steps lie at noise levels that were not chosen for this base",
         _departs("plan.shift", lambda config: config.plan.shift), settled=True),
)  # fmt: skip
DRIFT, ALIKE = 1.3, 0.15  # times the base's own figure; more than the base's own likeness
LOOKS = {"saturation": saturation, "contrast": contrast, "detail": high_frequency_energy, "likeness": likeness}
OF_BASE = "base_"


@dataclass(frozen=True)
class Look:
    """Is a rule of previews. drifts: says from a preview's figures whether it differs too much from the base's."""

    cause: str
    words: str
    figure: str
    drifts: Callable[[float, float], bool]


LOOK_RULES = (
    Look("colours", "colours drift from the base's: stop near there, or lower guidance", "saturation",
         lambda own, base: own > DRIFT * base > 0.02),
    Look("contrast", "contrast drifts from the base's: stop near there, or lower guidance", "contrast",
         lambda own, base: own > DRIFT * base),
    Look("alike", "samples grow alike, and the base's of the same noise are not: stop before, or raise fake.updates",
         "likeness", lambda own, base: own > base + ALIKE),
)  # fmt: skip
RULE = {rule.cause: rule for rule in RULES}


def looks(pixels: Tensor, base: Tensor | None) -> dict[str, float]:
    """Returns what a preview's pictures look like, and the base's of the same noise; {} for points.

    pixels, base: [n, k, h, w, 3] in [0, 1]. saturation, contrast, detail (power above half the Nyquist frequency), and
    likeness of two or more samples; those of the base begin with `OF_BASE`.
    """
    found: dict[str, float] = {}
    for prefix, shown in (("", pixels), (OF_BASE, base)):
        if shown is not None and shown.ndim == 5:
            figures = {name: of for name, of in LOOKS.items() if name != "likeness" or len(shown) > 1}
            found |= {f"{prefix}{name}": of(shown) for name, of in figures.items()}
    return found


def seen(previews: Sequence[Row]) -> list[Finding]:
    """Returns what the previews of the last phase that has any show, each cause from the iteration where it began.

    Two previews in a row must show it, up to the last one. What has no base beside it is not judged.
    """
    phase = max((row["phase"] for row in previews), default=0)
    rows, found = [row for row in previews if row["phase"] == phase], []
    for rule in LOOK_RULES:
        of_base = f"{OF_BASE}{rule.figure}"
        drifting = [of_base in row and rule.drifts(row[rule.figure], row[of_base]) for row in rows]
        streak = len(drifting) - next((i for i in range(len(drifting), 0, -1) if not drifting[i - 1]), 0)
        if streak < 2:
            continue
        since, own, base = rows[-streak]["iteration"], rows[-1][rule.figure], rows[-1][of_base]
        evidence = f"{rule.figure} is {own:.3g}, the base's {base:.3g}, since iteration {since}"
        found.append(Finding(rule.cause, rule.words, evidence, phase, since))
    return found


def current(rows: Sequence[Row], config: Config, phase: int) -> list[Finding]:
    """Returns what the lines of one phase say now: of the run's settings, and the first rule that its figures fulfil.

    The others then see its consequences.
    """
    of_phase, found = [row for row in rows if row["phase"] == phase], []
    for rule in RULES:
        if (rule.settled or all(RULE[each.cause].settled for each in found)) and (said := rule.sign(of_phase, config)):
            found.append(Finding(rule.cause, rule.words, said, phase, of_phase[-1]["iteration"]))
    return found


def verdict(rows: Sequence[Row], config: Config, previews: Sequence[Row] = ()) -> list[Finding]:
    """Returns what is wrong with a run by its lines of metrics, each cause where it first shows, and by its previews.

    A phase names one cause in its figures, the first that shows: what follows may be its consequence.
    """
    found: dict[str, Finding] = {}
    for phase in sorted({row["phase"] for row in rows}):
        of_phase, named = [row for row in rows if row["phase"] == phase], None
        for upto in range(1, len(of_phase) + 1):
            for finding in current(of_phase[:upto], config, phase):
                if not RULE[finding.cause].settled:
                    if named not in (None, finding.cause):
                        continue
                    named = finding.cause
                found.setdefault(finding.cause, finding)
    return [*found.values(), *seen(previews)]
