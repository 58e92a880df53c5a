"""Proves that two versions of the package train the same, byte for byte, before and after a change that should not
matter: `same_bytes.py BEFORE AFTER`, each of them a commit, or a checkout as it is now, changes and all.

Both versions run the command `python -m phased_dmd distill ...` for each line of TABLE, all options of training in
small runs, on CPU and offline; the experts and metrics.jsonl that they leave are compared. A line with processes=2 runs
under torchrun; with stopped=true AFTER is stopped between two updates of a cycle and goes on, BEFORE is not.

The table names fields as BEFORE does. Where AFTER calls one otherwise, RENAMED or --renamed says so: by the field's
name, or by "field=value" where the value has changed too; null means that there is no such option any more, and leaves
its lines out. With --cache, what a commit ends with as BEFORE is kept for the next time.
"""

import argparse
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

RENAMED: dict[str, str | None] = {
    "plan.solver": "ablation.solver", "plan.fake_rollout": "ablation.fake_rollout",
    "objective.target": "ablation.target", "renoise.interval": "ablation.renoise", "renoise.fixed": "ablation.renoise",
    "objective.weighting": "objective", "objective.divergence": "objective",
    "renoise.above_switch=false": "renoise.above_switch=null",
    "renoise.above_switch=true": "renoise.above_switch=clamp",
    "renoise.clamp=false": "renoise.network=sample", "renoise.clamp": None, "renoise.t_range": None,
    "renoise.sort": None, "engine.batched_guidance": None,
    "generator.optimiser.lr": "generator.lr", "fake.optimiser.lr": "fake.lr",
    **{f"{role}.optimiser.{field}": f"optimiser.{field}"
       for role in ("generator", "fake") for field in ("decay", "clip", "second_moment")},
}  # fmt: skip
SMALL = "iterations=2 batch_size=4 log_every=1 sample_every=null fake.updates=2 "
SMALL_TOY = SMALL + "teacher.fit_steps=20"
SMALL_NANO = SMALL + "generator.lora.rank=2"
TABLE = """
toy-1d
toy-2d
toy-2d-fast
nano-t2i
nano-t2i-fast
nano-t2v
nano-moe
nano-i2v

toy-1d plan.steps=4 method=dmd
toy-1d plan.steps=4 method=dmd-sgts
toy-1d plan.steps=4 method=phased
toy-1d plan.steps=4 method=phased-sgts
toy-2d method=dmd-sgts seed=1 engine.micro_batch=2
nano-t2i method=phased-sgts
nano-moe method=dmd-sgts
nano-moe plan.gradient=last

toy-1d plan.solver=renoise
toy-2d plan.solver=renoise method=phased-sgts
nano-t2i plan.solver=renoise method=dmd-sgts
toy-1d plan.steps=4 method=phased-sgts plan.fake_rollout=full
toy-1d plan.steps=4 method=phased-sgts plan.fake_rollout=same

toy-1d engine.micro_batch=1
toy-2d rollouts.reuse=true
toy-2d rollouts.reuse=true engine.micro_batch=2
toy-1d plan.steps=4 rollouts.reuse=true method=phased-sgts
toy-1d plan.steps=4 rollouts.reuse=true method=phased-sgts plan.fake_rollout=same plan.solver=renoise
nano-t2i rollouts.reuse=true engine.micro_batch=2 method=phased-sgts
toy-2d rollouts.antithetic=start
toy-2d rollouts.antithetic=start engine.micro_batch=2 fake.pull=0.5
nano-moe renoise.sort=true engine.micro_batch=2 rollouts.antithetic=start

toy-1d objective.target=biased
toy-1d objective.target=printed
toy-1d objective.weighting=normalised
toy-2d objective.weighting=paper
toy-2d objective.weighting=posterior
toy-2d objective.weighting=public
toy-2d objective.divergence=fisher
toy-2d objective.divergence=fisher-stop-gradient method=phased-sgts
nano-moe objective.divergence=fisher engine.micro_batch=2
nano-t2i objective.divergence=fisher-stop-gradient engine.batched_guidance=true
toy-1d renoise.interval=disjoint
toy-1d renoise.fixed=0.9
toy-1d renoise.t_range=[0.2,0.9]
toy-1d renoise.t_range=[0.2,0.9] renoise.clamp=true
toy-2d renoise.sort=true engine.micro_batch=2
nano-moe renoise.above_switch=false renoise.clamp=false
toy-1d teacher.schedule=vp-cosine teacher.prediction=v
toy-1d teacher.schedule=vp-linear teacher.prediction=eps
toy-1d teacher.schedule=ve teacher.prediction=x0

toy-1d fake.pull=1.0 fake.updates=1
toy-1d phase_shares=[1,1.5]
toy-1d generator.ema=0.9 sample_every=1 checkpoint_every=1
toy-1d generator.optimiser.clip=0.01 fake.optimiser.clip=0.01 skips=1
toy-1d generator.optimiser.decay=constant fake.optimiser.decay=constant
toy-1d generator.optimiser.second_moment=bfloat16 fake.optimiser.second_moment=bfloat16
nano-t2i fake.weights=lora fake.lora.rank=2 generator.ema=null
nano-t2i generator.weights=full generator.optimiser.second_moment=bfloat16 fake.optimiser.second_moment=bfloat16
nano-t2i engine.batched_guidance=true
nano-t2i engine.activation_checkpointing=true teacher.dtype=bfloat16
nano-moe engine.activation_checkpointing=true engine.batched_guidance=true fake.pull=0.5

toy-1d processes=2 plan.steps=4 method=phased-sgts rollouts.reuse=true rollouts.antithetic=start
nano-t2i processes=2 method=phased-sgts
nano-moe processes=2 engine.micro_batch=1 fake.pull=1.0 engine.activation_checkpointing=true
toy-1d stopped=true iterations=12 fake.updates=7 plan.steps=4 method=phased-sgts plan.solver=renoise generator.ema=0.9
toy-2d-fast stopped=true iterations=12 fake.updates=7 engine.micro_batch=2
nano-moe stopped=true iterations=3 fake.updates=7 plan.gradient=last rollouts.reuse=true
"""
ALONE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}
HEAVY = (
    "torch.distributed.checkpoint", "peft", "transformers", "diffusers.models.transformers.transformer_wan",
    "diffusers.loaders", "scipy.stats",
)  # fmt: skip
MID_CYCLE = re.compile(r"stopped and saved at phase \d+, iteration \d+, update \d+;")
LIMIT = 600  # seconds a command


class Failed(Exception):
    """A command did not do what it should; the message is one line."""


class Version(NamedTuple):
    """The package's sources, in a folder of the comparison's own, and where they are from."""

    source: Path
    commit: str
    changed: bool

    def __str__(self) -> str:
        return self.commit[:12] + " with changes" * self.changed


class Case(NamedTuple):
    """A line of the table; its fields are those of the config, and `method`."""

    line: str
    recipe: str
    fields: Mapping[str, str]
    processes: int
    stopped: bool

    @classmethod
    def of(cls, line: str) -> "Case":
        recipe, *words = line.split()
        small = SMALL_TOY if recipe.startswith("toy") else SMALL_NANO
        fields = dict(word.split("=", 1) for word in [*small.split(), *words])
        processes, stopped = int(fields.pop("processes", "1")), fields.pop("stopped", "false") == "true"
        return cls(line, recipe, fields, processes, stopped)

    def renamed(self, names: Mapping[str, str | None]) -> "Case | None":
        """The same in the other version's names; None where that has no such option."""
        words = []
        for name, value in self.fields.items():
            new = names.get(f"{name}={value}", names.get(name, name))
            if new is None:
                return None
            words.append(new if "=" in new else f"{new}={value}")
        return self._replace(fields=dict(word.split("=", 1) for word in words))

    @property
    def command(self) -> list[str]:
        """A module and its arguments, without the output's folder."""
        fields = dict(self.fields)
        method = ["--method", fields.pop("method")] if "method" in fields else []
        sets = [part for name, value in fields.items() for part in ("--set", f"{name}={value}")]
        torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={self.processes}", "-m"]
        return [*torchrun * (self.processes > 1), "phased_dmd", "distill", self.recipe, *method, *sets]


# ---------------------------------------------------------------- one run


def start(command: Sequence[str], source: Path, folder: Path, fresh: bool) -> int:
    """The number of a forked process that runs a module with its arguments as `python -m` does, of the package that is
    in `source`; what it says goes to a file.

    fresh: in a new interpreter, which takes seconds to import what else is imported already.
    """
    if process := os.fork():
        return process
    status: object = 1
    try:
        signal.alarm(LIMIT)
        os.chdir(folder)  # `python -m` looks for modules there first
        os.environ["PYTHONPATH"] = str(source)
        with (folder / "said").open("wb") as said:
            for stream in (1, 2):
                os.dup2(said.fileno(), stream)
        if fresh:
            os.execv(sys.executable, [sys.executable, "-m", *command])
        sys.path.insert(0, str(source))
        sys.argv = list(command)
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def finish(process: int, folder: Path) -> None:
    """Waits for the process to end well."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status:
        lines = said(folder).splitlines()
        raise Failed(f"exit status {status}, {lines[-1] if lines else 'without a word'}")


def said(folder: Path) -> str:
    """What the last process that worked in the folder has said."""
    return (folder / "said").read_text("utf-8", "replace").strip()


def stop_mid_cycle(command: Sequence[str], source: Path, folder: Path, fresh: bool) -> None:
    """Begins a run and stops it in its second phase, again from the beginning until that is between two updates."""
    metrics = folder / "run" / "metrics.jsonl"
    for attempt in range(20):
        process, asked = start(command, source, folder, fresh), False
        while os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if metrics.exists() and '"phase": 2' in metrics.read_text("utf-8"):
                time.sleep(0.002 * attempt)
                os.kill(process, signal.SIGTERM)
                asked = True
                break
            time.sleep(0.002)
        try:
            finish(process, folder)
        except Failed:
            if not asked:
                raise
        if MID_CYCLE.search(said(folder)):
            return
        shutil.rmtree(folder / "run", ignore_errors=True)
    raise Failed("was never stopped in the middle of a cycle")


def results(run: Path) -> dict[str, bytes]:
    """The files that must be the same, by their names in a run's folder."""
    paths = [run / "metrics.jsonl", *sorted((run / "experts").iterdir())]
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def train(case: Case, of: Version, stopped: bool, cache: Path | None, fresh: bool) -> dict[str, bytes]:
    """What a line of the table ends with, now or when it was put in the cache."""
    key = hashlib.sha256(repr((case.command, version("torch"), sys.version)).encode()).hexdigest()[:16]
    kept = cache / of.commit / key if cache and not of.changed else None
    if kept and kept.exists():
        return results(kept)
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as name:
        folder = Path(name)
        command = [*case.command, "--output", str(folder / "run")]
        if stopped:
            stop_mid_cycle(command, of.source, folder, fresh)
        finish(start(command, of.source, folder, fresh), folder)
        found = results(folder / "run")
    if kept:
        partial = kept.with_name(f".{key}-{os.getpid()}")
        for path, data in found.items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_bytes(data)
        try:
            partial.rename(kept)
        except OSError:  # another comparison was faster
            shutil.rmtree(partial)
    return found


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that work on runs; after a SIGTERM, they end the runs under way and begin no others."""
    default = signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    pool = ProcessPoolExecutor(count, get_context("fork"), signal.signal, (signal.SIGTERM, default))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- two versions


def version_of(what: str, folder: Path) -> Version:
    """A copy of the sources of a checkout, or of a commit in the repository of this file."""
    checkout = Path(what, "src").is_dir()
    at = Path(what) if checkout else Path(__file__).parents[1]

    def git(*arguments: str) -> bytes:
        done = subprocess.run(["git", "-C", str(at), *arguments], capture_output=True)
        return sys.exit(f"{what}: neither a commit nor a checkout") if done.returncode else done.stdout

    commit = git("rev-parse", "--verify", "HEAD" if checkout else f"{what}^{{commit}}").decode().strip()
    if checkout:
        shutil.copytree(at / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    else:
        with tarfile.open(mode="r:", fileobj=io.BytesIO(git("archive", commit, "src"))) as archive:
            archive.extractall(folder, filter="data")
    if not (folder / "src" / "phased_dmd" / "__main__.py").exists():
        sys.exit(f"{what}: has no src/phased_dmd")  # else the package that is installed would be run instead
    return Version(folder / "src", commit, checkout and bool(git("status", "--porcelain", "--", "src")))


def difference(before: Mapping[str, bytes], after: Mapping[str, bytes]) -> str:
    """The first one there is, or nothing."""
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after or name not in before:
            return f"{name} is only there {'before' if name in before else 'after'}"
        if before[name] != after[name]:
            find = in_metrics if name.endswith(".jsonl") else in_tensors
            return f"{name}: {find(before[name], after[name])}"
    return ""


def in_metrics(before: bytes, after: bytes) -> str:
    """The first line and field that differ in files of JSON lines."""
    rows = itertools.zip_longest(before.splitlines(), after.splitlines(), fillvalue=b"{}")
    number, one, other = next((i, json.loads(a), json.loads(b)) for i, (a, b) in enumerate(rows, 1) if a != b)
    field = next((field for field in one | other if one.get(field) != other.get(field)), "the order of fields")
    return f"line {number}, {field}: {one.get(field)} before, {other.get(field)} after"


def in_tensors(before: bytes, after: bytes) -> str:
    """What differs in safetensors files: the length of a header, the header, which is JSON, and the tensors."""
    one, other = {}, {}
    for tensors, data in ((one, before), (other, after)):
        body = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:body]).items():
            begin, end = about.pop("data_offsets", (0, 0))
            tensors[name] = about, data[body + begin : body + end]
    names = [name for name in one | other if one.get(name) != other.get(name)]
    if values := [name for name in names if name != "__metadata__"]:
        return f"{values[0]}, the first of {len(values)} tensors that differ"
    about = [tensors["__metadata__"][0] if "__metadata__" in tensors else None for tensors in (one, other)]
    return f"only the header, {about[0]} before, {about[1]} after"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit or a checkout")
    parser.add_argument("after", help="a commit or a checkout")
    parser.add_argument("--cache", type=Path, help="a folder for what BEFORE's runs end with, if it is a commit's")
    parser.add_argument("--only", default="", metavar="TEXT", help="the lines of the table that hold it")
    parser.add_argument("--renamed", type=json.loads, default={}, metavar="JSON", help="added to RENAMED")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    parser.add_argument("--fresh", action="store_true", help="a new interpreter for every run; several times slower")
    asked, begun = parser.parse_args(), time.monotonic()
    lines = [Case.of(line) for line in TABLE.splitlines() if line and asked.only in line]
    pairs = [(case, new) for case in lines if (new := case.renamed(RENAMED | asked.renamed))]
    os.environ |= ALONE
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports what it could be faster with
    same, cache = 0, asked.cache and asked.cache.resolve()
    with tempfile.TemporaryDirectory(prefix="same-bytes-") as name, workers(asked.jobs) as pool:
        before, after = version_of(asked.before, Path(name, "before")), version_of(asked.after, Path(name, "after"))
        for module in () if asked.fresh else HEAVY:
            importlib.import_module(module)
        runs = [
            {
                "before": pool.submit(train, old, before, False, cache, asked.fresh),
                "after": pool.submit(train, new, after, new.stopped, None, asked.fresh),
            }
            for old, new in pairs
        ]
        for (case, _), sides in zip(pairs, runs, strict=True):
            found, failed = {}, ""
            for side, run in sides.items():
                try:
                    found[side] = run.result()
                except Failed as error:
                    failed = failed or f"{side} fails: {error}"
            verdict = failed or difference(found["before"], found["after"]) or "identical"
            same += verdict == "identical"
            print(f"{case.line}: {verdict}", flush=True)
    left_out = f", {len(lines) - len(pairs)} left out" * (len(pairs) < len(lines))
    print(f"{same} of {len(pairs)} identical{left_out}: {before} and {after}, {time.monotonic() - begun:.0f} s")
    sys.exit(not pairs or same < len(pairs))


if __name__ == "__main__":
    main()
