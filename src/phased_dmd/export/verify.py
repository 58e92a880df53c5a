"""Verification of an export: it is loaded back, every key must be used, and its samples must be the run's."""

import runpy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from phased_dmd.config.teacher import Size
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export.exported_run import ExportedExpert, ExportedRun, format_times
from phased_dmd.export.stock import lora_tensors
from phased_dmd.media import read_picture
from phased_dmd.models.qwen_image import PATCH, pack, unpack
from phased_dmd.models.source import quiet
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.loading import assemble, read_lora, read_shards

TOLERANCE = 1e-4  # of latents, in full precision
STILL, CLIP = Size(height=64, width=96), Size(num_frames=5, height=64, width=96)  # small, of any model's strides
PROMPTS = ("a handwritten seven moving right", "two cats")
FAILED = "verification failed"


class VerificationError(ArithmeticError):
    """An export that stock software does not read as the run it was made from."""


def verify_diffusers(run: ExportedRun, folder: Path) -> list[str]:
    """Runs the export's own `sample.py` beside the run, from the same noise, both in full precision."""
    size = STILL if run.task == "t2i" else CLIP
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "first.png"
        Image.effect_noise((size.width, size.height), 80).convert("RGB").save(picture)
        prompts = [Prompt(text, picture if run.task == "i2v" else None) for text in PROMPTS]
        noise, expected = sample_run(run, prompts, size)
        pipe, sample = load_script(run, folder)
        counts = [check_loaded(run, folder, expert, pipe) for expert in run.experts]
        options: dict[str, Any] = {"height": size.height, "width": size.width, "latents": to_pipeline(run, noise)}
        options |= {"num_frames": size.num_frames} if run.is_wan else {}
        options |= {"image": read_picture(picture)} if run.task == "i2v" else {}
        with quiet():
            made = sample(pipe, list(PROMPTS), generator=renoise_generator(), output_type="latent", **options)
    difference = (from_pipeline(run, made, size) - expected).abs().max().item()
    times = format_times([time / 1000 for time in pipe.scheduler.timesteps.tolist()])
    found = f"samples at {times} differ from the run's by up to {difference:.2g}"
    if not difference <= TOLERANCE:
        raise VerificationError(f"{FAILED}: {found}, more than {TOLERANCE:g}")
    return [*counts, f"verified: {found}"]


def verify_comfyui(run: ExportedRun, folder: Path) -> list[str]:
    """Reads the files by diffusers' converter, which must use every key and give back the adapters."""
    lines = []
    for expert in run.experts:
        try:
            found = read_lora(folder / expert.file, run.teacher.kind)
        except (KeyError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise VerificationError(f"{FAILED}: {expert.file} cannot be read ({reason})") from error
        check_keys(expert.file, lora_tensors(run, expert), found)
        check_keys(expert.file, found, lora_tensors(run, expert))
        lines.append(f"{expert.file}: all {len(load_file(folder / expert.file))} keys read")
    return lines


def sample_run(run: ExportedRun, prompts: Sequence[Prompt], size: Size) -> tuple[Tensor, Tensor]:
    """Returns noise, and what the package's own sampler makes of it, on the full base even if the run's was packed."""
    teacher = run.teacher.model_copy(update={"dtype": "float32", "sizes": (size,), "quantise": None})
    sampler = assemble(run.config.model_copy(update={"teacher": teacher}), run.expert_tensors)
    system, known = sampler.system, sampler.encode(prompts)
    condition = system.model.batch([known[prompt] for prompt in prompts])
    noise = normal(system.model.sample_shapes[0], range(len(prompts)), "verify").to(device())
    generator = renoise_generator()

    def fresh(step: int) -> Tensor:  # as the script's scheduler draws it
        drawn = torch.randn(to_pipeline(run, noise).shape, generator=generator)
        return from_pipeline(run, drawn.to(device()), size)

    with torch.no_grad():
        path = system.plan.path(system.plan.num_phases)
        return noise, system.roll(path, system.start(noise), condition, noise=fresh).x


def load_script(run: ExportedRun, folder: Path) -> tuple[Any, Callable[..., Any]]:
    """Returns the pipeline as the export's `sample.py` loads it, in full precision, and the script's `sample`."""
    base = [run.teacher.path] if run.base is None else []
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
        reason = " ".join(str(error).split())
        raise VerificationError(f"{FAILED}: sample.py cannot load the export ({reason})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, script["sample"]


def check_loaded(run: ExportedRun, folder: Path, expert: ExportedExpert, pipe: Any) -> str:
    """Checks that all of an expert's keys are in the pipeline; returns a line with their number."""
    network = pipe.experts[expert.name] if run.fused and run.switches else pipe.components[expert.part]
    if run.fused:
        keys, loaded = read_shards(folder / expert.file), network.state_dict()
    else:
        keys = {name.removeprefix("transformer."): t for name, t in load_file(folder / expert.file).items()}
        there = expert.name in pipe.get_list_adapters().get(expert.part, ())
        loaded = get_peft_model_state_dict(network, adapter_name=expert.name) if there else {}
    check_keys(expert.file, keys, loaded)
    return f"{expert.file}: all {len(keys)} keys loaded"


def check_keys(file: str, keys: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raises VerificationError where a key is not loaded, or not as it stands in the file."""
    if unused := [key for key in keys if key not in loaded]:
        raise VerificationError(f"{FAILED}: {len(unused)} of {len(keys)} keys of {file} unused: {unused[0]}")
    if changed := next((key for key in keys if not torch.equal(keys[key], loaded[key].cpu())), None):
        raise VerificationError(f"{FAILED}: {changed} of {file} is not what was loaded")


def renoise_generator() -> torch.Generator:
    """Returns the generator from which both sides draw what re-noising adds; the first noise is given to both."""
    return torch.Generator().manual_seed(0)


def to_pipeline(run: ExportedRun, latents: Tensor) -> Tensor:
    """Packs latents as the stock pipeline takes them: Qwen-Image's are tokens."""
    return latents if run.is_wan else pack(latents)


def from_pipeline(run: ExportedRun, latents: Tensor, size: Size) -> Tensor:
    """Unpacks what the stock pipeline gives, the inverse of `to_pipeline`."""
    token = 8 * PATCH  # pixels a side
    return latents if run.is_wan else unpack(latents, size.height // token, size.width // token)
