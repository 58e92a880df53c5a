#!/usr/bin/env bash
# diffusers 0.42.1: a Qwen-Image LoRA by diffusers' own module names loses its layers if its halves are named down and up.
#
# Expected: `transformer.<module>.lora_down.weight`, `lora_up.weight` and `alpha` are read as `lora_A`/`lora_B` of the same names are.
# Seen: the converter adds the prefix `transformer.` once more, so that no layer is found under its name.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 peft==0.21.2 accelerate safetensors==0.8.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diffusers.loaders import QwenImageLoraLoaderMixin

stem = "transformer.transformer_blocks.0.attn.to_q"
halves = {"A": torch.ones(2, 4), "B": torch.ones(4, 2)}
found = {}
for form, names in (("A/B", ("lora_A", "lora_B")), ("down/up with alpha", ("lora_down", "lora_up"))):
    file = {f"{stem}.{name}.weight": half for name, half in zip(names, halves.values(), strict=True)}
    if "alpha" in form:
        file[f"{stem}.alpha"] = torch.tensor(2.0)
    found[form] = sorted(QwenImageLoraLoaderMixin.lora_state_dict(file))
print(found)
want = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
assert want in found["A/B"] and f"transformer.{want}" in found["down/up with alpha"], found
PYTHON
