"""An export for ComfyUI has LoRA files by its names, and a workflow with one sampler an expert."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from phased_dmd.errors import UserError
from phased_dmd.export.exported_run import NOISE, ExportedExpert, ExportedRun
from phased_dmd.export.stock import A, lora_tensors, save_lora
from phased_dmd.maths.phases import shift_time

SCHEDULE = "simple"  # ComfyUI's schedule that keeps the model's shift and picks evenly
TABLE = 1000  # noise levels it picks from
WAN_NAMES = (  # of diffusers' modules, as the original checkpoints name them
    (r"^blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn."),
    (r"^blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn."),
    (r"_attn\.to_out\.0$", "_attn.o"),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj$", r"blocks.\1.ffn.0"),
    (r"^blocks\.(\d+)\.ffn\.net\.2$", r"blocks.\1.ffn.2"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", "img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", "img_emb.proj.3"),
)
WAN_MODULE = r"(blocks\.\d+\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])|img_emb\.proj\.[13])"
QWEN_MODULE = r"transformer_blocks\.\d+\.\w+(\.\w+)*"
Link = list[Any]  # [node, output], as ComfyUI writes a connection
Start = tuple[Link, Link, Link]  # positive condition, negative condition, latents


def write_comfyui(run: ExportedRun, folder: Path) -> tuple[str, list[float], float]:
    """Writes the LoRA files and the workflow.

    Returns the name of ComfyUI's schedule, the times that it picks, and their largest gap to the trained ones.
    """
    for expert in run.experts:
        save_lora(folder / expert.file, comfyui_tensors(run, expert), run.header(expert))
    (folder / "workflow.json").write_text(json.dumps(workflow(run), indent=2) + "\n", "utf-8")
    steps, shift = run.plan.num_steps, run.config.plan.shift
    times = [shift_time((TABLE - int(i * TABLE / steps)) / TABLE, shift) for i in range(steps)]
    return SCHEDULE, times, max(abs(a - b) for a, b in zip(times, run.plan.times, strict=False))


def comfyui_tensors(run: ExportedRun, expert: ExportedExpert) -> dict[str, Tensor]:
    """Returns the adapter by ComfyUI's names, with alpha = rank; raises UserError for a module that has none there."""
    renamed = {}
    for name, tensor in lora_tensors(run, expert).items():
        module, _, side = name.removeprefix("transformer.").partition(".lora_")
        key = module
        for pattern, original in WAN_NAMES if run.is_wan else ():
            key = re.sub(pattern, original, key)
        if not re.fullmatch(WAN_MODULE if run.is_wan else QWEN_MODULE, key):
            raise UserError(f"teacher.lora_targets: ComfyUI has no name for {module}; export for diffusers")
        prefix = "diffusion_model." if run.is_wan else ""
        renamed[f"{prefix}{key}.lora_{'down' if side == A[6:] else 'up'}.weight"] = tensor
        if "blocks." in key:  # elsewhere diffusers' converter takes none, and without one every reader's scale is 1
            renamed[f"{prefix}{key}.alpha"] = torch.tensor(float(run.config.generator.lora.rank))
    return renamed


class Graph(dict[str, dict[str, Any]]):
    """A workflow holds nodes by number in ComfyUI's API format, which its window opens too."""

    def add(self, kind: str, **inputs: Any) -> Link:
        """Adds a node and returns the link to its first output."""
        name = str(len(self) + 1)
        self[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


def workflow(run: ExportedRun) -> Graph:
    """Returns a chain of samplers, one an expert, each on its own steps with its own LoRA."""
    graph = Graph()
    files = ("umt5_xxl_fp8_e4m3fn_scaled", "wan") if run.is_wan else ("qwen_2.5_vl_7b_fp8_scaled", "qwen_image")
    clip = graph.add("CLIPLoader", clip_name=f"{files[0]}.safetensors", type=files[1])
    vae_name = "qwen_image_vae" if not run.is_wan else "wan2.2_vae" if is_ti2v_5b(run) else "wan_2.1_vae"
    vae = graph.add("VAELoader", vae_name=f"{vae_name}.safetensors")
    positive = graph.add("CLIPTextEncode", clip=clip, text="what to show")
    negative = graph.add("CLIPTextEncode", clip=clip, text="")  # not run at cfg 1
    latent = add_samplers(run, graph, add_start(run, graph, vae, positive, negative))
    saved = {"images": graph.add("VAEDecode", samples=latent, vae=vae), "filename_prefix": run.model}
    if run.teacher.sizes[0].num_frames > 1:
        graph.add("SaveAnimatedWEBP", **saved, fps=16.0, lossless=False, quality=90, method="default")
    else:
        graph.add("SaveImage", **saved)
    return graph


def is_ti2v_5b(run: ExportedRun) -> bool:
    """Tells TI2V-5B, which has a VAE of its own and takes the first frame as a latent, from the other models."""
    return bool(run.source.index.get("expand_timesteps"))


def add_start(run: ExportedRun, graph: Graph, vae: Link, positive: Link, negative: Link) -> Start:
    """Adds the empty latents, and what a first frame changes of the conditions."""
    size = run.teacher.sizes[0]
    shape: dict[str, Any] = {"width": size.width, "height": size.height, "batch_size": 1}
    image = {"start_image": graph.add("LoadImage", image="first-frame.png")} if run.task == "i2v" else {}
    if not run.is_wan:
        return positive, negative, graph.add("EmptySD3LatentImage", **shape)
    shape["length"] = size.num_frames
    if is_ti2v_5b(run):
        return positive, negative, graph.add("Wan22ImageToVideoLatent", vae=vae, **shape, **image)
    if not image:
        return positive, negative, graph.add("EmptyHunyuanLatentVideo", **shape)
    if run.source.has("image_encoder"):
        vision = graph.add("CLIPVisionLoader", clip_name="clip_vision_h.safetensors")
        seen = graph.add("CLIPVisionEncode", clip_vision=vision, image=image["start_image"], crop="none")
        image["clip_vision_output"] = seen
    name, _ = graph.add("WanImageToVideo", positive=positive, negative=negative, vae=vae, **shape, **image)
    return [name, 0], [name, 1], [name, 2]


def add_samplers(run: ExportedRun, graph: Graph, start: Start) -> Link:
    """Adds the samplers; each but the last leaves the noise of its last time in the latents for the next one."""
    positive, negative, latent = start
    sampling = "ModelSamplingSD3" if run.is_wan else "ModelSamplingAuraFlow"
    models = [
        graph.add("UNETLoader", unet_name=f"{run.model}{noise}.safetensors", weight_dtype="default")
        for noise in ([f"-{name}" for name in NOISE] if len(run.networks) == 2 else [""])
    ]
    for i, expert in enumerate(run.experts):
        lora = graph.add(
            "LoraLoaderModelOnly", model=models[expert.network], lora_name=expert.file, strength_model=1.0
        )  # fmt: skip
        latent = graph.add(
            "KSamplerAdvanced", model=graph.add(sampling, model=lora, shift=run.config.plan.shift),
            positive=positive, negative=negative, latent_image=latent,
            add_noise="disable" if i else "enable", noise_seed=i, steps=run.plan.num_steps, cfg=1.0,
            sampler_name="lcm" if run.config.ablation.solver == "renoise" else "euler", scheduler=SCHEDULE,
            start_at_step=expert.steps[0], end_at_step=expert.steps[-1] + 1,
            return_with_leftover_noise="disable" if expert is run.experts[-1] else "enable",
        )  # fmt: skip
    return latent
