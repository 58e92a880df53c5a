"""Where the samples of an evaluation come from: a run's generator, its base by way of a cache, or a folder of files."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from phased_dmd.checkpoint import load_tensors, save_tensors, wait_for_lock
from phased_dmd.conditions import fitting
from phased_dmd.config.teacher import AnalyticTeacher, PipelineTeacher
from phased_dmd.engine.world import batch_size
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.sample_sets import SampleSet, group_by_seed
from phased_dmd.maths.phases import step_times
from phased_dmd.media import MEDIA, read_media
from phased_dmd.models.loader import stock_solver, stock_times
from phased_dmd.progress import progress
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.sampling.writing import MANIFEST


@dataclass(frozen=True)
class SampleSource:
    """Samples of one set, which are decoded when they are asked for, and what they cost.

    pixels: returns pixels [b, f, h, w, 3] for b indices. size: how many are decoded at once. fps: frames a second of
    clips, where it is known. calls, seconds: network calls and time for one sample. key: equal for equal samples.
    latents: [n, ...], of samples that a codec decodes.
    """

    pixels: Callable[[Sequence[int]], Tensor]
    size: int
    fps: float | None = None
    calls: int | None = None
    seconds: float | None = None
    key: str | None = None
    latents: Tensor | None = None


class Base:
    """The teacher of a sampler, whose samples are cached in a folder under a hash of all that they depend on."""

    def __init__(self, sampler: Sampler, folder: Path) -> None:
        self.sampler, self.folder = sampler, folder
        self._weights = ""

    def samples(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int, what: str = "base"
    ) -> SampleSource:  # fmt: skip
        """Samples the base, or reads its samples; a file a batch, so that sampling that was stopped goes on.

        The seconds are those of the time when it was sampled. what: the samples' name for the user.
        """
        system = self.sampler.system
        size = batch_size(system.model.sample_shapes[self.sampler.bucket])
        fitting(self.sampler.codec, list(dict.fromkeys(prompts)))
        key = self._key(prompts, seeds, steps)
        lock, parts = self.folder / f".{key}.lock", [slice(i, i + size) for i in range(0, len(seeds), size)]
        paths = [self.folder / f"{self._key(prompts[part], seeds[part], steps)}.safetensors" for part in parts]
        missing = {path: len(seeds[part]) for path, part in zip(paths, parts, strict=True) if not path.exists()}
        known, chunks = len(seeds) - sum(missing.values()), []
        with progress(what, len(seeds), known, unit="samples", quiet=not missing) as show:
            for path, part in zip(paths, parts, strict=True):
                chunks.append(self._chunk(prompts[part], seeds[part], steps, path, lock))
                show(show.count + missing.get(path, 0))
        latents = torch.cat([part for part, _ in chunks])
        times = self._times(steps)
        calls = sum(2 if system.model.guidance[system.plan.network(t)] > 1 else 1 for t in times[:steps])
        seconds = sum(took for _, took in chunks) / len(seeds)
        return _decoded_by(self.sampler, latents, calls, seconds, key)

    def _times(self, steps: int) -> Sequence[float]:
        """Returns the times of the base's steps, and 0: those of its own pipeline, or on the plan's grid."""
        config = self.sampler.system.config
        if (solver := stock_solver(config.teacher, steps)) is not None:
            return solver.sigmas.tolist()
        own = stock_times(config.teacher, self.sampler.bucket, steps)
        return own or step_times(steps, config.plan.shift, config.plan.start)

    def _way(self, steps: int) -> tuple[object, ...]:
        """Returns what decides how the base is sampled: the solver and its times, the times alone, or the grid."""
        config = self.sampler.system.config
        if (solver := stock_solver(config.teacher, steps)) is not None:
            return *sorted(solver.config.items()), *solver.sigmas.tolist()
        own = stock_times(config.teacher, self.sampler.bucket, steps)
        return tuple(own or (config.plan.shift, config.plan.start))

    def _chunk(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int, path: Path, lock: Path
    ) -> tuple[Tensor, float]:  # fmt: skip
        if not path.exists():
            with wait_for_lock(lock):  # another process may be sampling it
                if not path.exists():
                    started = time.perf_counter()
                    latents = self.sampler(prompts, seeds, steps)
                    save_tensors(path, {"latents": latents}, {"seconds": time.perf_counter() - started})
        tensors, header = load_tensors(path)
        return tensors["latents"], header["seconds"]

    def _key(self, prompts: Sequence[Prompt], seeds: Sequence[int], steps: int) -> str:
        """Returns a hash of the teacher's weights and settings, the encoder, prompts and seeds, and the grid."""
        system, codec = self.sampler.system, self.sampler.codec
        if not self._weights:
            self._weights = weights_hash(self.sampler)
        pictures = [prompt.image if codec.takes_images else None for prompt in prompts]
        images = [hashlib.blake2b(picture.read_bytes() if picture else b"").hexdigest() for picture in pictures]
        model, teacher = system.model, system.config.teacher
        own: dict[str, object] = {}  # of the kind of pipeline alone
        if isinstance(teacher, PipelineTeacher):
            own = teacher.model_dump(exclude={*PipelineTeacher.model_fields, "kind", "first_frame", "lora_targets"})
        t = torch.linspace(0, 1, 9, dtype=torch.float64)
        about = (
            self._weights, codec.fingerprint, tuple(model.guidance), tuple(model.switches), model.prediction,
            model.schedule.alpha(t).tolist(), model.schedule.sigma(t).tolist(), teacher.negative_prompt,
            teacher.dtype if isinstance(teacher, PipelineTeacher) else "",
            (teacher.means, teacher.std, teacher.weights) if isinstance(teacher, AnalyticTeacher) else (),
            tuple(model.sample_shapes[self.sampler.bucket]), *self._way(steps),
            steps, list(seeds), [prompt.text for prompt in prompts], images, *sorted(own.items()),
        )  # fmt: skip
        return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


def weights_hash(sampler: Sampler) -> str:
    """Returns a hash of the weights of the teacher's networks, without the adapters that they carry."""
    digest = hashlib.blake2b(digest_size=16)
    for network in sampler.system.model.networks:
        for name, tensor in sorted(network.state_dict().items()):
            if ".lora_" not in name:
                digest.update(name.replace(".base_layer", "").encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def generate(sampler: Sampler, sample_set: SampleSet, what: str) -> SampleSource:
    """Samples a set with the sampler's own generator. what: the samples' name for the user."""
    started, parts = time.perf_counter(), []
    with progress(what, len(sample_set.seeds), unit="samples") as show:
        for part in sampler.batches(sample_set.prompts, sample_set.seeds):
            parts.append(part)
            show(show.count + len(part))
    latents = torch.cat(parts)
    seconds = (time.perf_counter() - started) / len(latents)
    return _decoded_by(sampler, latents, sampler.calls, seconds)


def _decoded_by(sampler: Sampler, latents: Tensor, calls: int, seconds: float, key: str | None = None) -> SampleSource:
    """Returns a source of latents [n, ...] that a sampler's codec decodes."""
    size = batch_size(latents.shape[1:])
    return SampleSource(
        lambda indices: sampler.decode(latents[list(indices)]), size, sampler.fps, calls, seconds, key, latents
    )


class SampleFolder:
    """A folder of pictures or clips, whose prompts and seeds stand in the `samples.jsonl` of `phased-dmd sample`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path.stem: path for path in sorted(folder.glob("*")) if path.suffix.lower() in MEDIA}
        manifest = folder / MANIFEST
        self.rows: dict[str, tuple[Prompt, int]] = {}
        if manifest.exists():
            lines = manifest.read_text("utf-8").split("\n")  # a prompt may hold other ends of a line
            self.rows = dict(_entry(line, manifest) for line in lines if line.strip())
            if missing := next((stem for stem in self.rows if stem not in self.files), None):
                raise UserError(f"{manifest}: {missing} is not there")
            self.files = {stem: self.files[stem] for stem in self.rows}
        if not self.files:
            raise UserError(f"{folder}: neither a run, nor an export, nor a folder of pictures or clips")

    def sample_set(self, other: "SampleFolder") -> SampleSet:
        """Returns this folder's set of samples; raises UserError where the other one does not hold the same files."""
        if missing := sorted(self.files.keys() ^ other.files.keys()):
            where = other.folder if missing[0] in self.files else self.folder
            raise UserError(f"{where}: holds no {missing[0]}, which the folder it is compared with has")
        stems = list(self.files)
        rows = [self.rows.get(stem) or other.rows.get(stem) or _named(stem) for stem in stems]
        prompts, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
        number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        groups = group_by_seed(torch.tensor([number[prompt] for prompt in prompts]), seeds)
        about = f"{len(rows)} files, {len(number)} prompt{'s' if len(number) > 1 else ''}"
        return SampleSet("samples", about, prompts, seeds, groups)

    def samples(self, like: "SampleFolder") -> SampleSource:
        """Returns the samples in the order of the other folder's files; they are read when they are asked for."""
        files = [self.files[stem] for stem in like.files]
        first, fps = read_media(files[0])
        shape = first.shape

        def pixels(indices: Sequence[int]) -> Tensor:
            media = [read_media(files[i])[0] for i in indices]
            if any(one.shape != shape for one in media):
                raise UserError(f"{self.folder}: holds pictures or clips of different sizes or lengths")
            return torch.stack(media)

        return SampleSource(pixels, 1, fps)


def _entry(line: str, manifest: Path) -> tuple[str, tuple[Prompt, int]]:
    """Reads a line of the manifest: the file's stem, its prompt and its seed."""
    try:
        entry = json.loads(line)
        return Path(entry["image"]).stem, (Prompt(entry["prompt"]), int(entry["seed"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: {line[:60]!r} is no object with image, prompt and seed") from error


def _named(stem: str) -> tuple[Prompt, int]:
    """Returns a file's prompt and seed from its name, NAME-seedN or NAME_seedN; else the whole name is its prompt."""
    name, found, seed = stem.replace("_seed", "-seed").rpartition("-seed")
    return (Prompt(name), int(seed)) if found and seed.isdigit() else (Prompt(stem), 0)
