"""Worker processes that distil the missing runs and then evaluate them; each computes what it would compute alone."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from phased_dmd.checkpoint import RunFolder, write_atomically
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.reproduce.begin import begin_worker
from phased_dmd.prompts import read_prompts
from phased_dmd.sampling.loading import experts_made_by
from phased_dmd.train import distill

MOST_SAMPLES = 10_000  # of a prompt set, so that two training seeds share no noise
Log = Callable[[str], object]  # takes a line for the user


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made: its config and folder, and how many samples of a prompt set evaluate it.

    experts_from: the folder of the run that the experts of all phases but the last are taken from.
    """

    config: Config
    folder: Path
    samples: int
    experts_from: Path | None = None

    @property
    def protocol(self) -> Protocol:
        """Says how the run is evaluated: each training seed with noise of its own, which its variants share."""
        return Protocol(samples=self.samples, first=first_seed(self.config.seed))


class Workers:
    """A pool of `jobs` processes of one thread each, or this process where jobs is 1; a context manager.

    `log` gets a line when work is done. The error of a run that fails is raised as it is, once the runs under way have
    ended.
    """

    def __init__(self, jobs: int, log: Log) -> None:
        self.jobs, self.log = jobs, log
        self._pool = None
        if jobs > 1:
            self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), begin_worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def distill(self, runs: Sequence[PlannedRun]) -> None:
        """Distils the runs that are not finished; raises UserError where a folder holds a run of another config."""
        for run in unique_runs(runs):
            RunFolder(run.folder).check(run.config)
        missing = [run for run in unique_runs(runs) if not RunFolder(run.folder).finished(run.config)]
        # Runs that take experts from another run come after it.
        for wave in ([run for run in missing if not run.experts_from], [run for run in missing if run.experts_from]):
            self._each(_distill, [[run] for run in wave], "distilled")

    def evaluate(self, runs: Sequence[PlannedRun]) -> None:
        """Evaluates the runs that are not evaluated yet.

        Runs of one teacher and seed are a lot, whose base is sampled and read once.
        """
        missing = [run for run in unique_runs(runs) if not is_evaluated(run)]
        lots: dict[object, list[PlannedRun]] = {}
        for run in missing:
            lots.setdefault((run.config.teacher, run.protocol), []).append(run)
        self._each(_evaluate, list(lots.values()), "evaluated")

    def _each(self, work: Callable[[Sequence[PlannedRun]], None], lots: Sequence[list[PlannedRun]], done: str) -> None:
        """Does the work for each lot of runs, and logs when one is done."""
        names = [", ".join(run.folder.name for run in lot) for lot in lots]
        if self._pool is None:
            for lot, name in zip(lots, names, strict=True):
                work(lot)
                self.log(f"{done}: {name}")
            return
        try:
            futures = {self._pool.submit(work, lot): name for lot, name in zip(lots, names, strict=True)}
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                self.log(f"{done}, {count} of {len(lots)}: {futures[future]}")
        except BrokenProcessPool:
            raise UserError("--jobs: a worker was killed, for want of memory perhaps; try fewer") from None


def first_seed(training_seed: int) -> int:
    """Returns the first of the seeds that a run is evaluated with."""
    return MOST_SAMPLES * training_seed


def default_jobs() -> int:
    """Returns 1 where there is an accelerator, else the number of CPU cores."""
    return 1 if torch.cuda.is_available() else multiprocessing.cpu_count()


def unique_runs(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Returns one run for each folder: claims share them."""
    return list({run.folder: run for run in runs}.values())


def is_evaluated(run: PlannedRun) -> bool:
    """Says whether `evaluate` would leave the run alone."""
    path, asked = run.folder / "evaluation.json", json.loads(json.dumps(asdict(run.protocol)))
    about = {"protocol": asked, "experts": experts_made_by(run.folder)}
    return path.exists() and about.items() <= json.loads(path.read_text("utf-8")).items()


def inherit(run: PlannedRun) -> None:
    """Begins a run's folder with the experts that it takes over; `distill` then loads and freezes them."""
    if run.experts_from is None:
        return
    folder, source = RunFolder(run.folder), RunFolder(run.experts_from)
    prompts = read_prompts(run.config.prompts) if run.config.prompts is not None else []
    folder.open(run.config, [prompt.line() for prompt in prompts])
    for phase in range(1, run.config.plan.phases):
        if not folder.expert_path(phase).exists():
            write_atomically(folder.expert_path(phase), source.expert_path(phase).read_bytes())


def _distill(lot: Sequence[PlannedRun]) -> None:
    for run in lot:
        inherit(run)
        distill(run.config, run.folder)


def _evaluate(lot: Sequence[PlannedRun]) -> None:
    evaluate([run.folder for run in lot], lot[0].protocol)
