"""The methods that are weighed side by side, and the worlds that weigh them. Data, free of torch."""

from typing import Any, NamedTuple

from phased_dmd.lab.reproduce.claim import DMD_SGTS, PHASED, PHASED_SGTS, Budget, Claim, Criterion, Trial, Variant


class Arm(NamedTuple):
    """An arm is a row of the table: what is laid over a recipe, and what is said of it."""

    variant: Variant
    says: str


def phased(**overrides: Any) -> Variant:
    """Returns Phased DMD, an expert a step, with other values; `fake__updates=1` overrides fake.updates."""
    return Variant("phased", {name.replace("__", "."): value for name, value in overrides.items()})


REFERENCE = "Phased"
POOL = {"rollouts__pool": 512}  # at nano's budget the default of 1024 would take half of the calls
TDM = {"ablation__target": "rollout", "objective": "public"}
# TDM departs from these rows in that one network has all steps, trained in turn, and in the weight of the fake's loss.
ARMS = {
    REFERENCE: Arm(PHASED, "the paper's, with an expert for each step"),
    "Phased+SGTS": Arm(PHASED_SGTS, "the paper's, with an expert for two steps"),
    "DMD+SGTS": Arm(DMD_SGTS, "the paper's baseline"),
    "TDM, disjoint": Arm(
        phased(**TDM, ablation__renoise="disjoint"),
        "TDM's own target (x_0 and noise as the rollout has them) and normaliser, t within the phase",
    ),
    "TDM, nested": Arm(phased(**TDM), "the same with t up to 1, TDM's option"),
    "TDM, as told": Arm(
        phased(ablation__renoise="disjoint", ablation__target="biased"),
        "the paper's account of TDM: x_s in the place of x_0, t within the phase",
    ),
    "PDMD": Arm(phased(objective="projected"), "the gradient without its part along the fake's own error"),
    "PDMD, one fake update": Arm(phased(objective="projected", fake__updates=1), "as PDMD's authors train"),
    "one fake update": Arm(phased(fake__updates=1), "the control of the row above"),
    "Fisher": Arm(phased(objective="fisher"), "the Fisher divergence within each subinterval"),
    "Fisher, stopped": Arm(phased(objective="fisher-stop-gradient"), "its form that stops at the teacher"),
    "anchored first phase": Arm(
        phased(anchor__updates=[10**6, 0, 0, 0], **POOL),
        "the first expert regresses the teacher's trajectories, and has no fake (DP-DMD)",
    ),
    "phases at once": Arm(
        phased(rollouts__start="teacher", **POOL), "phases that begin with the teacher's states, not the experts'"
    ),
}
WORLDS = {
    "toy-2d": (Criterion("mixture", "mode_histogram_kl"), Criterion("mixture", "distance_to_nearest_mode")),
    "nano-t2i": (Criterion("weak", "frechet_features"), Criterion("specific", "frechet_features")),
    "nano-moe": (Criterion("weak", "frechet_features"), Criterion("specific", "frechet_features")),
}
BUDGETS = {"toy-2d": Budget(5, 4000), "nano-t2i": Budget(5, 1000, 0.25), "nano-moe": Budget(5, 1000, 0.25)}

METHOD_TABLE = Claim(
    source="Not a claim of the paper",
    says="Phased DMD, the methods that it is compared with, and later ones in its phases, at equal cost.",
    evidence="None: nobody has published this table.",
    how="Equal in all rows: teacher, prompts, batch, seeds, learning rates, rank, and the forwards of a network that "
    "training and the pool of the teacher's trajectories take (a backward counts as one or two of them), as "
    "`phased-dmd plan` counts them. A method whose update takes more of them makes fewer updates. The rates are those "
    "that the recipes have for Phased; no row was tuned.",
    trials={
        recipe: Trial(
            criteria,
            {label: arm.variant for label, arm in ARMS.items()},
            tuple((label, REFERENCE) for label in ARMS if label != REFERENCE),
        )
        for recipe, criteria in WORLDS.items()
    },
)
