"""Keeps one run on disk: config, prompts, metrics, experts, checkpoints and failures."""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from phased_dmd.checkpoint import same_run
from phased_dmd.checkpoint.files import partial_of, refuse_link, refuse_links, save_tensors, sync, write_atomically
from phased_dmd.checkpoint.folders import Point, points_in, remove, write_folder
from phased_dmd.checkpoint.lock import Busy, locked, wait_for_lock
from phased_dmd.checkpoint.logs import LOGS, METRICS, PREVIEWS, TIMING, read_log, rewrite_log
from phased_dmd.checkpoint.single_phases import join_phases, part_of
from phased_dmd.checkpoint.store import Checkpoints, is_kept
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.engine.collectives import run_on_first_rank
from phased_dmd.errors import UserError


class RunFolder:
    """Keeps one run on disk. All ranks of a group call `locked`, `save_*` and `load_checkpoint` together; the rest is
    for the first rank.

    only: the one phase that this process trains, while others may train other phases. It then has metrics, timing,
    checkpoints and failures in a folder of its own, until all phases are done and `close` makes them those of the run.
    """

    def __init__(self, path: Path | str, only: int | None = None) -> None:
        self.path, self.only = Path(path), only
        self.parts = self.path / "phases"
        self.own = self.path if only is None else part_of(self.path, only)  # where no other process writes
        self.config_path, self.lock_path = self.path / "config.json", self.path / ".lock"
        self._prompts_path, self._contents_path = self.path / "prompts.jsonl", self.path / "contents.json"
        self._metrics_path, self.checkpoints = self.own / METRICS, Checkpoints(self.own / "checkpoints")

    # ---------------------------------------------------------------- the run

    def config(self) -> Config:
        """Reads the run's config; a UserError if it is not there or not whole."""
        try:
            return build(json.loads(self.config_path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"{self.path}: not a run folder: config.json cannot be read ({reason})") from error

    def check(self, config: Config) -> None:
        """Raises a UserError where the folder holds another run, see `same_run`, one that cannot become as long, or
        anything but a run; or where the config's phases cannot be trained by themselves, if one is to be.

        What its places lead to is not looked at. What a kill may leave before the config is written is no other run.
        """
        if self.only is not None and not 1 <= self.only <= config.plan.phases:
            raise UserError(f"--only-phase: {self.only} is none of the phases 1 to {config.plan.phases}")
        if self.only is not None and self.only > 1 and config.rollouts.start == "experts":
            before = f"phase {self.only} begins with the samples of the experts before it"
            raise UserError(f"--only-phase: {before}; rollouts.start=teacher begins it with the teacher's")
        there = {*self.path.iterdir()} if self.path.is_dir() else set()  # before the config is: others may write it
        if self.config_path.exists():
            self._refuse_links()
            begun = self.config()
            if difference := same_run.other_than(config, begun):
                onward = f", with --init-experts {self.path} to go on from its experts" if self.finished(begun) else ""
                where = f"--output: {self.path} holds another run of {begun.recipe}"
                raise UserError(f"{where}: {difference}; take another --output{onward}")
            self._check_length(config, begun)
        elif self.path.exists() and (not self.path.is_dir() or there - self._first()):
            raise UserError(f"--output: {self.path} exists and is not a run folder")

    def begins(self) -> bool:
        """Says whether a run may yet begin: the folder is missing, or has no more than comes before the config."""
        there = {*self.path.iterdir()} if self.path.is_dir() else set()
        return not self.config_path.exists() and not there - self._first()

    def _first(self) -> set[Path]:
        """Returns what may be there before the config."""
        first = {self._prompts_path, self._contents_path}
        return {self.lock_path, self.parts, *first, *map(partial_of, first), partial_of(self.config_path)}

    def _check_length(self, config: Config, begun: Config) -> None:
        """Raises a UserError where the run, with the config's iterations, would not be the one that has had them from
        its start.
        """
        if same_run.lengths(config) == same_run.lengths(begun):
            return
        if self.only is not None or self.parts.exists():
            raise UserError(f"iterations: {self.path} trains its phases apart; it can be longer once they are done")
        for phase in range(1, begun.plan.phases + 1):
            reached = same_run.Reached(phase, self.expert_path(phase).exists(), self.checkpoints.newest(phase))
            same_run.refuse_length(self.path, config, begun, reached)

    def moved(self, config: Config) -> bool:
        """Says whether the run was begun with its inputs at other places than the config's."""
        return config.model_dump(include=same_run.PLACES) != self.config().model_dump(include=same_run.PLACES)

    def compare(self, contents: Mapping[str, tuple[str, str]]) -> None:
        """Raises a UserError where something is not what it was when the run was begun.

        contents: by the name of each thing, what it is in words, and its hash.
        """
        if self.config_path.exists() and self._contents_path.exists():
            same_run.refuse_contents(self.path, self._contents_path, contents)

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
        moved, or it is to be longer, its config says so from now on.
        """
        with wait_for_lock(self.parts / ".lock") if self.only is not None else nullcontext():  # others may open it, too
            self.check(config)
            self.compare(contents)
            hashes = {name: found for name, (_, found) in contents.items()}
            try:
                write_atomically(self._prompts_path, "".join(f"{prompt}\n" for prompt in prompts).encode())
                if hashes:
                    write_atomically(self._contents_path, json.dumps(hashes, indent=2).encode())
                begun = self.config() if self.config_path.exists() else config
                longer = same_run.lengths(begun) != same_run.lengths(config)
                if longer:
                    self._reopen(begun, config)
                if longer or not self.config_path.exists() or self.moved(config):
                    kept = config.model_copy(update={field: dict(begun)[field] for field in same_run.MAY_DIFFER})
                    write_atomically(self.config_path, (kept.model_dump_json(indent=2) + "\n").encode())
            except OSError as error:
                raise UserError(f"--output: {self.path} cannot be written: {error.strerror}") from error

    def _reopen(self, begun: Config, config: Config) -> None:
        """Makes a finished run one whose last phase goes on; what is not begun is left as it is.

        The expert goes first: whenever a kill comes, the command makes it again, with the old length or the new one.
        """
        last = begun.plan.phases
        if self._has_experts(begun):
            self.expert_path(last).unlink()
            sync(self.expert_path(last).parent)
            end = (last, begun.phase_iterations(last))
            if end[1] % config.log_every:  # a line for the end's sake, which a longer run has not had
                rewrite_log(self._metrics_path, lambda row: row.place != end)

    def prompts(self) -> list[str]:
        """Reads the texts of the run's prompts; none where it takes none, or was not begun."""
        return [row.content["prompt"] for row in read_log(self._prompts_path)]

    # ---------------------------------------------------------------- experts

    def expert_path(self, phase: int) -> Path:
        return self.path / "experts" / f"phase-{phase}.safetensors"

    def finished(self, config: Config) -> bool:
        """Says whether every phase has its expert, of as many iterations as the config has, and what single phases left
        behind is the run's, see `close`.
        """
        return (
            self._has_experts(config)
            and not self.parts.exists()
            and same_run.lengths(config) == same_run.lengths(self.config())
        )

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

    def save_checkpoint(
        self, at: Mapping[str, Any], state: Mapping[str, Tensor], keep_last: int, keep_every: int | None = None
    ) -> None:
        """Commits a checkpoint, then removes old ones: all but the last `keep_last`, of all phases counted together,
        and those whose iterations are multiples of `keep_every`.

        at: plain JSON with phase, iteration and update. state: tensors, sharded or not, the same names on all ranks.
        """
        with self._writing("checkpoints"):
            run_on_first_rank(self._sync_metrics)
            self.checkpoints.save(at, state, keep_last, keep_every)

    def load_checkpoint(self, phase: int, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Copies the newest whole checkpoint of the phase into the tensors; returns its `at`, or None if there is none.

        Damaged ones are passed over with a warning. One of other tensors is a UserError, and the state is as before.
        """
        return self.checkpoints.load(phase, state)

    def save_failure(self, at: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
        """Writes what reproduces a failure, in the format of a checkpoint; the first of a point is kept for good."""
        folder = self.own / "failures" / Point.of(at).name
        with self._writing("failures"):
            write_folder(folder, at, state)
        return folder

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
        if partial_of(self.parts).exists() or (self.parts.exists() and self._has_experts(config)):
            with suppress(Busy), locked(self.lock_path):
                join_phases(self.path, config.plan.phases)

    def retire(self, config: Config) -> None:
        """Removes the checkpoints that a run which has just been finished does not need, see `unneeded`."""
        if self.finished(config):
            with suppress(Busy), locked(self.lock_path):
                for folder in RunFolder(self.path).unneeded(config.kept[1]):
                    remove(folder)

    def unneeded(self, keep_every: int | None = None) -> list[Path]:
        """Returns the checkpoints of phases that are done, and what was half written or removed of others, but for the
        newest of the last phase and those that `keep_every` keeps.
        """
        kept = self.checkpoints.newest(self.config().plan.phases)
        done = [point for point in self.checkpoints.points() if self.expert_path(point.phase).exists()]
        points = [point for point in done if point != kept and not is_kept(point, keep_every)]
        return [*self.checkpoints.folder.glob(".*.partial"), *map(self.checkpoints.place, points)]

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
            if point := self.checkpoints.newest(phase):
                return str(point)
        except OSError:
            return "its last checkpoint"
        return f"the start of phase {phase}"

    # ---------------------------------------------------------------- metrics

    def rewind_metrics(self, phase: int, iteration: int) -> None:
        """Drops the metrics that lie beyond (phase, iteration), and a line cut short."""
        with self._writing(METRICS):
            rewrite_log(self._metrics_path, lambda row: row.place <= (phase, iteration))

    def log(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl` or `timing.jsonl`."""
        with self._writing(name), (self.own / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Reads the rows of `metrics.jsonl`, and of phases that are trained by themselves."""
        return self._read_logs(METRICS)

    def timing(self) -> list[dict[str, Any]]:
        """Reads the rows of `timing.jsonl`, see `metrics`."""
        return self._read_logs(TIMING)

    def previews(self) -> list[dict[str, Any]]:
        """Reads the rows of `previews.jsonl`, the last of each preview, in the order of training."""
        last = {(row["phase"], row["iteration"]): row for row in self._read_logs(PREVIEWS)}
        return [last[place] for place in sorted(last)]

    def _read_logs(self, name: str) -> list[dict[str, Any]]:
        return [row.content for folder in self._folders() for row in read_log(folder / name)]

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
