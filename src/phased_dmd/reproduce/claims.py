"""The claims that runs decide, as data: free of torch, so that the command can list them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phased_dmd.config import Method


@dataclass(frozen=True)
class Variant:
    """What is laid over a recipe: dotted overrides and a method, which keeps the generator updates in all."""

    method: Method | None = None  # None: the recipe's own
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Variants of recipes with equal teacher, seeds and generator updates in all, and what is said of them.

    source, says: of the paper, or of this project's own notes where the paper has none. shown: the evidence given
    there. recipes: the measure that decides, {recipe: (table, measure)}. pairs: (better, worse) by label: the measure
    is claimed to be lower for the first.
    """

    source: str
    says: str
    shown: str
    recipes: Mapping[str, tuple[str, str]]
    variants: Mapping[str, Variant]
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Budget:
    """How much of everything: seeds 0, 1, ..., samples a cell, and the share of a recipe's generator updates."""

    seeds: int
    samples: int
    updates: float = 1.0


FULL = {
    "toy-2d": Budget(5, 4000), "nano-t2i": Budget(3, 1000), "nano-moe": Budget(3, 1000),
    "nano-t2v": Budget(3, 160), "nano-i2v": Budget(3, 160),
}  # fmt: skip
QUICK = {
    "toy-2d": Budget(1, 1000), "nano-t2i": Budget(1, 200, 0.2), "nano-moe": Budget(1, 200, 0.2),
    "nano-t2v": Budget(1, 64, 0.2), "nano-i2v": Budget(1, 64, 0.2),
}  # fmt: skip

MODES = ("mixture", "mode_histogram_kl")
FRECHET = ("weak", "frechet_features")
BOTH = {"toy-2d": MODES, "nano-t2i": FRECHET}

PHASED = Variant("phased")
PHASED_SGTS = Variant("phased-sgts")
DMD_SGTS = Variant("dmd-sgts")
FAKE_LORA = {  # as much room, and as large steps, as the generator's own adapter has in the recipe
    "fake.weights": "lora",
    "fake.lora.rank": 32,
    "fake.lora.alpha": 32,
    "fake.optimiser.lr": 1e-3,
}

CLAIMS = {
    "fig8": Claim(
        source="Fig. 8, Appendix E.2",
        says="Nested re-noise intervals (t_k, 1) give better samples than disjoint ones (t_k, t_{k-1}).",
        shown="Frames of Wan2.2 text-to-video: low contrast and degraded faces with disjoint intervals. No figures.",
        recipes=BOTH,
        variants={"nested": PHASED, "disjoint": Variant("phased", {"renoise.interval": "disjoint"})},
        pairs=(("nested", "disjoint"),),
    ),
    "tdm": Claim(
        source="Sec. 4, Appendix B",
        says="TDM's disjoint intervals, with x_s in the place of x_0 in the fake's objective, are incorrect.",
        shown="By argument, and by Fig. 8 for the intervals alone. No figures.",
        recipes=BOTH,
        variants={
            "Phased DMD": PHASED,
            "disjoint and biased": Variant("phased", {"renoise.interval": "disjoint", "objective.target": "biased"}),
        },
        pairs=(("Phased DMD", "disjoint and biased"),),
    ),
    "fig9": Claim(
        source="Fig. 9, Appendix E.2",
        says="Plain DMD with t fixed at .357 fails to converge; at .882 it gives correct results.",
        shown="Pictures of Wan2.1 text-to-image. No figures.",
        recipes=BOTH,
        variants={
            "all t": Variant("dmd"),
            "t = .882": Variant("dmd", {"renoise.fixed": 0.882}),
            "t = .357": Variant("dmd", {"renoise.fixed": 0.357}),
        },
        pairs=(("t = .882", "t = .357"),),
    ),
    "biased": Claim(
        source="Sec. 2.3.2, Appendix D",
        says="The fake must be trained by the unbiased objective within a subinterval, Eq. 13.",
        shown="Trajectories of a 1-D score model, Fig. 2, without distillation. No figures.",
        recipes=BOTH,
        variants={"unbiased": PHASED, "biased": Variant("phased", {"objective.target": "biased"})},
        pairs=(("unbiased", "biased"),),
    ),
    "eq13": Claim(
        source="Eq. 13, not a claim of the paper",
        says="As printed the equation lost a bracket, which turns the sign of x_s; corrected it gives better samples.",
        shown="None; Eq. 12 beside it has the bracket.",
        recipes=BOTH,
        variants={"corrected": PHASED, "as printed": Variant("phased", {"objective.target": "printed"})},
        pairs=(("corrected", "as printed"),),
    ),
    "clamp": Claim(
        source="Appendix C, of Wan2.2; not a claim of the paper",
        says="Where a switch bounds t, truncated draws give better samples than clamped ones, which pile up at it.",
        shown="None: the paper clamps, and compares with nothing.",
        recipes={"nano-moe": FRECHET},
        variants={"truncated": Variant(None, {"renoise.clamp": False}), "clamped": Variant()},
        pairs=(("truncated", "clamped"),),
    ),
    "sgts-fake": Claim(
        source="Sec. 2.2, SGTS; not a claim of the paper",
        says="The fake must learn from the same truncated rollouts as the generator: full ones bias its gradient.",
        shown="None: the paper does not say which it uses.",
        recipes=BOTH,
        variants={"same": PHASED_SGTS, "full": Variant("phased-sgts", {"plan.fake_rollout": "full"})},
        pairs=(("same", "full"),),
    ),
    "weighting": Claim(
        source="Eq. 11; not a claim of the paper",
        says="The normalised weighting gives better samples than Eq. 11's own and than that of public code.",
        shown="None: the paper has Eq. 11 only.",
        recipes=BOTH,
        variants={
            "normalised": PHASED,
            "paper": Variant("phased", {"objective.weighting": "paper"}),
            "public": Variant("phased", {"objective.weighting": "public"}),
        },
        pairs=(("normalised", "paper"), ("normalised", "public")),
    ),
    "fake-lora": Claim(
        source="Appendix C; not a claim of the paper",
        says="A fake trained in full, as the paper's, gives better samples than one of LoRA alone.",
        shown="None: the paper compares with nothing.",
        recipes={"nano-t2i": FRECHET},
        variants={"full": PHASED, "lora": Variant("phased", FAKE_LORA)},
        pairs=(("full", "lora"),),
    ),
}

STUDIES = {  # of a recipe by its methods: tables without a verdict
    "toy-2d": {"dmd-sgts": DMD_SGTS, "phased-sgts": PHASED_SGTS, "phased": PHASED},
    "nano-t2i": {"dmd-sgts": DMD_SGTS, "phased": PHASED},
    "nano-t2v": {"phased": PHASED},
    "nano-moe": {"dmd-sgts": DMD_SGTS, "phased-sgts": PHASED_SGTS, "phased-all": Variant()},
    "nano-i2v": {"phased": Variant()},
}

NAMES = ("fig2", "memory", *CLAIMS, *STUDIES)
