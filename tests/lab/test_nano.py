"""The embedded teacher: a stock diffusers folder, distilled, sampled and evaluated through its own classes."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import teacher_alone

from phased_dmd.cli import main
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.lab.evaluate import Protocol, evaluate
from phased_dmd.lab.metrics.digit_classifier import WORDS, classify, load_classifier
from phased_dmd.lab.report import write_report
from phased_dmd.lab.teach.mnist import all_captions
from phased_dmd.lab.teach.nano import teach
from phased_dmd.lab.teach.variants import teach_i2v, teach_moe
from phased_dmd.lab.teach.worlds import DIGITS, TrainingBudget
from phased_dmd.models.wan import NANO
from phased_dmd.prompts import Prompt, read_prompts
from phased_dmd.recipes import resolve
from phased_dmd.sampling.loading import load
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.train import distill

DATA = Path(__file__).parents[2] / "data" / "mnist_5k.csv.gz"
PROMPTS = ["a handwritten seven", "a handwritten digit"]


@pytest.fixture(scope="module")
def stock() -> WanPipeline:
    pipeline = WanPipeline.from_pretrained(NANO, dtype=torch.float32).to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return teacher_alone(resolve("nano-t2i", {}))


def test_our_teacher_is_the_stock_pipelines(stock: WanPipeline, sampler: Sampler) -> None:
    """20 guided steps of WanPipeline, from the same noise, on UniPC's nearly equal grid (.9376 for .9375 and so on)."""
    noise = normal((16, 1, 4, 4), range(2), "sample")
    theirs = stock(
        PROMPTS, height=32, width=32, num_frames=1, num_inference_steps=20, max_sequence_length=16,
        guidance_scale=sampler.system.model.guidance[0], latents=noise, output_type="latent",
    ).frames  # fmt: skip
    ours = sampler(PROMPTS, range(2), teacher_steps=20)
    assert (ours - theirs.to(ours)).abs().mean() < 0.01 * ours.std()


def test_conditions_and_pixels_are_the_stock_pipelines(stock: WanPipeline, sampler: Sampler) -> None:
    with torch.no_grad():
        theirs, _ = stock.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=16)
    rows = sampler.codec.encode_text(PROMPTS)
    assert [len(row["text"]) for row in rows] == [4, 4], "three words and the end, nothing of the padding"
    assert torch.equal(sampler.system.model.batch(rows)["text"], theirs)
    latents, config = normal((16, 3, 4, 4), range(2), "latents"), stock.vae.config
    mean, std = (torch.tensor(each).reshape(1, 16, 1, 1, 1) for each in (config.latents_mean, config.latents_std))
    with torch.no_grad():
        raw = stock.vae.decode((latents * std + mean).to(device())).sample
    pixels = torch.tensor(stock.video_processor.postprocess_video(raw, output_type="np"))
    assert torch.allclose(sampler.codec.decode(latents).cpu(), pixels, atol=1e-6)


def test_the_teacher_writes_the_digit_it_is_asked_for(sampler: Sampler) -> None:
    prompts = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "six", "seven")] * 5
    labels = torch.tensor([0, 1, 2, 3, 6, 7] * 5)
    read_as = classify(load_classifier()[0], sampler.decode(sampler(prompts, range(30), teacher_steps=20)))[1].argmax(1)
    assert int((read_as == labels).sum()) >= 27


@pytest.mark.parametrize("name", ["nano-t2i", "nano-t2v"])
def test_the_shipped_prompts_are_captions_the_teacher_knows(name: str) -> None:
    prompts = read_prompts(name)
    assert {prompt.text for prompt in prompts} <= set(all_captions())
    assert len(set(prompts)) < len(prompts), "the weak prompt is drawn more often than a specific one"


def test_the_package_ships_at_most_12_mb_and_as_much_for_the_variants() -> None:
    sizes = {file: file.stat().st_size for file in NANO.parent.rglob("*") if file.is_file()}
    variants = sum(size for file, size in sizes.items() if "-moe" in str(file) or "-i2v" in str(file))
    assert variants <= 12e6 and sum(sizes.values()) - variants <= 12e6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two phases of two steps, two iterations each, by LoRA, on clips: the shortest whole run."""
    overrides = {"iterations": 2, "batch_size": 4, "plan.phases": 2, "teacher.base_steps": 6, "generator.lora.rank": 4}
    return distill(resolve("nano-t2v", overrides), tmp_path_factory.mktemp("nano") / "run", quiet=True)


def test_the_teacher_is_untouched_bit_for_bit_after_a_run(run: Path, sampler: Sampler) -> None:
    """With both phases' adapters injected and off, the transformer computes what a freshly loaded one does."""
    distilled = load(run)
    fresh = teacher_alone(distilled.system.config)
    ours, theirs = (s(PROMPTS, range(2), teacher_steps=3) for s in (distilled, fresh))
    assert torch.equal(ours, theirs)
    assert not torch.equal(distilled(PROMPTS, range(2)), fresh(PROMPTS, range(2), teacher_steps=4))


def test_the_expert_files_say_where_they_belong(run: Path) -> None:
    for phase, steps, boundary in ((1, [0, 1], 5 / 6), (2, [2, 3], 0.0)):
        path = run / "experts" / f"phase-{phase}.safetensors"
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["phased_dmd"])
            assert any(name.endswith("lora_A.weight") and t.shape[0] == 4 for name, t in load_file(path).items())
        assert header["steps"] == steps and header["boundary"] == pytest.approx(boundary)
        assert header["grid"] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])
        assert (header["rank"], header["alpha"], header["shift"], header["solver"]) == (4, 32.0, 5.0, "ddim")


def test_clips_are_sampled_evaluated_and_reported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "a handwritten seven moving right fast"
    arguments = ["sample", str(run), "--prompt", prompt, "--seeds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *arguments])
    main()
    clip, _, manifest, sheet = (Path(line) for line in capsys.readouterr().out.split())
    with Image.open(clip) as image:
        assert image.n_frames == 9
    with Image.open(sheet) as image:
        assert image.size[0] >= 9 * 4 * 32 and image.size[1] >= 2 * 4 * 32  # enlarged, and captioned
    assert read_prompts(str(manifest))[0] == Prompt(prompt, clip)

    result = evaluate([run], Protocol(samples=16))[str(run)]
    rows = result["sets"]["specific"]["rows"]
    base, student = ({name: figure["value"] for name, figure in rows[row].items()} for row in list(rows)[::2])
    assert (base["network_calls"], student["network_calls"]) == (12, 4)
    assert base["direction"] > 0.9 and base["pixels_moved_fast"] > base["pixels_moved_slowly"] + 2
    assert base["optical_flow"] > 0 and base["frechet_video"] > 0 == base["frechet_video_paired"]
    page = write_report([run], tmp_path / "report.html").read_text()
    shown = sum(len(json.loads(path.read_text())) for path in run.glob("samples/*/shown.json"))
    samples = page[page.index('<section id="samples"') : page.index('<section id="numbers"')]
    assert samples.count("data:image/webp") == 3 * shown  # three rows


def test_the_teacher_can_be_taught_again(tmp_path: Path) -> None:
    """Every stage for a step or two: the folder loads into the stock pipeline and samples."""
    budget = TrainingBudget(vae_steps=2, num_images=16, num_clips=8, transformer_steps=3)
    teach(DIGITS, tmp_path, DATA, 0, budget, lambda _: None)
    config = resolve("nano-t2v", {"teacher.path": str(tmp_path)})
    pixels = teacher_alone(config)
    clips = pixels.decode(pixels(["a handwritten digit"], [0], teacher_steps=2))
    assert torch.isfinite(clips).all() and clips.std() > 0


@pytest.mark.parametrize("name", ["nano-moe", "nano-i2v"])
def test_the_variants_can_be_taught_again(name: str, tmp_path: Path) -> None:
    """A complete folder, whose teacher samples; of nano-moe each network is trained for itself."""
    budget = TrainingBudget(num_images=16, num_clips=8, switch_steps=(2, 2), first_frame_steps=2)
    {"nano-moe": partial(teach_moe, DIGITS), "nano-i2v": teach_i2v}[name](tmp_path, DATA, 0, budget, lambda _: None)
    config = resolve(name, {"teacher.path": str(tmp_path)})
    sampler = teacher_alone(config)
    prompt = read_prompts(str(tmp_path / "prompts" / "nano-i2v.jsonl"))[0] if name == "nano-i2v" else PROMPTS[0]
    pixels = sampler.decode(sampler([prompt], [0], teacher_steps=2))
    assert torch.isfinite(pixels).all() and pixels.std() > 0
    networks = sampler.system.model.networks
    assert len(networks) == len(sampler.system.model.switches) + 1
    if name == "nano-moe":
        first, second = (next(network.parameters()) for network in networks)
        assert not torch.equal(first, second)


def test_each_network_of_nano_moe_knows_its_own_side_of_the_switch() -> None:
    """Flow matching on the teacher's own pictures: on either side the network in charge predicts better."""
    sampler = teacher_alone(resolve("nano-moe", {}))
    model = sampler.system.model
    prompts = [f"a handwritten {word}" for word in WORDS] * 6
    x_0 = sampler(prompts, range(60), teacher_steps=10).to(device())
    condition = model.batch(sampler.codec.encode_text(prompts))
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1)).to(device())
    for t, own in ((0.98, 0), (0.9, 0), (0.85, 1), (0.5, 1)):
        x_t, times = (1 - t) * x_0 + t * eps, torch.full((60,), t, dtype=torch.float64, device=device())
        with torch.no_grad():
            errors = [(model.predict(n, x_t, times, condition) - (eps - x_0)).square().mean() for n in model.networks]
        assert sampler.system.plan.network(t) == own and errors[own] < errors[1 - own], (t, errors)


def test_nano_i2v_moves_the_first_frame_it_is_given() -> None:
    """Held-out digits: a clip begins with its first frame, and shows the digit in it to the end."""
    sampler = teacher_alone(resolve("nano-i2v", {}))
    prompts = read_prompts("nano-i2v-held-out")[:40]
    clips = sampler.decode(sampler(prompts, range(40), teacher_steps=10))
    given = torch.stack([torch.tensor(np.asarray(Image.open(p.image).convert("RGB"))) / 255 for p in prompts])
    error = (clips[:, 0] - given).square().mean((1, 2, 3))
    others = (clips[:, 0] - given.roll(1, 0)).square().mean((1, 2, 3))
    assert (error < others / 4).float().mean() > 0.9
    labels = torch.tensor([next(i for i, word in enumerate(WORDS) if word in p.text.split()) for p in prompts])
    last = classify(load_classifier()[0], clips[:, -1:])[1].argmax(1)
    assert (last == labels).float().mean() > 0.85
