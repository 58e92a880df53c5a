"""The claims on what Phased DMD is made of: one part of it replaced, all else equal. Data, free of torch."""

from phased_dmd.lab.reproduce.claim import DMD, EVERYWHERE, FRECHET, PHASED, PHASED_SGTS, Claim, Variant, trials

FAKE_LORA = {  # as much room, and as large steps, as the generator's own adapter has in the recipe
    "fake.weights": "lora", "fake.lora.rank": 32, "fake.lora.alpha": 32, "fake.lr": 1e-3,
}  # fmt: skip
DISJOINT = {"ablation.renoise": "disjoint"}
BIASED = {"ablation.target": "biased"}
IN_THE_LOG = '[the log](../LOG.md), "Why do a biased target and disjoint intervals do no harm on toy-2d?"'

ABLATIONS = {
    "fig8": Claim(
        source="Fig. 8, Appendix E.2",
        says="Nested re-noise intervals (t_k, 1) give better samples than disjoint ones (t_k, t_{k-1}).",
        evidence="Frames of Wan2.2 text-to-video: low contrast and degraded faces with disjoint intervals. No figures.",
        trials=trials({"nested": PHASED, "disjoint": Variant("phased", DISJOINT)}, EVERYWHERE),
        why_not={
            "toy-2d": "With exact fakes and experts that can make any state disjoint intervals do no harm in any phase "
            "(KL of .003, nested .005): the mixture's modes are seen at every noise level. So it is this world, and "
            f"not the budget: {IN_THE_LOG}.",
        },
    ),
    "tdm": Claim(
        source="Sec. 4, Appendix B",
        says="TDM's disjoint intervals, with x_s in the place of x_0 in the fake's objective, are incorrect.",
        evidence="By argument, and by Fig. 8 for the intervals alone. No figures.",
        trials=trials({"Phased DMD": PHASED, "disjoint and biased": Variant("phased", DISJOINT | BIASED)}, EVERYWHERE),
        why_not={
            "toy-2d": "With exact fakes and experts that can make any state both together leave a KL of .012 instead "
            f"of .005: a harm, and less than seeds of the networks lie apart. So it is this world: {IN_THE_LOG}.",
        },
    ),
    "fig9": Claim(
        source="Fig. 9, Appendix E.2",
        says="Plain DMD with t fixed at .357 gives worse samples than at .882 or with all t; the paper: it fails to "
        "converge, where .882 gives correct results.",
        evidence="Pictures of Wan2.1 text-to-image. No figures.",
        trials=trials(
            {
                "all t": DMD,
                "t = .882": Variant("dmd", {"ablation.renoise": 0.882}),
                "t = .357": Variant("dmd", {"ablation.renoise": 0.357}),
            },
            pairs=(("t = .882", "t = .357"), ("all t", "t = .357")),
        ),
    ),
    "biased": Claim(
        source="Sec. 2.3.2, Appendix D",
        says="The fake must be trained by the unbiased objective within a subinterval, Eq. 13.",
        evidence="Trajectories of a 1-D score model, Fig. 2, without distillation. No figures.",
        trials=trials({"unbiased": PHASED, "biased": Variant("phased", BIASED)}, EVERYWHERE),
        why_not={
            "toy-2d": "The bias does its harm before the last phase, which undoes it: with exact fakes and experts "
            "that can make any state the first phase ends .61 as wide as it should; of what the last phase begins "
            "from, the teacher's own flow makes samples with a KL of .069 instead of .004, and the last expert with "
            "the .005 of the unbiased target. So it is this world, whose last expert can mend all, and not the budget: "
            f"{IN_THE_LOG}.",
        },
    ),
    "eq13": Claim(
        source="Eq. 13, not a claim of the paper",
        says="As printed the equation lost a bracket, which turns the sign of x_s; corrected it gives better samples.",
        evidence="None; Eq. 12 beside it has the bracket.",
        trials=trials({"corrected": PHASED, "as printed": Variant("phased", {"ablation.target": "printed"})}),
    ),
    "clamp": Claim(
        source="Appendix C, of Wan2.2; not a claim of the paper",
        says="Where a switch bounds t, truncated draws give better samples than clamped ones, which pile up at it.",
        evidence="None: the paper clamps, and compares with nothing.",
        trials=trials(
            {"truncated": Variant(None, {"renoise.above_switch": "truncate"}), "clamped": Variant()},
            {"nano-moe": (FRECHET,)},
        ),
    ),
    "networks": Claim(
        source="Sec. 2.3.1 on a teacher of two networks; not a claim of the paper",
        says="Each sample's own draw of the network that scores it gives better samples than one draw for an update.",
        evidence="None: the paper does not say how its processes draw.",
        trials=trials(
            {"sample": Variant(), "update": Variant(None, {"renoise.network": "update"})}, {"nano-moe": (FRECHET,)}
        ),
    ),
    "sgts-fake": Claim(
        source="Sec. 2.2, SGTS; not a claim of the paper",
        says="The fake must learn from the same truncated rollouts as the generator: full ones bias its gradient.",
        evidence="None: the paper does not say which it uses.",
        trials=trials(
            {"same": Variant("phased-sgts", {"ablation.fake_rollout": "same"}), "full": PHASED_SGTS}, EVERYWHERE
        ),
    ),
    "weighting": Claim(
        source="Eq. 11; not a claim of the paper",
        says="The normalised weighting gives better samples than Eq. 11's own and than that of public code.",
        evidence="None: the paper has Eq. 11 only.",
        trials=trials(
            {
                "normalised": PHASED,
                "paper": Variant("phased", {"objective": "paper"}),
                "public": Variant("phased", {"objective": "public"}),
            }
        ),
    ),
    "fake-lora": Claim(
        source="Appendix C; not a claim of the paper",
        says="A fake trained in full, as the paper's, gives better samples than one of LoRA alone.",
        evidence="None: the paper compares with nothing.",
        trials=trials({"full": PHASED, "lora": Variant("phased", FAKE_LORA)}, {"nano-t2i": (FRECHET,)}),
    ),
}
