"""Tiny random pipelines of the real diffusers classes, written to folders as a hub repository would hold them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from phased_dmd.config.teacher import QwenImageTeacher, Size, WanTeacher
from phased_dmd.models.source import quiet

CAPTIONS = ("a red fox in the snow", "two grey cats asleep", "a boat at night", "blurry, low quality")
TEMPLATE = (
    "system user assistant\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
TEXT_DIM, VISION_DIM, QWEN_TEXT_DIM = 16, 8, 24


def build(name: str, folder: Path) -> Path:
    """One of NAMES, saved into the folder; the same bytes every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        pipeline = BUILDERS[name]()
    with quiet():
        pipeline.save_pretrained(folder)
    return folder


def teacher(name: str, folder: Path) -> WanTeacher | QwenImageTeacher:
    """The teacher section of a run on that folder: guided, at the smallest sizes that are not square."""
    path, size = str(folder), Size(num_frames=5, height=32, width=48)
    still = size.model_copy(update={"num_frames": 1})
    common = {"path": path, "negative_prompt": CAPTIONS[-1], "base_steps": 2}
    if name == "qwen_image":
        return QwenImageTeacher(sizes=(still,), guidance=(3.0,), max_tokens=24, **common)
    if name == "wan21_t2v":
        return WanTeacher(sizes=(still, size), guidance=(3.0,), max_tokens=24, **common)
    if name == "ti2v_5b":
        return WanTeacher(sizes=(Size(num_frames=5, height=32, width=64),), guidance=(3.0,), max_tokens=24, **common)
    guidance = (3.0, 2.0) if name.startswith("wan22") else (3.0,)
    return WanTeacher(sizes=(size,), guidance=guidance, max_tokens=24, **common)


def frozen(network: nn.Module) -> Any:
    """As `from_pretrained` gives it: without dropout."""
    return network.eval().requires_grad_(False)


def wan_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram as UMT5's: the captions' words, and single letters for all others."""
    words = [(f"▁{word}", -1.0) for word in sorted({word for caption in CAPTIONS for word in caption.split()})]
    letters = [(letter, -5.0) for letter in "▁abcdefghijklmnopqrstuvwxyz,.0123456789"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *words, *letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def wan_text_encoder() -> UMT5EncoderModel:
    return frozen(
        UMT5EncoderModel(UMT5Config(vocab_size=128, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    )


def wan_vae() -> AutoencoderKLWan:
    return frozen(
        AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    )


def wan22_vae() -> AutoencoderKLWan:
    """Of TI2V-5B: residual, 48 channels, strides of 4 frames and 16 pixels."""
    statistics = {
        "latents_mean": torch.linspace(-0.5, 0.5, 48).tolist(),
        "latents_std": torch.linspace(0.5, 1.5, 48).tolist(),
    }
    return frozen(
        AutoencoderKLWan(
            base_dim=4, z_dim=48, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, **statistics,
        )
    )  # fmt: skip


def wan_transformer(channels: int = 16, first_frame: int = 0, **options: Any) -> WanTransformer3DModel:
    """channels: of the latents. first_frame: further ones that tell of a first frame."""
    return frozen(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=channels + first_frame,
            out_channels=channels, text_dim=TEXT_DIM, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=32, **options,
        )
    )  # fmt: skip


def wan_scheduler(shift: float = 5.0) -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, num_train_timesteps=1000
    )


def wan_parts() -> dict[str, Any]:
    return {
        "tokenizer": wan_tokenizer(), "text_encoder": wan_text_encoder(), "vae": wan_vae(),
        "scheduler": wan_scheduler(),
    }  # fmt: skip


def wan21_t2v() -> WanPipeline:
    return WanPipeline(**wan_parts(), transformer=wan_transformer())


def wan22_t2v() -> WanPipeline:
    return WanPipeline(
        **wan_parts(), transformer=wan_transformer(), transformer_2=wan_transformer(), boundary_ratio=0.875
    )


def wan21_i2v() -> WanImageToVideoPipeline:
    vision = CLIPVisionConfig(
        hidden_size=VISION_DIM, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        patch_size=16,
    )  # fmt: skip
    return WanImageToVideoPipeline(
        **wan_parts(), image_encoder=frozen(CLIPVisionModel(vision)),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformer=wan_transformer(first_frame=20, image_dim=VISION_DIM, added_kv_proj_dim=24),
    )  # fmt: skip


def wan22_i2v() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        **wan_parts(), transformer=wan_transformer(first_frame=20), transformer_2=wan_transformer(first_frame=20),
        boundary_ratio=0.9,
    )  # fmt: skip


def ti2v_5b() -> WanPipeline:
    return WanPipeline(**wan_parts() | {"vae": wan22_vae()}, transformer=wan_transformer(48), expand_timesteps=True)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE, as Qwen's, that knows the words of the captions and of the pipeline's own template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([*CAPTIONS, TEMPLATE], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], unk_token=special[0],
        pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:2],
    )  # fmt: skip


def qwen_text_encoder() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": 768, "hidden_size": QWEN_TEXT_DIM, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 2048,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": QWEN_TEXT_DIM,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    return frozen(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)))


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(
        tokenizer=qwen_tokenizer(), text_encoder=qwen_text_encoder(),
        vae=frozen(AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        transformer=frozen(
            QwenImageTransformer2DModel(
                num_layers=2, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=QWEN_TEXT_DIM,
                axes_dims_rope=(4, 4, 4),
            )
        ),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan21_t2v": wan21_t2v, "wan22_t2v": wan22_t2v, "wan21_i2v": wan21_i2v, "wan22_i2v": wan22_i2v,
    "ti2v_5b": ti2v_5b, "qwen_image": qwen_image,
}  # fmt: skip
NAMES: Sequence[str] = tuple(BUILDERS)
