"""The ComfyUI workflow, by a re-computation of what its nodes do: the samples are the run's own.

Of ComfyUI (read at its commit 3cd7b32f): models of flow are told 1000 sigma; a sampler starts from
sigma noise + (1 - sigma) latent and gives its last x back divided by 1 - its last sigma; where there is a mask, the
network is shown the latent itself and its prediction of the clean sample is the latent itself.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from PIL import Image
from runs import TINY, Make, finished_run
from tiny import draw
from torch import Tensor

from phased_dmd.engine.world import device
from phased_dmd.export import export
from phased_dmd.export.comfyui import Graph, obstacle, workflow
from phased_dmd.export.exported_run import ExportedRun
from phased_dmd.models.source import Source, architecture
from phased_dmd.networks.roles import expert_role
from phased_dmd.recipes import SYSTEMS, large, resolve
from phased_dmd.sampling.loading import load

Latent = dict[str, Tensor]


class Comfy:
    """Runs a workflow's nodes from the samples back to the start, on latents [b, c, f, h, w].

    network: the expert's prediction of the flow at (LoRA file, x, sigma), in the place of ComfyUI's model.
    """

    def __init__(
        self, graph: Graph, start: Latent, noises: Sequence[Tensor], network: Callable[[str, Tensor, Tensor], Tensor]
    ) -> None:
        self.graph, self.start, self.noises, self.network = graph, start, noises, network
        self.fresh = 0  # draws of the lcm sampler

    def run(self, link: Any) -> Any:
        node = self.graph[link[0]]
        kind = getattr(self, node["class_type"], None)
        if kind is None:
            return self.start if node["class_type"].startswith(("Empty", "Wan22")) else node
        inputs = {name: self.run(value) if isinstance(value, list) else value for name, value in node["inputs"].items()}
        return kind(**inputs)

    def ManualSigmas(self, sigmas: str) -> Tensor:
        return torch.tensor([float(number) for number in re.findall(r"[-+]?(?:\d*\.*\d+)", sigmas)])

    def KSamplerSelect(self, sampler_name: str) -> str:
        return sampler_name

    def ModelSamplingSD3(self, model: str, shift: float) -> str:
        return model

    ModelSamplingAuraFlow = ModelSamplingSD3

    def LoraLoaderModelOnly(self, model: Any, lora_name: str, strength_model: float) -> str:
        assert strength_model == 1
        return lora_name

    def LatentCut(self, samples: Latent, dim: str, index: int, amount: int) -> Latent:
        assert dim == "t"
        return samples | {"samples": samples["samples"][:, :, index : index + amount]}

    def ReplaceVideoLatentFrames(self, destination: Latent, source: Latent, index: int) -> Latent:
        made = destination["samples"].clone()
        made[:, :, index : index + source["samples"].shape[2]] = source["samples"]
        return destination | {"samples": made}

    def SamplerCustom(
        self, model: str, add_noise: bool, noise_seed: int, cfg: float, positive: Any, negative: Any, sampler: str,
        sigmas: Tensor, latent_image: Latent,
    ) -> Latent:  # fmt: skip
        assert cfg == 1
        latent, mask = latent_image["samples"], latent_image.get("noise_mask", torch.ones(1))
        noise = self.noises[0] if add_noise else torch.zeros_like(latent)
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            shown = x * mask + latent * (1 - mask)
            clean = shown - sigma * self.network(model, shown, sigma)
            clean = clean * mask + latent * (1 - mask)
            if sampler == "euler":
                x = x + (x - clean) / sigma * (after - sigma)
            else:
                x = clean
                if after > 0:
                    self.fresh += 1
                    x = after * self.noises[self.fresh] + (1 - after) * x
        return latent_image | {"samples": x / (1 - sigmas[-1])}


def gap(run: Path, graph: Graph, start: Latent | None = None) -> float:
    """The greatest gap between the workflow's latents and the run's own, from the same noise; about 1 is their size.

    start: latents with a first frame, clean, and the mask that is 0 there.
    """
    sampler = load(run)
    system = sampler.system
    model, plan = system.model, system.plan
    shape = (1, *model.sample_shapes[0])
    text = sampler.codec.encode_text(["a boat"])[0]
    frame = {} if start is None else {"first_frame": start["samples"][0, :, :1]}
    condition = model.batch([text | frame])
    start = start or {"samples": torch.zeros(shape)}
    noises = [draw(*shape, seed=seed) for seed in range(plan.num_steps)]
    phases = {expert.file: expert.phase for expert in ExportedRun.open(run).experts}

    def network(file: str, x: Tensor, sigma: Tensor) -> Tensor:
        step = min(range(plan.num_steps), key=lambda i: abs(plan.times[i] - sigma))
        expert, told = plan.expert(step), torch.tensor([sigma], dtype=torch.float64, device=device())
        assert expert.phase == phases[file], "each time has its own expert's file"
        seen = condition | ({"first_frame": x[:, :, :1].to(device())} if frame else {})  # ComfyUI knows no other
        return system.roles.predict(expert_role(expert.phase), expert.network, x.to(device()), told, seen).cpu()

    with torch.no_grad():
        path, first = plan.path(plan.num_phases), system.start(noises[0].to(device()))
        own = system.roll(path, first, condition, noise=lambda step: noises[step + 1].to(device())).x.cpu()
        decode = next(node for node in graph.values() if node["class_type"] == "VAEDecode")
        found = Comfy(graph, start, noises, network).run(decode["inputs"]["samples"])["samples"]
    return (found - own).abs().max().item()


@pytest.mark.parametrize(
    ("name", "method", "overrides"),
    [
        ("wan22_t2v", None, {"plan__phases": 4}),
        ("wan21_t2v", "phased", {"plan__steps": 3, "plan__shift": 7.0}),
        ("wan22_t2v", "dmd-sgts", {}),
        ("wan21_t2v", None, {"ablation__solver": "renoise"}),
        ("ti2v_5b", None, {}),
        ("qwen_image", None, {"plan__shift": 3.0}),
        ("z_image", None, {"plan__shift": 6.0}),
    ],
)
def test_the_workflow_makes_the_runs_samples(name: str, method: Any, overrides: dict[str, Any], make: Make) -> None:
    run = make(name, method, **overrides)
    graph = workflow(ExportedRun.open(run))
    assert gap(run, graph) < 1e-5
    sigmas = [node["inputs"]["sigmas"] for node in graph.values() if node["class_type"] == "ManualSigmas"]
    told = [[float(number) for number in text.split(", ")] for text in sigmas]
    grid = [*ExportedRun.open(run).plan.times]
    assert [t for times in told for t in times[:-1]] + [told[-1][-1]] == pytest.approx(grid, abs=1e-9)


def test_a_grid_of_comfyuis_own_would_not_be_the_trained_one(make: Make) -> None:
    """Of three steps at shift 7 its `simple` schedule, a table of 1000, has 933.4 and 778.3 for 933.3 and 777.8."""
    run = make("wan21_t2v", "phased", plan__steps=3, plan__shift=7.0)
    graph = workflow(ExportedRun.open(run))
    table = [7 * u / (1 + 6 * u) for u in ((1000 - int(i * 1000 / 3)) / 1000 for i in range(3))] + [0.0]
    nodes = [node for node in graph.values() if node["class_type"] == "ManualSigmas"]
    for i, node in enumerate(nodes):
        node["inputs"]["sigmas"] = f"{table[i]}, {table[i + 1]}"
    assert gap(run, graph) > 1e-4


def test_a_first_frame_in_the_latents_stays_what_it_is_between_samplers(make: Make, workshop: Path) -> None:
    """Without the nodes that put it back, the next sampler takes it, divided by 1 - sigma, for the clean one."""
    Image.effect_noise((64, 32), 80).convert("RGB").save(workshop / "wide.png")
    (workshop / "wide.jsonl").write_text(json.dumps({"prompt": "a boat", "image": "wide.png"}))
    run = make("ti2v_5b", teacher__first_frame=True, prompts=str(workshop / "wide.jsonl"))
    graph = workflow(ExportedRun.open(run))
    shape = (1, *load(run).shape)
    samples, mask = torch.zeros(shape), torch.ones(1, 1, *shape[2:])
    samples[:, :, :1], mask[:, :, :1] = draw(*shape[:2], 1, *shape[3:], seed=9), 0
    assert gap(run, graph, {"samples": samples, "noise_mask": mask}) < 1e-5
    (replaced,) = (node for node in graph.values() if node["class_type"] == "ReplaceVideoLatentFrames")
    for node in graph.values():
        for name, link in node["inputs"].items():
            if isinstance(link, list) and graph[link[0]] is replaced:
                node["inputs"][name] = replaced["inputs"]["destination"]
    assert gap(run, graph, {"samples": samples, "noise_mask": mask}) > 1


@pytest.mark.parametrize(
    ("name", "kinds", "absent"),
    [
        ("wan22_i2v", {"WanImageToVideo", "CreateVideo", "SaveVideo"}, {"CLIPVisionEncode", "SaveImage"}),
        ("wan21_i2v", {"WanImageToVideo", "CLIPVisionEncode"}, {"Wan22ImageToVideoLatent"}),
        ("ti2v_5b", {"Wan22ImageToVideoLatent", "ModelSamplingSD3"}, {"LatentCut", "LoadImage"}),
        ("wan21_t2v", {"EmptyHunyuanLatentVideo", "SaveImage"}, {"SaveVideo", "SaveAnimatedWEBP"}),
        ("qwen_image", {"EmptySD3LatentImage", "ModelSamplingAuraFlow", "SaveImage"}, {"EmptyHunyuanLatentVideo"}),
        ("z_image", {"EmptySD3LatentImage", "ModelSamplingAuraFlow", "SaveImage"}, {"EmptyHunyuanLatentVideo"}),
    ],
)
def test_the_workflow_has_the_nodes_of_its_model(name: str, kinds: set[str], absent: set[str], make: Make) -> None:
    opened = ExportedRun.open(make(name))
    graph = workflow(opened)
    found = {node["class_type"] for node in graph.values()}
    assert kinds <= found and not absent & found
    for node in graph.values():
        assert all(value[0] in graph for value in node["inputs"].values() if isinstance(value, list))
    loras = [node["inputs"] for node in graph.values() if node["class_type"] == "LoraLoaderModelOnly"]
    assert [lora["lora_name"] for lora in loras] == [expert.file for expert in opened.experts]
    networks = [graph[lora["model"][0]]["inputs"]["unet_name"] for lora in loras]
    pair = [f"{name}_high_noise.safetensors", f"{name}_low_noise.safetensors"]
    alone = {"qwen_image": "qwen_image_fp8_e4m3fn", "z_image": "z_image_bf16"}.get(name, name)
    assert networks == (pair if name == "wan22_i2v" else [f"{alone}.safetensors"] * 2)


@pytest.mark.parametrize(
    ("hub", "name", "files"),
    [
        (
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "wan22_t2v",
            ["wan2.2_t2v_high_noise_14B_fp8_scaled", "wan2.2_t2v_low_noise_14B_fp8_scaled"],
        ),
        (
            "Wan-AI/Wan2.2-I2V-A14B-Diffusers",
            "wan22_i2v",
            ["wan2.2_i2v_high_noise_14B_fp8_scaled", "wan2.2_i2v_low_noise_14B_fp8_scaled"],
        ),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", "ti2v_5b", ["wan2.2_ti2v_5B_fp16"]),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "wan21_t2v", ["wan2.1_t2v_14B_fp8_scaled"]),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "wan21_t2v", ["wan2.1_t2v_1.3B_fp16"]),
        ("Qwen/Qwen-Image", "qwen_image", ["qwen_image_fp8_e4m3fn"]),
        ("Tongyi-MAI/Z-Image", "z_image", ["z_image_bf16"]),
    ],
)
def test_the_bases_files_have_the_names_of_comfyuis_own_templates(
    hub: str, name: str, files: list[str], make: Make
) -> None:
    graph = workflow(ExportedRun.open(make(name), base_model=hub))
    loaded = [node["inputs"]["unet_name"] for node in graph.values() if node["class_type"] == "UNETLoader"]
    assert loaded == [f"{file}.safetensors" for file in files]


@pytest.mark.parametrize(
    ("changes", "tokens", "says"),
    [
        ({}, 512, "it cannot load this base, whose transformer has attention_head_dim 12, where it knows 128"),
        (
            {"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256},
            24,
            "it pads text to 512 tokens, and .* for 24",
        ),
        ({"attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256}, 512, None),
    ],
)
def test_where_comfyui_cannot_serve_there_is_a_reason_instead_of_a_workflow(
    changes: dict[str, Any], tokens: int, says: str | None, tmp_path: Path
) -> None:
    """Its transformer of Wan has sizes that no file changes, and its text encoder pads to 512."""
    folder = pipelines.build("wan21_t2v", tmp_path / "base")
    config = json.loads((folder / "transformer" / "config.json").read_text()) | changes
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    teacher = pipelines.teacher("wan21_t2v", folder).model_copy(update={"max_tokens": tokens})
    (tmp_path / "p.txt").write_text("a boat")
    settings = TINY | {"teacher": json.loads(teacher.model_dump_json()), "prompts": str(tmp_path / "p.txt")}
    run = finished_run(tmp_path / "run", resolve("nano-t2i", settings))
    found = obstacle(ExportedRun.open(run))
    assert found is None if says is None else re.fullmatch(says, found or "")
    lines = export(run, tmp_path / "out")
    assert (tmp_path / "out" / "workflow.json").exists() == (says is None)
    card = (tmp_path / "out" / "README.md").read_text()
    if says is None:
        assert "workflow.json: ComfyUI, at exactly the trained times" in lines and "- comfyui\n" in card
    else:
        assert f"no workflow for ComfyUI: {found}" in lines and f"no workflow for ComfyUI: {found}." in card


# ---------------------------------------------------------------- the page's tables

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def rows(head: str) -> dict[str, list[str]]:
    """The cells of a table of docs/export.md, by the recipes that stand in the first one."""
    lines = PAGE.read_text("utf-8").split(f"\n| {head}")[1].split("\n\n")[0].splitlines()[2:]
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {recipe: cells for first, *cells in split for recipe in re.findall(r"`([^`]+)`", first)}


def named(graph: Graph, kind: str, key: str) -> list[Any]:
    """An input of all nodes of a kind, in the graph's order."""
    return [node["inputs"][key] for node in graph.values() if node["class_type"] == kind]


@pytest.mark.parametrize("recipe", SYSTEMS)
def test_the_pages_tables_are_what_the_recipes_workflows_hold(recipe: str) -> None:
    """File by file and time by time, of the hub's configurations; recipes without a workflow are in neither table."""
    files, settings = (rows(head) for head in ("recipe | `models/diffusion_models`", "recipe | first sampler"))
    config, folder = large(recipe), architecture(SYSTEMS[recipe].path)
    teacher: Any = config.teacher
    source = Source(teacher)
    assert folder is not None
    source.folder = folder
    run = ExportedRun(Path(), False, torch.bfloat16, None, config, lambda _: {}, teacher, source)
    assert (obstacle(run) is None) == (recipe in files) == (recipe in settings)
    if obstacle(run):
        return
    graph = workflow(run)
    told = [[f"{name}.safetensors" for name in re.findall(r"`([^`]+)`", cell)] for cell in files[recipe]]
    loaded = (("UNETLoader", "unet_name"), ("CLIPLoader", "clip_name"), ("VAELoader", "vae_name"))
    assert told == [named(graph, *which) for which in loaded]

    first, sigmas, second, rest, (kind, shift) = *settings[recipe][:4], settings[recipe][4].split(", ")
    for name, file in zip((first, second), named(graph, "LoraLoaderModelOnly", "lora_name"), strict=True):
        assert f"_4step_{name.split('`')[1]}_rank64_" in file
    for told_sigmas, found in zip((sigmas, rest), named(graph, "ManualSigmas", "sigmas"), strict=True):
        assert [float(number) for number in told_sigmas.split(", ")] == pytest.approx(
            [float(number) for number in found.split(", ")], abs=5e-5
        )
    assert set(named(graph, kind, "shift")) == {float(shift)}
    assert named(graph, "SamplerCustom", "add_noise") == [True, False]
    assert set(named(graph, "SamplerCustom", "cfg")) == {1.0}
    assert named(graph, "KSamplerSelect", "sampler_name") == ["euler"]
