"""The few-step pipeline: what a wrong call does to a stock pipeline cannot happen to it, from the disk and the hub."""

import copy
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from hub import local_hub
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from runs import Make
from safetensors.torch import load_file, save_file
from tiny import draw
from torch import Tensor, nn

from phased_dmd import load_pipeline
from phased_dmd.engine.world import device
from phased_dmd.export import export, push
from phased_dmd.export.exported_run import ExportedRun
from phased_dmd.export.few_steps import FewSteps, check_call
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.loading import load

PROMPTS = ["a handwritten seven", "a digit"]


@pytest.fixture(scope="module")
def nano(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of nano in four phases: four experts on one transformer, text of 16 tokens."""
    export(make("nano", "phased"), folder := tmp_path_factory.mktemp("exports") / "nano")
    return folder


@pytest.fixture(scope="module")
def pipe(nano: Path) -> Any:
    """The export, loaded once: calls leave it as it was, and so do those that are refused."""
    return quiet(load_pipeline(nano, dtype=torch.float32))


@pytest.fixture
def changed(nano: Path) -> Any:
    """The export, loaded for a test that changes it."""
    return quiet(load_pipeline(nano, dtype=torch.float32))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise() -> Tensor:
    return draw(2, 16, 1, 4, 4, seed=0)


def latents(pipe: Any, **options: Any) -> Tensor:
    return pipe(PROMPTS, latents=noise(), output_type="latent", **options).frames.cpu()


def of_run(run: Path, start: Tensor) -> Tensor:
    """What the package's own sampler makes of the noise."""
    system = (sampler := load(run)).system
    condition = system.model.batch(list(sampler.encode([Prompt(text) for text in PROMPTS]).values()))
    with torch.no_grad():
        noise = system.start(start.to(device()))
        return system.roll(system.plan.path(system.plan.num_phases), noise, condition).x.cpu()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)  # four random experts amplify rounding


# ---------------------------------------------------------------- what cannot go wrong


def test_a_plain_call_is_the_runs_sample_whatever_was_called_before(pipe: Any, make: Make) -> None:
    expected = of_run(make("nano", "phased"), noise())
    for _ in range(2):
        same(latents(pipe), expected)
    pipe(["one"], height=64, width=32, generator=torch.Generator().manual_seed(1))
    same(latents(pipe, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=16), expected)
    assert pipe("a digit").frames.shape == (1, 1, 32, 32, 3), "the trained size, not 81 x 480 x 832"
    assert pipe.scheduler.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_inference_steps": 8}, r"num_inference_steps: 8, but the experts were distilled for 4"),
        ({"guidance_scale": 5.0}, r"guidance_scale: 5, but the guidance is distilled into the experts; leave it out"),
        ({"guidance_scale_2": 3.0}, r"guidance_scale_2: 3, but the guidance is distilled"),
        ({"max_sequence_length": 512}, r"max_sequence_length: 512, but the experts were distilled for 16 tokens"),
        ({"negative_prompt": "ugly"}, r"negative_prompt: without guidance it changes nothing; leave it out"),
        ({"attention_kwargs": {"scale": 0.5}}, r"attention_kwargs: scale would weaken or strengthen the experts"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 512, 64)}, r"prompt_embeds: 512 tokens, but .* padded to 16"),
    ],
)
def test_a_call_that_would_be_silently_wrong_is_refused_in_one_sentence(
    options: dict[str, Any], says: str, pipe: Any
) -> None:
    with pytest.raises(ValueError, match=rf"^{says}") as found:
        pipe(**{"prompt": "a digit"} | options)
    assert "\n" not in str(found.value)


def test_a_pipeline_whose_samples_depend_on_each_other_takes_one_prompt_and_keeps_no_texts() -> None:
    """As Qwen-Image-2.1's does; of the same prompt it may make several."""
    few = {
        "times": [1.0, 0.5], "max_sequence_length": None, "unguided": {"true_cfg_scale": 1.0}, "padded": False,
        "fixed": {"use_kv_cache": False}, "alone": True,
    }  # fmt: skip
    check_call({"prompt": ["a digit", "a digit"], "use_kv_cache": False}, few)
    with pytest.raises(ValueError, match=r"^prompt: samples of one call would depend on the longest prompt"):
        check_call({"prompt": ["a digit", "a handwritten digit"]}, few)
    with pytest.raises(
        ValueError, match=r"^use_kv_cache: True, with which the experts of several steps would be mixed"
    ):
        check_call({"prompt": "a digit", "use_kv_cache": True}, few)


def test_another_scheduler_is_refused(pipe: Any) -> None:
    """`FlowMatchEulerDiscreteScheduler(shift=5)` would shift twice."""
    kept, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=5.0)
    with pytest.raises(ValueError, match=r"^the scheduler was replaced: the experts were distilled for the times"):
        pipe("a digit")
    pipe.scheduler = kept
    pipe("a digit")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda pipe, folder: pipe.load_lora_weights(folder), "load_few_steps loads the experts, all of them"),
        (lambda pipe, folder: pipe.load_lora_weights(str(folder)), "load_few_steps loads the experts, all of them"),
        (lambda pipe, folder: pipe.load_lora_weights(folder, weight_name=file(folder)), "load_few_steps loads"),
        (lambda pipe, folder: pipe.load_lora_weights(folder / file(folder)), "load_few_steps loads the experts"),
        (
            lambda pipe, _: pipe.set_adapters([f"phase{i}" for i in (1, 2, 3, 4)]),
            "phase1 is an expert, which the pipel",
        ),
        (lambda pipe, _: pipe.set_adapters("none"), "there is no adapter none"),
        (lambda pipe, _: pipe.delete_adapters("phase2"), "phase2 is an expert, without which its steps would be"),
        (lambda pipe, _: pipe.fuse_lora(), "it would merge one expert for all steps; `phased-dmd export --fused`"),
        (lambda pipe, _: pipe.unload_lora_weights(), "without the experts this is the base in a few steps"),
        (lambda pipe, _: pipe.disable_lora(), "without the experts this is the base in a few steps"),
    ],
)
def test_experts_can_be_neither_loaded_again_nor_chosen_nor_taken_off(
    call: Callable[[Any, Path], None], says: str, pipe: Any, nano: Path
) -> None:
    before = latents(pipe)
    with pytest.raises(ValueError, match=says):
        call(pipe, nano)
    assert torch.equal(latents(pipe), before)


def file(folder: Path) -> str:
    return json.loads((folder / "export.json").read_text())["experts"][1]["file"]


def test_a_lora_of_the_users_own_is_active_in_every_step_beside_the_experts(
    changed: Any, nano: Path, tmp_path: Path
) -> None:
    """It adds to the experts what it would add alone: of a first step's latents, to first order, and off again."""
    own = {name: 0.1 * tensor for name, tensor in load_file(nano / file(nano)).items()}
    save_file(own, tmp_path / "style.safetensors")
    bare = latents(changed)
    active: list[set[str]] = []
    changed.transformer.register_forward_pre_hook(
        lambda network, _: active.append(set(network.active_adapters())) or None  # noqa: B023
    )
    changed.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    styled = latents(changed)
    assert active == [{f"phase{i}", "style"} for i in (1, 2, 3, 4)] and (styled - bare).abs().max() > 1e-3
    changed.set_adapters("style", 0.0)
    same(latents(changed), bare)
    changed.set_adapters([])
    assert torch.equal(latents(changed), bare) and active[-1] == {"phase4"}
    changed.set_adapters(["style"])
    assert torch.equal(latents(changed), styled)
    changed.delete_adapters("style")
    assert torch.equal(latents(changed), bare)


def test_networks_that_are_offloaded_switch_their_experts_too(changed: Any) -> None:
    """By accelerate's hooks, with this machine's CPU in the place of a GPU."""
    expected = latents(changed)
    changed.enable_model_cpu_offload(device="cpu")
    assert hasattr(changed.transformer, "_hf_hook")
    same(latents(changed), expected)


def test_each_of_two_networks_has_its_own_expert(make: Make, tmp_path: Path) -> None:
    """What two stock calls of `load_lora_weights` would both put into the first."""
    run = make("nano-moe")
    export(run, tmp_path / "out")
    pipe = quiet(load_pipeline(tmp_path / "out", dtype=torch.float32))
    adapters = pipe.get_list_adapters()
    assert adapters == {"transformer": ["high_noise_phase1"], "transformer_2": ["low_noise_phase2"]}
    same(latents(pipe), of_run(run, noise()))


def test_without_experts_the_class_samples_nothing(nano: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(nano / "base", custom_pipeline=str(nano), trust_remote_code=True)
    with pytest.raises(ValueError, match=r"^there are no experts yet: pipe\.load_few_steps\(FOLDER\)"):
        pipe("a digit")
    with pytest.raises(ValueError, match="load_few_steps loads the experts"):
        pipe.load_lora_weights(nano)


def test_a_folder_for_another_pipeline_or_none_is_refused(
    exported: Callable[[str], Path], pipe: Any, tmp_path: Path
) -> None:
    qwen = exported("qwen_image")
    with pytest.raises(ValueError, match=r"its experts are for a QwenImagePipeline, and this is a FewStepPipeline"):
        pipe.load_few_steps(qwen)
    with pytest.raises(ValueError, match=r"its base was a local folder; name it: load_pipeline\(.*, base=FOLDER\)"):
        load_pipeline(qwen)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no export\.json"):
        load_pipeline(tmp_path / "empty")
    index = qwen / "export.json"
    for change, said in (
        ({"pipeline": "os.system"}, "os.system: no pipeline of diffusers"),
        ({"pipeline": "ModelMixin"}, "ModelMixin: no pipeline of diffusers"),
        ({"experts": [{"file": "../../x.safetensors"}]}, "names files elsewhere"),
        ({"padded": None}, "says nothing of padded; an older version wrote it"),
    ):
        (tmp_path / "bad").mkdir(exist_ok=True)
        changed = {k: v for k, v in (json.loads(index.read_text()) | change).items() if v is not None or k == "base"}
        (tmp_path / "bad" / "export.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=said):
            load_pipeline(tmp_path / "bad", base=tmp_path)


def test_a_fused_export_is_its_own_base_and_no_others(make: Make, nano: Path, tmp_path: Path) -> None:
    """Whose pipeline, called plainly, is at the trained times, where the stock one comes near."""
    run = make("nano-moe")
    export(run, tmp_path / "out", fused=True)
    pipe = quiet(load_pipeline(tmp_path / "out", dtype=torch.float32))
    same(latents(pipe), of_run(run, noise()))
    with pytest.raises(ValueError, match=r"^base: .* is a whole pipeline, and needs no other"):
        load_pipeline(tmp_path / "out", base=nano / "base")
    kind = {"custom_pipeline": str(tmp_path / "out"), "trust_remote_code": True}
    with pytest.raises(ValueError, match="its experts are whole transformers; load the pipeline itself from there"):
        DiffusionPipeline.from_pretrained(nano / "base", **kind).load_few_steps(tmp_path / "out")


def test_fresh_noise_is_drawn_from_the_generator_that_is_given(make: Make, workshop: Path, tmp_path: Path) -> None:
    """Of the re-noising solver, whose first noise is the same here; diffusers' pipelines pass their scheduler none."""
    export(make("wan21_t2v", None, ablation__solver="renoise"), tmp_path / "out")
    pipe = quiet(load_pipeline(tmp_path / "out", base=workshop / "teachers" / "wan21_t2v", device="cpu"))
    first = draw(1, 16, 1, 4, 6, seed=1)

    def sample(seed: int) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return pipe("a boat", generator=rng, latents=first, output_type="latent").frames

    made = sample(0)
    torch.manual_seed(7)
    assert torch.equal(sample(0), made)
    assert (sample(1) - made).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "cleans"), [("wan21_t2v", True), ("wan21_i2v", True), ("qwen_image", False), ("z_image", False)]
)
def test_what_cleans_prompts_as_in_training_is_asked_for_at_once(
    name: str, cleans: bool, exported: Callable[[str], Path], workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without ftfy one of Wan's pipelines samples other tokens without a word, and the other fails once it is there."""
    folder = exported(name)
    assert ("ftfy" in (folder / "README.md").read_text()) == cleans
    monkeypatch.setitem(sys.modules, "ftfy", None)
    if cleans:
        with pytest.raises(ImportError, match="ftfy"):
            load_pipeline(folder, base=workshop / "teachers" / name)
    else:
        load_pipeline(folder, base=workshop / "teachers" / name)


def test_the_file_is_short_of_surprises_for_who_must_trust_it() -> None:
    """The copy in an export runs with the user's rights: it opens its folder, the hub's download, and nothing else."""
    text = Path(inspect.getfile(FewSteps)).read_text()
    assert not re.search(r"\b(os|sys|subprocess|socket|pickle|eval|exec|open|requests|urllib|phased_dmd)\b[.(]", text)
    assert set(re.findall(r"^(?:from|import) (\w+)", text, re.M)) == {
        "inspect", "json", "warnings", "collections", "pathlib", "typing", "torch", "diffusers"
    }  # fmt: skip


# ---------------------------------------------------------------- without this package, and from the hub

STRANGER = """
import sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
for name, base, here in {places}:
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=here, trust_remote_code=True).load_few_steps(here)
    noise = torch.load("{folder}/noise.pt", weights_only=True)
    torch.save(pipe({prompts}, latents=noise, output_type="latent").frames, f"{folder}/{{name}}.pt")
    try:
        pipe.load_lora_weights(here)
    except ValueError as error:
        print(error)
assert not any(name.startswith("phased_dmd") for name in sys.modules)
"""
OURS = """
import sys, pathlib, torch
from phased_dmd import load_pipeline
from phased_dmd.export import export, push
torch.set_num_threads(1)
run, output = map(pathlib.Path, sys.argv[1:])
export(run, output)
print(push(output, "me/few")[-1])
noise = torch.load("{folder}/noise.pt", weights_only=True)
pipe = load_pipeline("me/few", dtype=torch.float32)
torch.save(pipe({prompts}, latents=noise, output_type="latent").frames.cpu(), "{folder}/ours.pt")
"""


def child(code: str, environment: dict[str, str], *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)


def test_strangers_who_know_only_diffusers_make_the_runs_samples_from_the_disk_and_the_hub(
    nano: Path, make: Make, tmp_path: Path
) -> None:
    """Two exports in one process, whose files diffusers copies to one place, and one that another process exported to
    the same bytes (safetensors writes its metadata in an order that differs between processes, and we do not), uploaded
    and has loaded back; neither has what the other downloaded. Without being trusted diffusers runs none of it.
    """
    export(make("nano-moe"), tmp_path / "pair")
    torch.save(noise(), tmp_path / "noise.pt")
    with local_hub() as hub:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_nobody"}
        ours, theirs = (environment | {"HF_HOME": str(tmp_path / "homes" / name)} for name in ("ours", "theirs"))
        code, run = OURS.format(folder=tmp_path, prompts=PROMPTS), make("nano", "phased")
        done = child(code, ours, run, tmp_path / "there")
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"me/few: \d+ files, [\d,]+ bytes sent", done.stdout.strip())
        assert hub.asked[0] == ("/api/repos/create", [{"name": "few", "organization": "me", "visibility": "private"}])
        assert hub.repositories["me/few"] == {
            str(path.relative_to(nano)): path.read_bytes() for path in nano.rglob("*") if path.is_file()
        }
        places = [
            ("nano", str(nano / "base"), str(nano)),
            ("pair", str(tmp_path / "pair" / "base"), str(tmp_path / "pair")),
            ("hub", str(nano / "base"), "me/few"),
        ]
        done = child(STRANGER.format(places=places, folder=tmp_path, prompts=PROMPTS), theirs)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("load_few_steps loads the experts") == 3
    expected = {"nano": make("nano", "phased"), "pair": make("nano-moe")}
    for name, run in (("nano", "nano"), ("pair", "pair"), ("hub", "nano"), ("ours", "nano")):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        same(found, of_run(expected[run], noise()))
    assert list((tmp_path / "homes").rglob("snapshots/*/export.json"))
    assert not list((tmp_path / "homes").rglob("snapshots/*/wrong-calls.png")), "pictures are not asked for"
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(nano / "base", custom_pipeline=str(nano))


def test_a_refusal_of_the_hub_is_one_line(nano: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from phased_dmd.errors import UserError

    with pytest.raises(UserError, match=r"^--push: not a name: .*; the export is in "):
        push(nano, "not a name")


# ---------------------------------------------------------------- other readers' own loaders


def merged(run: Path, phase: int) -> dict[str, Tensor]:
    """base + alpha / rank B A, by name, of the modules that have an adapter."""
    opened = ExportedRun.open(run)
    expert = next(expert for expert in opened.experts if expert.phase == phase)
    base = load_file(
        Path(opened.teacher.path) / opened.networks[expert.network] / "diffusion_pytorch_model.safetensors"
    )
    tensors = opened.tensors(expert)
    names = [name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")]
    return {
        name: base[f"{name}.weight"] + 0.5 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        for name in names
    }


@pytest.mark.parametrize("name", ["wan21_t2v", "wan22_i2v", *pipelines.PICTURES])
def test_readers_own_loaders_merge_each_file_as_it_was_trained(
    name: str, make: Make, exported: Callable[[str], Path], workshop: Path
) -> None:
    """diffusers: the stock pipeline's `load_lora_weights` and `fuse_lora`. peft: what a trainer does with the keys."""
    run, folder, teacher = make(name), exported(name), workshop / "teachers" / name
    opened = ExportedRun.open(run)
    for expert in opened.experts:
        pipe = DiffusionPipeline.from_pretrained(teacher, **opened.adapter.stock.parts(opened.source))
        by_diffusers = pipe.components[expert.part]
        by_peft = copy.deepcopy(by_diffusers)
        second = {"load_into_transformer_2": True} if expert.part == "transformer_2" else {}
        pipe.load_lora_weights(folder, weight_name=expert.file, **second)
        pipe.fuse_lora(components=[expert.part])
        state = type(pipe).lora_state_dict(str(folder), weight_name=expert.file, use_safetensors=True)
        merge_by_peft(by_peft, {key.removeprefix("transformer."): tensor for key, tensor in state.items()})
        expected = merged(run, expert.phase)
        for network in (by_diffusers, by_peft):
            found = {key.replace(".base_layer", ""): tensor for key, tensor in network.state_dict().items()}
            for module, weight in expected.items():
                torch.testing.assert_close(found[f"{module}.weight"], weight, rtol=0, atol=1e-6)


def merge_by_peft(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Injects an adapter where the keys have one, fills it with them, all, and merges it."""
    modules = sorted({key.split(".lora_")[0] for key in state})
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=modules), network)
    assert not set_peft_model_state_dict(network, state).unexpected_keys
    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()


def test_the_right_stock_call_needs_every_switch_that_the_card_names(make: Make, nano: Path, tmp_path: Path) -> None:
    """What a stock pipeline makes of the calls on the card: the picture's wrong ones are, and say nothing, wrong."""
    expected = of_run(make("nano", "phased"), noise())
    pipe = quiet(WanPipeline.from_pretrained(nano / "base"))
    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "max_sequence_length": 16, "num_frames": 1}
    options |= {"height": 32, "width": 32}
    pipe.load_lora_weights(nano)
    assert (latents(pipe, **options) - expected).abs().max() > 0.1
    assert len(pipe.get_list_adapters()["transformer"]) == 1, "of four"
