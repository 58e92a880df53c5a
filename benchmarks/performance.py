"""What training costs beyond its network calls, and its health figures, what it holds in memory, what few steps save,
and what quality costs us and a peer.

python benchmarks/performance.py --output docs/results/performance      # one thread, on a quiet machine
"""

import argparse
import datetime
import json
import platform
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contests import CONTESTS
from cost import cost, levers
from cost_page import draw, show_cost, show_levers
from health_share import health_share, show_health
from overhead import overhead
from peer import MATCHES, PEER, peer
from peer_page import show_peer
from resident import resident
from sampling import sampling
from teachers import TWENTY_MILLION, make_teacher
from variance import variances

from phased_dmd.checkpoint import write_atomically
from phased_dmd.config import Config
from phased_dmd.config.teacher import Size
from phased_dmd.lab.reproduce.memory_study import update_bytes
from phased_dmd.plan import needs
from phased_dmd.recipes import resolve

UNDISTURBED = {"log_every": 1, "checkpoint_every": 10**6, "sample_every": 10**6}
STEPS = (1, 2, 4, 8)
FLOAT32, BFLOAT16 = 4, 2


def overheads(folder: Path) -> dict[str, Any]:
    nano = resolve("nano-t2i", {"iterations": 25, **UNDISTURBED})
    return {"nano": overhead(nano, folder / "nano"), "20m": overhead(twenty_million(15, folder), folder / "20m")}


def health_shares(folder: Path) -> dict[str, float]:
    seldom = {"log_every": 2}
    nano = resolve("nano-t2i", {"iterations": 10, **UNDISTURBED, **seldom})
    large = twenty_million(6, folder).model_copy(update=seldom)
    return {"nano": health_share(nano, folder / "nano"), "20m": health_share(large, folder / "20m")}


def twenty_million(iterations: int, folder: Path) -> Config:
    """Two phases of a Wan of 20 million parameters, made in the folder, on 8 pictures of 64 x 64."""
    make_teacher(folder / "teacher", TWENTY_MILLION)
    overrides = {"iterations": iterations, "batch_size": 8, "plan.phases": 2, "plan.steps": 2}
    config = resolve("nano-t2i", {**overrides, **UNDISTURBED})
    picture = (Size(num_frames=1, height=64, width=64),)
    teacher = config.teacher.model_copy(update={"path": str(folder / "teacher"), "sizes": picture})
    return config.model_copy(update={"teacher": teacher})


def memory() -> dict[str, Any]:
    """Saved bytes of a generator's update by the number of steps, and what is resident; of Wan 14B by the plan."""
    plain = {n: update_bytes(resolve("nano-t2i", {"plan.steps": n}, "dmd"))[0] for n in STEPS}
    phased = {n: max(update_bytes(resolve("nano-t2i", {"plan.steps": n, "plan.phases": n}))) for n in STEPS[1:]}
    wan = needs(resolve("wan21-t2i", {}), gpus=1, memory_gb=80)
    last, parameters = wan.phases[-1].memory, wan.parameters["teacher"]
    trained = FLOAT32 * (1 + 2)  # weights and both moments
    return {
        "saved": {"dmd": plain, "phased": phased}, "nano": resident(resolve("nano-t2i", {})),
        "wan21-14b": {
            "in_all": last.weights + last.optimiser, "three_copies": parameters * (BFLOAT16 + 2 * trained),
        },
    }  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["# Performance", "", f"`make bench`; {found['machine']}, one thread a process."]
    shown = {
        "overhead": show_overhead, "health": show_health, "memory": show_memory, "sampling": show_sampling,
        "variance": show_variance, "cost": show_cost, "levers": show_levers, PEER: show_peer,
    }  # fmt: skip
    for part in PARTS:
        if part in found["parts"]:
            show = shown[part.split()[0]]
            lines += ["", f"## {part.capitalize()}, {found['dates'][part]}", "", *show(found["parts"][part])]
    return "\n".join(lines) + "\n"


def show_overhead(found: Mapping[str, Any]) -> list[str]:
    lines = [
        "An iteration's time over that of the bare network calls that it must make, forward and backward; medians of "
        "pairs timed in turn.", "",
        "| model | phase | iteration, s | calls, s | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    return lines + [
        f"| {model} | {p['phase']:.0f} | {p['iteration']:.3f} | {p['calls']:.3f} | {p['ratio']:.3f} |"
        for model, phases in found.items()
        for p in phases
    ]


def show_memory(found: Mapping[str, Any]) -> list[str]:
    saved, mib = found["saved"], 2**20
    lines = ["What a generator's update saves for its backward, MiB.", ""]
    lines += ["| steps | DMD, all steps | Phased, the largest phase |", "|---|---|---|"]
    for n, size in saved["dmd"].items():
        own = f"{saved['phased'][n] / mib:.1f}" if n in saved["phased"] else ""
        lines.append(f"| {n} | {size / mib:.1f} | {own} |")
    lines += ["", "Weights and optimisers, beside a teacher, generator and fake of their own trained by AdamW.", ""]
    lines += ["| model | here, GB | three networks, GB |", "|---|---|---|"]
    return lines + [
        f"| {model} | {found[model]['in_all'] / 1e9:.3g} | {found[model]['three_copies'] / 1e9:.3g} |"
        for model in ("nano", "wan21-14b")
    ]


def show_sampling(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{found['steps']} steps without guidance take {found['student']:.3f} s, {found['base_steps']} with it "
        f"{found['base']:.2f} s: {found['ratio']:.1f} times (nano, {found['batch']} samples, the denoising loop alone; "
        "medians of pairs)."
    ]


def show_variance(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "The variance of a gradient over batches of nano, summed over the parameters, at the end of a short phase; of "
        "batches of pairs (`rollouts.antithetic`) over that of as many independent samples.", "",
        "| phase | fake, noise | fake, start | expert, start |", "|---|---|---|---|",
    ]  # fmt: skip
    return lines + [
        f"| {row['phase']} | {row['fake']['noise']:.2f} | {row['fake']['start']:.2f} | {row['expert']['start']:.2f} |"
        for row in found
    ]


RECIPES = {contest.recipe: contest for contest in CONTESTS}
PARTS = (
    "overhead", "health", "memory", "sampling", "variance",
    *(f"cost {recipe}" for recipe in RECIPES), *(f"levers {recipe}" for recipe in RECIPES),
    *(f"{PEER} {recipe}" for recipe in MATCHES),
)  # fmt: skip


def measure(part: str, folder: Path, runs: Path, output: Path, jobs: int) -> Any:
    match part.split():
        case ["overhead"]:
            return overheads(folder)
        case ["health"]:
            return health_shares(folder / "health")
        case ["memory"]:
            return memory()
        case ["sampling"]:
            return sampling(folder / "sampling")
        case ["variance"]:
            return variances(folder / "variance")
        case ["peer", recipe]:
            return peer(MATCHES[recipe], runs, output.parent, jobs)
        case [kind, recipe]:
            return (cost if kind == "cost" else levers)(RECIPES[recipe], runs, output.parent, jobs)


def keys(found: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures that are watched, of the parts that are there."""
    watched: dict[str, float | None] = {}
    for model, phases in found.get("overhead", {}).items():
        watched[f"overhead_{model}"] = max(p["ratio"] for p in phases)
    for model, share in found.get("health", {}).items():
        watched[f"health_share_{model}"] = share
    for recipe, contest in contests(found).items():
        name = short(recipe)
        watched |= {
            f"{unit.split('_')[-1]}_ratio_{name}": ratio for unit, ratio in contest["races"][0]["ratios"].items()
        }
    for recipe, match in matches(found).items():
        (race,) = match["races"]
        watched[f"peer_seconds_ratio_{short(recipe)}"] = race["ratios"]["cpu_seconds"]
        watched[f"peer_distance_ratio_{short(recipe)}"] = least(race["distances"].values())
        watched[f"peer_memory_ratio_{short(recipe)}"] = match["memory_ratio"]
    if "sampling" in found:
        watched["sampling_ratio_nano"] = found["sampling"]["ratio"]
    return watched


def short(recipe: str) -> str:
    return recipe.removesuffix("-t2i").replace("-", "")


def contests(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `cost` found, of the recipes that are there."""
    return {recipe: found[f"cost {recipe}"] for recipe in RECIPES if f"cost {recipe}" in found}


def matches(found: Mapping[str, Any]) -> dict[str, Any]:
    """What `peer` found, of the recipes that are there."""
    return {recipe: found[f"{PEER} {recipe}"] for recipe in MATCHES if f"{PEER} {recipe}" in found}


def least(values: Iterable[float | None]) -> float | None:
    found = list(values)
    return None if None in found else min(value for value in found if value is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance"))
    parser.add_argument("--part", choices=PARTS, action="append", help="these alone; the others stay as they are")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/bench"), help="of cost, levers and peer; finished ones stay"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes of cost, levers and peer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.output.with_suffix(".json")
    earlier = json.loads(path.read_text("utf-8")) if path.exists() else {}
    parts, dates = earlier.get("parts", {}), earlier.get("dates", {})
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.part or PARTS:
            parts[part] = measure(part, Path(folder), arguments.runs, arguments.output, arguments.jobs)
            dates[part] = f"{datetime.date.today()}"
            machine = f"{platform.machine()}, torch {torch.__version__}"
            found = json.loads(json.dumps({"machine": machine, **keys(parts), "dates": dates, "parts": parts}))
            write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
            write_atomically(path.with_suffix(".md"), page(found).encode())
            if drawn := contests(parts):
                draw(drawn, "calls", arguments.output.parent / "cost.png")
            if drawn := matches(parts):
                draw(drawn, "cpu_seconds", arguments.output.parent / "peer.png")


if __name__ == "__main__":
    main()
