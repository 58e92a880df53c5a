#!/usr/bin/env bash
# diffusers 0.42.1: QwenImageEditPlusPipeline cannot have its VAE in float32 while the rest is bfloat16.
#
# Expected: dtype={"default": torch.bfloat16, "vae": torch.float32}, which from_pretrained offers, works as it does for Wan's
# image-to-video, whose pipeline casts the picture to the VAE's dtype.
# Seen: the picture reaches the VAE in the text's dtype, and its first convolution raises.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate safetensors==0.8.0 numpy pillow
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan, QwenImageEditPlusPipeline, WanImageToVideoPipeline

vae = AutoencoderKLQwenImage(base_dim=3, z_dim=16, num_res_blocks=1)
parts = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "processor", "transformer"))
edit = QwenImageEditPlusPipeline(vae=vae, **parts)
picture = torch.rand(1, 3, 1, 64, 64)
given = {"batch_size": 1, "num_channels_latents": 16, "height": 64, "width": 64, "device": "cpu", "generator": None}
latents, image = edit.prepare_latents([picture], dtype=torch.float32, latents=torch.zeros(1, 16, 64), **given)
print("all in float32:", tuple(latents.shape), tuple(image.shape))
try:
    edit.prepare_latents([picture], dtype=torch.bfloat16, latents=torch.zeros(1, 16, 64), **given)
    raise SystemExit("the VAE in float32 took it")
except RuntimeError as error:
    print("the VAE alone in float32:", error)
    assert "BFloat16" in str(error) and "float" in str(error)

small = AutoencoderKLWan(base_dim=3, z_dim=16, num_res_blocks=1)
parts = dict.fromkeys(("scheduler", "text_encoder", "tokenizer", "image_encoder", "image_processor", "transformer"))
wan = WanImageToVideoPipeline(vae=small, **parts)
_, condition = wan.prepare_latents(torch.rand(1, 3, 64, 64), 1, 16, 64, 64, 5, torch.bfloat16, "cpu", torch.Generator())
print("Wan's image-to-video, the same:", tuple(condition.shape), condition.dtype)
PYTHON
