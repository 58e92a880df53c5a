"""ComfyUI's names of LoRA weights, and a workflow: one sampler an expert."""

import re
from typing import Any

import torch
from torch import Tensor

from phased_dmd.config.teacher import WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.export.subject import NOISE, Piece, Subject
from phased_dmd.export.weights import A, lora_tensors
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


def comfyui_tensors(subject: Subject, piece: Piece) -> dict[str, Tensor]:
    """The adapter by ComfyUI's names, with alpha = rank; a module that has none there is a UserError."""
    renamed = {}
    wan = isinstance(subject.teacher, WanTeacher)
    for name, tensor in lora_tensors(subject, piece).items():
        module, _, side = name.removeprefix("transformer.").partition(".lora_")
        key = wan_name(module) if wan else module
        if not re.fullmatch(WAN_MODULE if wan else QWEN_MODULE, key):
            raise UserError(f"teacher.lora_targets: ComfyUI has no name for {module}; export for diffusers")
        prefix = "diffusion_model." if wan else ""
        renamed[f"{prefix}{key}.lora_{'down' if side == A[6:] else 'up'}.weight"] = tensor
        if "blocks." in key:  # elsewhere diffusers' converter takes none, and without one every reader's scale is 1
            renamed[f"{prefix}{key}.alpha"] = torch.tensor(float(subject.config.generator.lora.rank))
    return renamed


def wan_name(module: str) -> str:
    """A diffusers module of Wan's transformer by its original name."""
    for pattern, original in WAN_NAMES:
        module = re.sub(pattern, original, module)
    return module


def comfyui_times(subject: Subject) -> tuple[list[float], float]:
    """The times ComfyUI's schedule picks, and the largest gap to the trained ones."""
    steps, shift = subject.plan.num_steps, subject.config.plan.shift
    times = [shift_time((TABLE - int(i * TABLE / steps)) / TABLE, shift) for i in range(steps)]
    return times, max(abs(a - b) for a, b in zip(times, subject.plan.times, strict=False))


class Graph(dict[str, dict[str, Any]]):
    """ComfyUI's API format, which its window opens too: nodes by number, [number, output] for a connection."""

    def add(self, kind: str, **inputs: Any) -> list[Any]:
        """A new node; returns the connection to its first output."""
        name = str(len(self) + 1)
        self[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


def workflow(subject: Subject) -> Graph:
    """A chain of samplers, one an expert, each on its own steps with its own LoRA."""
    graph, wan, frames = Graph(), isinstance(subject.teacher, WanTeacher), subject.teacher.sizes[0].num_frames
    files = ("umt5_xxl_fp8_e4m3fn_scaled", "wan") if wan else ("qwen_2.5_vl_7b_fp8_scaled", "qwen_image")
    clip = graph.add("CLIPLoader", clip_name=f"{files[0]}.safetensors", type=files[1])
    vae_name = "qwen_image_vae" if not wan else "wan2.2_vae" if expands(subject) else "wan_2.1_vae"
    vae = graph.add("VAELoader", vae_name=f"{vae_name}.safetensors")
    positive = graph.add("CLIPTextEncode", clip=clip, text="what to show")
    negative = graph.add("CLIPTextEncode", clip=clip, text="")  # not run at cfg 1
    latent = add_samplers(subject, graph, *add_start(subject, graph, vae, positive, negative))
    images = graph.add("VAEDecode", samples=latent, vae=vae)
    saved = {"images": images, "filename_prefix": subject.model}
    if frames > 1:
        graph.add("SaveAnimatedWEBP", **saved, fps=16.0, lossless=False, quality=90, method="default")
    else:
        graph.add("SaveImage", **saved)
    return graph


def expands(subject: Subject) -> bool:
    """Whether it is TI2V-5B, which has a VAE of its own and takes the first frame as a latent."""
    return bool(subject.source.index.get("expand_timesteps"))


def add_start(
    subject: Subject, graph: Graph, vae: list[Any], positive: list[Any], negative: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """The empty latents, and the conditions with what a first frame adds to them: positive, negative, latent."""
    size = subject.teacher.sizes[0]
    shape: dict[str, Any] = {"width": size.width, "height": size.height, "batch_size": 1}
    image = {"start_image": graph.add("LoadImage", image="first-frame.png")} if subject.task == "i2v" else {}
    if not isinstance(subject.teacher, WanTeacher):
        return positive, negative, graph.add("EmptySD3LatentImage", **shape)
    shape["length"] = size.num_frames
    if expands(subject):
        return positive, negative, graph.add("Wan22ImageToVideoLatent", vae=vae, **shape, **image)
    if not image:
        return positive, negative, graph.add("EmptyHunyuanLatentVideo", **shape)
    if subject.source.has("image_encoder"):
        vision = graph.add("CLIPVisionLoader", clip_name="clip_vision_h.safetensors")
        seen = graph.add("CLIPVisionEncode", clip_vision=vision, image=image["start_image"], crop="none")
        image["clip_vision_output"] = seen
    name, _ = graph.add("WanImageToVideo", positive=positive, negative=negative, vae=vae, **shape, **image)
    return [name, 0], [name, 1], [name, 2]


def add_samplers(
    subject: Subject, graph: Graph, positive: list[Any], negative: list[Any], latent: list[Any]
) -> list[Any]:
    """From empty latents to the sample: all but the last sampler leave the noise of their end in it."""
    sampling = "ModelSamplingSD3" if isinstance(subject.teacher, WanTeacher) else "ModelSamplingAuraFlow"
    models = [
        graph.add("UNETLoader", unet_name=f"{subject.model}{noise}.safetensors", weight_dtype="default")
        for noise in ([f"-{name}" for name in NOISE] if len(subject.networks) == 2 else [""])
    ]
    for i, piece in enumerate(subject.pieces):
        lora = graph.add(
            "LoraLoaderModelOnly", model=models[piece.network], lora_name=piece.file, strength_model=1.0
        )  # fmt: skip
        latent = graph.add(
            "KSamplerAdvanced", model=graph.add(sampling, model=lora, shift=subject.config.plan.shift),
            positive=positive, negative=negative, latent_image=latent,
            add_noise="disable" if i else "enable", noise_seed=i, steps=subject.plan.num_steps, cfg=1.0,
            sampler_name="lcm" if subject.config.ablation.solver == "renoise" else "euler", scheduler=SCHEDULE,
            start_at_step=piece.steps[0], end_at_step=piece.steps[-1] + 1,
            return_with_leftover_noise="disable" if piece is subject.pieces[-1] else "enable",
        )  # fmt: skip
    return latent
