"""The worked examples for a model of one's own, run as they stand on tiny teachers trained here for seconds."""

import copy
import functools
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny import draw
from torch import Tensor, nn
from torch.distributed.run import get_args_parser

from phased_dmd.checkpoint import RunFolder, load_tensors
from phased_dmd.cli import main
from phased_dmd.cli.flags import assignment
from phased_dmd.config import Config, Fake, Generator, Lora, Optimiser, Plan, phase_plan
from phased_dmd.config.teacher import OwnTeacher
from phased_dmd.dry_run import dry_run
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.lab.metrics.distances import frechet, moments
from phased_dmd.maths.schedules import VPSchedule, renoise_times
from phased_dmd.models.analytic import ExactMixture, PlainCodec, TimeMLP
from phased_dmd.plan import CARDS, needs, peak
from phased_dmd.recipes import RECIPES, resolve
from phased_dmd.sampling.loading import load
from phased_dmd.testing import ModelError, check_model
from phased_dmd.train import distill

EXAMPLES, DOCS = (Path(__file__).parents[1] / path for path in ("examples", "docs/extending.md"))
BRIEF = {"iterations": 2, "batch_size": 2, "log_every": 1, "checkpoint_every": 1, "sample_every": 1000}
LORA = Generator(lora=Lora(rank=2, alpha=4), lr=0.02)


def example(name: str) -> ModuleType:
    """A file of `examples` as a module."""
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("own_*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_80_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 80


def fit(network: nn.Module, loss: Callable[[torch.Generator], Tensor], steps: int, lr: float, seed: int = 0) -> None:
    """Trains a network in place, the learning rate falling to 0, then freezes it."""
    rng = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.requires_grad_(True).parameters(), lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.01, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(rng).backward()
        optimiser.step()
        decay.step()
    network.requires_grad_(False)


def trained(run: Path) -> None:
    """Every phase of a finished run left a LoRA expert that was trained, on the plan's grid."""
    config = RunFolder(run).config()
    for phase in range(1, config.plan.phases + 1):
        tensors, header = load_tensors(RunFolder(run).expert_path(phase))
        assert header["grid"] == pytest.approx(phase_plan(config).times)
        assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


# ---------------------------------------------------------------- UNet2DModel: eps prediction on a VP schedule


def discs(count: int, rng: torch.Generator) -> Tensor:
    """White discs of random place and size on black, [count, 1, 8, 8] in [-1, 1]."""
    place, radius = torch.rand(count, 2, 1, 1, generator=rng) * 4 + 1.5, torch.rand(count, 1, 1, generator=rng) + 1.5
    axis = torch.arange(8.0)
    distance = ((axis[:, None] - place[:, 0]) ** 2 + (axis - place[:, 1]) ** 2).sqrt()
    return (2 * torch.sigmoid(4 * (radius - distance)) - 1)[:, None]


@pytest.fixture(scope="module")
def ddpm() -> Any:
    """A stock DDPMPipeline whose UNet2DModel was trained on discs as a DDPM is."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(16,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    scheduler = DDPMScheduler()

    def loss(rng: torch.Generator) -> Tensor:
        x_0, t = discs(32, rng), torch.randint(1000, (32,), generator=rng)
        eps = torch.randn(x_0.shape, generator=rng)
        return (unet(scheduler.add_noise(x_0, eps, t), t).sample - eps).square().mean()  # type: ignore[arg-type]

    fit(unet, loss, steps=200, lr=4e-3)
    pipeline = DDPMPipeline(unet, scheduler).to(device())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_unet_example_checks_distils_and_samples(ddpm: Any, tmp_path: Path) -> None:
    unet = example("own_unet")
    plan = Plan(steps=4, phases=2, shift=1.0, start=unet.START)
    config = Config(recipe="own-unet", teacher=OwnTeacher(), plan=plan, generator=LORA, **BRIEF)
    fresh = unet.EpsUNet(copy.deepcopy(ddpm.unet), ddpm.scheduler.alphas_cumprod, (1, 8, 8))
    pictures = unet.main(ddpm, config, tmp_path / "run")
    trained(tmp_path / "run")
    sampler = load(tmp_path / "run", own=(fresh, unet.PixelCodec()))
    assert pictures.shape == (16, 1, 8, 8, 3)
    assert torch.equal(sampler.decode(sampler([""] * 16, range(16))), pictures)


def test_the_unet_wrapper_is_the_direct_call_at_the_trained_timesteps(ddpm: Any) -> None:
    unet, scheduler = ddpm.unet, ddpm.scheduler
    model = example("own_unet").EpsUNet(unet, scheduler.alphas_cumprod, (1, 8, 8))
    i = torch.tensor([0, 1, 321, 999])
    t, x = (i + 1).double() / 1000, draw(4, 1, 8, 8, seed=0).to(device())
    found, expected = model.predict(unet, x, t.to(device()), {}), unet(x, i.to(device())).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod[i].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


# ---------------------------------------------------------------- FluxTransformer2DModel

FLUX_PROMPTS, TOKENS = ("a red fox", "two grey cats", "a boat"), 8


def tokenizer(length: int) -> Any:
    """Whole words; both of Flux's tokenizers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted(set(" ".join(FLUX_PROMPTS).split()))]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)


@pytest.fixture(scope="module")
def flux() -> Any:
    """A stock FluxPipeline, small and random but for the transformer: trained on a latent of each prompt and noise."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    t5 = T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        block_out_channels=(8, 8), norm_num_groups=4, use_quant_conv=False, use_post_quant_conv=False,
        scaling_factor=0.4, shift_factor=0.1,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae.eval(), CLIPTextModel(clip).eval(), tokenizer(16),
        T5EncoderModel(t5).eval(), tokenizer(TOKENS), transformer,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        text, pooled, text_ids = pipeline.encode_prompt(list(FLUX_PROMPTS), max_sequence_length=TOKENS)
    centres, ids = draw(3, 24, 16, seed=1), FluxPipeline._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)

    def loss(rng: torch.Generator) -> Tensor:
        i, t = torch.randint(3, (16,), generator=rng), torch.rand(16, generator=rng)
        x_0 = centres[i] + 0.3 * torch.randn(16, 24, 16, generator=rng)
        eps = torch.randn(x_0.shape, generator=rng)
        x_t, guidance = torch.lerp(x_0, eps, t[:, None, None]), torch.full((16,), 3.5)
        velocity = transformer(x_t, text[i], pooled[i], t, ids, text_ids, guidance).sample
        return (velocity - (eps - x_0)).square().mean()

    fit(transformer, loss, steps=200, lr=5e-3)
    return pipeline.to(device())


def test_the_flux_example_distils_what_the_stock_pipeline_then_samples(flux: Any, tmp_path: Path) -> None:
    """Through LoRA files, as docs/extending.md has it: the sampler's pictures, from the same noise."""
    stock = copy.deepcopy(flux)
    stock.set_progress_bar_config(disable=True)
    (tmp_path / "prompts.txt").write_text("\n".join(FLUX_PROMPTS))
    config = Config(
        recipe="own-flux", teacher=OwnTeacher(), plan=Plan(shift=3.0), generator=LORA,
        prompts=str(tmp_path / "prompts.txt"), **BRIEF,
    )  # fmt: skip
    pictures = example("own_flux").main(flux, (16, 24), config, tmp_path / "run", max_tokens=TOKENS)
    assert pictures.shape == (2, 1, 16, 24, 3)
    trained(tmp_path / "run")
    latents = stock._pack_latents(normal((4, 8, 12), range(2), "sample").to(device()), 2, 4, 8, 12)
    options = {"latents": latents, "height": 16, "width": 24, "max_sequence_length": TOKENS, "output_type": "np"}
    known = {"pipeline": stock, "run": tmp_path / "run", "folder": tmp_path, "options": options}
    known["prompts"] = list(FLUX_PROMPTS[:2])
    (code,) = re.findall("```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    exec(code, known)
    torch.testing.assert_close(torch.from_numpy(known["images"]), pictures[:, 0].clamp(0, 1), rtol=0, atol=1e-4)
    stock.set_adapters("phase-1")  # at every step
    steps = {"sigmas": known["header"]["grid"][:-1], **options}
    assert (torch.from_numpy(stock(known["prompts"], **steps).images) - pictures[:, 0]).abs().max() > 1e-2


def test_the_flux_wrapper_is_the_stock_pipeline(flux: Any) -> None:
    """Four Euler steps on its own sigmas from the same noise, then the same pixels."""
    module = example("own_flux")
    model, codec = module.FluxModel(flux, [(16, 24)]), module.FluxCodec(flux, TOKENS)
    noise, sigmas = draw(2, 4, 8, 12, seed=0).to(device()), []

    def note(pipeline: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        sigmas[:] = pipeline.scheduler.sigmas.tolist()
        return tensors

    theirs = flux(
        list(FLUX_PROMPTS[:2]), height=16, width=24, num_inference_steps=4, max_sequence_length=TOKENS,
        latents=flux._pack_latents(noise, 2, 4, 8, 12), output_type="np", guidance_scale=3.5,
        callback_on_step_end=note,
    ).images  # fmt: skip
    x, condition = noise, model.batch(codec.encode_text(FLUX_PROMPTS[:2]))
    for t, r in itertools.pairwise(sigmas):
        time = torch.full((2,), t, dtype=torch.float64, device=device())
        x = x + (r - t) * model.predict(flux.transformer, x, time, condition)
    assert len(sigmas) == 5
    torch.testing.assert_close(codec.decode(x).clamp(0, 1)[:, 0].cpu(), torch.from_numpy(theirs), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- an exact mixture behind the same call

MEANS, STD = torch.tensor([[-1.0, -1.0], [2.0, 1.0], [1.0, 2.0]]), 0.4


class UNetCall(nn.Module):
    """Called as a UNet2DModel is: network(sample, timestep of 0 .. 999).sample."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.network(sample, (timestep.double() + 1) / 1000))


def exact_teacher(seed: int) -> tuple[Any, ExactMixture]:
    """The example's wrapper around the exact eps prediction of a mixture, its student a small network fitted to it."""
    from diffusers import DDPMScheduler

    unet, levels = example("own_unet"), DDPMScheduler().alphas_cumprod
    schedule = unet.DDPMSchedule(levels)
    exact = ExactMixture(MEANS, STD, torch.ones(len(MEANS)), schedule, "eps")
    torch.manual_seed(seed)
    student = TimeMLP(dims=2, hidden=64, layers=3)

    def loss(rng: torch.Generator) -> Tensor:
        x_0, t = exact.sample(256, rng), renoise_times(torch.rand(256, generator=rng), 0.01, 0.999, 1.0)
        alpha, sigma = schedule.alpha(t).float()[:, None], schedule.sigma(t).float()[:, None]
        x_t = alpha * x_0 + sigma * torch.randn(x_0.shape, generator=rng)
        return (student(x_t, t) - exact(x_t, t)).square().mean()

    fit(student, loss, steps=1500, lr=2e-3, seed=seed)
    model = unet.EpsUNet(UNetCall(exact), levels, (2,))
    model.students, model.lora_targets = [UNetCall(student).eval().to(device())], ()
    return model, exact


def test_distilling_an_exact_eps_teacher_beats_its_own_undistilled_steps(tmp_path: Path) -> None:
    """Fréchet distance of 4,000 samples to the mixture's own mean and covariance: 4 steps of each, the same noise."""
    model, exact = exact_teacher(0)
    own = model, PlainCodec()
    check_model(*own, exact.sample(256, torch.Generator().manual_seed(0)), start=0.98)
    config = Config(
        recipe="own-mixture", teacher=OwnTeacher(), plan=Plan(shift=1.0, start=0.98, gradient="all"),
        generator=Generator(weights="full", lr=5e-4, ema=0.95),
        fake=Fake(lr=2e-3), optimiser=Optimiser(decay="linear"),
        seed=0, **BRIEF | {"iterations": 100, "batch_size": 128, "log_every": 100, "checkpoint_every": 100},
    )  # fmt: skip
    sampler = load(distill(config, tmp_path / "run", quiet=True, own=own), own=own)
    centre = MEANS.double() - MEANS.double().mean(0)
    truth = MEANS.double().mean(0), centre.T @ centre / len(MEANS) + STD**2 * torch.eye(2, dtype=torch.float64)
    undistilled, distilled = (
        frechet(moments(sampler([""] * 4000, range(4000), teacher_steps=steps)), truth) for steps in (4, None)
    )
    assert undistilled > 0.1 and undistilled > 3 * distilled


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predict": lambda unet, x, t, _: unet(x, t.float()).sample}, "looks like eps prediction told 1000 t"),
        ({"prediction": "flow"}, "looks like eps prediction told t, not flow"),
        ({"schedule": VPSchedule()}, "trained on another schedule or scale"),
    ],
)
def test_wrong_wrappers_of_a_trained_unet_are_told_what_is_wrong(
    ddpm: Any, changes: dict[str, Any], message: str
) -> None:
    model = example("own_unet").EpsUNet(ddpm.unet, ddpm.scheduler.alphas_cumprod, (1, 8, 8))
    for name, value in changes.items():
        setattr(model, name, value)
    with pytest.raises(ModelError, match=message):
        check_model(model, samples=discs(32, torch.Generator().manual_seed(1)), start=0.98)


# ---------------------------------------------------------------- commands that name a number of GPUs

ROOT = EXAMPLES.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def gpu_commands(page: Path) -> list[tuple[list[str], str]]:
    """Those of a page's blocks: as words, and the line that follows."""
    text = "\n".join(re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)).replace("\\\n", " ")
    lines = [*text.splitlines(), ""]
    found = []
    for line, after in itertools.pairwise(lines):
        if "--gpus" in line or "--nproc-per-node" in line:
            found.append((shlex.split(line, comments=True), after))
    return found


def planned(words: list[str]) -> tuple[str, ...]:
    """The arguments of `plan` that ask for what the command does: of torchrun, on GPUs of 80 GB."""
    if "--gpus" in words:
        return tuple(words[1:])
    count = {flag: int(value) for flag, value in itertools.pairwise(words) if flag in ("--nnodes", "--nproc-per-node")}
    recipe = words[words.index("distill") + 1]
    settings = [word for flag, value in itertools.pairwise(words) if flag == "--set" for word in (flag, value)]
    gpus = count.get("--nnodes", 1) * count["--nproc-per-node"]
    return "plan", recipe, "--gpus", f"{gpus}", "--memory-gb", "80", *settings


@functools.cache
def plan_of(arguments: tuple[str, ...]) -> list[str]:
    """The lines that the command prints."""
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown):
        patch.setattr(sys, "argv", ["phased-dmd", *arguments])
        main()
    return shown.getvalue().splitlines()


@pytest.mark.parametrize("page", [page for page in PAGES if gpu_commands(page)], ids=lambda page: page.name)
def test_every_command_that_names_a_number_of_gpus_fits_on_them(page: Path) -> None:
    """By its own plan, whose line stands below the plan's command, and warns of nothing."""
    for words, after in gpu_commands(page):
        arguments = planned(words)
        if arguments[1] in RECIPES:  # else a file of the reader's own
            lines = plan_of(arguments)
            assert lines[-1].startswith("it fits: ") and not any("warning" in line for line in lines), arguments
            assert "torchrun" in words or after == f"# {lines[-1]}", arguments


def test_pages_that_name_a_number_of_gpus_are_found() -> None:
    assert {"README.md", "distributed.md", "plan.md"} <= {page.name for page in PAGES if gpu_commands(page)}


def yaml_blocks(page: Path) -> list[str]:
    """The blocks of configuration that a page shows."""
    return re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if yaml_blocks(page)], ids=lambda page: page.name)
def test_configuration_that_a_page_shows_is_of_fields_that_there_are(page: Path) -> None:
    """It is one of Wan2.2's, or can be laid over it."""
    whole = resolve("wan22-t2v", {}).model_dump(mode="json")
    for block in yaml_blocks(page):
        for section, fields in yaml.safe_load(block).items():
            Config.model_validate(whole | {section: whole[section] | fields})


@pytest.mark.parametrize(
    ("script", "memory", "tflops"), [("one_card.sh", 24, 165), ("one_large_card.sh", 80, 989), ("one_node.sh", 80, 989)]
)
def test_the_scripts_run_commands_that_are_valid_and_fit(
    script: str, memory: int, tflops: int, tmp_path: Path
) -> None:  # fmt: skip
    """With a launcher that writes down its arguments; one card has a small checkpoint, and fakes learn like experts."""
    for name in ("phased-dmd", "torchrun"):
        (tmp_path / name).write_text(f'#!/bin/bash\nprintf "%s\\n" {name} "$@" > {tmp_path}/arguments\n')
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", EXAMPLES / script, "--seed", "3"], env=environment, check=True)
    words = (tmp_path / "arguments").read_text().splitlines()
    gpus = "1"
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.module and launched.training_script == "phased_dmd"
        gpus, arguments = launched.nproc_per_node, launched.training_script_args
    else:
        arguments = words[1:]
    assert arguments[0] == "distill" and arguments[-2:] == ["--seed", "3"]
    settings = dict(assignment(value) for flag, value in itertools.pairwise(arguments) if flag == "--set")
    config = resolve(arguments[1], settings)
    dry_run(config)
    needed = needs(config, int(gpus), memory, tflops=tflops)
    assert needed.fits and not needed.warnings
    if gpus == "1":
        assert config.fake.lr == config.generator.lr
        assert max(phase.checkpoint for phase in needed.phases) < 1e9 and 36 < needed.hours < 60


# ---------------------------------------------------------------- one card

ONE_GPU = (ROOT / "docs" / "one-gpu.md").read_text("utf-8")
CARD_ROW = r"^\| (.*?) ?\| `(.+?)`.*? \| .+? \| ([\d.]+ of [\d.]+ GB) \| (\w+) \| (\d+ GB) \| ([\d.]+) \|$"
CARD_ROWS = re.findall(CARD_ROW, ONE_GPU, re.MULTILINE)
PLANNED_HERE = ("wan", "z-image")  # seconds each; the others' take a minute and more of CPU together


def one_card() -> list[tuple[int, list[str]]]:
    """The memory of a card, and the arguments of `phased-dmd` in its commands, in the order of docs/one-gpu.md."""
    found = []
    for memory, below in re.findall(r"^### (\d+) GB$(.*?)(?=^##)", ONE_GPU, re.DOTALL | re.MULTILINE):
        (block,) = re.findall(r"```\n(.*?)```", below, re.DOTALL)
        for words in map(shlex.split, block.replace("\\\n", " ").splitlines()):
            if words[0] == "bash":
                script = (ROOT / words[1]).read_text()
                words = shlex.split(script[script.index("exec ") :].replace("\\\n", " "))[1:]
            found.append((int(memory), words[1:]))
    return found


@pytest.mark.parametrize("row", range(len(one_card())), ids=lambda row: f"{one_card()[row][0]}-{one_card()[row][1][1]}")
def test_the_table_of_cards_is_what_each_command_is_planned_to_take(row: int) -> None:
    """Its rows and the commands have one order; a card's name stands in the first of its rows. Of some recipes the
    figures are planned anew.
    """
    memory, words = one_card()[row]
    assert len(CARD_ROWS) == len(one_card())
    cards = [card.split(" GB")[0] for card, *_ in CARD_ROWS[: row + 1] if card]
    _, recipe, held, stage, host, hours = CARD_ROWS[row]
    assert (cards[-1], recipe) == (str(memory), words[1])
    settings = dict(assignment(value) for flag, value in itertools.pairwise(words) if flag == "--set")
    config = resolve(recipe, settings)
    if not recipe.startswith(PLANNED_HERE):
        return
    plan = needs(config, 1, memory, tflops=CARDS[memory])
    most = peak(plan.stages)
    assert plan.fits and not plan.warnings
    assert held == f"{most.gpu / 1e9:.1f} of {plan.usable / 1e9:.1f} GB" and stage == most.name
    assert host == f"{max(each.host for each in plan.stages) / 1e9:.0f} GB" and hours == f"{plan.hours:.3g}"
