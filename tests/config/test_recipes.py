"""The recipes with the paper's figures: what they say, and that every method and number of phases can be built."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from commands import run
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from recorded import Recorded, distill_own
from tiny import TinyCodec, TinyWan
from torch.distributed.run import get_args_parser

from phased_dmd import cli
from phased_dmd.config import Method, phase_plan, renoise_interval
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import Expert
from phased_dmd.models.pipeline import line_mu
from phased_dmd.models.source import architecture
from phased_dmd.networks.optim import MomentumFreeAdamW
from phased_dmd.networks.roles import FAKE, TEACHER, System
from phased_dmd.prompts import read_prompts
from phased_dmd.recipes import FIRST_FRAMES, RECIPES, WAN_NEGATIVE, licence, resolve
from phased_dmd.step import draw_times

PAPER = {  # hub id, shift, negative prompt, of diffusers' own encoding the most tokens, the teacher's switch
    "wan21-t2i": ("Wan-AI/Wan2.1-T2V-14B-Diffusers", 5.0, WAN_NEGATIVE, 512, None),
    "wan21-t2v-1.3b": ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 5.0, WAN_NEGATIVE, 512, None),
    "wan22-t2i": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 5.0, WAN_NEGATIVE, 512, 0.875),
    "wan22-t2v": ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", 5.0, WAN_NEGATIVE, 512, 0.875),
    "wan22-i2v": ("Wan-AI/Wan2.2-I2V-A14B-Diffusers", 5.0, WAN_NEGATIVE, 512, 0.9),
    "qwen-image": ("Qwen/Qwen-Image", 3.0, " ", 1024, None),
}
OTHERS = {
    "z-image": ("Tongyi-MAI/Z-Image", 6.0, "", 512, None),
    "flux2-klein-4b": ("black-forest-labs/FLUX.2-klein-base-4B", 7.5, "", 512, None),
    "flux2-klein-9b": ("black-forest-labs/FLUX.2-klein-base-9B", 7.5, "", 512, None),
    "qwen-image-2.1": ("Qwen/Qwen-Image-2.1", 2.0, "", 1024, None),
    "qwen-image-edit": ("Qwen/Qwen-Image-Edit-2509", 3.0, " ", 1024, None),
    "krea-2": ("krea/Krea-2-Raw", 2.5, "", 512, None),
    "lumina-2": ("Alpha-VLLM/Lumina-Image-2.0", 6.0, "", 256, None),
}
MAKERS = {  # what their makers sample with: g, which is w + 1 of cond + w (cond - uncond), and steps
    "z-image": (5.0, 50), "flux2-klein-4b": (4.0, 50), "flux2-klein-9b": (4.0, 50), "qwen-image-2.1": (1.0, 40),
    "krea-2": (4.5, 52), "qwen-image-edit": (4.0, 40), "lumina-2": (4.0, 50),
}  # fmt: skip
LICENCES = {
    "flux2-klein-9b": "FLUX Non-Commercial License", "qwen-image-2.1": "Qwen Research License",
    "krea-2": "Krea 2 Community License",
}  # fmt: skip
GRIDS = {  # the paper's final version, in thousandths; of the shifts that it does not have, k u / (1 + (k - 1) u)
    5.0: (1000, 938, 833, 625), 3.0: (1000, 900, 750, 500), 6.0: (1000, 947, 857, 667), 7.5: (1000, 957, 882, 714),
    2.0: (1000, 857, 667, 400), 2.5: (1000, 882, 714, 455),
}  # fmt: skip
BOUNDARIES = {5.0: 0.8333, 3.0: 0.75, 6.0: 0.8571, 7.5: 0.8824, 2.0: 0.6667, 2.5: 0.7143}
OWN = {"prompts": "mine.jsonl"}  # wan22-i2v has no default
METHODS: dict[str, tuple[int, str]] = {  # phases and gradient, for four steps
    "dmd": (1, "all"), "dmd-sgts": (1, "last"), "phased": (4, "all"), "phased-sgts": (2, "last"),
}  # fmt: skip

ROOT = Path(__file__).parents[2]
DOCS, SLURM = ROOT / "docs" / "models.md", ROOT / "examples" / "slurm" / "distill.sbatch"

papers = pytest.mark.parametrize("recipe", PAPER)
systems = pytest.mark.parametrize("recipe", PAPER | OTHERS)


def switches_of(recipe: str) -> tuple[float, ...]:
    switch = (PAPER | OTHERS)[recipe][-1]
    return () if switch is None else (switch,)


# ---------------------------------------------------------------- the paper's figures


@papers
def test_the_settings_are_the_papers(recipe: str) -> None:
    """Appendix C: batch 64, fake 4e-7 full, generator 5e-5 LoRA r64 a8, AdamW (0, .999), five fake updates. Sec. 3.1:
    base 40 steps at guidance 4, students 4 steps."""
    config = resolve(recipe, OWN)
    path, shift, negative, tokens, _ = PAPER[recipe]
    teacher = config.teacher
    assert isinstance(teacher, PipelineTeacher)
    assert (teacher.path, config.plan.shift, teacher.negative_prompt, teacher.max_tokens) == (
        path,
        shift,
        negative,
        tokens,
    )
    assert (teacher.guidance, teacher.base_steps, teacher.dtype) == ((4.0,), 40, "bfloat16")
    assert (config.batch_size, config.fake.updates) == (64, 5)
    assert (config.fake.weights, config.fake.lr) == ("full", 4e-7)
    generator = config.generator
    assert (generator.weights, generator.lora.rank, generator.lora.alpha, generator.ema) == ("lora", 64, 8, None)
    assert generator.lr == 5e-5
    optimiser = MomentumFreeAdamW([torch.nn.Parameter(torch.zeros(1))], generator.lr).param_groups[0]
    assert (optimiser["beta2"], optimiser["weight_decay"]) == (0.999, 0.01)
    assert (config.optimiser.decay, config.optimiser.clip) == ("constant", 1)
    assert (config.ablation.solver, config.plan.start, config.ablation.renoise) == ("ddim", 1.0, "nested")
    assert config.method == "phased-sgts" and config.plan.steps == 4 and config.plan.phases == 2
    assert 1000 <= config.iterations * config.plan.phases <= 2000  # what the authors reported


@pytest.mark.parametrize("recipe", OTHERS)
def test_younger_models_take_the_papers_settings_and_their_makers_guidance(recipe: str) -> None:
    config, paper = resolve(recipe, OWN), resolve("qwen-image", OWN)
    path, shift, negative, tokens, _ = OTHERS[recipe]
    teacher = config.teacher
    assert isinstance(teacher, PipelineTeacher)
    assert (teacher.path, config.plan.shift, teacher.negative_prompt) == (path, shift, negative)
    assert teacher.max_tokens == tokens and teacher.dtype == "bfloat16"
    assert (*teacher.guidance, teacher.base_steps) == MAKERS[recipe]
    differing = {"recipe", "teacher", "plan"}
    if recipe == "lumina-2":  # on one card
        assert teacher.quantise == "int8" and (config.fake.weights, config.fake.lr) == ("lora", config.generator.lr)
        differing |= {"generator", "fake", "engine", "batch_size"}
    assert config.model_dump(exclude=differing) == paper.model_dump(exclude=differing)
    assert config.plan.model_copy(update={"shift": 3.0}) == paper.plan


def test_the_shift_of_flux2_klein_is_its_pipelines_at_a_megapixel() -> None:
    """Rounded to a half; that of 4 steps is 9.89, of which docs/models.md speaks."""
    assert math.exp(compute_empirical_mu(64 * 64, 50)) == pytest.approx(7.56, abs=0.005)
    assert math.exp(compute_empirical_mu(64 * 64, 4)) == pytest.approx(9.89, abs=0.005)
    assert resolve("flux2-klein-4b").plan.shift == resolve("flux2-klein-9b").plan.shift == 7.5


@pytest.mark.parametrize(("recipe", "exact"), [("qwen-image-2.1", 2.00), ("krea-2", 2.48)])
def test_the_shift_of_a_line_is_its_pipelines_at_a_megapixel(recipe: str, exact: float) -> None:
    """Rounded to a half; of 64 x 64 tokens, by the shipped configuration of the scheduler."""
    teacher = resolve(recipe, OWN).teacher
    assert isinstance(teacher, PipelineTeacher)
    folder = architecture(teacher.path)
    assert folder is not None
    found = math.exp(line_mu(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()), 64 * 64))
    assert found == pytest.approx(exact, abs=0.005)
    assert resolve(recipe).plan.shift == round(2 * found) / 2


@systems
def test_the_licence_of_the_base_is_said_by_its_hub_id_or_the_recipe(recipe: str) -> None:
    path = (PAPER | OTHERS)[recipe][0]
    end = f"{LICENCES.get(recipe, 'Apache-2.0')}, which holds for what is distilled from it too"
    assert licence(resolve(recipe, OWN)) == f"licence of {path}: {end}"
    assert licence(resolve(recipe, OWN | {"teacher.path": "/models/base"})) == f"licence of /models/base: {end}"


def test_a_base_of_an_unknown_licence_and_one_of_the_package_have_no_line() -> None:
    assert licence(resolve("toy-2d")) is None and licence(resolve("nano-t2i")) is None
    assert licence(resolve("nano-t2i", {"teacher.path": "someone/else"})) is None
    assert licence(resolve("nano-t2i", {"teacher.path": "Qwen/Qwen-Image"})) is not None


@pytest.mark.filterwarnings("ignore:teacher.path")  # the base is not here
@pytest.mark.parametrize(
    "command", [("distill", "lumina-2", "--dry-run"), ("plan", "lumina-2", "--gpus", "1", "--memory-gb", "24")]
)
def test_the_command_says_the_licence_first(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*command, monkeypatch=monkeypatch) == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[0] == licence(resolve("lumina-2")) and "licence" not in said.out


@systems
def test_the_grid_and_the_boundary_are_the_papers(recipe: str) -> None:
    plan = phase_plan(resolve(recipe, OWN), switches_of(recipe))
    shift = (PAPER | OTHERS)[recipe][1]
    assert tuple(math.floor(1000 * t + 0.5) for t in plan.times) == (*GRIDS[shift], 0)
    assert plan.end(1) == pytest.approx(BOUNDARIES[shift], abs=5e-5) and plan.end(2) == 0


def test_the_sizes_are_the_papers() -> None:
    """Appendix C and its final version's weights; frames, height, width. 1382 there is no multiple of 16: 1328."""
    shares = {
        recipe: {(size.num_frames, size.height, size.width): size.weight for size in RECIPES[recipe]().teacher.sizes}
        for recipe in PAPER
    }
    picture = {(1, 720, 1280): 1}
    clips = {(81, 720, 1280): 0.1, (81, 1280, 720): 0.1, (81, 480, 832): 0.4, (81, 832, 480): 0.4}
    qwen = [(1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584)]
    assert shares["wan21-t2i"] == shares["wan22-t2i"] == picture
    assert shares["wan22-t2v"] == shares["wan22-i2v"] == clips
    assert shares["qwen-image"] == {(1, height, width): 1 for height, width in qwen}
    assert all(shares["wan21-t2v-1.3b"][size] == clips[size] for size in ((81, 480, 832), (81, 832, 480)))
    for sizes in shares.values():  # strides of VAE times patch; frames 4 k + 1
        assert all(height % 16 == width % 16 == 0 and frames % 4 == 1 for frames, height, width in sizes)
    for recipe in ("wan22-t2v", "wan22-i2v", "wan21-t2v-1.3b"):
        assert str(RECIPES[recipe]().teacher.sizes[0]) == "81x480x832", "previews are made at the cheaper size"


# ---------------------------------------------------------------- forms and baselines


@papers
@pytest.mark.parametrize("method", [None, *METHODS])
@pytest.mark.parametrize("phases", [None, 2, 4])
def test_every_method_and_number_of_phases_is_built_or_contradicts(
    recipe: str, method: Any, phases: int | None
) -> None:
    overrides = OWN | ({} if phases is None else {"plan.phases": phases})
    updates = 2 * RECIPES[recipe]().iterations
    if method is not None and phases not in (None, METHODS[method][0]):
        with pytest.raises(UserError, match=f"^method: {method} contradicts plan.phases"):
            resolve(recipe, overrides, method)
        return
    config = resolve(recipe, overrides, method)
    expected = METHODS[method] if method else (phases or 2, "last")
    assert (config.plan.phases, config.plan.gradient) == expected
    assert config.method == method or (method is None and config.method == {2: "phased-sgts", 4: "phased"}[expected[0]])
    plan = phase_plan(config, switches_of(recipe))
    assert plan.num_phases == expected[0]
    assert tuple(math.floor(1000 * t + 0.5) for t in plan.times[:-1]) == GRIDS[PAPER[recipe][1]]
    if method:
        assert config.iterations * config.plan.phases == updates
    if not switches_of(recipe):
        assert all(
            plan.fakes(phase, renoise_interval(config, plan, phase).support) == (0,)
            for phase in range(1, expected[0] + 1)
        )


def test_the_table_of_methods_is_whole() -> None:
    assert set(METHODS) == set(get_args(Method))


TWO_NETWORKS = [  # phases, experts and fakes of each phase; grid 1, .9375 | .8333, .625
    (1, [[(1, 0), (1, 1)]], [(0, 1)]),
    (2, [[(1, 0)], [(2, 1)]], [(0,), (0, 1)]),
    (4, [[(1, 0)], [(2, 0)], [(3, 1)], [(4, 1)]], [(0,), (0,), (0, 1), (0, 1)]),
]


@pytest.mark.parametrize("recipe", ["wan22-t2i", "wan22-t2v", "wan22-i2v"])
@pytest.mark.parametrize(("phases", "experts", "fakes"), TWO_NETWORKS)
def test_phases_above_the_switch_take_one_fake(recipe: str, phases: int, experts: Any, fakes: Any) -> None:
    """Phase 1 ends at .8333, under the switch of .875 or .9, yet only the noisier network takes part."""
    config = resolve(recipe, OWN | {"plan.phases": phases})
    plan = phase_plan(config, switches_of(recipe))
    numbers = range(1, phases + 1)
    assert [list(plan.experts(phase)) for phase in numbers] == [[Expert(*e) for e in phase] for phase in experts]
    assert [plan.fakes(phase, renoise_interval(config, plan, phase).support) for phase in numbers] == fakes


@pytest.mark.parametrize(("recipe", "share"), [("wan22-t2v", 1 / 6), ("wan22-i2v", 2 / 7)])
def test_phase_1_of_wan22_piles_up_at_the_switch(recipe: str, share: float) -> None:
    """Shift 5: raw .5 is the boundary; .875 is raw .5833, .9 raw .6429. Of phase 2 nothing is clamped, over updates."""
    config = resolve(recipe, OWN)
    (switch,) = switches_of(recipe)
    system: Any = System(config, None, None, phase_plan(config, (switch,)), {})  # type: ignore[arg-type] draws alone
    t = draw_times(system, 1, (0, 1, 0, 0), range(4000), shares=False)
    later = torch.cat([draw_times(system, 2, (0, 2, i, 0), range(40), shares=False) for i in range(100)])
    assert t.min() == switch and t.max() <= 1
    assert {system.plan.network(time) for time in t.tolist()} == {0}
    found = (t == switch).double().mean().item()
    assert found == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
    assert later.min() < 0.1 and later.max() > 0.99 and not (later == switch).any()


@pytest.mark.parametrize(
    ("recipe", "method", "asked"),
    [
        ("nano-moe", None, {1: {TEACHER: {0}, FAKE: {0}}, 2: {TEACHER: {0, 1}, FAKE: {0, 1}}}),
        ("nano-moe", "dmd-sgts", {1: {TEACHER: {0, 1}, FAKE: {0, 1}}}),
    ],
)
def test_training_asks_the_noisier_network_alone_while_its_steps_are_distilled(
    recipe: str, method: Any, asked: dict[int, dict[str, set[int]]], tmp_path: Path
) -> None:
    """Which of two tiny networks teacher and fake were called on, phase by phase."""
    (tmp_path / "prompts.txt").write_text("a seven\n")
    small = {
        "prompts": str(tmp_path / "prompts.txt"), "iterations": 4, "batch_size": 8, "fake.updates": 1,
        "generator.lora.rank": 2, "fake.weights": "lora", "generator.ema": None,
    }  # fmt: skip
    run = tmp_path / "run"
    model = Recorded(TinyWan(2, (0.875,), guidance=1.0), run)
    distill_own(resolve(recipe, small, method), run, model, TinyCodec())
    for phase, networks in asked.items():
        assert {role: {call.network for call in model.of(role, phase)} for role in networks} == networks
    assert {call.phase for call in model.calls} == set(asked)


# ---------------------------------------------------------------- nano's variants, prompts, help


def test_nanos_variants_are_nano_but_for_what_they_are_named_for() -> None:
    image, video, moe, i2v = (RECIPES[f"nano-{name}"]() for name in ("t2i", "t2v", "moe", "i2v"))
    assert (
        moe.method == "phased-all" and moe.iterations * moe.plan.phases == image.iterations * image.plan.phases == 480
    )
    changed = {"recipe": image.recipe, "teacher": image.teacher, "plan": image.plan, "renoise": image.renoise}
    assert moe.model_copy(update=changed | {"iterations": image.iterations}) == image
    assert moe.teacher == image.teacher.model_copy(update={"path": "nano-moe"})
    assert [size.num_frames for size in i2v.teacher.sizes] == [9]
    assert i2v.teacher == video.teacher.model_copy(update={"path": "nano-i2v"})
    same = {"recipe": video.recipe, "teacher": video.teacher, "prompts": video.prompts}
    assert i2v.model_copy(update=same) == video


@pytest.mark.parametrize("recipe", ["wan22-t2v", "qwen-image"])
def test_a_large_recipe_with_fewer_calls_is_the_recipe_but_for_what_saves_them(recipe: str) -> None:
    saved = {"rollouts.reuse": True, "fake.pull": 1.0, "objective": "projected", "fake.updates": 2}
    assert resolve(f"{recipe}-fast") == resolve(recipe, saved).model_copy(update={"recipe": f"{recipe}-fast"})


@pytest.mark.parametrize("recipe", [name for name in RECIPES if RECIPES[name]().prompts not in (None, FIRST_FRAMES)])
def test_the_prompts_of_a_recipe_are_shipped(recipe: str) -> None:
    config = resolve(recipe, {})
    prompts = read_prompts(config.prompts or "")
    assert all((prompt.image is not None and prompt.image.is_file()) == recipe.endswith("i2v") for prompt in prompts)


def test_image_to_video_asks_for_first_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the user's own: given, or by its default name in the working folder."""
    monkeypatch.chdir(tmp_path)
    for overrides in ({}, {"seed": 3}, {"plan.phases": 4}):
        with pytest.raises(UserError) as error:
            resolve("wan22-i2v", overrides)
        assert str(error.value) == (
            "prompts: this recipe needs a picture with every prompt: "
            "--prompts FILE, a jsonl, csv or parquet with the columns prompt and image"
        )
    assert resolve("wan22-i2v", {"prompts": "mine.csv"}).prompts == "mine.csv"
    (tmp_path / FIRST_FRAMES).write_text('{"prompt": "a fox", "image": "fox.png"}\n')
    assert resolve("wan22-i2v", {}).prompts == FIRST_FRAMES


@systems
def test_the_docs_table_says_what_the_recipe_does(recipe: str) -> None:
    row = next(line.split("|")[2:-1] for line in DOCS.read_text().splitlines() if line.startswith(f"| `{recipe}` |"))
    path, shift, *_, switch = (PAPER | OTHERS)[recipe]
    boundary = f"{BOUNDARIES[shift]:g}"[1:]
    path_of, _, *numbers = (cell.strip() for cell in row)
    expected = [f"{shift:g}", ", ".join(map(str, GRIDS[shift])), boundary, f"{switch:g}"[1:] if switch else ""]
    assert (path_of, numbers) == (path, expected)


@pytest.mark.parametrize("array", [{}, {"SLURM_ARRAY_TASK_ID": "3"}], ids=["one job", "an array"])
def test_the_slurm_script_runs_a_command_that_is_valid(
    array: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a `srun` that writes down its arguments: torchrun takes its own, and the command itself the rest."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/venv/bin:$PATH\n")
    command = tmp_path / "venv" / "bin" / "srun"
    command.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    command.chmod(0o755)
    (tmp_path / "a prompt file.txt").write_text("a handwritten seven\n")
    variables = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "VENV": str(tmp_path / "venv"), "RECIPE": "nano-t2i",
        "OUTPUT": str(tmp_path / "run"), "CACHE": str(tmp_path / "cache"),
        "PROMPTS": str(tmp_path / "a prompt file.txt"), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "7", **array,
    }  # fmt: skip
    subprocess.run(["bash", SLURM, "--seed", "3", "--dry-run"], env=variables, check=True)
    launched = get_args_parser().parse_args((tmp_path / "arguments").read_text().splitlines()[1:])
    assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_id) == ("2", "8", "7")
    assert launched.module and launched.training_script == "phased_dmd"
    arguments = launched.training_script_args
    assert arguments[:2] == ["distill", "nano-t2i"] and arguments[-3:] == ["--seed", "3", "--dry-run"]
    assert [arguments[arguments.index(f"--{name.lower()}") + 1] for name in ("OUTPUT", "PROMPTS", "CACHE")] == [
        variables[name] for name in ("OUTPUT", "PROMPTS", "CACHE")
    ]
    apart = ["--set", "rollouts.start=teacher", "--only-phase", "3"]
    assert (arguments[-7:-3] == apart) == ("--only-phase" in arguments) == bool(array)
    assert launched.rdzv_endpoint.endswith(":29503" if array else ":29500")
    monkeypatch.setattr(sys, "argv", ["phased-dmd", *arguments])
    cli.main()
    assert not (tmp_path / "run").exists()
    del variables["RECIPE"]
    failed = subprocess.run(["bash", SLURM], env=variables, capture_output=True, text=True)
    assert failed.returncode and "RECIPE: a recipe, or a YAML or JSON file" in failed.stderr
