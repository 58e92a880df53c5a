"""Reads Wan 2.1 and 2.2, text- and image-to-video, of one transformer or two, from a diffusers folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from phased_dmd.config.teacher import Size, WanTeacher
from phased_dmd.errors import UserError
from phased_dmd.media import read_picture
from phased_dmd.models.adapter import Adapter, Comfy, Shape, Stock, TextEncoder
from phased_dmd.models.pipeline import (
    PipelineCodec,
    PipelineModel,
    check_pipeline,
    check_sizes,
    decode_clip,
    fitting_sizes,
)
from phased_dmd.models.protocol import Condition
from phased_dmd.models.source import ASSETS, Source

NANO, SCENES = ASSETS / "nano", ASSETS / "scenes"
ORIGINAL = (  # names of Wan's layers in its own program, from those in diffusers
    (r"^blocks\.(\d+)\.attn1\.", r"blocks.\1.self_attn."),
    (r"^blocks\.(\d+)\.attn2\.", r"blocks.\1.cross_attn."),
    (r"_attn\.to_out\.0$", r"_attn.o"),
    (r"_attn\.to_([qkv])$", r"_attn.\1"),
    (r"_attn\.add_([kv])_proj$", r"_attn.\1_img"),
    (r"_attn\.norm_added_k$", r"_attn.norm_k_img"),
    (r"^blocks\.(\d+)\.ffn\.net\.0\.proj$", r"blocks.\1.ffn.0"),
    (r"^blocks\.(\d+)\.ffn\.net\.2$", r"blocks.\1.ffn.2"),
    (r"^blocks\.(\d+)\.norm2$", r"blocks.\1.norm3"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_1$", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2$", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj$", r"time_projection.1"),
    (r"^condition_embedder\.image_embedder\.norm1$", r"img_emb.proj.0"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj$", r"img_emb.proj.1"),
    (r"^condition_embedder\.image_embedder\.ff\.net\.2$", r"img_emb.proj.3"),
    (r"^condition_embedder\.image_embedder\.norm2$", r"img_emb.proj.4"),
    (r"^proj_out$", r"head.head"),
)


class WanModel(PipelineModel):
    """Is the `VelocityModel` of Wan's transformers.

    Beside the text, image-to-video models are told the first frame: as more channels (`image`, Wan2.1 and 2.2), as
    features (`image_features`, Wan2.1), or, where timesteps are expanded (TI2V-5B), as the first latent frame itself
    (`first_frame`), whose tokens are at t = 0 and whose x0 is therefore known.
    """

    def __init__(self, config: WanTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        self.max_tokens, self.expands = config.max_tokens, bool(source.index.get("expand_timesteps"))
        vae = source.config(AutoencoderKLWan, "vae")
        space, time = vae.get("scale_factor_spatial", 8), vae.get("scale_factor_temporal", 4)
        switch = source.index.get("boundary_ratio")  # without one, the pipeline runs its first transformer alone
        parts = ["transformer"] if switch is None else ["transformer", "transformer_2"]
        shape = source.config(WanTransformer3DModel, parts[0])
        self.patch = tuple(shape["patch_size"])
        height, width = space * self.patch[1], space * self.patch[2]
        positions = shape["rope_max_seq_len"]  # tokens a side
        most = (positions * self.patch[0] - 1) * time + 1, positions * height, positions * width
        check_sizes(config.sizes, (time, height, width), most)
        if takes_first_frame(config, source) != (shape["in_channels"] > vae["z_dim"]) and not self.expands:
            raise UserError(
                f"teacher.first_frame: {config.path} has {shape['in_channels']} input channels, "
                f"{vae['z_dim']} of them latents"
            )
        shapes = [
            (vae["z_dim"], (size.num_frames - 1) // time + 1, size.height // space, size.width // space)
            for size in config.sizes
        ]
        switches = [] if switch is None else [switch]
        super().__init__(config, source, device, WanTransformer3DModel, config.lora_targets, parts, shapes, switches)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        assert isinstance(network, WanTransformer3DModel)
        return list(network.blocks)

    def batch(self, rows: Sequence[Condition]) -> Condition:
        """Pads the text with zeros, unmasked, to its full length, as Wan does."""
        text = rows[0]["text"].new_zeros(len(rows), self.max_tokens, rows[0]["text"].shape[1])
        for i, row in enumerate(rows):
            text[i, : len(row["text"])] = row["text"]
        images = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "text"}
        latents = ("image", "first_frame")  # as exact as x
        return {
            name: tensor.to(self.device, torch.float32 if name in latents else self.dtype)
            for name, tensor in ({"text": text} | images).items()
        }

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        first, inputs = condition.get("first_frame"), x
        timestep = (t * 1000).float()
        if self.expands:
            tokens = [size // patch for size, patch in zip(x.shape[2:], self.patch, strict=True)]
            timestep = timestep[:, None, None].repeat(1, tokens[0], tokens[1] * tokens[2])
            if first is not None:
                inputs = torch.cat([first.to(x.dtype), x[:, :, 1:]], dim=2)
                timestep[:, 0] = 0
            timestep = timestep.flatten(1)
        if "image" in condition:
            inputs = torch.cat([inputs, condition["image"].to(x.dtype)], dim=1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            velocity = network(
                inputs.to(self.dtype), timestep, condition["text"], condition.get("image_features"), return_dict=False
            )[0].to(x.dtype)
        if first is None:
            return velocity
        known = (x[:, :, :1] - first) / t.reshape(-1, 1, 1, 1, 1)
        return torch.cat([known.to(velocity.dtype), velocity[:, :, 1:]], dim=2)


class WanCodec(PipelineCodec):
    """Encodes as the stock pipeline of Wan does, and decodes with its video VAE."""

    def __init__(self, config: WanTeacher, device: torch.device, source: Source | None = None) -> None:
        source = source or Source(config)
        check_pipeline(source, config.pipelines)
        self.sizes, self.takes_images = config.sizes, takes_first_frame(config, source)
        parts = ["tokenizer", "text_encoder"]
        if self.takes_images:
            parts += [name for name in ("image_encoder", "image_processor", "vae") if source.has(name)]
        sizes = [str(size) for size in config.sizes] if self.takes_images else []
        super().__init__(config, source, device, AutoencoderKLWan, parts, sizes)
        self.tokenizer = source.load(AutoTokenizer, "tokenizer")
        self._encoder: Any = None

    @property
    def encoder(self) -> WanImageToVideoPipeline | WanPipeline:
        """Returns the stock pipeline without its transformers, loaded when it is first needed."""
        if self._encoder is None:
            source = self.source
            parts: dict[str, Any] = {
                "tokenizer": self.tokenizer, "vae": self.vae, "transformer": None, "scheduler": None,
                "text_encoder": source.load(UMT5EncoderModel, "text_encoder", dtype=self.text_dtype).to(self.device),
                "expand_timesteps": bool(source.index.get("expand_timesteps")),
            }  # fmt: skip
            if self.takes_images and source.has("image_encoder"):
                parts["image_encoder"] = source.load(CLIPVisionModel, "image_encoder", dtype=torch.float32)
                parts["image_encoder"] = parts["image_encoder"].to(self.device)
                parts["image_processor"] = source.load(CLIPImageProcessor, "image_processor")
            self._encoder = (WanImageToVideoPipeline if self.takes_images else WanPipeline)(**parts)
        return self._encoder

    def free(self) -> None:
        self._encoder = None

    def lengths(self, prompts: Sequence[str]) -> list[int]:
        tokens = self.tokenizer([prompt_clean(prompt) for prompt in prompts]).input_ids
        return [len(ids) for ids in tokens]

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Condition]:
        """Returns text [tokens, d] for each prompt, without the zeros that the pipeline pads it with."""
        text, _ = self.encoder.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device
        )
        lengths = text.ne(0).any(2).cpu() * torch.arange(1, text.shape[1] + 1)
        return [{"text": row[: int(length)].cpu().clone()} for row, length in zip(text, lengths.amax(1), strict=True)]

    def fits(self, image: Path) -> list[int]:
        return fitting_sizes(image, self.sizes)

    @torch.no_grad()
    def encode_picture(self, prompt: str, picture: Path, bucket: int) -> Condition:
        """Returns image [4 + z, f, h, w] and image_features [tokens, d], or first_frame [z, 1, h, w]."""
        pipeline, size = self.encoder, self.sizes[bucket]
        assert isinstance(pipeline, WanImageToVideoPipeline)
        return first_frame_condition(pipeline, read_picture(picture), size, self.device)

    def decode(self, latents: Tensor) -> Tensor:
        return decode_clip(self.vae, latents)


def first_frame_condition(
    pipeline: WanImageToVideoPipeline, picture: Image.Image, size: Size, device: torch.device
) -> Condition:
    """Encodes a first frame as the stock pipeline does, to the CPU; see `WanModel`."""
    pixels = pipeline.video_processor.preprocess(picture, height=size.height, width=size.width)
    prepared = pipeline.prepare_latents(
        pixels.to(device, torch.float32), 1, height=size.height, width=size.width, num_frames=size.num_frames,
        dtype=torch.float32, device=device, latents=torch.zeros(1),
    )  # fmt: skip
    if pipeline.config["expand_timesteps"]:
        return {"first_frame": prepared[1][0].cpu()}
    condition = {"image": prepared[1][0].cpu()}
    if pipeline.image_encoder is not None:
        condition["image_features"] = pipeline.encode_image(picture, device)[0].cpu()
    return condition


def takes_first_frame(config: WanTeacher, source: Source) -> bool:
    """Says whether the teacher is given a first frame: as its config says, or else the class of its pipeline."""
    return source.index["_class_name"] == config.pipelines[1] if config.first_frame is None else config.first_frame


def condition(config: Mapping[str, Any], tokens: int, shape: Shape) -> dict[str, Shape]:
    """Returns the shapes of a condition, see `Adapter`: of a first frame and its mask too, see `WanModel`."""
    shapes: dict[str, Shape] = {"text": (tokens, config["text_dim"])}
    if extra := config["in_channels"] - config["out_channels"]:
        shapes["image"] = (extra, *shape[1:])
        if config["image_dim"] is not None:
            shapes["image_features"] = (257, config["image_dim"])  # CLIP's 16 x 16 patches and its class token
    return shapes


def scheduler(shift: float, steps: int, stochastic: bool) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    """Returns the scheduler that is told no times: of order 1 and without corrector, UniPC is Euler, and only it starts
    at 1 and shifts once. Only the other one adds noise anew.
    """
    if stochastic:
        return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, solver_order=1,
        disable_corrector=list(range(steps)),
    )  # fmt: skip


def solver(source: Source) -> UniPCMultistepScheduler | None:
    """Returns the folder's own scheduler if it is UniPC of a higher order than Euler's method, with its own shift."""
    if source.index.get("scheduler", (None, None))[1] != UniPCMultistepScheduler.__name__:
        return None
    scheduler = source.load(UniPCMultistepScheduler, "scheduler")
    return scheduler if scheduler.config["solver_order"] > 1 else None


def same(latents: Tensor) -> Tensor:
    """Returns latents as they are: the stock pipeline's are ours."""
    return latents


ADAPTER = Adapter(
    WanModel, WanCodec, WanTransformer3DModel, AutoencoderKLWan, WanLoraLoaderMixin,
    TextEncoder(UMT5EncoderModel, options={}), condition, padded=True,
    stock=Stock(
        ("guidance_scale", 1.0), scheduler, same, same, lambda x, *_: x, lambda _, x, *__: x, passes_sigmas=False,
        frames=True, cleans=True,
    ),
    comfy=Comfy(
        {"patch_size": [1, 2, 2], "attention_head_dim": 128, "text_dim": 4096, "freq_dim": 256},
        (
            (r"wan2\.2_t2v_a14b", "wan2.2_t2v_{}_14B_fp8_scaled"),
            (r"wan2\.2_i2v_a14b", "wan2.2_i2v_{}_14B_fp8_scaled"),
            (r"wan2\.2_ti2v_5b", "wan2.2_ti2v_5B_fp16"),
            (r"wan2\.1_t2v_14b", "wan2.1_t2v_14B_fp8_scaled"),
            (r"wan2\.1_t2v_1\.3b", "wan2.1_t2v_1.3B_fp16"),
        ),
        ("umt5_xxl_fp8_e4m3fn_scaled", "wan"), "wan_2.1_vae", "EmptyHunyuanLatentVideo", "ModelSamplingSD3",
        tokens=512,  # at least; the network attends to the padding
    ),
    takes_images=takes_first_frame, places=2, original=ORIGINAL, solver=solver,
    public=r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"
    r"|img_emb\.proj\.[13]|(time|text)_embedding\.[02]|time_projection\.1|head\.head",
)  # fmt: skip
