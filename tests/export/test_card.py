"""The card: its metadata are the hub's, its pictures are there, and its code runs, as it stands, in the folder."""

import os
import re
from pathlib import Path

import pytest
import yaml
from faults import forked
from huggingface_hub import ModelCard
from PIL import Image
from runs import TINY, Make

from phased_dmd.export import export
from phased_dmd.recipes import resolve
from phased_dmd.train import distill


def code_of(card: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.M | re.S)


def run_in(folder: Path, code: str) -> None:
    """Runs code in the folder, as a reader of the card would: as a script, in a forked process of its own."""

    def read() -> None:
        os.chdir(folder)
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})

    assert forked(read, seconds=300) == 0


@pytest.mark.parametrize(
    ("name", "method", "fused"),
    [("nano", "phased", False), ("nano-moe", None, True), ("wan21_i2v", None, False), ("qwen_image", None, False)],
)
def test_the_code_of_the_card_runs_as_it_stands(
    name: str, method: str | None, fused: bool, make: Make, workshop: Path, tmp_path: Path
) -> None:
    """But for the place of a base that is a folder, which the card cannot know."""
    folder = tmp_path / "out"
    export(make(name, method), folder, fused=fused)
    blocks = code_of(folder / "README.md")
    assert len(blocks) == 2 and "phased_dmd" in blocks[0] and "trust_remote_code=True" in blocks[1]
    if name == "wan21_i2v":
        Image.effect_noise((48, 32), 80).convert("RGB").save(folder / "first-frame.png")
    made = "sample.webp" if name == "wan21_i2v" else "sample.png"
    ours, stock = (block.replace('"BASE"', repr(str(workshop / "teachers" / name))) for block in blocks)
    run_in(folder, f"{ours}\nfrom pathlib import Path\nPath({made!r}).rename('ours-{made}')\n{stock}")
    for each in (made, f"ours-{made}"):
        picture = Image.open(folder / each)
        assert picture.size == ((32, 32) if "nano" in name else (48, 32))
        assert getattr(picture, "n_frames", 1) == (5 if name == "wan21_i2v" else 1)


def test_the_cards_metadata_are_those_of_the_hub(make: Make, tmp_path: Path) -> None:
    hub = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    export(make("wan22_t2v"), tmp_path / "lora", base_model=hub, repo="me/few")
    export(make("wan22_t2v"), tmp_path / "fused", fused=True, base_model="me/tuned")
    export(make("nano"), tmp_path / "nano")
    card = ModelCard.load(tmp_path / "lora" / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0", "base_model": hub, "base_model_relation": "adapter", "library_name": "diffusers",
        "pipeline_tag": "text-to-video", "tags": ["phased-dmd", "distillation", "few-step", "t2v", "lora"],
    }  # fmt: skip
    assert 'load_pipeline("me/few")' in card.text and 'here = "me/few"\n' in card.text and hub in card.text
    fused = ModelCard.load(tmp_path / "fused" / "README.md").data.to_dict()
    assert (fused["license"], fused["license_name"]) == ("other", "that-of-the-base")
    assert (fused["base_model"], fused["base_model_relation"], "lora" in fused["tags"]) == (
        "me/tuned",
        "finetune",
        False,
    )
    assert "base_model" not in ModelCard.load(tmp_path / "nano" / "README.md").data.to_dict()


def test_the_card_says_sizes_text_times_and_what_was_checked(make: Make, workshop: Path, tmp_path: Path) -> None:
    export(make("wan21_t2v"), tmp_path / "plain")
    lines = export(make("wan21_t2v", ablation__solver="renoise"), tmp_path / "checked", verify=True, dtype="bfloat16")
    plain, checked = ((tmp_path / name / "README.md").read_text() for name in ("plain", "checked"))
    assert "- Sizes: 32 x 48, 32 x 48, height x width in pixels." in plain  # of a still and of clips
    assert "- Text: at most 24 tokens, padded to that; the network attends to the padding" in plain
    assert "- Weights: float32, rank 4" in plain and "- Weights: bfloat16, rank 4" in checked
    assert "- Solver: Euler." in plain and "noised again with fresh noise" in checked
    assert "- Check: none; " in plain and f"- Check: {lines[-1]}." in checked
    rows = re.findall(r"^\| (\d) \| (\S+) \| (\S+) \| `(\S+)` \| `(\S+)` \|$", plain, re.M)
    assert [row[:3] for row in rows] == [
        ("1", "1", "0.9375"), ("2", "0.9375", "0.833333"), ("3", "0.833333", "0.625"), ("4", "0.625", "0"),
    ]  # fmt: skip
    assert all((tmp_path / "plain" / row[3]).exists() and row[4] == "transformer" for row in rows)


def test_the_card_shows_the_last_preview_of_training_with_its_prompts_and_seeds(tmp_path: Path) -> None:
    """Of three prompts spread over sixteen samples: five or six seeds each."""
    (tmp_path / "p.txt").write_text("a seven\na four\na one\n")
    quick = {"iterations": 2, "batch_size": 2, "fake.updates": 1, "sample_every": 1, "prompts": str(tmp_path / "p.txt")}
    run = distill(resolve("nano-t2i", TINY | quick), tmp_path / "run", quiet=True)
    export(run, tmp_path / "out")
    last = run / "samples" / "phase-2-iteration-000002.png"
    assert (tmp_path / "out" / "samples.png").read_bytes() == last.read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "![samples](samples.png)" in card
    assert "- seeds 0 to 5: a seven\n- seeds 6 to 10: a four\n- seeds 11 to 15: a one\n" in card
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert (tmp_path / "out" / picture).stat().st_size < 100_000
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
