"""Ways to go on from what a run has left: take another checkpoint as an expert, branch the run, make it smaller."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from phased_dmd.checkpoint import Reference, RunFolder, load_tensors, partial_of, write_atomically
from phased_dmd.checkpoint.folders import remove
from phased_dmd.checkpoint.logs import LOGS, encode_log
from phased_dmd.checkpoint.same_run import first_difference
from phased_dmd.checkpoint.single_phases import joined_log, part_of
from phased_dmd.config import Config, phase_plan
from phased_dmd.config.overrides import changed
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.networks.build import describe_expert
from phased_dmd.sampling.loading import checkpoint_expert

# What a checkpoint, and the experts before it, fit alone: the networks, the grid, and what is stored of the optimisers.
FIXED = {
    "teacher": True, "plan": {"steps", "phases", "shift", "start"}, "generator": {"weights", "lora"},
    "fake": {"weights", "lora"}, "optimiser": {"second_moment"}, "ablation": {"solver"},
}  # fmt: skip
FREE = {"teacher": {"path", "revision", "guidance", "negative_prompt", "sizes"}}  # a place is told by its contents


# ---------------------------------------------------------------- promote


def promote(reference: Reference, drop_later: bool = False) -> bool:
    """Makes a checkpoint's weights, averaged if the run averages them, the expert of its phase, as if that had ended
    there; returns False where they are that already.

    The phases behind it have learnt from the samples of another expert, unless `rollouts.start` is teacher: what they
    left is removed if drop_later, for `distill` to train them again, and else a UserError. Raises UserError for a
    checkpoint that is not there or not whole, and where another process writes the run.
    """
    run, phase = RunFolder(reference.run), reference.phase
    config = run.config()
    run.check(config)  # refuses symlinks
    with run.locked():
        tensors = checkpoint_expert(reference.find(), phase)
        header = describe_expert(config, phase_plan(config), phase, reference.iteration)
        if run.expert_path(phase).exists() and _same(load_tensors(run.expert_path(phase)), (tensors, header)):
            return False
        later = [] if config.rollouts.start == "teacher" else _left_behind(run, config, phase)
        if later and not drop_later:
            learnt = f"phases behind phase {phase} have learnt from its expert's samples"
            again = "--drop-later removes what they left, and `phased-dmd distill` trains them again"
            raise UserError(f"{reference}: {learnt}; {again}")
        for path in later:
            _delete(path)
        if later:
            run.rewind_metrics(phase + 1, 0)
        run.save_expert(phase, tensors, header)  # last: until then the former expert stands, and what follows from it
    run.close(config)
    return True


def _same(a: tuple[Mapping[str, Any], ...], b: tuple[Mapping[str, Any], ...]) -> bool:
    """Says whether two experts have the same header, and tensors that are equal in every bit but a zero's sign."""
    (tensors, header), (others, other) = a, b
    return header == other and tensors.keys() == others.keys() and all(tensors[n].equal(others[n]) for n in tensors)


def _left_behind(run: RunFolder, config: Config, phase: int) -> list[Path]:
    """Returns what the phases behind one have left that follows from its expert, the last phase's first."""
    paths = []
    for later in range(config.plan.phases, phase, -1):
        checkpoints = [run.checkpoints.place(point) for point in run.checkpoints.points(later)]
        folders = [run.path / kind / f"phase-{later}" for kind in ("pool", "evaluations")]
        left = run.expert_path(later), *checkpoints, *folders, part_of(run.path, later)
        paths += [path for path in left if path.exists()]
    return paths


# ---------------------------------------------------------------- branch


def branch(reference: Reference, output: Path, changes: Mapping[str, Any]) -> Config:
    """Begins a run in the folder `output` at a checkpoint of another one, with other fields; returns its config.

    `distill` of that config goes on with it: without changes it ends like the other run, byte for byte. Files that
    never change are shared with the other run by hard links, where the disk has them. Raises UserError for a checkpoint
    that is not there or not whole, for one that does not fit the config, and for a folder that is not empty.
    """
    run = RunFolder(reference.run)
    begun = run.config()
    config = changed(begun, changes)
    _check_fits(reference, begun, config)
    if missing := [phase for phase in range(1, reference.phase) if not run.expert_path(phase).exists()]:
        raise UserError(f"{reference}: phase {missing[0]}, which comes before it, has no expert yet")
    refuse_full(output)
    checkpoint, partial = reference.find(), partial_of(output.absolute())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for phase in range(1, reference.phase):
            _share(run.expert_path(phase), RunFolder(partial).expert_path(phase))
        for file in checkpoint.iterdir():
            _share(file, partial / "checkpoints" / checkpoint.name / file.name)
        for file in (run.path / "conditions").glob("[!.]*.safetensors"):  # named by all that they were made from
            _share(file, partial / "conditions" / file.name)
        for name in LOGS:
            rows = joined_log(run.path, begun.plan.phases, name)
            upto = [row for row in rows if row.place <= (reference.phase, reference.iteration)]
            write_atomically(partial / name, encode_log(upto))
        _write_origin(reference, begun, config, partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _check_fits(reference: Reference, begun: Config, config: Config) -> None:
    """Raises a UserError where a run of the config cannot go on from a checkpoint of the one that was begun."""
    theirs, mine = (each.model_dump(mode="json", include=FIXED, exclude=FREE) for each in (begun, config))
    phase, why = reference.phase, ""
    if mine != theirs:
        why = f"{first_difference(theirs, mine)}, and what is stored fits there alone"
    elif (begun.generator.ema is None) != (config.generator.ema is None):
        why = f"generator.ema: the checkpoint has {'no' if begun.generator.ema is None else 'an'} average to go on with"
    elif config.phase_iterations(phase) < reference.iteration:
        why = f"iterations: phase {phase} would have {config.phase_iterations(phase)}, and the checkpoint more"
    elif begun.matches(phase) != config.matches(phase):
        why = f"anchor.updates: the checkpoint has {'a' if begun.matches(phase) else 'no'} fake"
    if why:
        raise UserError(f"{reference}: {why}; --init-experts {reference.run} starts any run from the run's experts")


def _share(source: Path, target: Path) -> None:
    """Makes a file that is the other one, or, where the disk cannot, a copy of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)


def _write_origin(reference: Reference, begun: Config, config: Config, folder: Path) -> None:
    """Writes the config of a branch, the hashes of those inputs that are the other run's, and where it comes from."""
    kept = reference.run / "contents.json"
    other = {"prompts", "pictures"} if config.prompts != begun.prompts else set()
    other |= {"init_experts"} if config.init_experts != begun.init_experts else set()
    if kept.exists():
        hashes = {name: found for name, found in json.loads(kept.read_bytes()).items() if name not in other}
        write_atomically(folder / kept.name, json.dumps(hashes, indent=2).encode())
    origin = {"from": str(reference), "config": begun.model_dump(mode="json")}
    write_atomically(folder / "branch.json", (json.dumps(origin, indent=2) + "\n").encode())
    write_atomically(folder / "config.json", (config.model_dump_json(indent=2) + "\n").encode())


# ---------------------------------------------------------------- prune


class Pruned(NamedTuple):
    """Says what is removed of a run: how many of which, and the bytes that this frees."""

    number: int
    what: str
    size: int


def prune(folder: Path, everything: bool = False, dry_run: bool = False) -> list[Pruned]:
    """Removes what a run does not need; returns what that is. dry_run: remove nothing.

    That is the checkpoints of phases that are done but for the newest of the last phase, what reproduces failures, what
    was half written, and, of a finished run, the teacher's trajectories, all of which can be made again. everything: of
    a finished run also that newest checkpoint and the encoded prompts: it can still be sampled, evaluated and exported.
    Raises UserError for what is no run, or is being written.
    """
    run = RunFolder(folder)
    config = run.config()
    run.check(config)  # refuses symlinks
    with run.locked():
        found = dict(_unneeded(run, config, everything))
        pruned = [Pruned(len(paths), what, sum(map(_size, paths))) for what, paths in found.items() if paths]
        for path in [] if dry_run else chain.from_iterable(found.values()):
            _delete(path)
    return pruned


def _unneeded(run: RunFolder, config: Config, everything: bool) -> Iterator[tuple[str, list[Path]]]:
    """Yields what `prune` removes, by what it is."""
    parts = [RunFolder(run.path, phase) for phase in range(1, config.plan.phases + 1)]
    folders = [run, *(part for part in parts if part.own.exists())]
    finished = run.finished(config)
    if everything and finished:
        checkpoints = [run.checkpoints.place(point) for point in run.checkpoints.points()]
    else:
        checkpoints = [path for each in folders for path in each.unneeded()]
    halves = sorted({path for path in run.path.rglob(".*.partial")} - {*checkpoints})
    yield "checkpoint", [path for path in checkpoints if not path.name.startswith(".")]
    yield "failure", [path for each in folders for path in (each.own / "failures").glob("phase-*")]
    yield "half-written file", [*halves, *(path for path in checkpoints if path.name.startswith("."))]
    if finished:
        yield "trajectory file", list((run.path / "pool").glob("*/*.safetensors"))
    if finished and everything:
        yield "encoded prompt file", list((run.path / "conditions").glob("*.safetensors"))


def _size(path: Path) -> int:
    """Returns the bytes that the removal of a file or folder frees: those that no hard link of a branch holds."""
    files = [file.lstat() for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def _delete(path: Path) -> None:
    """Removes a file, or a folder by its name first."""
    remove(path) if path.is_dir() else path.unlink(missing_ok=True)
