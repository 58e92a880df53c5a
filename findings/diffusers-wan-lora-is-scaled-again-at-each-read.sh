#!/usr/bin/env bash
# diffusers 0.42.1: reading a Wan LoRA from a dictionary changes the caller's tensors, and the next read finds them weaker.
#
# Expected: `WanLoraLoaderMixin.lora_state_dict(dict)`, which `load_lora_weights(dict)` calls, gives the same each time. It copies
# the dictionary first.
# Seen: the copy is shallow, and alpha / rank is multiplied in place into the tensors of cross-attention and feed-forward
# layers (of those of self-attention it is not): of alpha 1 and rank 2 they have 1, 1/2, 1/4 of their effect by call. One file
# read once and loaded into two pipelines, or into a second transformer, arrives whole in the first alone, silently.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate safetensors==0.8.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers.loaders import WanLoraLoaderMixin

LAYERS = [f"{part}.{name}" for part in ("self_attn", "cross_attn") for name in "qkvo"] + ["ffn.0", "ffn.2"]
file = {}
for layer in LAYERS:
    stem = f"diffusion_model.blocks.0.{layer}"
    file[f"{stem}.lora_down.weight"] = torch.ones(2, 4)
    file[f"{stem}.lora_up.weight"] = torch.ones(4, 2)
    file[f"{stem}.alpha"] = torch.tensor(1.0)  # of rank 2: a scale of one half
changes = []
for _ in range(3):
    read = WanLoraLoaderMixin.lora_state_dict(file)
    names = "attn1.to_q", "attn2.to_q", "ffn.net.0.proj"
    stems = [f"transformer.blocks.0.{name}.lora_" for name in names]
    changes.append([(read[f"{s}B.weight"] @ read[f"{s}A.weight"])[0, 0].item() for s in stems])
print("B A of self-attention, cross-attention and feed-forward, by call:", changes)
assert changes == [[1.0, 1.0, 1.0], [1.0, 0.5, 0.5], [1.0, 0.25, 0.25]], changes
PYTHON
