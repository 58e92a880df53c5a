"""What is said of a set of prompts: repetitions, lengths, scripts, and the share that a run's own draws see."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from tiny import TinyWan
from torch import Tensor

from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.corpus import draws, examine, script_of, share_seen, token_counter
from phased_dmd.networks.build import build_system
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.recipes import resolve
from phased_dmd.step import draw


def of(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


# ---------------------------------------------------------------- what is there twice


def test_repeated_alike_and_near_prompts_are_told_apart() -> None:
    long = "a red fox asleep in deep snow under a full moon, seen from above"
    found = examine(of(long, "a cat", long, "A cat!", f"{long}, 4k", "a dog"))
    assert (found.repeated, found.alike, found.near) == ({2: 0}, {3: 1}, {4: 0})
    assert found.kept == of(long, "a cat", "a dog")


def test_prompts_with_other_pictures_are_not_the_same() -> None:
    prompts = [Prompt("turn it blue", Path(name)) for name in ("a.png", "b.png", "a.png")]
    found = examine(prompts)
    assert (found.repeated, found.alike, found.near) == ({2: 0}, {}, {}) and found.kept == prompts[:2]


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("a red fox", "Latin"), ("日本の冬、a川", "Han"), ("красная лиса", "Cyrillic"), ("ひらがな", "Hiragana"),
        ("빨간 여우", "Hangul"), ("１２３ !", "no letters"), ("Ｆｏｘ", "Latin"), ("ثعلب أحمر", "Arabic"),
    ],
)  # fmt: skip
def test_the_script_is_that_of_most_letters(text: str, script: str) -> None:
    assert script_of(text) == script


# ---------------------------------------------------------------- lengths


def test_lengths_are_the_encoders_tokens_where_it_is_at_hand() -> None:
    """nano's tokenizer has a token a word, and one for the end; its folder ships."""
    counter = token_counter(resolve("nano-t2i"))
    assert counter is not None
    found = examine(of("a handwritten seven", "a digit"), counter)
    assert (found.unit, list(found.lengths)) == ("tokens", [4, 3])
    assert token_counter(resolve("wan22-t2v", {"teacher.path": "nobody/none"})) is None
    assert (examine(of("a handwritten seven")).unit, examine(of("a b  c")).lengths) == ("words", [3])


# ---------------------------------------------------------------- what a run sees


class Numbers:
    """Stands for encoded prompts; keeps which are drawn."""

    def __init__(self, count: int) -> None:
        self.count, self.drawn = count, list[int]()

    def eligible(self, bucket: int) -> Sequence[int]:
        return range(self.count)

    def row(self, index: int, bucket: int) -> dict[str, Tensor]:
        self.drawn.append(index)
        return {"text": torch.zeros(1, 32)}


def config_of(**changes: Any) -> Config:
    return build({
        "recipe": "mine", "teacher": {"kind": "own"}, "prompts": "mine.txt", "plan": {"steps": 2, "phases": 2},
        "fake": {"updates": 2}, "iterations": 6, "batch_size": 16, **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({}, 2 * 6 * 3 * 16),
        ({"rollouts": {"reuse": True}}, 2 * 6 * 16),
        ({"rollouts": {"antithetic": "start"}}, 2 * 6 * 3 * 8),
        ({"phase_shares": [0.5, 2.0]}, (3 + 12) * 3 * 16),
    ],
)
def test_a_run_draws_as_many_prompts_as_is_said_and_sees_the_share_that_is_expected(
    changes: dict[str, Any], number: int
) -> None:  # fmt: skip
    """By the draws of its own updates, of 400 prompts; the distinct ones deviate by 8 at most."""
    config, conditions = config_of(**changes), Numbers(400)
    assert draws(config) == (number, 0)
    system = build_system(config, TinyWan(), {})
    seen = set[tuple[int, ...]]()
    for phase in (1, 2):
        for iteration in range(config.phase_iterations(phase)):
            for update in range(config.fake.updates + 1):
                before = len(conditions.drawn)
                draw(system, phase, iteration, update, range(16), [1.0], conditions)  # type: ignore[arg-type]
                seen.add((phase, iteration, update, *conditions.drawn[before:]))
    assert len(set(conditions.drawn)) == pytest.approx(400 * share_seen(config, 400), abs=30)
    assert abs(len(set(conditions.drawn)) / 400 - share_seen(config, 400)) < 0.06


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"iterations": 1, "fake.updates": 1, "batch_size": 1, "plan.steps": 1, "plan.phases": 1}, 1 - (3 / 4) ** 2),
        ({"anchor.updates": 120, "rollouts.pool": 2}, 0.5),  # all from the two entries of a pool, drawn for sure
        ({"rollouts.start": "teacher", "plan.phases": 1, "plan.steps": 1}, 1.0),
    ],
)
def test_the_expected_share_is_that_of_draws_with_replacement(changes: dict[str, Any], expected: float) -> None:
    assert share_seen(resolve("nano-t2i", changes), 4) == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- the command


def test_the_command_says_what_a_set_is_like_and_writes_it_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    lines = ["a handwritten seven", "a handwritten seven", "A handwritten seven.", "a digit", "日本"]
    Path("p.txt").write_text("\n".join(lines), "utf-8")
    arguments = ["prompts", "p.txt", "--recipe", "nano-t2i", "--max-tokens", "3", "--output", "clean.jsonl"]
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.splitlines() == [
        "5 prompts, 3 of them unlike any before",
        "repeated, and so drawn more often: 1, 20 %",
        "  2 times: a handwritten seven",
        "alike but for case and marks: 1, 20 %",
        "  A handwritten seven. | a handwritten seven",
        "length in tokens: 4 in the middle, 90 % from 2 to 5, at most 5",
        "longer than 3 tokens, and cut off: 3, 60 %",
        "script of most letters: Latin 4, Han 1",
        "a run of nano-t2i draws 92,160 prompts, and sees 100 % of 5 at least once",
        "clean.jsonl: 3 prompts written",
    ]
    assert read_prompts("clean.jsonl") == of("a handwritten seven", "a digit", "日本")
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert "--output: clean.jsonl exists" in capsys.readouterr().err


def test_pictures_stay_beside_their_prompts_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "in").mkdir()
    rows = [{"prompt": "turn", "image": f"{name}.png"} for name in "aba"]
    (tmp_path / "in" / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out" / "clean.jsonl"
    assert run("prompts", str(tmp_path / "in" / "p.jsonl"), "--output", str(output), monkeypatch=monkeypatch) == 0
    images = [prompt.image for prompt in read_prompts(str(output))]
    assert [image and image.resolve() for image in images] == [tmp_path / "in" / f"{name}.png" for name in "ab"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["p.jsonl", "--output", "clean.txt"], "--output: a line of a txt cannot hold '# a note'; name a .jsonl"),
        (["p.jsonl", "--output", "clean.csv"], "--output: clean.csv is neither a .txt nor a .jsonl"),
        (["p.jsonl", "--recipe", "toy-1d"], "--recipe: toy-1d takes no prompts"),
        (["nowhere.txt"], "prompts: nowhere.txt is neither a readable prompt file nor a shipped set"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text('{"prompt": "# a note"}\n')
    assert run("prompts", *arguments, monkeypatch=monkeypatch) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.glob("clean*"))
