"""Which rollouts should feed the fake under SGTS: the sampler's laws by `ablation.fake_rollout`, over seeds.

    python benchmarks/exits.py run RUNS [--policies full,same] [--recipes toy-2d,nano-t2i] [--seeds 200,201,202,203,204]
    python benchmarks/exits.py table RUNS

A run that is there is not done again. Each training seed is evaluated on noise of its own.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from phased_dmd.lab.evaluate.measures import mixture_statistics
from phased_dmd.lab.metrics.digit_classifier import WORDS, classify, load_classifier
from phased_dmd.lab.metrics.distances import frechet, moments
from phased_dmd.lab.metrics.intervals import interval, ratio
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.train import distill

CASES = {"toy-2d": ("dmd-sgts", "phased-sgts"), "nano-t2i": ("phased-sgts",)}  # the methods on each recipe
UPDATES = {"toy-2d": 250, "nano-t2i": 60}  # `--iterations`: half of the recipe's
POINTS, PICTURES = 4000, 1000  # samples of a run; of pictures for each of the two kinds of prompt
NOISE = 10_000_000  # seeds between the samples of two training seeds, and the base's first one times a hundred
PROMPTS = {"weak": ["a handwritten digit"], "specific": [f"a handwritten {word}" for word in WORDS]}


def measure_sampler(sampler: Sampler, seed: int, runs: Path) -> dict[str, float]:
    """The sampler's figures on noise that no other training seed is evaluated on."""
    first = seed * NOISE
    if not sampler.system.model.guidance[0] > 1:
        points = sampler.decode(sampler([""] * POINTS, range(first, first + POINTS)))
        found = mixture_statistics(points, sampler.system.model.networks[0])
        return {name: statistic(torch.arange(POINTS)) for name, statistic in found.items()}
    reader, row = load_classifier()[0], {}
    for name, prompts in PROMPTS.items():
        asked = (prompts * PICTURES)[:PICTURES]
        base = runs / f"base-{name}.pt"
        if not base.exists():
            torch.save(features(reader, sampler, asked, range(100 * NOISE, 100 * NOISE + PICTURES), 40), base)
        own = features(reader, sampler, asked, range(first, first + PICTURES))
        row[f"frechet {name}"] = frechet(moments(own), moments(torch.load(base, weights_only=True)))
    return row


def features(reader: Any, sampler: Sampler, prompts: list[str], seeds: range, steps: int | None = None) -> Tensor:
    return classify(reader, sampler.decode(sampler(prompts, seeds, steps)))[0]


def run(runs: Path, policies: list[str], recipes: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for recipe in recipes:
            for method in CASES[recipe]:
                for policy in policies:
                    folder = runs / f"{recipe}-{method}-{policy}-{seed}"
                    if (folder / "exits.json").exists():
                        continue
                    overrides = {"iterations": UPDATES[recipe], "seed": seed, "ablation.fake_rollout": policy}
                    overrides |= {"sample_every": None, "checkpoint_every": 10**6}
                    started = time.process_time()
                    distill(resolve(recipe, overrides, method), folder, quiet=True)
                    row = measure_sampler(load(folder), seed, runs) | {"cpu_seconds": time.process_time() - started}
                    (folder / "exits.json").write_text(json.dumps(row), encoding="utf-8")
                    print(folder.name, {name: round(value, 4) for name, value in row.items()}, flush=True)


def table(runs: Path) -> None:
    """Means over the seeds with their 95 % intervals, and ratios of the other policies to `full` of equal seeds."""
    rows: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for path in sorted(runs.glob("*/exits.json")):
        case, policy, seed = path.parent.name.rsplit("-", 2)
        rows.setdefault((case, policy), {})[int(seed)] = json.loads(path.read_text(encoding="utf-8"))
    for (case, policy), by_seed in rows.items():
        for name in next(iter(by_seed.values())):
            found = interval([row[name] for row in by_seed.values()])
            line = f"{case} {policy}: {name} {found['mean']:.4g} ± {found['half_width'] or math.nan:.2g}"
            full = rows.get((case, "full"), {})
            both = sorted(full.keys() & by_seed.keys())
            if policy != "full" and len(both) > 1 and name != "cpu_seconds":
                r = ratio([by_seed[seed][name] for seed in both], [full[seed][name] for seed in both])
                line += f"; over full's {r['value']:.3g} ({r['low']:.3g} to {r['high']:.3g}), {len(both)} seeds"
            print(line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--policies", default="full,same")
    parser.add_argument("--recipes", default="toy-2d,nano-t2i")
    parser.add_argument("--seeds", default="200,201,202,203,204")
    given = parser.parse_args()
    if given.what == "table":
        table(given.runs)
    else:
        run(given.runs, given.policies.split(","), given.recipes.split(","), list(map(int, given.seeds.split(","))))
