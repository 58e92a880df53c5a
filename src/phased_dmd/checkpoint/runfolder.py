"""Keeps one run on disk: config, prompts, metrics, experts, checkpoints and failures."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from phased_dmd.checkpoint.files import partial_of, refuse_link, refuse_links, save_tensors, sync, write_atomically
from phased_dmd.checkpoint.folders import (
    Damaged,
    Point,
    check_folder,
    points_in,
    read_folder,
    remove,
    verify,
    write_folder,
)
from phased_dmd.checkpoint.lock import Busy, locked, wait_for_lock
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.engine.world import warn
from phased_dmd.errors import UserError

# Fields of the config in which the same run may differ.
CADENCES = {"log_every", "sample_every", "checkpoint_every", "checkpoint_minutes"}
MAY_DIFFER = {"engine", "keep_last", "skips", "trackers", *CADENCES}
PLACES = {"prompts": True, "teacher": {"path": True, "revision": True}, "init_experts": True}  # compared by content
LONGEST = 60  # characters of a value that is shown
LOGS = "metrics.jsonl", "timing.jsonl"


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Names the first field in which two nested mappings differ, and both its values."""
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    key = "kind" if "kind" in differing else differing[0]
    if isinstance(a.get(key), Mapping) and isinstance(b.get(key), Mapping):
        return f"{key}.{first_difference(a[key], b[key])}"
    values = (json.dumps(of.get(key), ensure_ascii=False) for of in (a, b))
    there, here = (text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for text in values)
    return f"{key} is {there} there, {here} here"


class RunFolder:
    """Keeps one run on disk. All ranks of a group call `locked`, `save_*` and `load_checkpoint` together; the rest is
    for the first rank.

    only: the one phase that this process trains, while others may train other phases. It then has metrics, timing,
    checkpoints and failures in a folder of its own, until all phases are done and `close` makes them those of the run.
    """

    def __init__(self, path: Path | str, only: int | None = None) -> None:
        self.path, self.only = Path(path), only
        self.parts = self.path / "phases"
        self.own = self.path if only is None else self.parts / f"phase-{only}"  # where no other process writes
        self.config_path, self.lock_path = self.path / "config.json", self.path / ".lock"
        self._prompts_path, self._contents_path = self.path / "prompts.jsonl", self.path / "contents.json"
        self._metrics_path, self._checkpoints = self.own / "metrics.jsonl", self.own / "checkpoints"
        self._damaged: set[Point] = set()  # checkpoints that were passed over
        self._newest: Point | None = None  # the checkpoint that this process has saved last

    # ---------------------------------------------------------------- the run

    def config(self) -> Config:
        """Reads the run's config; a UserError if it is not there or not whole."""
        try:
            return build(json.loads(self.config_path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path}: not a run folder: config.json cannot be read ({reason})") from error

    def check(self, config: Config) -> None:
        """Raises a UserError where the folder holds another run, see MAY_DIFFER, or anything but a run; or where the
        config's phases cannot be trained by themselves, if one is to be.

        What PLACES lead to is not looked at. What a kill may leave before the config is written is no other run.
        """
        if self.only is not None and not 1 <= self.only <= config.plan.phases:
            raise UserError(f"--only-phase: {self.only} is none of the phases 1 to {config.plan.phases}")
        if self.only is not None and self.only > 1 and config.rollouts.start == "experts":
            before = f"phase {self.only} begins with the samples of the experts before it"
            raise UserError(f"--only-phase: {before}; rollouts.start=teacher begins it with the teacher's")
        if self.config_path.exists():
            self._refuse_links()
            other, left_out = self.config(), {**PLACES, **dict.fromkeys(MAY_DIFFER, True)}
            mine, theirs = (each.model_dump(mode="json", exclude=left_out) for each in (config, other))
            if mine != theirs:
                onward = f", with --init-experts {self.path} to go on from its experts" if self.finished(other) else ""
                where = f"--output: {self.path} holds another run of {other.recipe}"
                raise UserError(f"{where}: {first_difference(theirs, mine)}; take another --output{onward}")
        elif self.path.exists():
            first = {self._prompts_path, self._contents_path}
            begun = {self.lock_path, self.parts, *first, *map(partial_of, first), partial_of(self.config_path)}
            if not self.path.is_dir() or set(self.path.iterdir()) - begun:
                raise UserError(f"--output: {self.path} exists and is not a run folder")

    def moved(self, config: Config) -> bool:
        """Says whether the run was begun under other PLACES than the config's."""
        return config.model_dump(include=PLACES) != self.config().model_dump(include=PLACES)

    def compare(self, contents: Mapping[str, tuple[str, str]]) -> None:
        """Raises a UserError where something is not what it was when the run was begun.

        contents: by the name of each thing, what it is in words, and its hash.
        """
        if not self.config_path.exists() or not self._contents_path.exists():
            return
        try:
            kept = dict(json.loads(self._contents_path.read_bytes()))
        except ValueError as error:
            raise UserError(f"{self._contents_path}: damaged ({error})") from error
        for name, (words, found) in contents.items():
            if kept.get(name) != found:
                was = f"{words} is not what it was when {self.path} was begun"
                raise UserError(f"{was}; bring that back, or take another --output")

    def _refuse_links(self) -> None:
        """Raises a UserError if what a run reads again or appends to is a symlink; the run folder itself may be."""
        for path in self.path.iterdir():
            refuse_link(path)
        inside = [*self.parts.glob("*"), *self.parts.glob("*/checkpoints"), *(self.path / "pool").glob("*")]
        for folder in (self.path / "checkpoints", self.path / "experts", self.parts, self.path / "pool", *inside):
            refuse_links(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run, or its one phase, for this process, or group of them; a UserError if another one writes it."""
        with ExitStack() as stack:

            def lock() -> None:
                stack.enter_context(locked(self.lock_path, shared=self.only is not None))
                if self.only is not None:
                    stack.enter_context(locked(self.own / ".lock"))

            run_on_first_rank(lock)
            yield

    def open(
        self, config: Config, prompts: Sequence[str], contents: Mapping[str, tuple[str, str]] = MappingProxyType({})
    ) -> None:
        """Makes the folder with its config and prompts, lines of jsonl, or finds it holding the same run.

        contents: see `compare`; none yet where the folder is begun for a run to come. If the inputs of the run have
        moved, its config has their new places from now on.
        """
        with wait_for_lock(self.parts / ".lock") if self.only is not None else nullcontext():  # others may open it, too
            self.check(config)
            self.compare(contents)
            hashes = {name: found for name, (_, found) in contents.items()}
            try:
                write_atomically(self._prompts_path, "".join(f"{prompt}\n" for prompt in prompts).encode())
                if hashes:
                    write_atomically(self._contents_path, json.dumps(hashes, indent=2).encode())
                begun = dict(self.config()) if self.config_path.exists() else {}
                if not begun or self.moved(config):
                    kept = config.model_copy(update={field: begun[field] for field in MAY_DIFFER if begun})
                    write_atomically(self.config_path, (kept.model_dump_json(indent=2) + "\n").encode())
            except OSError as error:
                raise UserError(f"--output: {self.path} cannot be written: {error.strerror}") from error

    def prompts(self) -> list[str]:
        """Reads the texts of the run's prompts; none where it takes none, or was not begun."""
        return [row["prompt"] for row, _ in self._rows(self._prompts_path)]

    # ---------------------------------------------------------------- experts

    def expert_path(self, phase: int) -> Path:
        return self.path / "experts" / f"phase-{phase}.safetensors"

    def finished(self, config: Config) -> bool:
        """Says whether every phase has its expert, and what single phases left behind is the run's, see `close`."""
        return self._has_experts(config) and not self.parts.exists()

    def _has_experts(self, config: Config) -> bool:
        return all(self.expert_path(phase).exists() for phase in range(1, config.plan.phases + 1))

    def save_expert(self, phase: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Writes a phase's expert, which ends the phase."""
        path = self.expert_path(phase)
        with self._writing(f"experts/{path.name}"):
            path.parent.mkdir(exist_ok=True)  # in a run folder that vanished, nothing is begun again
            self._sync_metrics()
            save_tensors(path, tensors, header)

    def save_samples(self, name: str, write: Callable[[Path], None]) -> None:
        """Calls `write` with a path, whose file then takes that name among the run's samples, whole."""
        path = self.path / "samples" / name
        with self._writing(f"samples/{name}"):
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(f".{name}")  # its suffix tells the format
            write(partial)
            partial.replace(path)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, at: Mapping[str, Any], state: Mapping[str, Tensor], keep_last: int) -> None:
        """Commits a checkpoint, then removes old ones: all but the last `keep_last`, of all phases counted together.

        at: plain JSON with phase, iteration and update. state: tensors, sharded or not, the same names on all ranks.
        """
        point = Point.of(at)
        if point == self._newest:
            return
        with self._writing("checkpoints"):
            run_on_first_rank(self._sync_metrics)
            write_folder(self._folder(point), at, state)
            self._damaged.discard(point)
            run_on_first_rank(lambda: self._retire(point, keep_last))
        self._newest = point

    def load_checkpoint(self, phase: int, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Copies the newest whole checkpoint of the phase into the tensors; returns its `at`, or None if there is none.

        Damaged ones are passed over with a warning. One of other tensors is a UserError, and the state is as before.
        """
        self._newest = None
        points = [point for point in run_on_first_rank(lambda: points_in(self._checkpoints)) if point.phase == phase]
        for point in reversed(points):
            folder = self._folder(point)
            try:
                at = verify(folder)
            except Damaged as error:
                self._damaged.add(point)
                warn(f"{error}; {point} is passed over")
                continue
            read_folder(folder, state)
            return at
        if points:
            warn(f"{self._checkpoints}: none of phase {phase} is whole; the phase starts again")
        return None

    def save_failure(self, at: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
        """Writes what reproduces a failure, in the format of a checkpoint; the first of a point is kept for good."""
        folder = self.own / "failures" / Point.of(at).name
        with self._writing("failures"):
            write_folder(folder, at, state)
        return folder

    def _folder(self, point: Point) -> Path:
        return self._checkpoints / point.name

    def _retire(self, newest: Point, keep_last: int) -> None:
        """Removes what need not be kept, now that `newest` is whole; what lies beyond it was passed over, and stays
        until the run gets there.
        """
        until = [point for point in points_in(self._checkpoints) if point <= newest]
        whole = [point for point in until if point not in self._damaged]
        for point in set(until) - set(whole[-keep_last:]):
            remove(self._folder(point))

    # ---------------------------------------------------------------- single phases

    def of_phase(self, phase: int) -> "RunFolder":
        """Returns the folder to train a phase in, all ranks together. Where phases were begun by themselves that is the
        phase's own: a process of all phases goes on with what it finds there.
        """
        if not run_on_first_rank(self.parts.exists):
            return self
        own = RunFolder(self.path, phase)
        run_on_first_rank(lambda: own.own.mkdir(exist_ok=True))
        return own

    def close(self, config: Config) -> None:
        """Makes one run of phases that were trained by themselves, once they are done and none of their processes holds
        it; it is then like one that a single process made. A kill in between costs nothing: it is done again.
        """
        gone = partial_of(self.parts)
        if gone.exists() or (self.parts.exists() and self._has_experts(config)):
            with suppress(Busy), locked(self.lock_path):
                shutil.rmtree(gone, ignore_errors=True)
                if self.parts.exists():
                    self._merge(config)
                    self.parts.rename(gone)
                    sync(self.path)
                    shutil.rmtree(gone)

    def _merge(self, config: Config) -> None:
        """Joins the logs of all phases, in their order, and moves the rest of them to where a single process has it."""
        folders = {phase: self.parts / f"phase-{phase}" for phase in range(1, config.plan.phases + 1)}
        for name in LOGS:
            places = {phase: (own if own.exists() else self.path) / name for phase, own in folders.items()}
            lines = [line for k, path in places.items() for row, line in self._rows(path) if row["phase"] == k]
            write_atomically(self.path / name, "".join(lines).encode())
        for own in folders.values():
            kept = {
                path: path.relative_to(own) for kind in ("checkpoints", "failures") for path in own.glob(f"{kind}/p*")
            }
            kept |= {path: Path("tensorboard", own.name) for path in own.glob("tensorboard")}
            for path, place in kept.items():
                if not (self.path / place).exists():
                    (self.path / place).parent.mkdir(exist_ok=True)
                    path.rename(self.path / place)
        for partial in (self.path / "checkpoints").glob(".*.partial"):  # half removed, when a kill came
            shutil.rmtree(partial)
        for point in points_in(self.path / "checkpoints")[: -config.keep_last]:
            remove(self.path / "checkpoints" / point.name)

    # ---------------------------------------------------------------- faults

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Turns an OSError into one line that says where the run goes on from."""
        try:
            yield
        except OSError as error:
            reason = f"{what}: cannot be written: {error.strerror or error}"
            raise UserError(f"{reason}; {self.path} goes on from {self._resumes_from()} by the same command") from error

    def _resumes_from(self) -> str:
        """Says where the next process begins, as far as names, sizes and manifests tell."""
        try:
            phase = self.only or next(phase for phase in itertools.count(1) if not self.expert_path(phase).exists())
            for point in reversed(points_in(self._checkpoints)):
                if point.phase == phase and point not in self._damaged:
                    with suppress(UserError):
                        check_folder(self._folder(point), summed=slice(0))
                        return str(point)
        except OSError:
            return "its last checkpoint"
        return f"the start of phase {phase}"

    # ---------------------------------------------------------------- metrics

    def _rows(self, path: Path) -> list[tuple[dict[str, Any], str]]:
        """Reads the rows of a log with their lines, but for one that was cut short."""
        try:
            complete = (path.read_text("utf-8") if path.exists() else "").split("\n")[:-1]
            return [(json.loads(line), f"{line}\n") for line in complete]
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error})") from error

    def rewind_metrics(self, phase: int, iteration: int) -> None:
        """Drops the metrics that lie beyond (phase, iteration), and a line cut short."""
        if self._metrics_path.exists():
            upto = [
                line
                for row, line in self._rows(self._metrics_path)
                if (row["phase"], row["iteration"]) <= (phase, iteration)
            ]
            with self._writing(self._metrics_path.name):
                write_atomically(self._metrics_path, "".join(upto).encode())

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl` or `timing.jsonl`."""
        with self._writing(name), (self.own / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Reads the rows of `metrics.jsonl`, and of phases that are trained by themselves."""
        return self._read_logs("metrics.jsonl")

    def timing(self) -> list[dict[str, Any]]:
        """Reads the rows of `timing.jsonl`, see `metrics`."""
        return self._read_logs("timing.jsonl")

    def _read_logs(self, name: str) -> list[dict[str, Any]]:
        return [row for folder in self._folders() for row, _ in self._rows(folder / name)]

    def _folders(self) -> list[Path]:
        """Lists the run's own folder, and those of phases that are trained by themselves."""
        return [self.path, *sorted(self.parts.glob("phase-*"))]

    def failures(self) -> list[Point]:
        """Lists where an update could not be made because a number was not finite, in the order of training."""
        return sorted(point for folder in self._folders() for point in points_in(folder / "failures"))

    def last_word(self) -> float:
        """Returns when the run last wrote a log, or was begun, in seconds since 1970."""
        files = [self.config_path, *(folder / name for folder in self._folders() for name in LOGS)]
        return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)

    def _sync_metrics(self) -> None:
        """Forces the metrics to the disk before a checkpoint or an expert follows them."""
        if self._metrics_path.exists():
            sync(self._metrics_path)
