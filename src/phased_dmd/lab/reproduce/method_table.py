"""`reproduce methods`: every method at equal cost in every world, and a verdict on each against Phased DMD."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from phased_dmd.lab.metrics.formats import markdown_table, number
from phased_dmd.lab.reproduce.arms import ARMS, METHOD_TABLE, REFERENCE
from phased_dmd.lab.reproduce.claim import Budget, Claim, Trial
from phased_dmd.lab.reproduce.claim_page import (
    HOW_COMPARED,
    HOW_EVALUATED,
    IN_THE_FIGURE,
    comparison_table,
    made_by,
    measured_parts,
)
from phased_dmd.lab.reproduce.study import Study
from phased_dmd.lab.reproduce.verdict import count_outcomes, judge, mirrored
from phased_dmd.plan.work import pool_forwards, trained_forwards
from phased_dmd.recipes import resolve

SHARE = {"holds": "", "holds partly": " in part"}
RULE = (
    f"A row is **better** than {REFERENCE} where every interval says so, and **better in part** where some say so, one "
    "of them still after Bonferroni's correction for their number, and none says the reverse; **worse** likewise; "
    "**mixed** where one is sure and others say the reverse of it; else it is **not told apart**."
)
WHY_TDM = (
    "What the targets teach a fake on toy-2d, by exact means over the mixture, without networks. *Signal*: the "
    "generator's gradient E_F - E_T of x_s where an expert begins, of a fake that is right. *Bias*: the gradient that "
    "moves a generator which is right already, because the fake has learned a biased target without error. Root mean "
    "squares over the t that training draws. At s = 0, in the last phase, x_s, the rollout's x_0 and x_0 are the same."
)
PARTICLES = (
    "Where the biases lead, phase by phase, if an expert could make any x_s: particles that are moved along the "
    "gradient. *Stretch*: the root mean square of x_s at a phase's end, over that of the teacher's law. The last "
    "columns are of samples: as the last phase's expert makes them, whose fake has no bias, and as the teacher's own "
    "flow makes them of what the last phase begins from, where nothing is undone. The biases do their harm before the "
    "last phase, and an expert that can make any sample of any x_s undoes it there."
)


def at_equal_cost(claim: Claim, budgets: Mapping[str, Budget]) -> Claim:
    """Returns the claim with such factors on the updates of each variant that all take the reference's forwards.

    budgets: by recipe. A pool takes the same whatever the budget, and is paid for in updates; one that takes more than
    the whole budget leaves an update a phase.
    """
    trials = {}
    for recipe, trial in claim.trials.items():
        configs = {label: resolve(recipe, v.overrides, v.method) for label, v in trial.variants.items()}
        share, whole = budgets[recipe].updates, trained_forwards(configs[REFERENCE])
        variants = {
            label: replace(variant, updates=max(0.0, whole - pool_forwards(config) / share) / trained_forwards(config))
            for (label, variant), config in zip(trial.variants.items(), configs.values(), strict=True)
        }
        trials[recipe] = Trial(trial.criteria, variants, trial.pairs)
    return replace(claim, trials=trials)


def row_verdicts(comparisons: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """Returns the verdict on each row against the reference; None of one seed."""
    rows = dict.fromkeys(comparison["better"] for comparison in comparisons)
    return {row: _verdict([c for c in comparisons if c["better"] == row]) for row in rows}


def _verdict(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    better, worse = judge(comparisons), judge([mirrored(comparison) for comparison in comparisons])
    if better is None or worse is None:
        return None
    if "mixed" in (better, worse):
        return "mixed"
    if better in SHARE:
        return f"better{SHARE[better]}"
    return f"worse{SHARE[worse]}" if worse in SHARE else "not told apart"


def methods_page(
    studies: Mapping[str, Study], comparisons: Sequence[Mapping[str, Any]], verdicts: Mapping[str, str | None],
    about: Mapping[str, Any], tdm: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Returns the parts of results/methods.md. verdicts: by row; none at other budgets than the full one. tdm: what
    `tdm_study` returns.
    """
    lines = []
    for label, arm in ARMS.items():
        counts = count_outcomes([c for c in comparisons if c["better"] == label])
        lines.append([label, arm.says, verdicts.get(label) or "-", "{}, {}, {}".format(*counts) if counts else "-"])
    return [
        "# methods", f"{METHOD_TABLE.says} {made_by(about)}", METHOD_TABLE.how,
        markdown_table(["", "what it is", f"against {REFERENCE}", "better, worse, open"], lines), RULE,
        "![methods](methods.png)", IN_THE_FIGURE,
        "## Compared", comparison_table(comparisons), HOW_COMPARED + HOW_EVALUATED,
        "## Why TDM's departures do not hurt on toy-2d", WHY_TDM, bias_table(tdm), PARTICLES, end_table(tdm),
        "## Measured", *measured_parts(METHOD_TABLE, studies),
    ]  # fmt: skip


def bias_table(tdm: Mapping[str, Any]) -> str:
    """Returns the sizes of the biases over that of the signal, a line a phase."""
    lines = [
        [
            str(row["phase"]), f"{row['s']:.3g} to {row['high']:.3g}", number(row["signal"]),
            *(number(row[target] / row["signal"]) if row["signal"] else "-" for target in ("biased", "rollout")),
        ]
        for row in tdm["biases"]
    ]  # fmt: skip
    return markdown_table(["phase", "t", "signal", "bias / signal, x_s for x_0", "bias / signal, rollout's x_0"], lines)


def end_table(tdm: Mapping[str, Any]) -> str:
    """Returns where the particles end, a line a target and interval."""
    lines = [
        [
            row["target"], row["interval"], ", ".join(f"{stretch:.3f}" for stretch in row["stretch"]),
            *(number(of[name]) for of in (row, row["flowed"]) for name in ("kl", "distance")),
        ]
        for row in tdm["ends"]
    ]  # fmt: skip
    last = [f"{name}, {by}" for by in ("by an expert", "by the teacher") for name in ("KL of the modes", "distance")]
    return markdown_table(["target", "t", "stretch by phase", *last], lines)
