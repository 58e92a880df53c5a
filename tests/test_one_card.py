"""The path of one small card: prompts encoded before there are networks, a packed base, and its export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pipelines
import pytest
import torch
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel
from PIL import Image
from recorded import Recorded, distill_own, loaded_together
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel, Qwen2_5_VLForConditionalGeneration, UMT5EncoderModel

from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.export import export
from phased_dmd.models.loader import load_model
from phased_dmd.models.pipeline import PipelineModel
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.train import distill

ENCODERS = UMT5EncoderModel, CLIPVisionModel, Qwen2_5_VLForConditionalGeneration
NETWORKS = WanTransformer3DModel, QwenImageTransformer2DModel
NAMES = {kind.__name__ for kind in ENCODERS}
BRIEF = {
    "plan.phases": 2, "plan.gradient": "last", "generator.lora.rank": 4, "generator.lora.alpha": 2,
    "fake.weights": "lora", "fake.updates": 1, "batch_size": 2, "iterations": 1,
}  # fmt: skip
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-card")
    Image.effect_noise((48, 32), 80).convert("RGB").save(folder / "frame.png")
    rows = [json.dumps({"prompt": text, "image": "frame.png"}) for text in pipelines.CAPTIONS]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def make(workshop: Path) -> Make:
    """A run of an iteration a phase, of a tiny pipeline; more: changes of its teacher, and of the rest."""

    def build(name: str, teacher: dict[str, Any] | None = None, **more: Any) -> Config:
        folder = workshop / name
        if not folder.exists():
            pipelines.build(name, folder)
        section = json.loads(pipelines.teacher(name, folder).model_dump_json()) | (teacher or {})
        changes = {key.replace("__", "."): value for key, value in more.items()}
        return resolve("nano-t2i", BRIEF | {"teacher": section, "prompts": str(workshop / "prompts.jsonl")} | changes)

    return build


@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v", "wan22_t2v", "qwen_image"])
def test_encoders_and_networks_are_never_loaded_together(
    name: str, make: Make, workshop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run; in one whose prompts are encoded already, which loads none; where it or its teacher is sampled."""
    with loaded_together(*ENCODERS, *NETWORKS) as first:
        run = distill(make(name), tmp_path / "run", quiet=True, cache=tmp_path / "cache")
    with loaded_together(*ENCODERS, *NETWORKS) as second:
        distill(make(name, seed=1), tmp_path / "again", quiet=True, cache=tmp_path / "cache")
    picture = ["--image", str(workshop / "frame.png")] if name == "wan21_i2v" else []
    words = ["sample", str(run), "--prompt", "two cats", "--prompt", "a boat", *picture]
    with loaded_together(*ENCODERS, *NETWORKS) as third:
        for more in ([], ["--base", "2"]):
            output = ["--output", str(tmp_path / f"samples{len(more)}")]
            assert commands.run(*words, *output, *more, monkeypatch=monkeypatch) == 0
    for seen in (first, third):
        assert any(each & NAMES for each in seen) and any(each - NAMES for each in seen)
        assert not [each for each in seen if each & NAMES and each - NAMES]
    assert second and not any(each & NAMES for each in second)


def test_a_network_that_cannot_be_loaded_is_said_before_a_prompt_is_encoded(make: Make, tmp_path: Path) -> None:
    config = make("wan22_t2v")
    whole = Path(config.teacher.path) / "transformer_2" / "diffusion_pytorch_model.safetensors"  # type: ignore[union-attr]
    held = whole.read_bytes()
    tensors = load_file(whole)
    name = "blocks.1.ffn.net.2.weight"
    damages = {
        f"transformer_2 lacks {name} of its Wan": lambda: save_file(
            {key: t for key, t in tensors.items() if key != name}, whole, {"format": "pt"}
        ),
        rf"{name} is \[1\], where its Wan": lambda: save_file(
            tensors | {name: torch.zeros(1)}, whole, {"format": "pt"}
        ),
        "transformer_2 cannot be loaded": lambda: whole.write_bytes(held[:-4]),
    }
    try:
        for message, damage in damages.items():
            damage()
            with pytest.raises(UserError, match=message), loaded_together(*ENCODERS) as seen:
                distill(config, tmp_path / "run", quiet=True)
            assert not seen and not (tmp_path / "run").exists()
    finally:
        whole.write_bytes(held)


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_t2v", "qwen_image"])
def test_a_run_on_a_packed_base_is_exported_and_verified_on_it(name: str, make: Make, tmp_path: Path) -> None:
    """Of both networks; on the full base its samples are others by far more than what is allowed."""
    learn = {"generator__lr": 0.05, "fake__lr": 0.05, "sample_every": None}
    for kind, least in {"nf4": 1e-3, "int8": 2e-4}.items():
        config = make(name, {"quantise": kind}, **learn)
        run = distill(config, tmp_path / kind, quiet=True)
        lines = export(run, tmp_path / f"{kind}-out", verify=True)
        assert lines[-2] == f"verified on the run's own base, packed in {kind}"
        assert "samples at 1, 0.9375, 0.833333, 0.625 differ from the run's by up to " in lines[-1]
        full = load(tmp_path / f"{kind}-out", base=config.teacher.path)  # type: ignore[union-attr]
        apart = load(run)(["a boat"], [0]) - full(["a boat"], [0])
        assert apart.abs().max() > least


def test_phase_1_of_two_networks_calls_the_noisier_one_alone(tmp_path: Path) -> None:
    """With its previews; so the other could wait elsewhere, see docs/models.md."""
    config = resolve("nano-moe", BRIEF | {"iterations": 3, "renoise.network": "update", "sample_every": 1})
    model, codec = load_model(config.teacher, config.seed)
    assert isinstance(model, PipelineModel)
    recorded = Recorded(model, tmp_path / "run")
    distill_own(config, tmp_path / "run", recorded, codec)
    called = [{call.network for call in recorded.calls if call.phase == phase} for phase in (1, 2)]
    assert called == [{0}, {0, 1}]
