"""One run on disk: config, prompts, metrics, experts, checkpoints and failures."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from phased_dmd.checkpoint.files import partial_of, refuse_link, refuse_links, save_tensors, sync, write_atomically
from phased_dmd.checkpoint.folders import Damaged, Point, check, read_folder, remove, verify, write_folder
from phased_dmd.checkpoint.lock import locked
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.engine.world import on_first_rank, rank, warn
from phased_dmd.errors import UserError

CADENCES = {"log_every", "sample_every", "checkpoint_every"}
OTHERWISE = {"engine", "keep_last", "skips", "trackers", *CADENCES}  # in which the same run may differ
PLACES = {"prompts": True, "teacher": {"path": True, "revision": True}, "init_experts": True}  # compared by content
LONGEST = 60  # characters of a value that is shown


def first_difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first field in which two nested mappings differ, and both its values, in words."""
    differing = [key for key in {**a, **b} if a.get(key) != b.get(key)]
    key = "kind" if "kind" in differing else differing[0]
    if isinstance(a.get(key), Mapping) and isinstance(b.get(key), Mapping):
        return f"{key}.{first_difference(a[key], b[key])}"
    there, here = (json.dumps(of.get(key), ensure_ascii=False) for of in (a, b))
    return f"{key} is {_cut(there)} there, {_cut(here)} here"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


class RunFolder:
    """One run on disk. Of a group, all ranks call `locked`, `save_*` and `load_checkpoint` together; the rest is for
    the first rank.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._damaged: set[Point] = set()  # checkpoints that were passed over

    # ---------------------------------------------------------------- the run

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def lock_path(self) -> Path:
        return self.path / ".lock"

    @property
    def _contents_path(self) -> Path:
        return self.path / "contents.json"

    def _beginnings(self) -> set[Path]:
        """What a kill may leave before the config is written."""
        prompts = self.path / "prompts.jsonl"
        first = {prompts, self._contents_path}
        return {self.lock_path, *first, *map(partial_of, first), partial_of(self.config_path)}

    def config(self) -> Config:
        try:
            return build(json.loads(self.config_path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path}: not a run folder: config.json cannot be read ({reason})") from error

    def check(self, config: Config) -> None:
        """A UserError where the folder cannot take this run, see OTHERWISE; what PLACES lead to is not looked at."""
        if self.config_path.exists():
            self._refuse_links()
            other, left_out = self.config(), {**PLACES, **dict.fromkeys(OTHERWISE, True)}
            mine, theirs = (each.model_dump(mode="json", exclude=left_out) for each in (config, other))
            if mine != theirs:
                onward = f", with --init-experts {self.path} to go on from its experts" if self.finished(other) else ""
                where = f"--output: {self.path} holds another run of {other.recipe}"
                raise UserError(f"{where}: {first_difference(theirs, mine)}; take another --output{onward}")
        elif self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - self._beginnings()):
            raise UserError(f"--output: {self.path} exists and is not a run folder")

    def moved(self, config: Config) -> bool:
        """Whether the run was begun under other PLACES than the config's."""
        return config.model_dump(include=PLACES) != self.config().model_dump(include=PLACES)

    def compare(self, contents: Mapping[str, tuple[str, str]]) -> None:
        """A UserError where something is not what it was when the run was begun; by its name in words, and its hash."""
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
        """A UserError if anything that a run reads again or appends to is a symlink; the run folder itself may be."""
        for path in self.path.iterdir():
            refuse_link(path)
        refuse_links(self.path / "checkpoints")
        refuse_links(self.path / "experts")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The only process, or group of them, that writes this run; UserError if another one does."""
        with ExitStack() as stack:
            on_first_rank(lambda: stack.enter_context(locked(self.lock_path)))
            yield

    def open(
        self, config: Config, prompts: Sequence[str], contents: Mapping[str, tuple[str, str]] = MappingProxyType({})
    ) -> None:
        """Makes the folder with its config and prompts, lines of jsonl, or finds it holding the same run.

        contents: see `compare`; none yet where the folder is begun for a run to come. Of a run that has moved, the
        config has the new places from now on.
        """
        self.check(config)
        self.compare(contents)
        hashes = {name: found for name, (_, found) in contents.items()}
        try:
            write_atomically(self.path / "prompts.jsonl", "".join(f"{prompt}\n" for prompt in prompts).encode())
            if hashes:
                write_atomically(self._contents_path, json.dumps(hashes, indent=2).encode())
            begun = dict(self.config()) if self.config_path.exists() else {}
            if not begun or self.moved(config):
                kept = config.model_copy(update={field: begun[field] for field in OTHERWISE if begun})
                write_atomically(self.config_path, (kept.model_dump_json(indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"--output: {self.path} cannot be written: {error.strerror}") from error

    # ---------------------------------------------------------------- experts

    def expert_path(self, phase: int) -> Path:
        return self.path / "experts" / f"phase-{phase}.safetensors"

    def finished(self, config: Config) -> bool:
        return all(self.expert_path(phase).exists() for phase in range(1, config.plan.phases + 1))

    def save_expert(self, phase: int, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Writes a phase's expert, which ends the phase."""
        path = self.expert_path(phase)
        with self._writing(f"experts/{path.name}"):
            path.parent.mkdir(exist_ok=True)  # in a run folder that vanished, nothing is begun again
            self._sync_metrics()
            save_tensors(path, tensors, header)

    def save_samples(self, name: str, write: Callable[[Path], None]) -> None:
        """Has `write` make the file of that name among the run's samples."""
        path = self.path / "samples" / name
        with self._writing(f"samples/{name}"):
            path.parent.mkdir(exist_ok=True)
            write(path)

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """An empty folder of a process's own, gone afterwards; what a kill left of all processes' is removed first."""
        on_first_rank(lambda: self._remove_scratch(name))
        folder = self.path / f".{name}-{rank()}"
        with self._writing(folder.name):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_scratch(self, name: str) -> None:
        for folder in self.path.glob(f".{name}-*"):
            refuse_links(folder)
            shutil.rmtree(folder, ignore_errors=True)

    # ---------------------------------------------------------------- checkpoints

    def save_checkpoint(self, at: Mapping[str, Any], state: Mapping[str, Tensor], keep_last: int) -> None:
        """Commits a checkpoint, then removes old ones: all but the last `keep_last`, of all phases counted together.

        at: plain JSON with phase, iteration and update. state: tensors, sharded or not, the same names on all ranks.
        """
        point = Point.of(at)
        with self._writing("checkpoints"):
            on_first_rank(self._sync_metrics)
            write_folder(self._folder(point), at, state)
            self._damaged.discard(point)
            on_first_rank(lambda: self._retire(point, keep_last))

    def load_checkpoint(self, phase: int, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Copies the newest whole checkpoint of the phase into the given tensors; its `at`, or None if there is none.

        Damaged ones are passed over with a warning. One of other tensors is a UserError, and the state as before.
        """
        points = [point for point in on_first_rank(self._points) if point.phase == phase]
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
            warn(f"{self.path / 'checkpoints'}: none of phase {phase} is whole; the phase starts again")
        return None

    def save_failure(self, at: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
        """Writes what reproduces a failure, in the format of a checkpoint; the first of a point is kept for good."""
        folder = self.path / "failures" / Point.of(at).name
        with self._writing("failures"):
            write_folder(folder, at, state)
        return folder

    def _folder(self, point: Point) -> Path:
        return self.path / "checkpoints" / point.name

    def _points(self) -> list[Point]:
        """Of all folders that have a checkpoint's name, whole or not, oldest first."""
        folder = self.path / "checkpoints"
        refuse_links(folder)
        paths = folder.iterdir() if folder.exists() else ()
        return sorted(point for path in paths if (point := Point.named(path.name)))

    def _retire(self, newest: Point, keep_last: int) -> None:
        """Removes what need not be kept, now that `newest` is whole; what lies beyond it was passed over, and stays
        until the run gets there.
        """
        until = [point for point in self._points() if point <= newest]
        whole = [point for point in until if point not in self._damaged]
        for point in set(until) - set(whole[-keep_last:]):
            remove(self._folder(point))

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
        """Where the next process begins, as far as names, sizes and manifests tell."""
        try:
            phase = next(phase for phase in itertools.count(1) if not self.expert_path(phase).exists())
            for point in reversed(self._points()):
                if point.phase == phase and point not in self._damaged:
                    with suppress(UserError):
                        check(self._folder(point), summed=slice(0))
                        return str(point)
        except OSError:
            return "its last checkpoint"
        return f"the start of phase {phase}"

    # ---------------------------------------------------------------- metrics

    def _rows(self) -> list[tuple[dict[str, Any], str]]:
        """The rows of `metrics.jsonl` with their lines, without one that was cut short."""
        path = self.path / "metrics.jsonl"
        try:
            whole = (path.read_text("utf-8") if path.exists() else "").split("\n")[:-1]
            return [(json.loads(line), f"{line}\n") for line in whole]
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error})") from error

    def rewind_metrics(self, phase: int, iteration: int) -> None:
        """Drops the metrics that lie beyond (phase, iteration), and a line cut short."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            upto = [line for row, line in self._rows() if (row["phase"], row["iteration"]) <= (phase, iteration)]
            with self._writing(path.name):
                write_atomically(path, "".join(upto).encode())

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl` or `timing.jsonl`."""
        with self._writing(name), (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return [row for row, _ in self._rows()]

    def _sync_metrics(self) -> None:
        """The metrics up to a checkpoint or a phase's end are on the disk before these are."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            sync(path)
