"""What a claim is made of: variants of recipes, the measures that decide, and how much is run. Free of torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from phased_dmd.config import Method

BOUNDED = {  # shares and bounded scores, compared by differences; all else is positive and compared by ratios
    "pairwise_cosine", "class_entropy", "least_class_share", "dynamic_degree", "faithfulness", "direction", "agreement",
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """What is laid over a recipe: a method, which keeps the generator updates in all, and dotted overrides.

    updates: a factor on the budget's share of the generator updates. last: a factor on the iterations of the last
    phase alone, whose earlier phases are then the experts of the run without it.
    """

    method: Method | None = None  # None: the recipe's own
    overrides: Mapping[str, Any] = field(default_factory=dict)
    updates: float = 1.0
    last: float = 1.0


@dataclass(frozen=True)
class Measure:
    """A measure on a prompt set, and what is better: a lower value, a higher one, or one closer to the base's."""

    table: str
    name: str
    direction: Literal["lower", "higher", "closer"] = "lower"

    @property
    def scale(self) -> Literal["ratio", "difference"]:
        """What two values are compared by; gaps to the base, which may be zero, by their difference."""
        return "difference" if self.name in BOUNDED or self.direction == "closer" else "ratio"


@dataclass(frozen=True)
class Trial:
    """A claim on one recipe: the measures that decide, the variants by label, and pairs (better, worse) of labels."""

    measures: tuple[Measure, ...]
    variants: Mapping[str, Variant]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Claim:
    """What is said of variants with equal teacher, seeds and generator updates in all, and the trials that decide.

    source, says: of the paper, or of this project's own notes where the paper has none. shown: the evidence given
    there. how: what is done here, where the tables do not say it. trials: by recipe. paper: the paper's own figures
    by label, and under "" what they are. curves: show the measures over the updates, a curve a method.
    """

    source: str
    says: str
    shown: str
    trials: Mapping[str, Trial]
    how: str = ""
    paper: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    curves: bool = False


@dataclass(frozen=True)
class Budget:
    """How much of everything: seeds from `first` on, samples a cell, and the share of a recipe's generator updates."""

    seeds: int
    samples: int
    updates: float = 1.0
    first: int = 0


FULL = {
    "toy-2d": Budget(5, 4000), "nano-t2i": Budget(3, 1000, 0.5), "nano-moe": Budget(3, 1000),
    "nano-t2v": Budget(3, 160, 0.5), "nano-i2v": Budget(3, 160, 0.5),
}  # fmt: skip
QUICK = {
    "toy-2d": Budget(1, 1000, 0.2), "nano-t2i": Budget(1, 200, 0.1), "nano-moe": Budget(1, 200, 0.1),
    "nano-t2v": Budget(1, 64, 0.1), "nano-i2v": Budget(1, 64, 0.1),
}  # fmt: skip

MODES = Measure("mixture", "mode_histogram_kl")
FRECHET = Measure("weak", "frechet_features")

ONE_STEP = Variant("dmd", {"plan.steps": 1})
DMD = Variant("dmd")
DMD_SGTS = Variant("dmd-sgts")
DMD_SGTS_WIDE = Variant("dmd-sgts", {"generator.lora.rank": 64, "generator.lora.alpha": 64})
PHASED_SGTS = Variant("phased-sgts")
PHASED = Variant("phased")


def trials(
    variants: Mapping[str, Variant],
    pairs: tuple[tuple[str, str], ...],
    recipes: Mapping[str, tuple[Measure, ...]] | None = None,
) -> dict[str, Trial]:
    """The same variants and pairs on several recipes; if not told, on toy-2d's modes and nano-t2i's weak prompt."""
    recipes = recipes or {"toy-2d": (MODES,), "nano-t2i": (FRECHET,)}
    return {recipe: Trial(measures, variants, pairs) for recipe, measures in recipes.items()}
