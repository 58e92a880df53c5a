"""Checks on a real GPU, in ten minutes at most, what the tests can only pretend; `make gpu`.

    python scripts/gpu.py                        # needs an NVIDIA GPU; writes docs/results/gpu.json and gpu.md
    python scripts/gpu.py --device cpu --tiny    # shows that the parts run; its figures say nothing of a GPU

Each part is a process of its own with a limit of time: what fails there is written down, and the next one begins.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-3  # of a loss or norm, relative, between two devices in float32
HALF = 0.05  # of a prediction in bfloat16, relative to float32's norm
PLANNED = 0.1  # of the peak of memory, relative to the plan
SMALL = {"iterations": 2, "batch_size": 4, "log_every": 1, "sample_every": "null", "fake.updates": 2}
ONE_PHASE = {"plan__phases": 1, "plan__gradient": "last", "iterations": 1}
TESTS = ["tests/networks", "tests/test_step.py", "tests/maths/test_rollout.py", "tests/engine/test_compile.py"]
TINY_TESTS = ["tests/networks/test_optim.py"]
CLIP, TINY_CLIP = (21, 480, 832), (1, 32, 32)  # frames, height and width of the large part's sample


class Check(NamedTuple):
    """Is a line of the table. found: a figure or words. most: what a figure may be at most; None for one to look at."""

    what: str
    found: float | str | None
    most: float | None = None

    @property
    def holds(self) -> bool:
        return self.most is None or (isinstance(self.found, float | int) and self.found <= self.most)


@dataclass(frozen=True)
class Setting:
    """Says where the parts compute and what they leave. work: a folder of this call's own."""

    device: str
    tiny: bool
    work: Path
    tflops: float

    def environment(self, device: str | None = None) -> dict[str, str]:
        """Returns the environment of a command on a device, this setting's by default; float32 is float32 there."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if (device or self.device) == "cpu" else {}
        return os.environ | {"NVIDIA_TF32_OVERRIDE": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | hidden


def command(words: Sequence[object], environment: dict[str, str]) -> None:
    """Runs a command in the repository; raises a RuntimeError with its last line if it fails."""
    done = subprocess.run([*map(str, words)], cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"exit status {done.returncode}: {lines[-1] if lines else 'without a word'}")


def distilled(
    setting: Setting, name: str, device: str | None = None, launcher: Sequence[str] = (), **more: Any
) -> Path:
    """Distils nano-t2i for some iterations in a process of its own; returns the run's folder. more: `__` for a dot."""
    run, sets = setting.work / name, []
    for key, value in (SMALL | {key.replace("__", "."): value for key, value in more.items()}).items():
        sets += ["--set", f"{key}={value}"]
    begin = launcher or [sys.executable]
    command([*begin, "-m", "phased_dmd", "distill", "nano-t2i", "--output", run, *sets], setting.environment(device))
    return run


def difference(one: Path, other: Path) -> float:
    """Returns the greatest relative difference of two runs' losses and norms."""
    rows = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()] for run in (one, other)
    )
    keys = ("fake_loss", "generator_loss", "fake_gradient_norm", "generator_gradient_norm")
    pairs = [(a[key], b[key]) for a, b in zip(*rows, strict=True) for key in keys]
    return max(abs(a - b) / (max(abs(a), abs(b)) or 1) for a, b in pairs)


# ---------------------------------------------------------------- the parts


def facts(setting: Setting) -> list[Check]:
    """Says what the machine is."""
    import torch

    found = [Check("Python, torch, CUDA", f"{platform.python_version()}, {torch.__version__}, {torch.version.cuda}")]
    if setting.device == "cpu":
        return [Check("device", "none: a CPU was asked for"), *found]
    about = torch.cuda.get_device_properties(0)
    memory = f"{about.total_memory / 1e9:.1f} GB, of which free {torch.cuda.mem_get_info()[0] / 1e9:.1f}"
    name = f"{about.name}, capability {about.major}.{about.minor}, {torch.cuda.device_count()} of them"
    return [Check("device", name), Check("its memory", memory), *found]


def nano(setting: Setting) -> list[Check]:
    """Trains the embedded teacher's generator on the device and on the CPU."""
    here, there = distilled(setting, "nano"), distilled(setting, "nano-cpu", "cpu")
    return [Check("metrics against the CPU's, relative", difference(here, there), TOLERANCE)]


def tests(setting: Setting) -> list[Check]:
    """Runs a part of the suite, whose tensors are on the device."""
    chosen = TINY_TESTS if setting.tiny else TESTS
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "--tb=no", *chosen]
    done = subprocess.run(words, cwd=ROOT, env=setting.environment(), capture_output=True, encoding="utf-8")
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout else "without a word"
    return [Check(f"`pytest {' '.join(chosen)}`: {last}", done.returncode, 0)]


def group(setting: Setting) -> list[Check]:
    """Trains in a group of one process, sharded and checkpointed, over NCCL on a GPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    alone = distilled(setting, "alone", **ONE_PHASE)
    grouped = distilled(setting, "grouped", launcher=launcher, engine__activation_checkpointing="true", **ONE_PHASE)
    return [Check("metrics under torchrun against those of no group, relative", difference(grouped, alone), TOLERANCE)]


def compiled(setting: Setting) -> list[Check]:
    """Trains with the blocks compiled by inductor."""
    plain, started = distilled(setting, "plain", **ONE_PHASE), time.perf_counter()
    found = difference(distilled(setting, "compiled", engine__compile="true", **ONE_PHASE), plain)
    seconds = round(time.perf_counter() - started, 1)
    return [Check("metrics against those of no compiler, relative", found, TOLERANCE), Check("seconds", seconds)]


def precision(setting: Setting) -> list[Check]:
    """Predicts by the embedded teacher in bfloat16 and in float32."""
    import torch

    from phased_dmd.networks.build import load_teacher
    from phased_dmd.recipes import resolve

    found = {}
    for dtype in ("float32", "bfloat16"):
        config = resolve("nano-t2i", {"teacher.dtype": dtype})
        model, codec = load_teacher(config)
        x = torch.randn(4, *model.sample_shapes[0], generator=torch.Generator().manual_seed(0))
        device = next(model.networks[0].parameters()).device
        t = torch.tensor([0.95, 0.7, 0.4, 0.1], dtype=torch.float64, device=device)
        condition = model.batch(codec.encode_text(["a handwritten seven"]) * 4)
        with torch.no_grad():
            found[dtype] = model.predict(model.networks[0], x.to(device), t, condition).float()
    error = (found["bfloat16"] - found["float32"]).norm() / found["float32"].norm()
    return [Check("bfloat16's predictions against float32's, relative", error.item(), HALF)]


def large(setting: Setting) -> list[Check]:
    """Trains a random teacher of Wan2.1-1.3B's shape for two iterations a phase: memory, seconds, utilisation."""
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from large import config_of, measure, shape_of  # type: ignore[import-not-found]
    from teachers import make_teacher  # type: ignore[import-not-found]

    from phased_dmd.config.teacher import Size

    asked = argparse.Namespace(iterations=2, batch=1, tiny=setting.tiny, eager=True)
    make_teacher(setting.work / "teacher", shape_of(setting.tiny), torch.bfloat16)
    config = config_of(setting.work / "teacher", asked)
    frames, height, width = TINY_CLIP if setting.tiny else CLIP
    size = Size(num_frames=frames, height=height, width=width)
    config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"sizes": (size,)})})
    memory = torch.cuda.mem_get_info()[1] / 1e9 if setting.device != "cpu" else 80
    found = measure(config, setting.work / "large", memory, setting.tflops)
    planned = max(phase["planned_gb"] for phase in found["phases"])
    checks = [Check("planned peak, GB", planned)]
    if (peak := found["peak_gb"]) is not None:
        checks += [Check("peak, GB", peak), Check("peak against plan, relative", abs(peak / planned - 1), PLANNED)]
    for phase in found["phases"]:
        name = f"phase {phase['phase']}"
        checks += [Check(f"{name}, seconds an iteration", phase["seconds_an_iteration"])]
        checks += [Check(f"{name}, utilisation of {setting.tflops:g} TFLOPS", phase["utilisation"])]
    return checks


def quantised(setting: Setting) -> list[Check]:
    """Trains on a base packed to nf4, on the device and on the CPU."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return [Check("nf4", "left out: bitsandbytes is not installed")]
    packed = {"teacher__quantise": "nf4", "fake__weights": "lora"}
    here, there = distilled(setting, "nf4", **packed), distilled(setting, "nf4-cpu", "cpu", **packed)
    return [Check("metrics against the CPU's, relative", difference(here, there), HALF)]


PARTS: dict[str, tuple[Callable[[Setting], list[Check]], int]] = {  # with the seconds that each may take: 600 in all
    "facts": (facts, 20), "nano": (nano, 80), "group": (group, 60), "compiled": (compiled, 110),
    "precision": (precision, 30), "large": (large, 150), "quantised": (quantised, 70), "tests": (tests, 80),
}  # fmt: skip


# ---------------------------------------------------------------- all of them, and the page


def attempt(name: str, setting: Setting, limit: float) -> dict[str, Any]:
    """Runs a part in a process of its own; returns its checks, or what it failed with."""
    words = [sys.executable, __file__, "--part", name, "--device", setting.device, "--work", str(setting.work)]
    words += ["--tflops", str(setting.tflops), *["--tiny"] * setting.tiny]
    environment, started = setting.environment(), time.perf_counter()
    process = subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", start_new_session=True
    )  # fmt: skip
    try:
        said, complained = process.communicate(timeout=limit)
        lines = complained.strip().splitlines()
        failed = None if process.returncode == 0 else (lines[-1] if lines else f"exit status {process.returncode}")
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started: the session is its own
        process.communicate()
        said, failed = "", f"did not end within {limit:g} seconds"
    checks = [] if failed else json.loads(said.splitlines()[-1])
    return {"part": name, "seconds": round(time.perf_counter() - started, 1), "failed": failed, "checks": checks}


def passed(found: dict[str, Any]) -> bool:
    """Says whether every part ended, and every figure is within its bound."""
    return all(
        part["failed"] is None and all(Check(*check).holds for check in part["checks"]) for part in found["parts"]
    )


def page(found: dict[str, Any]) -> str:
    """Returns what was found as Markdown."""
    about = found["commit"] + (", with changes" if found["changed"] else "")
    options = "" if found["on_device"] else " --device cpu"
    options += " --tiny" if found["tiny"] else ""
    lines = ["# On a GPU", "", f"`python scripts/gpu.py{options}`, {found['date']}, commit {about}.", ""]
    if not found["on_device"]:
        lines += [
            "**This was not run on a GPU.** The parts ran on a CPU, to show that they run at all; no figure below says",
            "anything of a GPU. `make gpu` on a machine with one writes this page anew.", "",
        ]  # fmt: skip
    lines += ["| part | | found | at most | |", "|---|---|---|---|---|"]
    for part in found["parts"]:
        name = f"{part['part']}, {part['seconds']} s"
        if part["failed"] is not None:
            lines.append(f"| {name} | | {part['failed'].replace('|', '/')} | | failed |")
        for what, value, most in part["checks"]:
            shown = f"{value:.3g}" if isinstance(value, float) else value
            verdict = "" if most is None else "holds" if Check(what, value, most).holds else "does not hold"
            lines.append(f"| {name} | {what} | {shown} | {'' if most is None else f'{most:g}'} | {verdict} |")
    return "\n".join([*lines, "", "[gpu.md](../gpu.md) says what each part is.", ""])


def git(*words: str) -> str:
    """Returns what git says of the repository, or nothing where there is none."""
    done = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, encoding="utf-8")
    return done.stdout.strip()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes")
    parser.add_argument("--tflops", type=float, default=989, help="the GPU's dense peak in bfloat16 [989, an H100's]")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="for gpu.json and gpu.md")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process; prints its checks
    parser.add_argument("--work", type=Path, default=Path(), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    asked = arguments()
    setting = Setting(asked.device, asked.tiny, asked.work, asked.tflops)
    if asked.part:
        print(json.dumps(PARTS[asked.part][0](setting)))
        return
    import torch

    on_device = asked.device != "cpu"
    if on_device and not torch.cuda.is_available():
        sys.exit("make gpu: this machine has no NVIDIA GPU that torch can use")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        setting, slower = replace(setting, work=Path(folder).resolve()), 1 if on_device else 3
        parts = [attempt(name, setting, slower * PARTS[name][1]) for name in asked.only]
    found = {
        "on_device": on_device, "tiny": asked.tiny, "date": time.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD"), "changed": bool(git("status", "--porcelain", "--", "src")),
        "parts": parts,
    }  # fmt: skip
    asked.output.mkdir(parents=True, exist_ok=True)
    (asked.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    (asked.output / "gpu.md").write_text(page(found), "utf-8")
    print(page(found))
    sys.exit(not passed(found))


if __name__ == "__main__":
    main()
