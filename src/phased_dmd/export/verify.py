"""Verification of an export: it is loaded back, every key must be used, and its samples must be the run's."""

import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers import DiffusionPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from phased_dmd.config.teacher import Size
from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.export.exported_run import ExportedExpert, ExportedRun, format_times
from phased_dmd.export.few_steps import load_pipeline
from phased_dmd.maths.rollout import rollout
from phased_dmd.media import read_picture
from phased_dmd.models.quantise import quantise
from phased_dmd.models.source import quiet, repeated
from phased_dmd.networks.build import load_teacher
from phased_dmd.networks.roles import TEACHER
from phased_dmd.prompts import Prompt
from phased_dmd.sampling.loading import Trained, assemble, read_lora, read_shards, without_prefix

TOLERANCE = 1e-4  # of latents, in full precision
SHARE = 0.25  # of what the experts change, root mean square, in bfloat16: half of their scale would be twice that
LEAST = 0.03  # that they change, of the samples: rounding to bfloat16 moves these by .005
ROOM = 0.9  # of the free memory, which the base may take
STILL, CLIP = Size(height=64, width=96), Size(num_frames=5, height=64, width=96)  # small, of any model's strides
PROMPTS = ("a handwritten seven moving right", "two cats")
FAILED = "verification failed"
UNTOLD = (
    "the experts change too little to be told from rounding in bfloat16; more memory, or --dtype float32, would tell"
)


class VerificationError(ArithmeticError):
    """An export that stock software does not read as the run it was made from."""


def verify(run: ExportedRun, folder: Path, dtype: torch.dtype | None = None) -> list[str]:
    """Runs the export's pipeline beside the run, one after the other, from the same noise.

    dtype: float32, or bfloat16 where the memory does not hold the base in float32; None looks at the memory. In
    float32 both must agree, in bfloat16 by far more than the experts differ from the base. The base of both is packed
    as the run's was, unless the experts were merged into it.
    """
    dtype = dtype or precision(run.source.count_weights(), free_memory())
    size = STILL if run.task in ("t2i", "i2i") else CLIP
    with tempfile.TemporaryDirectory() as scratch:
        picture = Path(scratch) / "first.png"
        Image.effect_noise((size.width, size.height), 80).convert("RGB").save(picture)
        texts = PROMPTS[1:] if run.adapter.stock.alone else PROMPTS
        prompts = [Prompt(text, picture if run.takes_images else None) for text in texts]
        noise, expected, bare = sample_run(run, prompts, size, dtype)
        stock, latents = run.adapter.stock, noise.shape[-2:]
        given = stock.given(noise).to(dtype if stock.rounds else noise.dtype)
        options: dict[str, Any] = {"height": size.height, "width": size.width, "latents": given}
        options |= {"num_frames": size.num_frames} if stock.frames else {}
        options |= {"image": read_picture(picture)} if run.takes_images else {}
        for load in (load_package, load_custom):
            pipe = load_quietly(load, run, folder, dtype)
            counts = [check_loaded(run, folder, expert, pipe) for expert in run.experts]
            times = format_times(pipe.scheduler.times)
            with quiet():
                made = pipe(prompt=list(texts), generator=renoise_generator(), output_type="latent", **options)[0]
            made = stock.returned(pipe, made, *latents)
            del pipe  # before the next, which may fill the memory
            found = compare(run, made, expected, bare, times, dtype)
    if run.teacher.quantise:
        where = "the full base: the run's was" if run.fused else "the run's own base,"
        counts.append(f"verified on {where} packed in {run.teacher.quantise}")
    return [*counts, f"verified, by load_pipeline and as a custom pipeline: {found}"]


def compare(run: ExportedRun, made: Tensor, expected: Tensor, bare: Tensor, times: str, dtype: torch.dtype) -> str:
    """Says how far a pipeline's samples are from the run's; raises VerificationError if that is too far.

    bare: the run's without experts. Transformers that were merged in bfloat16 are rounded as all computation in it is.
    """
    difference = (made - expected).double()
    if dtype == torch.float32 and not (run.fused and run.dtype == torch.bfloat16):
        figure, most = difference.abs().max().item(), TOLERANCE
        found = f"samples at {times} differ from the run's by up to {figure:.2g}"
    else:
        change = (expected - bare).double().norm()
        if not change >= LEAST * expected.double().norm():
            raise UserError(f"--verify: {UNTOLD}")
        figure, most = (difference.norm() / change).item(), SHARE
        found = f"samples at {times} differ from the run's by {figure:.2g} of what the experts change, in bfloat16"
    if not figure <= most:
        raise VerificationError(f"{FAILED}: {found}, more than {most:g}")
    return found


def precision(weights: int, free: float) -> torch.dtype:
    """Returns the widest dtype in which a base of so many weights fits into the free bytes; none is a UserError."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype.itemsize * weights <= ROOM * free:
            return dtype
    needed, there = torch.bfloat16.itemsize * weights / 1e9, free / 1e9
    elsewhere = "; CUDA_VISIBLE_DEVICES= takes the host's memory" if device().type == "cuda" else ""
    raise UserError(f"--verify: the base takes {needed:.3g} GB in bfloat16, and {there:.3g} GB are free{elsewhere}")


def free_memory() -> float:
    """Returns the free bytes of the GPU, or of the host where there is none."""
    if device().type == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def sample_run(
    run: ExportedRun, prompts: Sequence[Prompt], size: Size, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns noise, and what the package's own sampler makes of it with the experts, and on the same grid without.

    Adapters are rounded as their files are.
    """
    kind: Literal["float32", "bfloat16"] = "float32" if dtype == torch.float32 else "bfloat16"
    changes = {"dtype": kind, "sizes": (size,)} | ({"quantise": None} if run.fused else {})
    config = run.config.model_copy(update={"teacher": run.teacher.model_copy(update=changes)})
    experts = run.expert_tensors
    if run.config.generator.weights == "lora" and not run.fused:  # the files hold the scale
        lora = config.generator.lora.model_copy(update={"alpha": config.generator.lora.rank})
        generator = config.generator.model_copy(update={"lora": lora})
        config, experts = config.model_copy(update={"generator": generator}), run.written
    trained = Trained(config, experts, config.plan.phases)
    sampler = assemble(trained, load_teacher(config, fit=False), prompts=prompts)
    system, known = sampler.system, sampler.encode(prompts)
    condition = system.model.batch([known[prompt] for prompt in prompts])
    noise = normal(system.model.sample_shapes[0], range(len(prompts)), "verify").to(device())
    generator, stock = renoise_generator(), run.adapter.stock

    def fresh(step: int) -> Tensor:  # as the script's scheduler draws it
        drawn = torch.randn(stock.stepped(noise).shape, generator=generator)
        return stock.restored(drawn.to(device()), *noise.shape[-2:])

    def bare(step: int, x: Tensor, t: Tensor) -> Tensor:
        return system.roles.predict(TEACHER, system.plan.expert(step).network, x, t, condition)

    with torch.no_grad():
        path, start, model = system.plan.path(system.plan.num_phases), system.start(noise), system.model
        made = system.roll(path, start, condition, noise=fresh).x
        return noise, made, rollout(bare, start, path, model.schedule, model.prediction).x


def load_package(run: ExportedRun, folder: Path, dtype: torch.dtype, where: torch.device) -> Any:
    """Loads the export as `phased_dmd.load_pipeline` does."""
    base = run.teacher.path if run.source.on_disk and not run.base_is_shipped and not run.fused else None
    return load_pipeline(folder, base=base, dtype=dtype, device=where, **run.adapter.stock.parts(run.source))


def load_custom(run: ExportedRun, folder: Path, dtype: torch.dtype, where: torch.device) -> Any:
    """Loads the export as a custom pipeline of diffusers, which runs the copy of our own file that was just written."""
    base = folder if run.fused else folder / "base" if run.base_is_shipped else run.source.folder
    options: dict[str, Any] = {"dtype": {"default": dtype, "vae": torch.float32}, "use_safetensors": True}
    options |= run.adapter.stock.parts(run.source)
    pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline=str(folder), trust_remote_code=True, **options)
    return pipe.load_few_steps(folder).to(where)


def load_quietly(
    load: Callable[[ExportedRun, Path, torch.dtype, torch.device], Any], run: ExportedRun, folder: Path,
    dtype: torch.dtype,
) -> Any:  # fmt: skip
    """Loads a pipeline, its base packed as the run's; a VerificationError says why if it cannot be loaded."""
    packed = None if run.fused else run.teacher.quantise
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="While injecting the PEFT adapters")  # keys are counted below
            diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)  # errors come as exceptions too
            pipe = load(run, folder, dtype, torch.device("cpu") if packed else device())
    except OSError as error:
        raise UserError(f"--verify: the base pipeline is not at hand ({error})") from error
    except ImportError as error:
        raise UserError(f"--verify: the base pipeline needs more: {' '.join(str(error).split())}") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise VerificationError(f"{FAILED}: the pipeline cannot load the export ({reason})") from error
    if packed:
        for name in run.networks:
            quantise(repeated(pipe.components[name]), packed, dtype, device())
        pipe.to(device())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_loaded(run: ExportedRun, folder: Path, expert: ExportedExpert, pipe: Any) -> str:
    """Checks that all of an expert's keys are in the pipeline; returns a line with their number."""
    network = pipe.components[expert.part]
    if run.fused:
        keys, loaded = read_shards(folder / expert.file), network.state_dict()
    else:
        keys = without_prefix(read_lora(folder / expert.file, run.config.teacher))
        there = expert.name in pipe.get_list_adapters().get(expert.part, ())
        loaded = get_peft_model_state_dict(network, adapter_name=expert.name) if there else {}
    check_keys(expert.file, keys, loaded)
    return f"{expert.file}: all {len(keys)} keys loaded"


def check_keys(file: str, keys: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    """Raises VerificationError where a key is not loaded, or not as it stands in the file, rounded to what computes."""
    if unused := [key for key in keys if key not in loaded]:
        raise VerificationError(f"{FAILED}: {len(unused)} of {len(keys)} keys of {file} unused: {unused[0]}")
    if changed := next(
        (key for key in keys if not torch.equal(keys[key].to(loaded[key].dtype), loaded[key].cpu())), None
    ):
        raise VerificationError(f"{FAILED}: {changed} of {file} is not what was loaded")


def renoise_generator() -> torch.Generator:
    """Returns the generator from which both sides draw what re-noising adds; the first noise is given to both."""
    return torch.Generator().manual_seed(0)
