"""Runs in worker processes: what is missing is distilled, then evaluated; each is the same computation as alone."""

import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

import torch

from phased_dmd.checkpoint import RunFolder, write_atomically
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.reproduce.begin import begin_worker
from phased_dmd.prompts import read_prompts
from phased_dmd.train import distill

Tell = Callable[[str], object]


@dataclass(frozen=True)
class Run:
    """A distillation to be had: its config and folder, and how many samples of a cell evaluate it.

    heir_of: the folder of the run whose experts of all phases but the last it takes over.
    """

    config: Config
    folder: Path
    samples: int
    heir_of: Path | None = None


class Workers:
    """`jobs` processes of one thread each, or this process alone; `tell` is told what is done. A context manager.

    A failing run's error is raised as it is, once the runs under way have ended.
    """

    def __init__(self, jobs: int, tell: Tell) -> None:
        context = multiprocessing.get_context("spawn")
        self.jobs, self.tell = jobs, tell
        self._pool = ProcessPoolExecutor(jobs, context, begin_worker) if jobs > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def distil(self, runs: Sequence[Run]) -> None:
        """Distils what is not finished; heirs come last. A folder of another config is a UserError."""
        for run in unique(runs):
            RunFolder(run.folder).check(run.config)
        missing = [run for run in unique(runs) if not RunFolder(run.folder).finished(run.config)]
        for wave in ([run for run in missing if not run.heir_of], [run for run in missing if run.heir_of]):
            self._each(partial(_distil, quiet=self.jobs > 1), [[run] for run in wave], "distilled")

    def evaluate(self, runs: Sequence[Run]) -> None:
        """Evaluates what is not yet. One run of each recipe goes first, so that the base is sampled once.

        A recipe's other runs are dealt out in lots, within which what is read off the base's samples is shared.
        """
        missing = [run for run in unique(runs) if not is_evaluated(run)]
        recipes = dict.fromkeys(run.config.recipe for run in missing)
        lots = [[run for run in missing if run.config.recipe == recipe] for recipe in recipes]
        if self._pool:
            self._each(_evaluate, [lot[:1] for lot in lots], "evaluated")
            lots = [lot[i :: self.jobs] for lot in lots for i in range(1, self.jobs + 1) if lot[i :: self.jobs]]
        self._each(_evaluate, lots, "evaluated")

    def _each(self, work: Callable[[Sequence[Run]], None], lots: Sequence[Sequence[Run]], done: str) -> None:
        if self._pool is None:
            for lot in lots:
                work(lot)
                self.tell(f"{done}: {', '.join(run.folder.name for run in lot)}")
            return
        try:
            futures = {self._pool.submit(work, lot): lot for lot in lots}
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                names = ", ".join(run.folder.name for run in futures[future])
                self.tell(f"{done}, {count} of {len(lots)}: {names}")
        except BrokenProcessPool:
            raise UserError("--jobs: a worker was killed, for want of memory perhaps; try fewer") from None


def default_jobs() -> int:
    """One where there is an accelerator, else the number of CPU cores."""
    return 1 if torch.cuda.is_available() else multiprocessing.cpu_count()


def unique(runs: Sequence[Run]) -> list[Run]:
    """One of each folder: claims share them."""
    return list({run.folder: run for run in runs}.values())


def is_evaluated(run: Run) -> bool:
    """Whether `evaluate` would leave it alone."""
    path, asked = run.folder / "evaluation.json", json.loads(json.dumps(asdict(Protocol(samples=run.samples))))
    return path.exists() and json.loads(path.read_text("utf-8")).get("protocol") == asked


def inherit(run: Run) -> None:
    """Begins an heir's folder with the experts of all phases but the last, which `distill` then loads and freezes."""
    if run.heir_of is None:
        return
    folder, source = RunFolder(run.folder), RunFolder(run.heir_of)
    prompts = read_prompts(run.config.prompts) if run.config.prompts is not None else []
    folder.open(run.config, [prompt.line() for prompt in prompts])
    for phase in range(1, run.config.plan.phases):
        if not folder.expert_path(phase).exists():
            write_atomically(folder.expert_path(phase), source.expert_path(phase).read_bytes())


def _distil(lot: Sequence[Run], quiet: bool) -> None:
    for run in lot:
        inherit(run)
        distill(run.config, run.folder, quiet=quiet)


def _evaluate(lot: Sequence[Run]) -> None:
    for samples in dict.fromkeys(run.samples for run in lot):
        evaluate([run.folder for run in lot if run.samples == samples], Protocol(samples=samples))
