#!/usr/bin/env bash
# diffusers 0.42.1: a tensor that is in no shard is not reported as missing if the index names it.
#
# Expected: `output_loading_info` names it, as it does for a network in one file.
# Seen: of one file, "missing_keys" holds the name; of shards with an index that lists it (an interrupted or a partly
# replaced download), "missing_keys" is empty and no warning is given. Either way the parameter stays on the meta device, and
# the first use ends in an error that does not name it.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.24.0 accelerate safetensors==0.8.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

LOST = "blocks.1.ffn.net.2.weight"
network = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=16,
    num_layers=2, rope_max_seq_len=32,
)
found = {}
for name, size in (("one file", "1GB"), ("shards", "20KB")):
    folder = Path(sys.argv[1]) / name
    network.save_pretrained(folder, max_shard_size=size)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(LOST, None) is not None:
            save_file(tensors, file, {"format": "pt"})
    loaded, report = WanTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    found[name] = report["missing_keys"], loaded.get_parameter(LOST).device.type
print(found)
assert found == {"one file": ([LOST], "meta"), "shards": ([], "meta")}, found
PYTHON
