"""Tiny random pipelines of the real diffusers classes, written to folders as a hub repository would hold them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from phased_dmd.config.teacher import (
    Flux2KleinTeacher,
    Krea2Teacher,
    Lumina2Teacher,
    PipelineTeacher,
    QwenImage21Teacher,
    QwenImageEditTeacher,
    QwenImageTeacher,
    Size,
    WanTeacher,
    ZImageTeacher,
)
from phased_dmd.models.qwen_image_21 import TextProcessor
from phased_dmd.models.qwen_image_edit import PictureProcessor
from phased_dmd.models.source import quiet

CAPTIONS = ("a red fox in the snow", "two grey cats asleep", "a boat at night", "blurry, low quality")
TEMPLATE = (
    "system user assistant\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
CHAT = (  # Qwen3's template, of a chat without a system's message
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
EDIT = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate. system user assistant "
    "Picture 1: "
)
LUMINA = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> "
)
CHAT_PARTS = (  # Qwen3-VL's, of messages in parts
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content[0].text }}<|im_end|>\n{% endfor %}"
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


def teacher(name: str, folder: Path) -> PipelineTeacher:
    """The teacher section of a run on that folder: guided, at the smallest sizes that are not square."""
    path, size = str(folder), Size(num_frames=5, height=32, width=48)
    still = size.model_copy(update={"num_frames": 1})
    common: dict[str, Any] = {"path": path, "negative_prompt": CAPTIONS[-1], "base_steps": 2}
    if kind := PICTURES.get(name):
        own = {"negative_prompt": ""} if kind is Flux2KleinTeacher else {}
        if kind is QwenImage21Teacher:
            still = still.model_copy(update={"width": 64})
        if kind is QwenImageEditTeacher:
            still = still.model_copy(update={"height": 64, "width": 96})
        tokens = 64 if kind is Lumina2Teacher else 24  # behind the system's
        return kind(sizes=(still,), guidance=(3.0,), max_tokens=tokens, **common | own)
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


def qwen_tokenizer(*more: str, template: str = TEMPLATE) -> Qwen2Tokenizer:
    """Byte-level BPE, as Qwen's, that knows the words of the captions and of the pipeline's own template.

    more: words that are tokens of their own.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=768, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([*CAPTIONS, template], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], unk_token=special[0],
        pad_token=special[0], eos_token=special[2], additional_special_tokens=[special[1], *more],
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


def qwen_image_vae() -> AutoencoderKLQwenImage:
    return frozen(AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1))


def qwen_image() -> QwenImagePipeline:
    return QwenImagePipeline(
        tokenizer=qwen_tokenizer(), text_encoder=qwen_text_encoder(),
        vae=qwen_image_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        transformer=frozen(
            QwenImageTransformer2DModel(
                num_layers=2, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=QWEN_TEXT_DIM,
                axes_dims_rope=(4, 4, 4),
            )
        ),
    )  # fmt: skip


class Qwen2VLProcessor(PictureProcessor):
    """The two thirds that need no torchvision, saved under the name of the whole."""

    __module__ = "transformers.models.qwen2_vl.processing_qwen2_vl"


def qwen_image_edit() -> QwenImageEditPlusPipeline:
    """With a VAE of 16 pixels a latent and few convolutions, since the pipeline encodes pictures of a megapixel."""
    tokenizer = qwen_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", template=EDIT)
    encoder = qwen_text_encoder()
    encoder.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    transformer = qwen_image().transformer
    transformer.txt_in.weight.mul_(10)  # else the text, of random weights, says little beside the picture
    transformer.proj_out.weight.mul_(3)
    return QwenImageEditPlusPipeline(
        tokenizer=tokenizer, processor=Qwen2VLProcessor(Qwen2VLImageProcessorPil(), tokenizer), text_encoder=encoder,
        vae=frozen(
            AutoencoderKLQwenImage(
                base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=0,
                temperal_downsample=[False, True, True, True],
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9),
        transformer=transformer,
    )  # fmt: skip


def chat_tokenizer() -> Qwen2Tokenizer:
    tokenizer = qwen_tokenizer("<think>", "</think>")
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=768, hidden_size=TEXT_DIM, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=False, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def picture_vae() -> AutoencoderKL:
    return frozen(
        AutoencoderKL(
            block_out_channels=(4, 4, 4, 4), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, scaling_factor=0.36, shift_factor=0.12,
            use_quant_conv=False, use_post_quant_conv=False,
        )
    )  # fmt: skip


def z_image() -> ZImagePipeline:
    return ZImagePipeline(
        tokenizer=chat_tokenizer(), text_encoder=frozen(Qwen3Model(qwen3(layers=2))),
        vae=picture_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer=frozen(
            ZImageTransformer2DModel(
                dim=24, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT_DIM,
                axes_dims=[4, 4, 4], axes_lens=[128, 64, 64],
            )
        ),
    )  # fmt: skip


def flux2_klein() -> Flux2KleinPipeline:
    vae = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, latent_channels=8
    )  # fmt: skip
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = Flux2Transformer2DModel(
        in_channels=32, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * TEXT_DIM, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    with torch.no_grad():
        for modulation in (
            transformer.double_stream_modulation_img, transformer.double_stream_modulation_txt,
            transformer.single_stream_modulation,
        ):  # fmt: skip
            modulation.linear.weight.mul_(10)  # else its gates, of random weights, hardly open
    return Flux2KleinPipeline(
        tokenizer=chat_tokenizer(), text_encoder=frozen(Qwen3ForCausalLM(qwen3(layers=28))), vae=frozen(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        transformer=frozen(transformer),
    )  # fmt: skip


class Qwen3VLProcessor(TextProcessor):
    """The half that needs no torchvision, saved under the name of the whole."""

    __module__ = "transformers.models.qwen3_vl.processing_qwen3_vl"


def qwen3_vl() -> Qwen3VLConfig:
    text = {
        "vocab_size": 768, "hidden_size": TEXT_DIM, "intermediate_size": 16, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_DIM,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=5, video_token_id=6)


def qwen_image_21() -> QwenImage21Pipeline:
    processor = Qwen3VLProcessor(qwen_tokenizer("<|image_pad|>", "<|video_pad|>"), chat_template=CHAT_PARTS)
    transformer = QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=12, num_attention_heads=2,
        context_in_dim=TEXT_DIM, axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    with torch.no_grad():
        transformer.modulation[1].weight.mul_(10)  # else its gates, of random weights, hardly open
    return QwenImage21Pipeline(
        processor=processor, text_encoder=frozen(Qwen3VLForConditionalGeneration(qwen3_vl())),
        vae=frozen(
            AutoencoderKLQwenImage21(
                base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
                latents_mean=torch.linspace(-0.5, 0.5, 8).tolist(), latents_std=torch.linspace(0.5, 1.5, 8).tolist(),
            )
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02
        ),
        transformer=frozen(transformer),
    )  # fmt: skip


def krea_2() -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        num_layers=2, attention_head_dim=12, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
        timestep_embed_dim=32, text_hidden_dim=TEXT_DIM, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 4),
    )  # fmt: skip
    return Krea2Pipeline(
        tokenizer=qwen_tokenizer(), text_encoder=frozen(Qwen3VLModel(qwen3_vl())), vae=qwen_image_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, max_image_seq_len=6400, max_shift=1.15
        ),
        transformer=frozen(transformer), text_encoder_select_layers=(1, 2, 4),
    )  # fmt: skip


def lumina_2() -> Lumina2Pipeline:
    encoder = Gemma2Config(
        vocab_size=768, hidden_size=TEXT_DIM, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=0, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Lumina2Pipeline(
        tokenizer=qwen_tokenizer(template=LUMINA), text_encoder=frozen(Gemma2Model(encoder)), vae=picture_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        transformer=frozen(
            Lumina2Transformer2DModel(
                hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
                multiple_of=8, axes_dim_rope=(4, 4, 4), cap_feat_dim=TEXT_DIM,
            )
        ),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {
    "wan21_t2v": wan21_t2v, "wan22_t2v": wan22_t2v, "wan21_i2v": wan21_i2v, "wan22_i2v": wan22_i2v,
    "ti2v_5b": ti2v_5b, "qwen_image": qwen_image, "z_image": z_image, "flux2_klein": flux2_klein,
    "qwen_image_edit": qwen_image_edit, "qwen_image_21": qwen_image_21, "krea_2": krea_2, "lumina_2": lumina_2,
}  # fmt: skip
PICTURES = {
    "qwen_image": QwenImageTeacher, "z_image": ZImageTeacher, "flux2_klein": Flux2KleinTeacher,
    "qwen_image_edit": QwenImageEditTeacher, "qwen_image_21": QwenImage21Teacher, "krea_2": Krea2Teacher,
    "lumina_2": Lumina2Teacher,
}  # fmt: skip
NAMES: Sequence[str] = tuple(BUILDERS)


def guided(section: PipelineTeacher) -> dict[str, Any]:
    """How a stock pipeline is asked for a section's guidance, whose g is w + 1 where it has cond + w (cond - uncond).

    FLUX.2 klein's takes no negative prompt: its own is the empty one.
    """
    g, negative = section.guidance, {"negative_prompt": [section.negative_prompt] * 2}
    match section:
        case QwenImageTeacher() | QwenImage21Teacher():
            return {"true_cfg_scale": g[0]} | negative
        case Krea2Teacher():
            return {"guidance_scale": g[0] - 1} | negative
        case ZImageTeacher():
            return {"guidance_scale": g[0] - 1, "cfg_normalization": section.norm_limit} | negative
        case Lumina2Teacher():
            return {"guidance_scale": g[0]} | negative
        case Flux2KleinTeacher():
            return {"guidance_scale": g[0]}
    return {"guidance_scale": g[0]} | ({"guidance_scale_2": g[1]} if len(g) == 2 else {}) | negative


def direct(
    stock: Any, x: Tensor, t: Tensor, prompts: Sequence[str], tokens: int, picture: Image.Image
) -> Tensor:  # fmt: skip
    """The velocity that a stock picture pipeline's network predicts at x [b, c, 1, h, w], t [b], by its own means."""
    network, (b, c, _, h, w) = stock.transformer, x.shape
    match stock:
        case QwenImagePipeline():
            text, mask = stock.encode_prompt(list(prompts), max_sequence_length=tokens)
            packed = stock._pack_latents(x, b, c, h, w)
            velocity = network(packed, text, mask, t, [[(1, h // 2, w // 2)]] * b).sample
            return stock._unpack_latents(velocity, 8 * h, 8 * w, 8)
        case ZImagePipeline():
            texts, _ = stock.encode_prompt(list(prompts), None, False, max_sequence_length=tokens)
            return -torch.stack(network(list(x.unbind(0)), (1000 - 1000 * t) / 1000, texts).sample)
        case Flux2KleinPipeline():
            text, text_ids = stock.encode_prompt(list(prompts), max_sequence_length=tokens)
            packed, ids = stock.prepare_latents(b, c // 4, 16 * h, 16 * w, x.dtype, x.device, None, x[:, :, 0])
            velocity = network(packed, text, t, ids, text_ids).sample
            return stock._unpack_latents_with_ids(velocity, ids, h, w)[:, :, None]
        case QwenImageEditPlusPipeline():
            (seen, wide), (large, larger) = (calculate_dimensions(area, w / h) for area in (384**2, 1024**2))
            pixels = stock.image_processor.preprocess(picture, larger, large).unsqueeze(2)
            small, found = stock.image_processor.resize(picture, wide, seen), []
            for one, time, prompt in zip(x, t, prompts, strict=True):
                text, _ = stock.encode_prompt(prompt, [small])
                tokens, image = stock.prepare_latents(
                    [pixels], 1, c, 16 * h, 16 * w, x.dtype, x.device, None, stock._pack_latents(one[None], 1, c, h, w)
                )
                shapes = [[(1, h // 2, w // 2), (1, larger // 32, large // 32)]]
                velocity = network(torch.cat([tokens, image], 1), text, None, time[None], shapes).sample
                found.append(stock._unpack_latents(velocity[:, : tokens.shape[1]], 16 * h, 16 * w, 16))
            return torch.cat(found)
        case QwenImage21Pipeline():
            found = []
            for one, time, prompt in zip(x, t, prompts, strict=True):
                text, _, slots = stock.encode_prompt(prompt)
                slots = torch.cat([slots, slots.new_ones(1, h * w // 4)], dim=1)
                tokens = stock._pack_latents(one, 1, c, h, w)
                sequence = network(tokens, text, time[None], [[(1, h, w)]], slots).sample
                found.append(stock._unpack_latents(sequence[:, -h * w :], 16 * h, 16 * w, 16))
            return torch.cat(found)
        case Lumina2Pipeline():
            text, mask, *_ = stock.encode_prompt(list(prompts), False, max_sequence_length=tokens)
            return -network(x[:, :, 0], 1 - t, text, mask).sample[:, :, None]
        case Krea2Pipeline():
            text, mask = stock.encode_prompt(list(prompts), max_sequence_length=tokens)
            ids = stock.prepare_position_ids(text.shape[1], h // 2, w // 2, x.device)
            packed = stock._pack_latents(x, b, c, h, w)
            return stock._unpack_latents(network(packed, text, t, ids, mask).sample, 8 * h, 8 * w)
    raise NotImplementedError(type(stock).__name__)
