"""The prompt cache: prompts are encoded once, unpadded, into files that a killed run finds again."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich import get_console

from phased_dmd.checkpoint import HashedFiles, is_whole, save_hashed, wait_for_lock
from phased_dmd.engine.collectives import map_over_ranks, run_on_first_rank
from phased_dmd.engine.world import world_size
from phased_dmd.errors import UserError
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.progress import progress
from phased_dmd.prompts import Prompt

CHUNK = 64  # prompts a file, and a call of the encoder


class Part(NamedTuple):
    """Names a file of the cache and the prompts in it, of which the first is number `first`."""

    path: Path
    first: int
    prompts: Sequence[Prompt]


class Conditions:
    """Keeps the conditions of prompts, and of the negative prompt, in a folder.

    A file's name holds the hash of all that its tensors were made from, the encoder, prompts and pictures: one that is
    there is right, and runs that share the folder do not overwrite each other's. Every tensor read is checked by a hash
    of its own.
    """

    def __init__(
        self, codec: Codec, prompts: Sequence[Prompt], negative: str, folder: Path,
        between: Callable[[], object] = lambda: None, pictures: Sequence[str] | None = None, quiet: bool = True,
    ) -> None:  # fmt: skip
        """Encodes what is not in the folder yet, each process of a group a share of the files, and frees the encoder.

        between: called before each file, and while others are waited for; what it raises ends the encoding, which goes
        on another time. pictures: see `picture_hashes`. quiet: do not say how far it is.
        """
        self.folder, self.num_prompts = folder, len(prompts)
        self.buckets = fitting(codec, prompts)
        if not codec.takes_images:
            prompts = [Prompt(prompt.text) for prompt in prompts]
        images = picture_hashes(prompts, between) if pictures is None else pictures
        self._files = HashedFiles()
        (fingerprint,) = map_over_ranks([codec], lambda codec: codec.fingerprint, between)

        def part(name: str, first: int, prompts: Sequence[Prompt], images: Sequence[str]) -> Part:
            key = hashlib.blake2b(fingerprint.encode(), digest_size=16)
            key.update(repr(([prompt.text for prompt in prompts], images)).encode())
            return Part(folder / f"{name}-{key.hexdigest()}.safetensors", first, prompts)

        chunks = [
            part(f"{i // CHUNK:05d}", i, prompts[i : i + CHUNK], images[i : i + CHUNK])
            for i in range(0, len(prompts), CHUNK)
        ]
        last = part("negative", 0, [Prompt(negative)], [""])
        self._encode(codec, [*chunks, last], between, quiet)
        codec.free()
        self._chunks = [chunk.path for chunk in chunks]
        self.negative = self._read(last.path, "0.")

    def eligible(self, bucket: int) -> Sequence[int]:
        """Lists the prompts that can be drawn in a bucket: all, or those whose picture fits it."""
        return [i for i, fits in enumerate(self.buckets) if bucket in fits] if self.buckets else range(self.num_prompts)

    def row(self, index: int, bucket: int) -> Condition:
        """Reads one prompt's condition."""
        file = self._chunks[index // CHUNK]
        image = self._read(file, f"{index}.{bucket}.") if self.buckets else {}
        return self._read(file, f"{index}.") | image

    def _encode(self, codec: Codec, parts: Sequence[Part], between: Callable[[], object], quiet: bool) -> None:
        """Writes the files that are not there. Of the runs that share the folder, one writes at a time."""

        def missing() -> list[int]:
            return [i for i, part in enumerate(parts) if not is_whole(part.path)]

        if not run_on_first_rank(missing):
            return
        with ExitStack() as stack:
            map_over_ranks(
                [self.folder / ".lock"], lambda lock: stack.enter_context(wait_for_lock(lock, between)), between
            )
            left = run_on_first_rank(missing)
            with progress(
                "prompts encoded", sum(len(parts[i].prompts) for i in left), unit="prompts", quiet=quiet,
                console=get_console(),
            ) as show:  # fmt: skip

                def write(i: int) -> None:
                    self._write(codec, *parts[i])
                    show(min(show.total, show.count + world_size() * len(parts[i].prompts)))  # the others' alike

                map_over_ranks(left, write, between)

    def _write(self, codec: Codec, path: Path, first: int, prompts: Sequence[Prompt]) -> None:
        """Encodes the prompts of one file."""
        tensors = {}
        texts = codec.encode_text([prompt.text for prompt in prompts])
        for i, (prompt, row) in enumerate(zip(prompts, texts, strict=True), first):
            tensors |= {f"{i}.{part}": tensor for part, tensor in row.items()}
            if prompt.image:
                for bucket in self.buckets[i]:
                    row = codec.encode_picture(prompt.text, prompt.image, bucket)
                    tensors |= {f"{i}.{bucket}.{part}": tensor for part, tensor in row.items()}
        save_hashed(path, tensors)

    def _read(self, path: Path, prefix: str) -> Condition:
        """Reads the tensors whose names are the prefix and one word; one that is damaged is a UserError."""
        names = [n for n in self._files.names(path) if n.startswith(prefix) and n.count(".") == prefix.count(".")]
        return {name.removeprefix(prefix): self._files.read(path, name) for name in names}


def picture_hashes(prompts: Sequence[Prompt], between: Callable[[], object] = lambda: None) -> list[str]:
    """Hashes all bytes of the prompts' pictures, to an empty hash without one; each process reads its part."""

    def picture_hash(prompt: Prompt) -> str:
        return hashlib.blake2b(prompt.image.read_bytes(), digest_size=16).hexdigest() if prompt.image else ""

    return (
        map_over_ranks(prompts, picture_hash, between)
        if any(prompt.image for prompt in prompts)
        else [""] * len(prompts)
    )


def fitting(codec: Codec, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Lists for each prompt the buckets that its picture fits; empty for a model that takes none."""
    if not codec.takes_images:
        return []
    if missing := next((prompt for prompt in prompts if prompt.image is None), None):
        raise UserError(f"prompts: the model needs a picture with every prompt; {missing.text!r} has none")
    return [codec.fits(prompt.image) for prompt in prompts if prompt.image]
