"""Checkpoints as subjects, experts and beginnings: exact where they should be, and refused in one line elsewhere."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import commands
import pytest
import torch
from faults import interrupted

from phased_dmd.checkpoint import Reference, RunFolder, load_header, load_tensors
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.onward import branch, promote, prune
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

FIELDS = {
    "iterations": 6, "teacher.fit_steps": 20, "batch_size": 16, "generator.ema": 0.8, "fake.updates": 2,
    "log_every": 2, "checkpoint_every": 2, "keep_last": "all", "sample_every": None,
}  # fmt: skip


def toy(**fields: Any) -> Config:
    return resolve("toy-1d", FIELDS | {name.replace("__", "."): value for name, value in fields.items()})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, two phases of six iterations, every second checkpoint kept."""
    return distill(toy(), tmp_path_factory.mktemp("made") / "run", quiet=True)


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "run")


def at(run: Path, phase: int, iteration: int) -> Reference:
    return Reference(run, phase, iteration)


def results(run: Path) -> dict[str, bytes]:
    files = [run / "metrics.jsonl", *sorted((run / "experts").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name.removesuffix("-update-0") for path in (run / "checkpoints").iterdir())


# ---------------------------------------------------------------- the name


def test_a_name_is_read_as_it_is_written_and_a_folder_that_is_there_wins(tmp_path: Path) -> None:
    reference = Reference(tmp_path / "a@b", 12, 300)
    assert str(reference) == f"{tmp_path}/a@b@phase-12/300" and Reference.of(str(reference)) == reference
    for folder in (
        "runs/a",
        "runs/a@phase-2",
        "runs/a@phase-2/x",
        "runs/a@phase--1/3",
        "@phase-1/1",
        "a@phase-1/\u0663",
    ):
        assert Reference.of(folder) is None
        with pytest.raises(UserError, match=r"names no checkpoint; RUN@phase-2/300 does"):
            Reference.needed(folder)
    (tmp_path / "a@phase-1" / "2").mkdir(parents=True)
    assert Reference.of(tmp_path / "a@phase-1" / "2") is None


def test_a_checkpoint_that_is_not_there_is_one_line_with_those_that_are(run: Path) -> None:
    there = "phase-1/2, phase-1/4, phase-1/6, phase-2/2, phase-2/4, phase-2/6"
    for phase, iteration in ((2, 3), (3, 2), (0, 0)):
        with pytest.raises(UserError, match=f"there is no such checkpoint; the run has {there}"):
            at(run, phase, iteration).find()
    with pytest.raises(UserError, match="not a run folder"):
        at(run / "nowhere", 1, 2).find()


def test_a_damaged_checkpoint_and_one_behind_a_symlink_are_not_read(run: Path, tmp_path: Path) -> None:
    folder = at(run, 2, 4).find()
    file = next(folder.glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for action in (
        lambda: load(f"{run}@phase-2/4"),
        lambda: promote(at(run, 2, 4)),
        lambda: branch(at(run, 2, 4), tmp_path / "b", {}),
    ):
        with pytest.raises(UserError, match="damaged"):
            action()
    shutil.move(folder, tmp_path / "aside")
    folder.symlink_to(tmp_path / "aside")
    with pytest.raises(UserError, match="symlink"):
        load(f"{run}@phase-2/4")
    shutil.move(run / "config.json", tmp_path / "config.json")
    (run / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: leads out of"):
        load(f"{run}@phase-2/6")


# ---------------------------------------------------------------- samples


def test_the_last_checkpoint_samples_as_the_run_does_and_another_one_does_not(made: Path) -> None:
    seeds = range(5)
    whole, last, other = (
        load(subject)([""] * 5, seeds) for subject in (made, f"{made}@phase-2/6", f"{made}@phase-2/2")
    )
    assert torch.equal(whole, last) and not torch.equal(whole, other)


def test_a_checkpoint_of_an_earlier_phase_is_sampled_to_its_end_as_a_preview(made: Path) -> None:
    """The prediction of x_0 there, by the averaged weights; a warning says so."""
    with pytest.warns(UserWarning, match=r"^samples are predictions of x_0 at the end of phase 1 of 2, t = 0\.5$"):
        sampler = load(f"{made}@phase-1/6")
    assert sampler.calls == 1 and load(made).calls == 2
    samples = sampler([""] * 5, range(5))
    assert torch.equal(samples, load(made).preview(1, [{}] * 5))
    assert torch.equal(samples, sampler.preview(1, [{}] * 5)) and not torch.equal(
        samples, load(made)([""] * 5, range(5))
    )


# ---------------------------------------------------------------- promote


@pytest.mark.parametrize("ema", [0.8, None])
def test_promoting_the_last_checkpoint_gives_the_expert_byte_for_byte(ema: float | None, tmp_path: Path) -> None:
    run = distill(toy(generator__ema=ema, iterations=2), tmp_path / "run", quiet=True)
    before = results(run)
    for phase in (1, 2):
        assert not promote(at(run, phase, 2))  # it is that already
    RunFolder(run).expert_path(2).unlink()
    assert promote(at(run, 2, 2)) and results(run) == before


def test_a_promoted_checkpoint_is_the_expert_and_says_of_which_iteration(run: Path, made: Path) -> None:
    assert promote(at(run, 2, 4))
    path = RunFolder(run).expert_path(2)
    assert load_header(path) == load_header(RunFolder(made).expert_path(2)) | {"iteration": 4}
    assert torch.equal(load(run)([""] * 5, range(5)), load(f"{made}@phase-2/4")([""] * 5, range(5)))
    assert promote(at(run, 2, 6)) and results(run) == results(made)


def test_an_unfinished_phase_ends_where_it_is_promoted_and_the_run_goes_on(tmp_path: Path, made: Path) -> None:
    """As a run whose first phase has that many iterations, but for the lines of metrics that were there."""
    run, constant = tmp_path / "run", {"optimiser__decay": "constant"}
    begun = toy(**constant)
    with interrupted(lambda path: RunFolder(run).expert_path(1).parent == path.parent):
        distill(begun, run, quiet=True)
    assert not RunFolder(run).expert_path(1).exists()
    assert promote(at(run, 1, 4))
    distill(begun, run, quiet=True)
    shorter = distill(toy(**constant, phase_shares=(2 / 3, 1)), tmp_path / "shorter", quiet=True)
    for phase in (1, 2):
        ours, theirs = (load_tensors(RunFolder(each).expert_path(phase)) for each in (run, shorter))
        assert ours[1] == theirs[1] and all(torch.equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    assert load_header(RunFolder(run).expert_path(1))["iteration"] == 4


def test_phases_that_learnt_from_another_expert_are_removed_when_that_is_asked_for(run: Path, made: Path) -> None:
    for file in (run / "evaluations" / "phase-2" / "4" / "evaluation.json", run / "pool" / "phase-2" / "x.safetensors"):
        file.parent.mkdir(parents=True)
        file.touch()
    with pytest.raises(UserError, match="phases behind phase 1 have learnt from its expert's samples; --drop-later"):
        promote(at(run, 1, 4))
    assert results(run) == results(made)
    assert promote(at(run, 1, 4), drop_later=True)
    assert checkpoints(run) == [f"phase-1-iteration-{i:06d}" for i in (2, 4, 6)]
    assert [path.name for path in (run / "experts").iterdir()] == ["phase-1.safetensors"]
    assert not (run / "evaluations" / "phase-2").exists() and not (run / "pool" / "phase-2").exists()
    assert [row["phase"] for row in RunFolder(run).metrics()] == [1, 1, 1]
    distill(toy(), run, quiet=True)
    assert (
        RunFolder(run).finished(toy()) and results(run)["phase-2.safetensors"] != results(made)["phase-2.safetensors"]
    )


def test_a_kill_while_phases_are_removed_leaves_the_former_expert(run: Path, made: Path) -> None:
    expert = RunFolder(run).expert_path(2)
    with interrupted(lambda path: path.is_relative_to(run) and not expert.exists()):
        promote(at(run, 1, 4), drop_later=True)
    assert results(run)["phase-1.safetensors"] == results(made)["phase-1.safetensors"]
    assert promote(at(run, 1, 4), drop_later=True) and checkpoints(run) == checkpoints(made)[:3]


def test_a_run_that_is_being_written_is_left_alone(run: Path) -> None:
    with RunFolder(run).locked():
        for action in (lambda: promote(at(run, 2, 4)), lambda: prune(run)):
            with pytest.raises(UserError, match=f"is being written by process {os.getpid()}"):
                action()


# ---------------------------------------------------------------- branch


@pytest.mark.parametrize(("phase", "iteration"), [(1, 2), (1, 6), (2, 4)])
def test_a_branch_without_changes_ends_as_the_run_did(phase: int, iteration: int, made: Path, tmp_path: Path) -> None:
    config = branch(at(made, phase, iteration), tmp_path / "branch", {})
    assert config == toy() and checkpoints(tmp_path / "branch") == [f"phase-{phase}-iteration-{iteration:06d}"]
    distill(config, tmp_path / "branch", quiet=True)
    assert results(tmp_path / "branch") == results(made)


def test_a_branch_with_another_rate_and_length_goes_its_own_way(made: Path, tmp_path: Path) -> None:
    before = results(made)
    config = branch(at(made, 2, 4), tmp_path / "branch", {"generator.lr": 1e-2, "iterations": 8})
    distill(config, tmp_path / "branch", quiet=True)
    ours = results(tmp_path / "branch")
    assert ours["phase-1.safetensors"] == before["phase-1.safetensors"] != ours["phase-2.safetensors"]
    rows = [(row["phase"], row["iteration"]) for row in RunFolder(tmp_path / "branch").metrics()]
    assert rows == [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6), (2, 8)]
    origin = json.loads((tmp_path / "branch" / "branch.json").read_text())
    assert origin == {"from": f"{made}@phase-2/4", "config": toy().model_dump(mode="json")}
    assert results(made) == before and checkpoints(made)[-2:] == [
        "phase-2-iteration-000004",
        "phase-2-iteration-000006",
    ]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"plan.shift": 2.0}, "plan.shift is 1.0 there, 2.0 here"),
        ({"plan.steps": 4}, "plan.steps is 2 there, 4 here"),
        ({"teacher.fit_steps": 30}, "teacher.fit_steps is 20 there, 30 here"),
        ({"optimiser.second_moment": "bfloat16"}, "optimiser.second_moment is"),
        ({"generator.ema": None}, "generator.ema: the checkpoint has an average"),
        ({"iterations": 3}, "iterations: phase 2 would have 3, and the checkpoint more"),
        ({"anchor.updates": 6}, "anchor.updates: the checkpoint has a fake"),
        ({"iteration": 3}, "iteration: unknown field; did you mean iterations?"),
    ],
)
def test_a_branch_that_does_not_fit_is_refused_and_leaves_nothing(
    changes: dict[str, Any], why: str, made: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        branch(at(made, 2, 4), tmp_path / "branch", changes)
    assert why in str(error.value) and not list(tmp_path.iterdir())


def test_a_branch_of_adapters_keeps_its_rank_and_may_have_other_prompts(tmp_path: Path) -> None:
    """Of the base it still knows what it was; its own prompts are those that it is given. Its checkpoints are exported
    as the run is.
    """
    fields = {
        "iterations": 2, "batch_size": 2, "generator.lora.rank": 2, "fake.updates": 1, "log_every": 1, "plan.phases": 1,
        "plan.gradient": "last",
        "sample_every": None, "checkpoint_every": 1, "keep_last": "all", "optimiser.decay": "constant",
    }  # fmt: skip
    run = distill(resolve("nano-t2i", fields), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="generator.lora.rank is 2 there, 4 here"):
        branch(at(run, 1, 1), tmp_path / "branch", {"generator.lora.rank": 4})
    (tmp_path / "mine.txt").write_text("a handwritten seven\n")
    config = branch(at(run, 1, 1), tmp_path / "branch", {"prompts": str(tmp_path / "mine.txt")})
    assert {*json.loads((tmp_path / "branch" / "contents.json").read_bytes())} == {"init_experts", "teacher"}
    distill(config, tmp_path / "branch", quiet=True)
    assert RunFolder(tmp_path / "branch").finished(config)
    same = branch(at(run, 1, 1), tmp_path / "same", {})
    assert os.path.samefile(*(next((each / "conditions").glob("00000-*")) for each in (run, tmp_path / "same")))
    distill(same, tmp_path / "same", quiet=True)
    assert results(tmp_path / "same") == results(run)
    exported = [tmp_path / name for name in ("of-run", "of-checkpoint", "of-another")]
    for subject, folder in zip((run, f"{run}@phase-1/2", f"{run}@phase-1/1"), exported, strict=True):
        export(Path(subject), folder)
    whole, last, middle = (
        {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} for folder in exported
    )
    assert whole == last and [name for name in whole if middle[name] != whole[name]] == [
        name for name in whole if name.endswith(".safetensors")
    ]


def test_a_folder_that_is_not_empty_is_not_branched_into(made: Path, run: Path) -> None:
    with pytest.raises(UserError, match="--output: .* exists and is not an empty folder"):
        branch(at(made, 2, 4), run, {})
    assert results(run) == results(made)


def test_phases_that_are_trained_apart_have_checkpoints_too(tmp_path: Path) -> None:
    config = toy(rollouts__start="teacher", rollouts__pool=16)
    whole = distill(config, tmp_path / "whole", quiet=True)
    run = distill(config, tmp_path / "run", quiet=True, only_phase=1)
    assert (run / "phases" / "phase-1" / "checkpoints").is_dir()
    branched = branch(at(run, 1, 4), tmp_path / "branch", {})
    distill(branched, tmp_path / "branch", quiet=True)
    assert results(tmp_path / "branch") == results(whole)
    assert promote(at(run, 1, 4))
    distill(config, run, quiet=True, only_phase=2)
    assert not (run / "phases").exists() and load_header(RunFolder(run).expert_path(1))["iteration"] == 4
    assert results(run)["phase-2.safetensors"] == results(whole)["phase-2.safetensors"]  # it learnt from the teacher's
    assert promote(at(run, 1, 6)) and results(run) == results(whole)


# ---------------------------------------------------------------- prune


def size(*paths: Path) -> int:
    return sum(file.stat().st_size for path in paths for file in [path, *path.rglob("*")] if file.is_file())


def test_what_a_finished_run_does_not_need_is_said_and_removed(run: Path, made: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(at(run, 1, 2).find(), run / "failures" / "phase-1-iteration-000002-update-0")
    for file in ("pool/phase-1/0-00000.safetensors", "conditions/a.safetensors", "experts/.x.partial"):
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes(bytes(1000))
    old = [path for path in folder.iterdir() if not path.name.startswith("phase-2-iteration-000006")]
    expected = [
        (5, "checkpoint", size(*old)), (1, "failure", size(run / "failures")), (1, "half-written file", 1000),
        (1, "trajectory file", 1000),
    ]  # fmt: skip
    assert prune(run, dry_run=True) == expected and len(old) == 5 and all(path.exists() for path in old)
    assert prune(run) == expected and prune(run) == []
    assert checkpoints(run) == ["phase-2-iteration-000006"] and results(run) == results(made)
    assert promote(at(run, 2, 6)) is False  # whole still
    last = size(folder)
    assert prune(run, everything=True) == [(1, "checkpoint", last), (1, "encoded prompt file", 1000)]
    assert results(run) == results(made) and torch.equal(load(run)([""], [0]), load(made)([""], [0]))


def test_an_unfinished_run_keeps_what_it_goes_on_from(tmp_path: Path, made: Path) -> None:
    run = tmp_path / "run"
    with interrupted(lambda path: (run / "checkpoints" / "phase-2-iteration-000004-update-0").exists()):
        distill(toy(), run, quiet=True)
    assert [each[:2] for each in prune(run, everything=True)] == [(3, "checkpoint")]
    assert checkpoints(run) == ["phase-2-iteration-000002", "phase-2-iteration-000004"]
    distill(toy(), run, quiet=True)
    assert results(run) == results(made)


def test_what_a_branch_shares_is_not_counted_as_freed(run: Path, tmp_path: Path) -> None:
    branch(at(run, 2, 4), tmp_path / "branch", {})
    alone = size(*(at(run, phase, i).find() for phase, i in ((1, 2), (1, 4), (1, 6), (2, 2))))
    assert prune(run) == [(5, "checkpoint", alone)]
    assert at(tmp_path / "branch", 2, 4).find()  # whole


def test_a_finished_run_keeps_its_last_checkpoint_alone(tmp_path: Path) -> None:
    """It loses the others when it ends, and then no more: a command that finds it done may ask for other ones."""
    run, config = tmp_path / "run", toy(keep_last=2, iterations=4)
    with interrupted(lambda path: RunFolder(run).expert_path(2).exists() and "checkpoints" in path.parts):
        distill(config, run, quiet=True)
    assert len(checkpoints(run)) == 2
    distill(config, run, quiet=True)
    assert len(checkpoints(run)) == 2
    whole = distill(config, tmp_path / "whole", quiet=True)
    prune(run)
    assert checkpoints(run) == checkpoints(whole) == ["phase-2-iteration-000004"]


# ---------------------------------------------------------------- the commands


def test_the_commands_say_what_they_did_and_what_comes_next(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def said(*arguments: str, status: int = 0) -> str:
        assert commands.run(*arguments, monkeypatch=monkeypatch) == status
        out, error = capsys.readouterr()
        return (error if status else out).replace(str(tmp_path), "")

    assert said("promote", f"{run}@phase-2/6") == "/run@phase-2/6: is the expert of phase 2 already\n"
    now = "/run@phase-2/4: is the expert of phase 2 now; next: `phased-dmd evaluate /run`\n"
    assert said("promote", f"{run}@phase-2/4") == now
    assert "--drop-later removes" in said("promote", f"{run}@phase-1/4", status=2)
    assert "trains the phases behind it" in said("promote", f"{run}@phase-1/4", "--drop-later")
    new = str(tmp_path / "new")
    begun = said("branch", f"{run}@phase-1/4", "--output", new, "--generator.lr", "0.001", "--iterations", "8")
    first = "/new: begun at /run@phase-1/4, with 4 iterations of phase 1 to go"
    assert begun == f"{first}\nnext: phased-dmd distill /new/config.json --output /new\n"
    assert RunFolder(new).config() == toy(generator__lr=0.001, iterations=8)
    assert said("distill", f"{new}/config.json", "--output", new).endswith("`phased-dmd evaluate /new`\n")
    assert "names no checkpoint" in said("branch", str(run), "--output", str(tmp_path / "other"), status=2)
    lines = said("prune", str(run), new, "--dry-run").splitlines()
    assert lines[0].startswith("/run: 3 checkpoints, 0.00") and lines[0].endswith(" GB would be removed")
    assert lines[1].endswith("GB would be removed") and lines[2].startswith("in all 0.00")
    assert said("prune", str(run), str(tmp_path), status=2).startswith("phased-dmd: : not a run folder")
    assert len(checkpoints(run)) == 3


def test_a_checkpoint_of_a_phase_that_others_follow_is_not_exported(made: Path, tmp_path: Path) -> None:
    for subject, why in (
        (f"{made}@phase-2/4", "kind analytic has no stock pipeline"),
        (f"{made}@phase-1/4", "phase 1 of 2"),
    ):
        with pytest.raises(UserError, match=why):
            export(Path(subject), tmp_path / "out")
