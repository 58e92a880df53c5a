"""Is what SGTS loses on exact-clips a want of parameters? DMD+SGTS with networks as large as two experts together.

`python benchmarks/capacity.py` distils exact-clips by DMD+SGTS with a student of six blocks, which has 1.1 times the
parameters of Phased+SGTS's two experts of two blocks each, and compares it with the rows of docs/results/table3.jsonl.
The blocks are no setting of a run, so that `phased-dmd` cannot go on with the runs or evaluate them; this script can.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch

from phased_dmd.lab.reproduce.claim import DMD_SGTS, FULL, MODES, Trial
from phased_dmd.lab.reproduce.claim_page import comparison_table
from phased_dmd.lab.reproduce.claims import CLIP_MOTION
from phased_dmd.lab.reproduce.results import summary_table, write_rows
from phased_dmd.lab.reproduce.study import plan_runs, rows_of, study_of
from phased_dmd.lab.reproduce.verdict import compare_pairs
from phased_dmd.lab.reproduce.workers import Workers
from phased_dmd.models import analytic
from phased_dmd.models.exact_clips import ClipTransformer

RESULTS = Path(__file__).parents[1] / "docs" / "results"
RECIPE, BLOCKS = "exact-clips", 6
LARGE = f"DMD+SGTS, {BLOCKS} blocks"
MEASURES = ("speed_kl", "clip_speed", "mode_histogram_kl", "energy_distance", "distance_to_nearest_mode")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(FULL[RECIPE].seeds))
    parser.add_argument("--runs", type=Path, default=Path("runs/capacity"))
    parser.add_argument("--output", type=Path, default=RESULTS / "capacity.jsonl")
    arguments = parser.parse_args()
    analytic.ClipTransformer = partial(ClipTransformer, layers=BLOCKS)  # type: ignore[misc] of this process alone
    variants, budget = {LARGE: DMD_SGTS}, FULL[RECIPE]
    planned = plan_runs(RECIPE, variants, budget, arguments.runs)
    runs = {(label, seed): run for (label, seed), run in planned.items() if seed in arguments.seeds}
    with Workers(1, print) as worker:
        worker.distill([*runs.values()])
        worker.evaluate([*runs.values()])
    # Without its config no row can be taken for one of a run by `phased-dmd`, whose network has two blocks.
    rows = [{key: row[key] for key in row if key != "config"} for row in rows_of(RECIPE, runs)]
    write_rows(arguments.output, rows)
    with (RESULTS / "table3.jsonl").open(encoding="utf-8") as file:
        others = [row for row in map(json.loads, file) if row["seed"] in arguments.seeds]
    study = study_of(RECIPE, budget, [*others, *rows])
    pairs = (("Phased+SGTS", LARGE), ("Phased", LARGE), (LARGE, "DMD+SGTS"))
    print(summary_table("mixture", study.summary["mixture"], MEASURES, study.sizes, study.nets))
    print(comparison_table(compare_pairs(RECIPE, Trial((*CLIP_MOTION, MODES), variants, pairs), study.summary)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
