#!/usr/bin/env bash
# peft 0.21.2: an adapter's type depends on whether its base has values.
#
# Expected: the adapter of a float64 layer has one type, wherever the layer is.
# Seen: on a base with values it is cast to the base's float64; on the same base on the meta device, as the processes
# have it that get their shards from the first one, it stays float32. Collectives over both then fail.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 peft==0.21.2 transformers==5.24.0 accelerate numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from torch import nn

found = {}
for place in ("cpu", "meta"):
    with torch.device(place):
        base = nn.Sequential(nn.Linear(4, 4)).double()
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), base, adapter_name="one")
    (found[place],) = {p.dtype for name, p in base.named_parameters() if "lora_" in name}
print(found)
assert found == {"cpu": torch.float64, "meta": torch.float32}, found
PYTHON
