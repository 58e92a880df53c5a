"""A claim's results as the parts of a Markdown page."""

from collections.abc import Mapping, Sequence
from typing import Any

from phased_dmd.lab.evaluate import title
from phased_dmd.lab.metrics.formats import markdown_table, number
from phased_dmd.lab.reproduce.claim import Claim, Criterion, Trial
from phased_dmd.lab.reproduce.results import amounts, plus_minus, summary_table
from phased_dmd.lab.reproduce.study import Study
from phased_dmd.lab.reproduce.verdict import count_outcomes, judge, outcome

ARROWS = {"lower": "↓", "higher": "↑", "closer": "→ base"}
CONTEXT = {  # by prompt set, the measures that are shown beside those that decide
    "change": ("structure", "detail", "detail_over_structure", "agreement"),
    "mixture": ("mode_histogram_kl", "energy_distance", "distance_to_nearest_mode"),
    "weak": ("frechet_features", "class_entropy"),
    "specific": ("frechet_features", "faithfulness"),
}
HOW_COMPARED = (
    "Equal seeds are compared: ratios by the geometric mean and the interval of their logarithms, claimed to lie above "
    "1; differences of shares, bounded scores and gaps to the base, whose sign is left out, claimed to lie above 0. "
    "Intervals are of 95 %, by Student's t over the seeds. *Could tell*: the effect that as many seeds, as far apart "
    "as these, tell in four of five cases."
)
HOW_EVALUATED = (
    " Each training seed is evaluated with noise and a reference of its own, so that intervals hold the evaluation's "
    "error too. Fréchet distances, KL and entropy have the bias of few samples taken out; a distance below what the "
    "base reads as from itself counts as that."
)
IN_THE_FIGURE = (
    "Means with their intervals, a dot a seed where there is room; dotted, the base at its own number of steps. "
    "Samples are of one seed's runs, of the same noise in every row."
)
EQUAL = (
    " Mean ± half width of the 95 % interval over seeds. Equal in all rows but the base's, unless the label says "
    "otherwise: teacher, seeds, batch, rank and generator updates in all. A method of more phases has more experts, "
    "and so more trainable parameters, which are counted over all of them."
)


def claim_page(
    name: str, claim: Claim, studies: Mapping[str, Study], comparisons: Sequence[Mapping[str, Any]],
    verdicts: Mapping[str, str | None], about: Mapping[str, Any],
) -> list[str]:  # fmt: skip
    """Returns the parts of results/NAME.md. verdicts: by recipe."""
    parts = [f"# {name}", f"{claim.source}: {claim.says}", f"The evidence there: {claim.evidence}"]
    parts.append(verdict_part(verdicts, comparisons, about))
    unmet = (recipe for recipe, verdict in verdicts.items() if verdict not in (None, "holds"))
    parts += [f"**Why not on {recipe}.** {claim.why_not[recipe]}" for recipe in unmet if recipe in claim.why_not]
    parts += [comparison_table(comparisons), HOW_COMPARED + HOW_EVALUATED]
    parts += [f"![{name}]({name}.png)", IN_THE_FIGURE]
    if claim.how:
        parts.append(claim.how)
    if claim.paper:
        parts += ["## Ours vs the paper's", beside_paper(claim, studies)]
    return [*parts, "## Measured", made_by(about) + EQUAL, *measured_parts(claim, studies)]


def measured_parts(claim: Claim, studies: Mapping[str, Study]) -> list[str]:
    """Returns what was measured as the parts of a page: for each recipe the amounts and a table a prompt set."""
    parts = []
    for recipe, study in studies.items():
        parts.append(f"{recipe}: {amounts(study)}.")
        first = next(iter(study.summary))  # its table also tells the runs' sizes
        for kind, rows in study.summary.items():
            sizes = study.sizes if kind == first else None
            parts.append(summary_table(kind, rows, page_measures(claim.trials[recipe], kind), sizes, study.nets))
    return parts


def made_by(about: Mapping[str, Any]) -> str:
    """Names the command, date and budget of a result."""
    return f"`{about['command']}`, {about['date']}, {about['budget']} budget."


def verdict_part(
    verdicts: Mapping[str, str | None], comparisons: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> str:
    """States the verdict on each recipe, what it counts, and the rule by which it was found.

    verdicts: by recipe; None, of those whose budget does not suffice.
    """
    if not any(verdicts.values()):
        return "No verdict: that takes the full budget, with its seeds, samples and updates."
    lines = []
    for recipe, verdict in verdicts.items():
        counts = _counted([c for c in comparisons if c["recipe"] == recipe])
        lines.append([f"{recipe}, {world_in_words(recipe)}", f"**{verdict}**" if verdict else "none", counts or "-"])
    table = markdown_table(["at the size of", "verdict", "intervals"], lines)
    return (
        f"{table}\n\nA claim holds on a recipe where every interval lies where it is claimed to. It holds partly where "
        "one does so even after Bonferroni's correction for their number and none is reversed; it is mixed where one "
        f"does so and others are reversed; else it does not hold. {made_by(about)}"
    )


def world_in_words(recipe: str) -> str:
    """Says what the samples of a recipe are."""
    worlds = {"scenes-": "scenes of several coloured digits", "nano-": "single digits"}
    return next((words for prefix, words in worlds.items() if recipe.startswith(prefix)), "an exact mixture")


def _counted(comparisons: Sequence[Mapping[str, Any]]) -> str | None:
    """Says in words how many intervals show what; None where one is missing."""
    counts = count_outcomes(comparisons)
    if counts is None:
        return None
    text = "{} as claimed, {} reversed, {} undecided".format(*counts)
    unclear = counts[1] == 0 and judge(comparisons) == "does not hold"
    return f"{text}; the seeds are too few to tell" if unclear else text


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table with a line a comparison."""
    lines = []
    for c in comparisons:
        value, span = _value_and_span(c)
        measure = f"{title(c['measure'])}, {c['table']} {ARROWS[c['direction']]}"
        told = "-" if c["detectable"] is None else number(c["detectable"])
        lines.append([c["recipe"], measure, c["what"], value, span or "none", told, outcome(c) or "-"])
    return markdown_table(["recipe", "measure", "compared", "", "95 % interval", "could tell", "it shows"], lines)


def _value_and_span(comparison: Mapping[str, Any]) -> tuple[str, str | None]:
    """Writes a comparison's value and its interval, if it has one; those of a difference with equal decimals."""
    value, low, high = (comparison[key] for key in ("value", "low", "high"))
    if low is None:
        return number(value), None
    scale = max(abs(low), abs(high)) if comparison["scale"] == "difference" else None
    return number(value, scale=scale), f"{number(low, scale=scale)} to {number(high, scale=scale)}"


def decisive(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Says in a line what the first comparison is, and how many show what."""
    first, counts = comparisons[0], _counted(comparisons)
    value, span = _value_and_span(first)
    text = f"{first['recipe']}, {title(first['measure'])}: {first['what']} = {value}"
    return f"{text} ({span or 'no interval'}); {counts}" if counts else f"{text} (one seed)"


def beside_paper(claim: Claim, studies: Mapping[str, Study]) -> str:
    """Returns a table of our measures that decide beside the paper's figures, by label; our base has all its steps."""
    columns: dict[tuple[str, str, str], Criterion] = {}
    for recipe, trial in claim.trials.items():
        for criterion in trial.criteria:
            columns.setdefault((recipe, criterion.table, criterion.name), criterion)
    head = [f"{recipe}: {title(name)}, {kind} {ARROWS[c.direction]}" for (recipe, kind, name), c in columns.items()]
    head = ["", *head, *(f"paper, {text}" for text in claim.paper[""])]
    lines = []
    for label in ["base", *dict.fromkeys(label for trial in claim.trials.values() for label in trial.variants)]:
        cells = []
        for recipe, kind, name in columns:
            rows = studies[recipe].summary[kind]
            row = next(iter(rows)) if label == "base" else label
            cells.append(plus_minus(rows[row].get(name)) if row in rows else "-")
        lines.append([label, *cells, *claim.paper.get(label, ("-",) * len(claim.paper[""]))])
    return markdown_table(head, lines)


def page_measures(trial: Trial, kind: str) -> list[str]:
    """Returns the measures of a prompt set that a page shows."""
    return list(dict.fromkeys([*(c.name for c in trial.criteria if c.table == kind), *CONTEXT[kind]]))
