"""The claims that runs decide, as data: free of torch, so that the command can list them."""

from dataclasses import replace

from phased_dmd.lab.reproduce.ablations import ABLATIONS
from phased_dmd.lab.reproduce.arms import METHOD_TABLE
from phased_dmd.lab.reproduce.claim import (
    DMD,
    DMD_SGTS,
    DMD_SGTS_WIDE,
    LAW,
    MODES,
    ONE_STEP,
    PHASED,
    PHASED_SGTS,
    Claim,
    Criterion,
    Trial,
    Variant,
    trials,
)

METHODS = {
    "one-step DMD": ONE_STEP, "DMD": DMD, "DMD+SGTS": DMD_SGTS, "Phased+SGTS": PHASED_SGTS, "Phased": PHASED,
}  # fmt: skip
OVER_BASELINES = (
    ("Phased+SGTS", "DMD+SGTS"), ("Phased", "DMD+SGTS"), ("Phased+SGTS", "DMD"), ("Phased", "DMD"),
    ("DMD", "DMD+SGTS"),
)  # fmt: skip
DIVERSITY = (
    Criterion("weak", "pairwise_cosine", "closer"),
    Criterion("weak", "class_entropy", "closer"),
    Criterion("specific", "pairwise_cosine", "closer"),
)
MOTION = (
    Criterion("specific", "optical_flow", "higher"),
    Criterion("specific", "dynamic_degree", "higher"),
    Criterion("specific", "optical_flow", "closer"),
)
OF_SCENES = (LAW, Criterion("weak", "pairwise_cosine", "closer"), Criterion("specific", "pairwise_cosine", "closer"))
OF_MOVING_SCENES = (
    *MOTION, Criterion("specific", "speeds_right", "higher"), Criterion("weak", "world_speed", "closer"), LAW,
)  # fmt: skip
CLIP_MOTION = (
    Criterion("mixture", "clip_speed", "higher"),
    Criterion("mixture", "clip_speed", "closer"),
    Criterion("mixture", "speed_kl"),
)
WIDE = "DMD+SGTS, rank 64"  # the parameters of two experts of rank 32
TWO_NETWORKS = {"DMD+SGTS": DMD_SGTS, "Phased+SGTS": PHASED_SGTS, "Phased-all": Variant()}

IN_MOTION = (("Phased+SGTS", "DMD+SGTS"), ("Phased", "DMD+SGTS"))

TABLE2 = Claim(
    source="Table 2, Sec. 3.1",
    says="Phased DMD preserves the base's generative diversity better than vanilla DMD and DMD with SGTS; SGTS has "
    "slightly lower diversity than vanilla DMD.",
    evidence="Figures of DINOv3 and LPIPS on 21 prompts, 8 seeds each, of one run a method.",
    how="Weak: the prompt that leaves all open, where a generator may lose digits, and of scenes colours, places and "
    "counts too, whose law is known; specific: prompts that name all. Errors too look like diversity, so that closer "
    "to the base is better, and more than the base's is no merit. Two controls give DMD+SGTS the parameters of two "
    "experts: rank 64 where the others have 32, and nano-moe, whose two networks give both methods two experts, the "
    "paper's own argument with Wan2.2. Phased, of four experts, has four times the parameters of DMD+SGTS and no "
    "control of its own.",
    trials={
        **trials(METHODS, {"toy-2d": (MODES,), "exact-clips": (MODES,)}, OVER_BASELINES),
        "nano-t2i": Trial(DIVERSITY, METHODS | {WIDE: DMD_SGTS_WIDE}, (*OVER_BASELINES, ("Phased+SGTS", WIDE))),
        "scenes-t2i": Trial(OF_SCENES, METHODS, OVER_BASELINES),
        "nano-moe": Trial(DIVERSITY, TWO_NETWORKS, (("Phased+SGTS", "DMD+SGTS"), ("Phased-all", "DMD+SGTS"))),
    },
    paper={
        "": ("Wan2.1: DINOv3 ↓, LPIPS ↑", "Wan2.2, two networks", "Qwen-Image"),
        "base": (".708, .607", ".732, .531", ".907, .483"),
        "DMD": (".825, .522", "-", "-"),
        "DMD+SGTS": (".826, .521", ".828, .447", ".941, .309"),
        "Phased+SGTS": (".782, .544", ".768, .481", ".958, .322"),
    },
)

TABLE3 = Claim(
    source="Table 3, Appendix E.1",
    says="Phased DMD produces significantly stronger motion than DMD with SGTS, and so preserves the base's.",
    evidence="Figures of optical flow and VBench's dynamic degree on 220 prompts, seed 42, of one run a method.",
    how="Clips of nine frames: of a digit that moves as its prompt says, and of scenes of two or three that move each "
    "its own way before a camera that may pan, whose speeds are read. On scenes-moe, as on Wan2.2, both methods have "
    "two experts, one a network. Optical flow is in pixels of 32 a side; the dynamic degree scales VBench's threshold "
    "to them. Of the exact mixture's clips each has a speed, and all are as frequent, so that the true mean and shares "
    "are known; a sample's is that of the clip nearest to it. But on scenes-moe Phased+SGTS has twice the parameters "
    "of DMD+SGTS and Phased, of four experts, four times; there is no control of as many.",
    trials=trials(
        METHODS, {
            "scenes-t2v": OF_MOVING_SCENES, "exact-clips": CLIP_MOTION, "nano-t2v": MOTION, "nano-i2v": MOTION,
        }, IN_MOTION,
    ) | {"scenes-moe": Trial(OF_MOVING_SCENES, TWO_NETWORKS, IN_MOTION[:1])},
    paper={
        "": ("Wan2.2 T2V: flow ↑, dynamic degree in % ↑", "Wan2.2 I2V"),
        "base": ("10.26, 79.55", "9.32, 82.27"),
        "DMD+SGTS": ("3.23, 65.45", "7.87, 80.00"),
        "Phased+SGTS": ("9.30, 82.27", "9.84, 83.64"),
        "Phased": ("9.43, 83.18", "-"),
    },
)  # fmt: skip


def collapse_trial(criteria: tuple[Criterion, ...], factors: tuple[float, ...]) -> Trial:
    """Returns a trial of DMD+SGTS and Phased DMD at several factors on the updates, of which the last is the most."""
    methods = {"DMD+SGTS": DMD_SGTS, "Phased": PHASED}
    variants = {f"{m}, x {f:g}": replace(variant, updates=f) for m, variant in methods.items() for f in factors}
    least, most = factors[0], factors[-1]
    pairs = ((f"DMD+SGTS, x {least:g}", f"DMD+SGTS, x {most:g}"), (f"Phased, x {most:g}", f"DMD+SGTS, x {most:g}"))
    return Trial(criteria, variants, pairs)


COLLAPSE = Claim(
    source="Sec. 3.3",
    says="Under DMD diversity declines as training goes on; frozen experts of the low-SNR phases protect it.",
    evidence="By argument: reverse KL seeks modes. No figures.",
    how="Runs of their own at each number of updates, whose learning rate falls to zero at their end; x 1 is the "
    "budget of the other claims.",
    trials={
        "nano-t2i": collapse_trial(
            (Criterion("weak", "class_entropy", "closer"), Criterion("weak", "pairwise_cosine", "closer")),
            (0.25, 0.5, 1, 2),
        ),
        "toy-2d": collapse_trial((MODES,), (0.25, 0.5, 1)),
        "scenes-t2i": collapse_trial((LAW, Criterion("weak", "pairwise_cosine", "closer")), (1, 4)),
        "exact-clips": collapse_trial((MODES,), (1, 4)),
    },
    curves=True,
)

SHORT = 1 / 4  # of the iterations, as in the paper
FIG5 = Claim(
    source="Fig. 5, Sec. 3.3",
    says="Longer training of the last expert, on a frozen first one, changes lighting and texture and leaves the "
    "structure unchanged.",
    evidence="Pictures of Wan2.1 text-to-image after 100 and 400 iterations of the high-SNR expert. No figures.",
    how="From short training of the last phase, a quarter of its iterations, to long training, on one frozen first "
    "expert: 500 samples of the weak prompt with equal noise. A change is the energy of the difference of the grey "
    "pictures over that of the long training's, of structure below a quarter of the Nyquist frequency without the mean "
    "(lighting counts to the detail), of detail above half of it. Claimed: with a frozen first expert the structure "
    "changes less than in the control without one, and the detail more relative to it. The control, DMD+SGTS, is "
    "trained for a quarter of its updates, and for all.",
    trials=dict.fromkeys(
        ("nano-t2i", "scenes-t2i"),
        Trial(
            (Criterion("change", "structure"), Criterion("change", "detail_over_structure", "higher")),
            {
                "Phased+SGTS, short": replace(PHASED_SGTS, last=SHORT),
                "Phased+SGTS": PHASED_SGTS,
                "DMD+SGTS, short": replace(DMD_SGTS, updates=SHORT),
                "DMD+SGTS": DMD_SGTS,
            },
            (("Phased+SGTS", "DMD+SGTS"),),
        ),
    ),
)

TABLES = {"methods": METHOD_TABLE}  # a verdict a row
CLAIMS = {"table2": TABLE2, "table3": TABLE3, "fig5": FIG5, "collapse": COLLAPSE, **ABLATIONS}

STUDIES = {  # of a recipe by its methods, with all of its updates: tables without a verdict
    "toy-2d": {"dmd-sgts": DMD_SGTS, "phased-sgts": PHASED_SGTS, "phased": PHASED},
    "nano-t2i": {"dmd-sgts": DMD_SGTS, "phased": PHASED},
    "nano-t2v": {"phased": PHASED},
    "nano-moe": {"dmd-sgts": DMD_SGTS, "phased-sgts": PHASED_SGTS, "phased-all": Variant()},
    "nano-i2v": {"phased": Variant()},
}

ALONE = ("fig2", "memory")  # claims that no distillation decides
NAMES = (*ALONE, *CLAIMS, *TABLES, *STUDIES)
