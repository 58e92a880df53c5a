"""The run folder holds a run's config, metrics, experts and checkpoints. What is there is there whole or not at all.

- `files`: single files, written atomically; safetensors with a header.
- `folders`: one checkpoint: staged, summed, committed by a rename; verified before it is read.
- `lock`: one writer at a time, or one after the other.
- `store`: which of them is read, and which are kept.
- `runfolder`: all of it, as one run; with `same_run`, `logs` and `single_phases`.
- `reference`: a checkpoint by the name that a user gives it.
"""

from phased_dmd.checkpoint.files import (
    HEADER,
    HashedFiles,
    is_whole,
    load_header,
    load_tensors,
    partial_of,
    resolve_inside,
    save_hashed,
    save_tensors,
    write_atomically,
)
from phased_dmd.checkpoint.lock import claimed, is_held, wait_for_lock
from phased_dmd.checkpoint.reference import Reference
from phased_dmd.checkpoint.runfolder import RunFolder

__all__ = [
    "HEADER",
    "HashedFiles",
    "Reference",
    "RunFolder",
    "claimed",
    "wait_for_lock",
    "is_held",
    "is_whole",
    "load_header",
    "load_tensors",
    "partial_of",
    "resolve_inside",
    "save_hashed",
    "save_tensors",
    "write_atomically",
]
