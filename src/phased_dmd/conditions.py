"""What a run's prompts are encoded to: once, unpadded, in files that a killed run finds again."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phased_dmd.checkpoint import HEADER, awaited, save_tensors
from phased_dmd.errors import UserError
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.prompts import Prompt

CHUNK = 64  # prompts a file, and a call of the encoder


class Conditions:
    """The conditions of prompts, and of the negative prompt, in a folder.

    A file's name holds the hash of all that its tensors were made from, the encoder, prompts and pictures: one that is
    there is right, and runs that share the folder do not overwrite each other's. Every tensor read is checked by a hash
    of its own.
    """

    def __init__(
        self, codec: Codec, prompts: Sequence[Prompt], negative: str, folder: Path,
        between: Callable[[], object] = lambda: None,
    ) -> None:  # fmt: skip
        """Encodes what is not in the folder yet, and frees the encoder.

        between: called before each file; what it raises ends the encoding, which goes on another time.
        """
        self.folder, self.num_prompts = folder, len(prompts)
        self.buckets = fitting(codec, prompts)
        if not codec.takes_images:
            prompts = [Prompt(prompt.text) for prompt in prompts]
        self._between = between
        self._files: dict[Path, tuple[safe_open, dict[str, str]]] = {}
        self._chunks = [
            self._encode(codec, f"{start // CHUNK:05d}", start, prompts[start : start + CHUNK])
            for start in range(0, len(prompts), CHUNK)
        ]
        negative_file = self._encode(codec, "negative", 0, [Prompt(negative)])
        codec.free()
        self.negative = self._read(negative_file, "0.")

    def eligible(self, bucket: int) -> Sequence[int]:
        """The prompts that can be drawn in a bucket: all, or those whose first frame fits it."""
        return [i for i, fits in enumerate(self.buckets) if bucket in fits] if self.buckets else range(self.num_prompts)

    def row(self, index: int, bucket: int) -> Condition:
        """One prompt's condition."""
        file = self._chunks[index // CHUNK]
        image = self._read(file, f"{index}.{bucket}.") if self.buckets else {}
        return self._read(file, f"{index}.") | image

    def _encode(self, codec: Codec, name: str, first: int, prompts: Sequence[Prompt]) -> Path:
        """The file of some of the prompts, the first of them number `first`; written if it is not there."""
        images = [hashlib.blake2b(prompt.image.read_bytes() if prompt.image else b"").hexdigest() for prompt in prompts]
        key = hashlib.blake2b(codec.fingerprint.encode(), digest_size=16)
        key.update(repr(([prompt.text for prompt in prompts], images)).encode())
        path = self.folder / f"{name}-{key.hexdigest()}.safetensors"
        if _is_whole(path):
            return path
        with awaited(self.folder / ".lock"):  # of a folder that runs share
            if not _is_whole(path):
                self._between()
                self._write(codec, path, first, prompts)
        return path

    def _write(self, codec: Codec, path: Path, first: int, prompts: Sequence[Prompt]) -> None:
        tensors = {}
        texts = codec.encode_text([prompt.text for prompt in prompts])
        for i, (prompt, row) in enumerate(zip(prompts, texts, strict=True), first):
            tensors |= {f"{i}.{part}": tensor for part, tensor in row.items()}
            if prompt.image:
                for bucket in self.buckets[i]:
                    row = codec.encode_image(prompt.image, bucket)
                    tensors |= {f"{i}.{bucket}.{part}": tensor for part, tensor in row.items()}
        save_tensors(path, tensors, {"hashes": {name: _hash(tensor) for name, tensor in tensors.items()}})

    def _read(self, path: Path, prefix: str) -> Condition:
        if path not in self._files:
            file = safe_open(path, "pt")
            self._files[path] = file, json.loads(file.metadata()[HEADER])["hashes"]
        file, hashes = self._files[path]
        names = [name for name in hashes if name.startswith(prefix) and name.count(".") == prefix.count(".")]
        row = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        for name in names:
            if _hash(row[name.removeprefix(prefix)]) != hashes[name]:
                raise UserError(f"{path}: {name} is damaged; remove the file")
        return row


def fitting(codec: Codec, prompts: Sequence[Prompt]) -> list[list[int]]:
    """For each prompt the buckets that its first frame fits; empty for a model that takes none."""
    if not codec.takes_images:
        return []
    if missing := next((prompt for prompt in prompts if prompt.image is None), None):
        raise UserError(f"prompts: image-to-video needs a first frame with every prompt; {missing.text!r} has none")
    return [codec.fits(prompt.image) for prompt in prompts if prompt.image]


def _is_whole(path: Path) -> bool:
    """Whether the file is there, as long as its header says, with a hash of every tensor."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[HEADER])["hashes"].keys() == set(file.keys())
    except Exception:  # safetensors raises its own, OSError, KeyError, ValueError: all mean that it is written anew
        return False


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
