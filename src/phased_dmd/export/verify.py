"""The export loaded back: every key used, and the samples those of the package."""

import runpy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders import QwenImageLoraLoaderMixin, WanLoraLoaderMixin
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.config.teacher import Size, WanTeacher
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export.subject import Piece, Subject
from phased_dmd.export.weights import lora_tensors
from phased_dmd.finished import assemble, read_shards
from phased_dmd.models.qwen_image import PATCH, pack, unpack
from phased_dmd.models.source import quiet
from phased_dmd.pictures import read_picture
from phased_dmd.prompts import Prompt

TOLERANCE = 1e-4  # of latents, in full precision
STILL, CLIP = Size(height=64, width=96), Size(num_frames=5, height=64, width=96)  # small, of any model's strides
PROMPTS = ("a handwritten seven moving right", "two cats")


class VerificationError(ArithmeticError):
    """An export that stock software does not read as the run it was made from."""


def verify_diffusers(subject: Subject, folder: Path) -> list[str]:
    """Runs the export's own `sample.py` beside the run, from the same noise, both in full precision."""
    size = STILL if subject.task == "t2i" else CLIP
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "first.png"
        Image.effect_noise((size.width, size.height), 80).convert("RGB").save(picture)
        prompts = [Prompt(text, picture if subject.task == "i2v" else None) for text in PROMPTS]
        noise, expected = in_memory(subject, prompts, size)
        pipe, sample = load_script(subject, folder)
        counts = [count(subject, folder, piece, pipe) for piece in subject.pieces]
        made = stock(subject, pipe, sample, prompts, size, noise)
    difference = (made - expected).abs().max().item()
    times = ", ".join(f"{time / 1000:.6g}" for time in pipe.scheduler.timesteps.tolist())
    found = f"samples at {times} differ from the run's by up to {difference:.2g}"
    if not difference <= TOLERANCE:
        raise VerificationError(f"verification failed: {found}, more than {TOLERANCE:g}")
    return [*counts, f"verified: {found}"]


def verify_comfyui(subject: Subject, folder: Path) -> list[str]:
    """Reads the files by diffusers' converter, which must use every key and give back the adapters."""
    reader = WanLoraLoaderMixin if isinstance(subject.teacher, WanTeacher) else QwenImageLoraLoaderMixin
    lines = []
    for piece in subject.pieces:
        try:
            found = reader.lora_state_dict(str(folder), weight_name=piece.file, use_safetensors=True)
        except (KeyError, ValueError) as error:
            raise VerificationError(f"verification failed: {piece.file} cannot be read ({one_line(error)})") from error
        check_keys(piece.file, lora_tensors(subject, piece), found)  # type: ignore[arg-type] a dictionary unless asked for more
        check_keys(piece.file, found, lora_tensors(subject, piece))  # type: ignore[arg-type]
        lines.append(f"{piece.file}: all {len(load_file(folder / piece.file))} keys read")
    return lines


def in_memory(subject: Subject, prompts: Sequence[Prompt], size: Size) -> tuple[Tensor, Tensor]:
    """Noise, and what the package's own sampler makes of it, on the full base even if the run's was packed."""
    teacher = subject.teacher.model_copy(update={"dtype": "float32", "sizes": (size,), "quantise": None})
    sampler = assemble(subject.config.model_copy(update={"teacher": teacher}), subject.experts)
    system, known = sampler.system, sampler.encode(prompts)
    condition = system.model.batch([known[prompt] for prompt in prompts])
    noise = normal(system.model.sample_shapes[0], range(len(prompts)), "verify").to(device())

    generator = fresh_noise()

    def fresh(step: int) -> Tensor:  # as the script's scheduler draws it
        drawn = torch.randn(to_pipeline(subject, noise).shape, generator=generator)
        return from_pipeline(subject, drawn.to(device()), size)

    with torch.no_grad():
        path = system.plan.path(system.plan.num_phases)
        return noise, system.roll(path, system.start(noise), condition, renoise=fresh).x


def load_script(subject: Subject, folder: Path) -> tuple[Any, Callable[..., Any]]:
    """The pipeline as `sample.py` loads it, in full precision, and its function `sample`."""
    base = [subject.teacher.path] if subject.base is None else []
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")  # keys are counted below
            diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # errors come as exceptions too
            script = runpy.run_path(str(folder / "sample.py"))
            pipe = script["load"](*base, dtype=torch.float32, device=str(device()))
    except OSError as error:
        raise UserError(f"--verify: the base pipeline is not at hand ({error})") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise VerificationError(f"verification failed: sample.py cannot load the export ({one_line(error)})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, script["sample"]


def count(subject: Subject, folder: Path, piece: Piece, pipe: Any) -> str:
    """A line with the number of the expert's keys, all of which must be in the pipeline."""
    network = pipe.experts[piece.name] if subject.fused and subject.switches else pipe.components[piece.part]
    if subject.fused:
        keys, loaded = read_shards(folder / piece.file), network.state_dict()
    else:
        keys = {name.removeprefix("transformer."): t for name, t in load_file(folder / piece.file).items()}
        there = piece.name in pipe.get_list_adapters().get(piece.part, ())
        loaded = get_peft_model_state_dict(network, adapter_name=piece.name) if there else {}
    check_keys(piece.file, keys, loaded)
    return f"{piece.file}: all {len(keys)} keys loaded"


def check_keys(file: str, keys: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """A VerificationError where a key is not loaded, or not as it stands in the file."""
    unused = [key for key in keys if key not in loaded]
    if unused:
        raise VerificationError(f"verification failed: {len(unused)} of {len(keys)} keys of {file} unused: {unused[0]}")
    changed = next((key for key in keys if not torch.equal(keys[key], loaded[key].cpu())), None)
    if changed:
        raise VerificationError(f"verification failed: {changed} of {file} is not what was loaded")


def stock(
    subject: Subject, pipe: Any, sample: Callable[..., Any], prompts: Sequence[Prompt], size: Size, noise: Tensor
) -> Tensor:
    """What the export's script makes of the noise."""
    options: dict[str, Any] = {"height": size.height, "width": size.width, "latents": to_pipeline(subject, noise)}
    if isinstance(subject.teacher, WanTeacher):
        options["num_frames"] = size.num_frames
    if prompts[0].image:
        options["image"] = read_picture(prompts[0].image)
    with quiet():
        texts = [prompt.text for prompt in prompts]
        made = sample(pipe, texts, generator=fresh_noise(), output_type="latent", **options)
    return from_pipeline(subject, made, size)


def fresh_noise() -> torch.Generator:
    """What re-noising draws from; the first noise is given."""
    return torch.Generator().manual_seed(0)


def to_pipeline(subject: Subject, latents: Tensor) -> Tensor:
    """Latents as the stock pipeline takes them: Qwen-Image's are packed."""
    return latents if isinstance(subject.teacher, WanTeacher) else pack(latents)


def from_pipeline(subject: Subject, latents: Tensor, size: Size) -> Tensor:
    if isinstance(subject.teacher, WanTeacher):
        return latents
    stride = 8 * PATCH
    return unpack(latents, size.height // stride, size.width // stride)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
