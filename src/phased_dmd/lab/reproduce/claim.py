"""What a claim is made of: variants of recipes, the measures that decide, and how much is run. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phased_dmd.config import Method

BOUNDED = {  # shares and bounded scores, compared by differences; all else is positive and compared by ratios
    "pairwise_cosine", "class_entropy", "least_class_share", "dynamic_degree", "faithfulness", "direction", "agreement",
    "speeds_right", "directions_right",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is laid over a recipe: a method, which keeps the generator updates in all, and dotted overrides.

    updates: a factor on the budget's share of the generator updates. last: a factor on the iterations of the last
    phase alone; the experts of its earlier phases are then taken from the run whose factor is 1.
    """

    method: Method | None = None  # None: the recipe's own
    overrides: Mapping[str, Any] = field(default_factory=dict)
    updates: float = 1.0
    last: float = 1.0


@dataclass(frozen=True)
class Criterion:
    """A measure in the table of a prompt set, and what is better: lower or higher values, or closer to the base's."""

    table: str
    name: str
    direction: Literal["lower", "higher", "closer"] = "lower"

    @property
    def scale(self) -> Literal["ratio", "difference"]:
        """Says how two values are compared; gaps to the base may be zero, and so are compared by their difference."""
        return "difference" if self.name in BOUNDED or self.direction == "closer" else "ratio"


@dataclass(frozen=True)
class Trial:
    """A claim on one recipe: the criteria that decide, the variants by label, and pairs (better, worse) of labels."""

    criteria: tuple[Criterion, ...]
    variants: Mapping[str, Variant]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Claim:
    """A statement on variants of equal teacher, seeds and generator updates in all, and the trials that decide it.

    source, says: where it is said and what, in the paper, or in this project's own notes where the paper has none.
    evidence: what is given for it there. trials: by recipe. how: what is done here, where the tables do not say it.
    paper: the paper's own figures by label; under "" are the titles of their columns. curves: whether the figure shows
    the measures over the updates, a curve a method. why_not: by recipe where it does not hold, what an experiment
    beside it decided to be the reason: the world, the budget, the capacity or the claim.
    """

    source: str
    says: str
    evidence: str
    trials: Mapping[str, Trial]
    how: str = ""
    paper: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    curves: bool = False
    why_not: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """How much is run: seeds from `first` on, samples of a set, and the share of a recipe's generator updates."""

    seeds: int
    samples: int
    updates: float = 1.0
    first: int = 0


FULL = {
    "toy-2d": Budget(5, 4000), "exact-clips": Budget(5, 2000), "nano-t2i": Budget(3, 1000, 0.5),
    "nano-moe": Budget(3, 1000), "nano-t2v": Budget(3, 160, 0.5), "nano-i2v": Budget(3, 160, 0.5),
    "scenes-t2i": Budget(5, 500), "scenes-t2v": Budget(5, 160), "scenes-moe": Budget(5, 160),
}  # fmt: skip
QUICK = {
    "toy-2d": Budget(1, 1000, 0.2), "exact-clips": Budget(1, 500, 0.1), "nano-t2i": Budget(1, 200, 0.1),
    "nano-moe": Budget(1, 200, 0.1), "nano-t2v": Budget(1, 64, 0.1), "nano-i2v": Budget(1, 64, 0.1),
    "scenes-t2i": Budget(1, 200, 0.1), "scenes-t2v": Budget(1, 64, 0.1), "scenes-moe": Budget(1, 64, 0.1),
}  # fmt: skip

MODES = Criterion("mixture", "mode_histogram_kl")
FRECHET = Criterion("weak", "frechet_features")
LAW = Criterion("weak", "law_kl")

ONE_STEP = Variant("dmd", {"plan.steps": 1})
DMD = Variant("dmd")
DMD_SGTS = Variant("dmd-sgts")
DMD_SGTS_WIDE = Variant("dmd-sgts", {"generator.lora.rank": 64, "generator.lora.alpha": 64})
PHASED_SGTS = Variant("phased-sgts")
PHASED = Variant("phased")
ON_BOTH = {"toy-2d": (MODES,), "nano-t2i": (FRECHET,)}
EVERYWHERE = ON_BOTH | {"scenes-t2i": (LAW, FRECHET)}


def trials(
    variants: Mapping[str, Variant], recipes: Mapping[str, tuple[Criterion, ...]] = ON_BOTH,
    pairs: tuple[tuple[str, str], ...] | None = None,
) -> dict[str, Trial]:  # fmt: skip
    """Returns trials of the same variants on several recipes, each decided by its own criteria.

    pairs: by default the first variant is claimed to be better than each of the others.
    """
    first, *others = variants
    pairs = pairs or tuple((first, other) for other in others)
    return {recipe: Trial(criteria, variants, pairs) for recipe, criteria in recipes.items()}
