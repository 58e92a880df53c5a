"""One run of tuning of the peer: trains it with given options, evaluates it, and adds a line to a file.

python benchmarks/tune_peer.py nano-t2i 60 lr=1e-3 fake_lr=1.5e-4 lora=32 sample_type=sde --seed 100 --samples 512
"""

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from cost import cpu_seconds
from modelopt_dmd2 import train
from peer import MATCHES, Options

from phased_dmd.checkpoint import RunFolder
from phased_dmd.lab.evaluate import Protocol, evaluate


def tuned(recipe: str, options: Options, updates: int, seed: int, samples: int, runs: Path) -> dict[str, Any]:
    """Returns a run's options, its cost, and the measures of its recipe; a finished run is not trained again."""
    config = options.config(recipe, updates, seed)
    run = RunFolder(runs / "-".join([config.recipe, options.tag(), f"{updates}", f"{seed}"]))
    if not run.finished(config):
        train(config, options, run.path)
    (found,) = evaluate([run.path], Protocol(samples=samples)).values()
    measured = {}
    for m in (*MATCHES[recipe].contest.measures, *MATCHES[recipe].contest.diversity):
        *_, row = found["sets"][m.table]["rows"].values()  # the bases' come before it
        measured[f"{m.table}/{m.name}"] = round(row[m.name]["value"], 5)
    return {
        "recipe": recipe, "seed": seed, "samples": samples, "updates": updates, "options": asdict(options),
        "forwards": options.forwards(config), "cpu_seconds": round(cpu_seconds(run.path), 1), **measured,
    }  # fmt: skip


def parsed(option: str) -> tuple[str, Any]:
    """Returns the name and the value of name=value; what is no JSON is a word."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=MATCHES)
    parser.add_argument("updates", type=int)
    parser.add_argument("options", nargs="+", help=f"name=value of {', '.join(f.name for f in fields(Options))}")
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--runs", type=Path, default=Path("runs/tuning"))
    parser.add_argument("--output", type=Path, default=Path("docs/results/cost/peer-tuning.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = Options(**dict(map(parsed, arguments.options)))
    row = tuned(arguments.recipe, options, arguments.updates, arguments.seed, arguments.samples, arguments.runs)
    print(json.dumps(row))
    with arguments.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
