#!/usr/bin/env bash
# diffusers 0.42.1: Lumina2Pipeline's dynamic shift does not depend on the resolution, but on the number of latent channels.
#
# Expected: with use_dynamic_shifting larger pictures are sampled at larger times, as by the other pipelines with that option.
# Seen: the sequence's length is read off the axis of the channels, so that all sizes get the shift of 16 tokens.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate safetensors==0.8.0 numpy pillow
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

transformer = Lumina2Transformer2DModel(
    hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
    axes_dim_rope=(4, 4, 4), cap_feat_dim=16,
)
vae = AutoencoderKL(
    block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=2,
    up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16,
)
scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
pipe = Lumina2Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None)
pipe.set_progress_bar_config(disable=True)
text, mask = torch.randn(1, 3, 16), torch.ones(1, 3, dtype=torch.long)
found = {}
for size in (64, 512):
    pipe(
        prompt_embeds=text, prompt_attention_mask=mask, height=size, width=size, num_inference_steps=4,
        guidance_scale=1.0, output_type="latent",
    )
    found[size] = [round(sigma, 4) for sigma in pipe.scheduler.sigmas.tolist()]
    print(f"{size} x {size}, {(size // 16) ** 2} tokens: {found[size]}")
slope = (1.15 - 0.5) / (4096 - 256)  # of the line that the shift's logarithm lies on, by default
shift = torch.tensor(0.5 + slope * (16 - 256)).exp().item()
want = [round(shift / (shift + 1 / t - 1), 4) for t in (1.0, 0.75, 0.5, 0.25)]
assert found[64] == found[512], found
assert max(abs(a - b) for a, b in zip(found[512], [*want, 0.0], strict=True)) < 2e-4, (found, want)
print("both those of 16 tokens: the latents have 16 channels")
PYTHON
