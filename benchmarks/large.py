"""A random teacher of Wan2.1-1.3B's shape through `distill`: time, peak memory beside the plan's, utilisation.

    python benchmarks/large.py --output docs/results/large            # one GPU: bfloat16, checkpointing, compiled
    torchrun --nproc-per-node 8 benchmarks/large.py --batch 8 ...     # as many as there are

The pipeline is nano's but for the transformer, whose weights are random: no download. Latents are of 81 x 480 x 832.
`--tiny` has the same run on a CPU, to see that it works; its figures say nothing.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from teachers import make_teacher

from phased_dmd.config import Config, Engine, Plan
from phased_dmd.config.teacher import Size
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.engine.world import device, processes, world_size
from phased_dmd.models.source import architecture
from phased_dmd.plan import needs
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
CLIP, TINY_CLIP = Size(num_frames=81, height=480, width=832), Size(num_frames=1, height=32, width=32)


def shape_of(tiny: bool) -> dict[str, Any]:
    """The base's transformer, or a tiny one with its other fields."""
    shipped = architecture(BASE)
    assert shipped is not None
    shape = json.loads((shipped / "transformer" / "config.json").read_text("utf-8"))
    return (
        shape | {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32} if tiny else shape
    )


def config_of(folder: Path, arguments: argparse.Namespace) -> Config:
    """The recipe of that size on that teacher: two phases, few iterations."""
    config = resolve(
        "wan21-t2v-1.3b", {"iterations": arguments.iterations, "batch_size": arguments.batch, "log_every": 1}
    )
    teacher = config.teacher.model_copy(update={"path": str(folder), "sizes": (TINY_CLIP if arguments.tiny else CLIP,)})
    engine = Engine(micro_batch=1, activation_checkpointing=True, compile=not arguments.eager)
    never = {"checkpoint_every": 10**6, "sample_every": 10**6}
    return config.model_copy(update={"teacher": teacher, "engine": engine, "plan": Plan(phases=2), **never})


def measure(config: Config, run: Path, memory_gb: float, tflops: float) -> dict[str, Any]:
    """Distils, and sets what was measured beside the plan; the first third of the iterations warms up."""
    on_gpu = device().type != "cpu"
    started = time.perf_counter()
    distill(config, run)
    planned = needs(config, world_size(), memory_gb, tflops=tflops)
    rows = [json.loads(line) for line in (run / "timing.jsonl").read_text("utf-8").splitlines()]
    phases = []
    for cost in planned.phases:
        seconds = sorted(row["seconds"] for row in rows if row["phase"] == cost.phase)
        warm = [row["seconds"] for row in rows if row["phase"] == cost.phase][len(seconds) // 3 :]
        median = sorted(warm)[len(warm) // 2]
        phases.append({
            "phase": cost.phase, "seconds_an_iteration": median, "first_iteration": rows[0]["seconds"],
            "petaflop_an_iteration": cost.iteration_flops / 1e15,
            "utilisation": cost.iteration_flops / median / (tflops * 1e12 * world_size()),
            "planned_gb": cost.memory.gpu / 1e9,
        })  # fmt: skip
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "processes": world_size(),
        "torch": torch.__version__, "batch_size": config.batch_size, "size": str(config.teacher.sizes[0]),
        "compiled": config.engine.compile, "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "seconds_in_all": time.perf_counter() - started, "phases": phases,
    }  # fmt: skip


def write(found: dict[str, Any], output: Path) -> None:
    """The figures as JSON and as a table."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    head = "| phase | s an iteration | PFLOP | utilisation | planned GB |\n|---|---|---|---|---|\n"
    lines = "".join(
        f"| {p['phase']} | {p['seconds_an_iteration']:.2f} | {p['petaflop_an_iteration']:.2f} | "
        f"{100 * p['utilisation']:.1f} % | {p['planned_gb']:.1f} |\n"
        for p in found["phases"]
    )
    about = "".join(f"- {key}: {value}\n" for key, value in found.items() if key != "phases")
    output.with_suffix(".md").write_text(
        f"# A Wan2.1-1.3B-shaped random teacher\n\n`python benchmarks/large.py`\n\n{head}{lines}\n{about}",
        "utf-8",
    )
    print(output.with_suffix(".md").read_text("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/large"))
    parser.add_argument("--work", type=Path, default=Path("runs/large"), help="for the teacher and the run")
    parser.add_argument("--iterations", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1, help="global")
    parser.add_argument("--memory-gb", type=float, default=80)
    parser.add_argument("--tflops", type=float, default=989, help="the GPU's dense peak in bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    with processes():
        run_on_first_rank(lambda: make_teacher(arguments.work / "teacher", shape_of(arguments.tiny), torch.bfloat16))
        config = config_of(arguments.work / "teacher", arguments)
        found = measure(config, arguments.work / "run", arguments.memory_gb, arguments.tflops)
        run_on_first_rank(lambda: write(found, arguments.output))


if __name__ == "__main__":
    main()
