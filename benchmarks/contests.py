"""Who runs against whom, over what budgets, and with which levers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phased_dmd.lab.reproduce.claim import FRECHET, MODES, Criterion, Variant
from phased_dmd.lab.reproduce.claims import DIVERSITY

LEVER_SEEDS = range(3)
PAPER, FAST = "paper's", "fast"
MARGINS = {  # by which `fast` may be worse and count as no worse: factors of distances, differences of bounded scores
    "frechet_features": 1.25, "distance_to_nearest_mode": 1.1, "mode_histogram_kl": 1.5, "energy_distance": 1.5,
    "pairwise_cosine": 0.01, "class_entropy": 0.02,
}  # fmt: skip


@dataclass(frozen=True)
class Contest:
    """The paper's schedule of a recipe against `fast`, which is the recipe of that name with -fast.

    seeds: those that decide. measures: of quality; a target is reached where each of them reaches the best that the
    paper's schedule does. diversity: what must not be lost by it. ladders: by side, shares of its recipe's iterations.
    tuned: what is laid over the recipe on the paper's side, as its own tuning found best. levers: what the table of
    levers has, of LEVER_SEEDS, at `share` of the iterations, over the recipe of the side `levers_of` as it is; each is
    compared with the label `reference`, which is among them or a point of that side.
    """

    recipe: str
    seeds: range
    samples: int
    measures: tuple[Criterion, ...]
    diversity: tuple[Criterion, ...]
    ladders: Mapping[str, Sequence[float]]
    tuned: Mapping[str, Any]
    levers_of: str
    levers: Mapping[str, Mapping[str, Any]]
    reference: str
    share: float = 1.0

    def variants(self, side: str) -> dict[str, Variant]:
        overrides = self.tuned if side == PAPER else {}
        return {f"{side}, x {share:g}": Variant(None, overrides, share) for share in self.ladders[side]}

    def lever_variants(self) -> dict[str, Variant]:
        return {label: Variant(None, lever, self.share) for label, lever in self.levers.items()}

    def name(self, side: str) -> str:
        return f"{self.recipe}-fast" if side == FAST else self.recipe


def key(criterion: Criterion) -> str:
    """Returns the name that a criterion has in the figures."""
    return f"{criterion.table}/{criterion.name}"


SGTS = {  # as many updates in all; exits need it
    "plan.phases": 2, "plan.gradient": "last", "ablation.fake_rollout": "same", "iterations": 1000,
}  # fmt: skip
SHARES = {"phase_shares": [0.125, 0.125, 0.25, 3.5]}
SLOWER = {"generator.lr": 5e-4}
ALONE = {
    "none": {},
    "reuse": {"rollouts.reuse": True}, "antithetic start": {"rollouts.antithetic": "start"},
    "2 fake updates": {"fake.updates": 2}, "1 fake update": {"fake.updates": 1}, "pull": {"fake.pull": 1.0},
    "slower fake": {"fake.lr": 1e-3}, "slower generator": SLOWER, "shares": SHARES,
    "projected": {"objective": "projected"}, "Fisher": {"objective": "fisher"},
    "Fisher, stop gradient": {"objective": "fisher-stop-gradient"},
    "2 phases, SGTS": SGTS,
}  # fmt: skip
TOY = Contest(
    recipe="toy-2d", seeds=range(30, 38), samples=4000, measures=(Criterion("mixture", "distance_to_nearest_mode"),),
    diversity=(MODES, Criterion("mixture", "energy_distance")),
    ladders={PAPER: (0.25, 0.5, 0.75, 1.0), FAST: (0.5, 0.75, 1.0, 2.0, 4.0)},
    tuned=SHARES | SLOWER, levers_of=PAPER, levers=ALONE, reference="none", share=0.5,
)  # fmt: skip
LEFT_OUT = {
    "no reuse": {"rollouts.reuse": False}, "5 fake updates": {"fake.updates": 5}, "no pull": {"fake.pull": 0.0},
    "no antithetic start": {"rollouts.antithetic": None}, "normalised": {"objective": "normalised"},
    "equal phases": {"phase_shares": [1.0625] * 4},
}  # fmt: skip
NANO = Contest(
    recipe="nano-t2i", seeds=range(20, 25), samples=2000, measures=(FRECHET, Criterion("specific", "frechet_features")),
    diversity=DIVERSITY, ladders={PAPER: (0.5, 0.75, 1.0), FAST: (0.5, 0.75, 1.0, 2.0)},
    tuned={"generator.ema": 0.9, "fake.lr": 1.5e-4}, levers_of=FAST, levers=LEFT_OUT,
    reference="fast, x 0.5", share=0.5,
)  # fmt: skip
CONTESTS = (TOY, NANO)
