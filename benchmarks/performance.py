"""What training costs beyond its network calls, what it holds in memory, and what few steps save in sampling.

python benchmarks/performance.py --output docs/results/performance      # one thread, on a quiet machine
"""

import argparse
import datetime
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from overhead import overhead
from resident import resident
from sampling import sampling
from teachers import TWENTY_MILLION, make_teacher

from phased_dmd.checkpoint import write_atomically
from phased_dmd.plan import needs
from phased_dmd.recipes import resolve
from phased_dmd.reproduce.memory import update_bytes
from phased_dmd.teachers import Size

UNDISTURBED = {"log_every": 1, "checkpoint_every": 10**6, "sample_every": 10**6}
STEPS = (1, 2, 4, 8)
FLOAT32, BFLOAT16 = 4, 2


def overheads(folder: Path) -> dict[str, Any]:
    """nano as its recipe has it, and a Wan of 20 million parameters on 8 pictures of 64 x 64."""
    make_teacher(folder / "teacher", TWENTY_MILLION)
    nano = resolve("nano-t2i", {"iterations": 25, **UNDISTURBED})
    large = resolve("nano-t2i", {"iterations": 15, "batch_size": 8, "plan.phases": 2, "plan.steps": 2, **UNDISTURBED})
    picture = (Size(num_frames=1, height=64, width=64),)
    teacher = large.teacher.model_copy(update={"path": str(folder / "teacher"), "sizes": picture})
    large = large.model_copy(update={"teacher": teacher})
    return {"nano": overhead(nano, folder / "nano"), "20m": overhead(large, folder / "large")}


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


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = [
        "# Performance", "",
        f"`make bench`, {found['date']}; {found['machine']}. Medians of paired runs in one process of one thread.", "",
        "## Overhead", "",
        "An iteration's time over that of the bare network calls that it must make, forward and backward.", "",
        "| model | phase | iteration, s | calls, s | ratio |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for model, phases in found["overhead"].items():
        lines += [
            f"| {model} | {p['phase']:.0f} | {p['iteration']:.3f} | {p['calls']:.3f} | {p['ratio']:.3f} |"
            for p in phases
        ]
    saved, mib = found["memory"]["saved"], 2**20
    lines += ["", "## Memory", "", "What a generator's update saves for its backward, MiB.", ""]
    lines += ["| steps | DMD, all steps | Phased, the largest phase |", "|---|---|---|"]
    for n, size in saved["dmd"].items():
        own = f"{saved['phased'][n] / mib:.1f}" if n in saved["phased"] else ""
        lines.append(f"| {n} | {size / mib:.1f} | {own} |")
    lines += ["", "Weights and optimisers, beside a teacher, generator and fake of their own trained by AdamW.", ""]
    lines += ["| model | here, GB | three networks, GB |", "|---|---|---|"]
    for model in ("nano", "wan21-14b"):
        sizes = found["memory"][model]
        lines.append(f"| {model} | {sizes['in_all'] / 1e9:.3g} | {sizes['three_copies'] / 1e9:.3g} |")
    s = found["sampling"]
    lines += [
        "", "## Sampling", "",
        f"{s['steps']} steps without guidance take {s['student']:.3f} s, {s['base_steps']} with it {s['base']:.2f} s: "
        f"{s['ratio']:.1f} times (nano, {s['batch']} samples, the denoising loop alone).",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/performance"))
    output = parser.parse_args().output
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = {"overhead": overheads(Path(folder)), "sampling": sampling(Path(folder) / "sampling")}
    found = {
        "date": f"{datetime.date.today()}", "machine": f"{platform.machine()}, torch {torch.__version__}",
        **measured, "memory": memory(),
        "overhead_nano": max(p["ratio"] for p in measured["overhead"]["nano"]),
        "overhead_20m": max(p["ratio"] for p in measured["overhead"]["20m"]),
        "sampling_ratio_nano": measured["sampling"]["ratio"],
    }  # fmt: skip
    write_atomically(output.with_suffix(".json"), (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(output.with_suffix(".md"), page(found).encode())
    print(page(found))


if __name__ == "__main__":
    main()
