#!/usr/bin/env bash
# diffusers 0.42.1: what QwenImage21Pipeline makes of a prompt depends on how long the other prompts of the call are.
#
# Expected: with the same latents a prompt gives the same picture alone and beside a longer one, whose padding is masked.
# Seen: the picture's positions begin where the longest text ends, so that the shorter prompt's sample is another.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate safetensors==0.8.0 numpy pillow
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers import (
    AutoencoderKLQwenImage21, FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline, QwenImage21Transformer2DModel,
)
from torch.nn.functional import pad

torch.manual_seed(0)
transformer = QwenImage21Transformer2DModel(
    in_channels=8, out_channels=8, num_layers=2, attention_head_dim=12, num_attention_heads=2, context_in_dim=16,
    axes_dims_rope=(4, 4, 4),
).eval()
with torch.no_grad():
    transformer.modulation[1].weight.mul_(10)  # else its gates, of random weights, hardly open
vae = AutoencoderKLQwenImage21(base_dim=4, decoder_base_dim=4, z_dim=8, dim_mult=[1] * 5, num_res_blocks=1)


class Processor:
    """Is asked for numbers of tokens of its template alone: texts are given encoded."""

    @property
    def tokenizer(self) -> "Processor":
        return self

    def encode(self, text: str) -> list[int]:
        return [0]

    def apply_chat_template(self, *_: object, **__: object) -> list[list[int]]:
        return [[0]]


pipe = QwenImage21Pipeline(
    transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(), text_encoder=None, processor=Processor()
)
pipe.set_progress_bar_config(disable=True)
text, long = torch.randn(3, 16), torch.randn(9, 16)
latents = torch.randn(1, 16, 8)


def sample(*rows: torch.Tensor) -> torch.Tensor:
    """The first text's sample in a call of several, padded to the longest."""
    longest = max(map(len, rows))
    return pipe(
        prompt_embeds=torch.stack([pad(row, (0, 0, 0, longest - len(row))) for row in rows]),
        prompt_embeds_mask=torch.stack([torch.arange(longest) < len(row) for row in rows]),
        height=64, width=64, num_inference_steps=2, latents=latents.repeat(len(rows), 1, 1), output_type="latent",
        use_kv_cache=False,
    )[0][0]


alone = sample(text)
equal, longer = ((sample(text, other) - alone).norm() / alone.norm() for other in (text, long))
print(f"beside a prompt of its length {equal:.1e} off, beside a longer one {longer:.1e}, relative to the sample")
assert equal < 1e-5 < 1e-3 < longer, (equal, longer)
PYTHON
