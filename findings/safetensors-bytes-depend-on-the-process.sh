#!/usr/bin/env bash
# safetensors 0.8.0: one file of the same tensors and metadata has other bytes in every other process.
#
# Expected: the same tensors with the same metadata make the same file, so that its hash names its content (model cards,
# content-addressed stores and checks of reproduction rely on it).
# Seen: keys of the metadata are written in an order drawn anew in each process; of 24 processes, each with three keys, there
# are two files or more. With one key, or none, all are equal: tensors are sorted.
# Passes while that is so; fails once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.3.5
cat > "$folder/write.py" <<'PYTHON'
import hashlib
import sys

import numpy as np
from safetensors.numpy import save

keys = ("format", "modelspec.title", "modelspec.license")[: int(sys.argv[1])]
made = save({"b": np.zeros(2, np.float32), "a": np.ones(2, np.float32)}, {key: "x" for key in keys})
print(hashlib.sha256(made).hexdigest())
PYTHON
count() {
    for _ in $(seq 24); do "$folder/venv/bin/python" "$folder/write.py" "$1"; done | sort -u | wc -l
}
one=$(count 1)
three=$(count 3)
echo "files of 24 processes: $one with one key of metadata, $three with three"
[ "$one" = 1 ] && [ "$three" -gt 1 ]
