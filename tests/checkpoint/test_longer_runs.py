"""A finished run goes on to more iterations, and ends as if it had had them all along; or one line says why not."""

from pathlib import Path
from typing import Any

import pytest
from faults import interrupted
from tiny import killed_after

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

FIELDS = {
    "teacher.fit_steps": 20, "batch_size": 16, "generator.ema": 0.8, "fake.updates": 2, "optimiser.decay": "constant",
    "log_every": 2, "checkpoint_every": 2, "sample_every": None,
}  # fmt: skip


def toy(iterations: int, **fields: Any) -> Config:
    return resolve("toy-1d", FIELDS | {"iterations": iterations} | {k.replace("__", "."): v for k, v in fields.items()})


def results(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", *sorted((run / "experts").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------- what is exact


@pytest.mark.parametrize(
    ("iterations", "every"), [(4, 2), (5, 2), (5, 5)], ids=["on a line", "before its end", "between lines"]
)
def test_a_run_of_one_phase_becomes_one_that_was_longer_from_its_start(
    iterations: int, every: int, tmp_path: Path
) -> None:
    """Whether its last checkpoint is of its last iteration or not, and its last line of metrics one of every second."""
    phases = {"plan__phases": 1, "plan__gradient": "last", "checkpoint_every": every}
    run, longer = tmp_path / "run", tmp_path / "longer"
    distill(toy(iterations, **phases), run, quiet=True)
    before = results(run)
    distill(toy(9, **phases), run, quiet=True)
    distill(toy(9, **phases), longer, quiet=True)
    assert results(run) == results(longer) != before
    assert RunFolder(run).config() == toy(9, **phases) and RunFolder(run).finished(toy(9, **phases))
    with pytest.raises(UserError, match=f"phase 1 of {run} is at 9, and 5 are asked for; `phased-dmd promote"):
        distill(toy(5, **phases), run, quiet=True)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(toy(4), tmp_path_factory.mktemp("short") / "run", quiet=True)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run is whose second phase has two iterations more."""
    return results(distill(toy(4, phase_shares=(1, 1.5)), tmp_path_factory.mktemp("long") / "run", quiet=True))


def test_the_last_of_two_phases_becomes_longer(short: Path, long: dict[str, bytes], tmp_path: Path) -> None:
    run = tmp_path / "run"
    distill(toy(4), run, quiet=True)
    assert results(run) == results(short) and names(run) == ["phase-2-iteration-000004-update-0"]
    distill(toy(4, phase_shares=(1, 1.5)), run, quiet=True)
    assert results(run) == long and names(run) == ["phase-2-iteration-000006-update-0"]


@pytest.mark.parametrize("goes_on", ["longer", "as it was"])
@pytest.mark.parametrize("when", ["the expert is gone", "the config is written"])
def test_a_kill_while_it_is_reopened_costs_nothing(
    when: str, goes_on: str, short: Path, long: dict[str, bytes], tmp_path: Path
) -> None:
    """By either command: at the end of the old one's iterations it is where that ends."""
    run, longer = distill(toy(4), tmp_path / "run", quiet=True), toy(4, phase_shares=(1, 1.5))
    expert = RunFolder(run).expert_path(2)

    def due(path: Path) -> bool:
        place = (
            run if when == "the expert is gone" else run / "checkpoints"
        )  # which is read after the config is written
        return path.is_relative_to(place) and not expert.exists()

    with interrupted(due):
        distill(longer, run, quiet=True)
    assert not expert.exists()
    assert RunFolder(run).config() == (toy(4) if when == "the expert is gone" else longer)
    distill(longer if goes_on == "longer" else toy(4), run, quiet=True)
    assert results(run) == (long if goes_on == "longer" else results(short))


def test_an_unfinished_run_may_end_elsewhere(long: dict[str, bytes], tmp_path: Path) -> None:
    run = tmp_path / "run"
    with killed_after(2, 2):
        distill(toy(4), run, quiet=True)
    with pytest.raises(UserError, match="phase 1 of .* is done with 4, and 5 are asked for; `--iterations 4 --set pha"):
        distill(toy(5), run, quiet=True)
    with pytest.raises(
        UserError, match="phase 2 of .* is at 2, and 1 are asked for; `phased-dmd promote .*@phase-2/1`"
    ):
        distill(toy(4, phase_shares=(1, 0.25)), run, quiet=True)
    distill(toy(4, phase_shares=(1, 1.5)), run, quiet=True)
    assert results(run) == long


# ---------------------------------------------------------------- what is not


def refused(config: Config, run: Path) -> str:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(UserError) as error:
        distill(config, run, quiet=True)
    assert {path: path.read_bytes() for path in before} == before
    return str(error.value).replace(str(run), "RUN")


def test_what_cannot_be_exact_is_refused_with_what_to_do(short: Path, tmp_path: Path) -> None:
    shares = "`--iterations 4 --set phase_shares=[1,1.5]` makes the last phase alone longer"
    assert refused(toy(6), short) == f"iterations: phase 1 of RUN is done with 4, and 6 are asked for; {shares}"
    assert "is at 4, and 2 are asked for" in refused(toy(4, phase_shares=(1, 0.5)), short)
    assert "holds another run of toy-1d: seed is 0 there, 1 here" in refused(toy(6, seed=1), short)


def test_rates_that_fall_and_anchored_phases_are_not_made_longer(tmp_path: Path) -> None:
    falls = {"plan__phases": 1, "plan__gradient": "last", "optimiser__decay": "linear"}
    run = distill(toy(2, **falls), tmp_path / "falls", quiet=True)
    again = "`phased-dmd branch RUN@phase-1/2 --output NEW --iterations 4` goes on from there all the same"
    rates = "had learning rates that fall over 2 iterations; over 4 they would have been others"
    assert refused(toy(4, **falls), run) == f"iterations: phase 1 of RUN {rates}; {again}"
    anchored = {"plan__phases": 1, "plan__gradient": "last", "anchor__updates": 3, "rollouts__pool": 16}
    run = distill(toy(2, **anchored), tmp_path / "anchored", quiet=True)
    assert "phase 1 of RUN is anchored in all of its 2 iterations" in refused(toy(4, **anchored), run)


def test_without_its_checkpoint_a_run_is_not_made_longer(tmp_path: Path) -> None:
    run = distill(toy(2, plan__phases=1, plan__gradient="last", checkpoint_every=9), tmp_path / "run", quiet=True)
    longer = toy(4, plan__phases=1, plan__gradient="last", checkpoint_every=9)
    assert refused(longer, run).endswith("--init-experts RUN begins another run with its experts")
    assert "trains its phases apart" in refused(toy(4, plan__phases=1, plan__gradient="last"), apart(tmp_path))


def apart(folder: Path) -> Path:
    """A run whose phase is being trained by itself."""
    run = RunFolder(folder / "apart", 1)
    run.open(toy(2, plan__phases=1, plan__gradient="last"), [""])
    return run.path
