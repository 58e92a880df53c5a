"""Where the samples of an evaluation come from: a run's generator, its base by way of a cache, a folder of files."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.checkpoint import load_tensors, save_tensors
from phased_dmd.config import UserError
from phased_dmd.evaluate.protocol import SampleSet, blocks
from phased_dmd.media import MEDIA, read_media
from phased_dmd.prompts import Prompt
from phased_dmd.sample import MANIFEST, Sampler, batch_size

CHUNK = 64  # samples kept in one file of the cache


@dataclass(frozen=True)
class Row:
    """Samples of one set: their pixels [b, f, h, w, 3] by their indices, and what they cost.

    size: how many are decoded at once. key: equal for equal samples, where that is known.
    """

    pixels: Callable[[Sequence[int]], Tensor]
    size: int
    calls: int | None = None  # of the networks, a sample
    seconds: float | None = None  # a sample
    key: str | None = None


class Base:
    """The teacher of a sampler; what it samples is kept in a folder, by a hash of all that it depends on."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self.sampler, self.folder = sampler, folder
        self._weights = ""

    def row(self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> Row:
        """A row of the base, in files of CHUNK samples, so that what was stopped goes on; seconds as when sampled."""
        chunks = [self._chunk(prompts[i : i + CHUNK], seeds[i : i + CHUNK], steps) for i in range(0, len(seeds), CHUNK)]
        latents = torch.cat([part for part, _ in chunks])
        calls = steps * (2 if max(self.sampler.system.model.guidance) > 1 else 1)
        seconds = sum(took for _, took in chunks) / len(seeds)
        return of_latents(self.sampler, latents, calls, seconds, self._key(prompts, seeds, steps))

    def _chunk(self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> tuple[Tensor, float]:
        path = self.folder / f"{self._key(prompts, seeds, steps)}.safetensors"
        if path.exists():
            tensors, header = load_tensors(path)
            return tensors["latents"], header["seconds"]
        started = time.perf_counter()
        latents = self.sampler(prompts, seeds, steps)
        seconds = time.perf_counter() - started
        save_tensors(path, {"latents": latents}, {"seconds": seconds})
        return latents, seconds

    def _key(self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> str:
        """A hash of the teacher's weights and settings, the encoded prompts, the seeds and the grid."""
        system, codec = self.sampler.system, self.sampler.codec
        if not self._weights:
            self._weights = weights_hash(self.sampler)
        images = [hashlib.blake2b(p.image.read_bytes() if p.image else b"").hexdigest() for p in prompts]
        plan, shape = system.config.plan, system.model.sample_shapes[self.sampler.bucket]
        about = (
            self._weights, codec.fingerprint, system.model.guidance, system.config.teacher.negative_prompt, shape,
            plan.shift, plan.start, steps, list(seeds), [prompt.text for prompt in prompts], images,
        )  # fmt: skip
        return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


def weights_hash(sampler: Sampler) -> str:
    """Of the teacher's networks alone, whatever adapters they carry."""
    digest = hashlib.blake2b(digest_size=16)
    for network in sampler.system.model.networks:
        for name, tensor in sorted(network.state_dict().items()):
            if ".lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def generated(sampler: Sampler, sample_set: SampleSet) -> Row:
    """A row of the sampler's own generator."""
    started = time.perf_counter()
    latents = sampler(sample_set.prompts, sample_set.seeds)
    seconds = (time.perf_counter() - started) / len(latents)
    return of_latents(sampler, latents, sampler.system.plan.num_steps, seconds)


def of_latents(sampler: Sampler, latents: Tensor, calls: int, seconds: float, key: str | None = None) -> Row:
    """A row of latents [n, ...] that a sampler's codec decodes."""
    size = batch_size(latents.shape[1:])
    return Row(lambda indices: sampler.decode(latents[list(indices)]), size, calls, seconds, key)


class SampleFolder:
    """Pictures or clips on disk; with `samples.jsonl`, as `phased-dmd sample` writes it, with prompts and seeds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in MEDIA}
        manifest = folder / MANIFEST
        self.rows: dict[str, tuple[Prompt, int]] = {}
        if manifest.exists():
            entries = [json.loads(line) for line in manifest.read_text().splitlines() if line.strip()]
            self.rows = {Path(e["image"]).stem: (Prompt(e["prompt"]), int(e["seed"])) for e in entries}
            self.files = {stem: self.files[stem] for stem in self.rows if stem in self.files}
        if not self.files:
            raise UserError(f"{folder}: neither a run, nor an export, nor a folder of pictures or clips")

    def sample_set(self, other: "SampleFolder") -> SampleSet:
        """The samples that this folder and the other one must both hold, by file name."""
        if missing := sorted(self.files.keys() ^ other.files.keys()):
            where = other.folder if missing[0] in self.files else self.folder
            raise UserError(f"{where}: holds no {missing[0]}, which the folder it is compared with has")
        stems = list(self.files)
        rows = [self.rows.get(stem) or other.rows.get(stem) or _named(stem) for stem in stems]
        seeds = sorted({seed for _, seed in rows})
        prompts = len({prompt for prompt, _ in rows})
        if len(seeds) > 2 and prompts * len(seeds) == len(rows):
            groups = torch.tensor([seeds.index(seed) for _, seed in rows])
        else:
            groups = blocks(len(rows))
        return SampleSet(
            "samples",
            f"{len(rows)} files, {prompts} prompt{'s' if prompts > 1 else ''}",
            [p for p, _ in rows],
            [s for _, s in rows],
            groups,
        )

    def row(self) -> Row:
        """The samples in the order of the files, one read at a time."""
        files = list(self.files.values())
        shape = read_media(files[0]).shape

        def pixels(indices: Sequence[int]) -> Tensor:
            media = [read_media(files[i]) for i in indices]
            if any(one.shape != shape for one in media):
                raise UserError(f"{self.folder}: holds pictures or clips of different sizes or lengths")
            return torch.stack(media)

        return Row(pixels, 1)


def _named(stem: str) -> tuple[Prompt, int]:
    """A file's prompt and seed by its name, NAME-seedN or NAME_seedN; else a prompt of its own."""
    name, found, seed = stem.replace("_seed", "-seed").rpartition("-seed")
    return (Prompt(name), int(seed)) if found and seed.isdigit() else (Prompt(stem), 0)
