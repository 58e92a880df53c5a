"""A workflow for ComfyUI has one sampler an expert, each on its own times with its own LoRA."""

import json
import re
from typing import Any

from phased_dmd.export.exported_run import ExportedRun
from phased_dmd.models.adapter import Comfy

Link = list[Any]  # [node, output], as ComfyUI writes a connection
Start = tuple[Link, Link, Link]  # positive condition, negative condition, latents
MODEL_LORA = "LoraLoaderModelOnly"


class Graph(dict[str, dict[str, Any]]):
    """A workflow holds nodes by number in ComfyUI's API format, which its window opens too."""

    def add(self, kind: str, **inputs: Any) -> Link:
        """Adds a node and returns the link to its first output."""
        name = str(len(self) + 1)
        self[name] = {"class_type": kind, "inputs": inputs}
        return [name, 0]


def obstacle(run: ExportedRun) -> str | None:
    """Returns why ComfyUI cannot run the experts, or None if it can."""
    if run.fused:
        return "whole transformers are for diffusers"
    if (comfy := run.adapter.comfy) is None:
        return f"no workflow with a {run.pipeline}'s networks was put together yet"
    known, config = comfy.config, run.source.config(run.adapter.transformer, "transformer")
    if odd := next((name for name in known if json.loads(json.dumps(config[name])) != known[name]), None):
        return f"it cannot load this base, whose transformer has {odd} {config[odd]}, where it knows {known[odd]}"
    if comfy.tokens and run.teacher.max_tokens != comfy.tokens:
        return f"it pads text to {comfy.tokens} tokens, and these experts were distilled for {run.teacher.max_tokens}"
    return None


def base_files(run: ExportedRun) -> list[str]:
    """Returns the base's files, one a network: the official ones where the base is known, else its own name."""
    names = run.adapter.comfy.names if run.adapter.comfy else ()
    stem = next((name for pattern, name in names if re.fullmatch(pattern, run.model)), None)
    stem = stem or run.model + ("_{}" if len(run.networks) == 2 else "")
    return [f"{stem.format(noise)}.safetensors" for noise in run.noises]


def workflow(run: ExportedRun) -> Graph:
    """Returns the nodes from the base's files to the picture or clip."""
    graph, comfy = Graph(), known(run)
    clip = graph.add("CLIPLoader", clip_name=f"{comfy.clip[0]}.safetensors", type=comfy.clip[1])
    vae_name = "wan2.2_vae" if is_ti2v_5b(run) else comfy.vae
    vae = graph.add("VAELoader", vae_name=f"{vae_name}.safetensors")
    positive = graph.add("CLIPTextEncode", clip=clip, text="what to show")
    negative = graph.add("CLIPTextEncode", clip=clip, text="")  # not run at cfg 1
    latent = add_samplers(run, graph, add_start(run, graph, vae, positive, negative))
    images = graph.add("VAEDecode", samples=latent, vae=vae)
    if run.teacher.sizes[0].num_frames > 1:
        video = graph.add("CreateVideo", images=images, fps=16.0)
        graph.add("SaveVideo", video=video, filename_prefix=run.name, format="auto", codec="auto")
    else:
        graph.add("SaveImage", images=images, filename_prefix=run.name)
    return graph


def known(run: ExportedRun) -> Comfy:
    """Returns what ComfyUI has built in of a run's base, where there is no obstacle."""
    assert run.adapter.comfy is not None
    return run.adapter.comfy


def is_ti2v_5b(run: ExportedRun) -> bool:
    """Tells TI2V-5B, which has a VAE of its own and takes the first frame as a latent, from the other models."""
    return bool(run.source.index.get("expand_timesteps"))


def add_start(run: ExportedRun, graph: Graph, vae: Link, positive: Link, negative: Link) -> Start:
    """Adds the empty latents, and what a first frame changes of the conditions."""
    size = run.teacher.sizes[0]
    shape: dict[str, Any] = {"width": size.width, "height": size.height, "batch_size": 1}
    image = {"start_image": graph.add("LoadImage", image="first-frame.png")} if run.task == "i2v" else {}
    if run.adapter.stock.frames:
        shape["length"] = size.num_frames
    if is_ti2v_5b(run):
        return positive, negative, graph.add("Wan22ImageToVideoLatent", vae=vae, **shape, **image)
    if not image:
        return positive, negative, graph.add(known(run).latent, **shape)
    if run.source.has("image_encoder"):
        vision = graph.add("CLIPVisionLoader", clip_name="clip_vision_h.safetensors")
        seen = graph.add("CLIPVisionEncode", clip_vision=vision, image=image["start_image"], crop="none")
        image["clip_vision_output"] = seen
    name, _ = graph.add("WanImageToVideo", positive=positive, negative=negative, vae=vae, **shape, **image)
    return [name, 0], [name, 1], [name, 2]


def add_samplers(run: ExportedRun, graph: Graph, start: Start) -> Link:
    """Adds the samplers; each but the last leaves the noise of its last time in the latents for the next one.

    The latents between two samplers are divided by 1 - sigma, a clean first frame among them too, where it is a part of
    the latents: it is put back before the next one takes it for clean.
    """
    positive, negative, latent = start
    frame = graph.add("LatentCut", samples=latent, dim="t", index=0, amount=1) if keeps_frame(run) else None
    sampling = known(run).sampling
    models = [graph.add("UNETLoader", unet_name=name, weight_dtype="default") for name in base_files(run)]
    sampler = graph.add("KSamplerSelect", sampler_name="lcm" if run.stochastic else "euler")
    for i, expert in enumerate(run.experts):
        model = graph.add(MODEL_LORA, model=models[expert.network], lora_name=expert.file, strength_model=1.0)
        times = run.plan.times[expert.steps[0] : expert.steps[-1] + 2]
        if i and frame:
            latent = graph.add("ReplaceVideoLatentFrames", destination=latent, source=frame, index=0)
        latent = graph.add(
            "SamplerCustom", model=graph.add(sampling, model=model, shift=run.config.plan.shift), add_noise=not i,
            noise_seed=i, cfg=1.0, positive=positive, negative=negative, sampler=sampler,
            sigmas=graph.add("ManualSigmas", sigmas=", ".join(f"{time:.9f}" for time in times)), latent_image=latent,
        )  # fmt: skip
    return latent


def keeps_frame(run: ExportedRun) -> bool:
    """Says whether a first frame is a part of the latents, and there is more than one sampler for it to pass."""
    return is_ti2v_5b(run) and run.task == "i2v" and len(run.experts) > 1
