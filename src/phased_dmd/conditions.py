"""What a run's prompts are encoded to: once, unpadded, in files that a killed run finds again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from phased_dmd.checkpoint import HEADER, save_tensors
from phased_dmd.config import UserError
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.prompts import Prompt

CHUNK = 64  # prompts a file, and a call of the encoder


class Conditions:
    """The conditions of prompts, and of the negative prompt, in a folder.

    A file already there is used if its header's hash, of the encoder and of its prompts and pictures, is right; and
    every tensor read is checked by a hash of its own.
    """

    def __init__(self, codec: Codec, prompts: Sequence[Prompt], negative: str, folder: Path) -> None:
        """Encodes what is not in the folder yet, and frees the encoder."""
        self.folder, self.prompts = folder, prompts
        self._files: dict[str, tuple[safe_open, dict[str, str]]] = {}
        self.buckets = fitting(codec, prompts)
        for start in range(0, len(prompts), CHUNK):
            self._encode(codec, start, prompts[start : start + CHUNK], f"{start // CHUNK:05d}")
        self._encode(codec, 0, [Prompt(negative)], "negative")
        codec.free()
        self.negative = self._read("negative", "0.")

    def eligible(self, bucket: int) -> Sequence[int]:
        """The prompts that can be drawn in a bucket: all, or those whose first frame fits it."""
        return (
            [i for i, fits in enumerate(self.buckets) if bucket in fits] if self.buckets else range(len(self.prompts))
        )

    def row(self, index: int, bucket: int) -> Condition:
        """One prompt's condition."""
        chunk = f"{index // CHUNK:05d}"
        image = self._read(chunk, f"{index}.{bucket}.") if self.buckets else {}
        return self._read(chunk, f"{index}.") | image

    def _encode(self, codec: Codec, start: int, prompts: Sequence[Prompt], name: str) -> None:
        path = self.folder / f"{name}.safetensors"
        images = [prompt.image.read_bytes() if prompt.image else b"" for prompt in prompts]
        key = hashlib.blake2b(codec.fingerprint.encode(), digest_size=16)
        for part in ([prompt.text for prompt in prompts], [hashlib.blake2b(image).hexdigest() for image in images]):
            key.update(repr(part).encode())
        if path.exists() and _key(path) == key.hexdigest():
            return
        tensors = {}
        for i, row in enumerate(codec.encode_text([prompt.text for prompt in prompts]), start):
            tensors |= {f"{i}.{part}": tensor for part, tensor in row.items()}
            if name != "negative" and (image := self.prompts[i].image):
                for bucket in self.buckets[i]:
                    row = codec.encode_image(image, bucket)
                    tensors |= {f"{i}.{bucket}.{part}": tensor for part, tensor in row.items()}
        header = {"key": key.hexdigest(), "hashes": {name: _hash(tensor) for name, tensor in tensors.items()}}
        save_tensors(path, tensors, header)

    def _read(self, chunk: str, prefix: str) -> Condition:
        if chunk not in self._files:
            file = safe_open(self.folder / f"{chunk}.safetensors", "pt")
            self._files[chunk] = file, json.loads(file.metadata()[HEADER])["hashes"]
        file, hashes = self._files[chunk]
        names = [name for name in hashes if name.startswith(prefix) and name.count(".") == prefix.count(".")]
        row = {name.removeprefix(prefix): file.get_tensor(name) for name in names}
        for name in names:
            if _hash(row[name.removeprefix(prefix)]) != hashes[name]:
                raise UserError(f"{self.folder / chunk}.safetensors: {name} is damaged; remove the file")
        return row


def fitting(codec: Codec, prompts: Sequence[Prompt]) -> list[list[int]]:
    """For each prompt the buckets that its first frame fits; empty for a model that takes none."""
    if not codec.takes_images:
        return []
    if missing := next((prompt for prompt in prompts if prompt.image is None), None):
        raise UserError(f"prompts: image-to-video needs a first frame with every prompt; {missing.text!r} has none")
    return [codec.fits(prompt.image) for prompt in prompts if prompt.image]


def _key(path: Path) -> str | None:
    """The hash in a file's header; None if the file is no good."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()[HEADER])["key"]
    except Exception:  # safetensors raises its own, OSError, KeyError, ValueError: all mean that it is written anew
        return None


def _hash(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()
