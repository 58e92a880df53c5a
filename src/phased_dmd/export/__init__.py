"""`export` writes a finished run as files that stock diffusers and ComfyUI load."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from phased_dmd.checkpoint import partial_of
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.export.comfyui import write_comfyui
from phased_dmd.export.exported_run import ExportedRun, format_times
from phased_dmd.export.stock import render, write_diffusers
from phased_dmd.export.verify import verify_comfyui, verify_diffusers
from phased_dmd.sampling.loading import EXPORT

Format = Literal["diffusers", "comfyui"]
WAN_TOKENS = 512  # that Wan's text is padded to, by stock pipelines and ComfyUI alike


def export(run: Path, format: Format, output: Path, fused: bool = False, verify: bool = False) -> list[str]:
    """Writes a finished run's experts into the folder `output`; returns what there is to say, line by line.

    fused: full transformers, the experts merged into them, instead of LoRA files. verify: load the export back and
    compare, which leaves nothing behind if it fails (VerificationError). Raises UserError for what the user can mend.
    """
    exported = ExportedRun.open(run, fused)
    if format == "comfyui" and fused:
        raise UserError("--fused: full experts are written for diffusers only")
    if not fused and exported.config.generator.weights == "full":
        raise UserError(f"{run}: its experts are full weights, not LoRA; export them with --format diffusers --fused")
    refuse_full(output)
    exported.check_experts()
    partial = partial_of(output.absolute())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error
    try:
        write = write_diffusers if format == "diffusers" else write_comfyui
        lines = describe(exported, partial, format, *write(exported, partial))
        if verify:
            lines += (verify_diffusers if format == "diffusers" else verify_comfyui)(exported, partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines


def describe(
    run: ExportedRun, folder: Path, format: Format, scheduler: str, times: Sequence[float], gap: float
) -> list[str]:
    """Writes the model card and `export.json`, which `load` reads; returns what there is to say, line by line.

    times: the stock scheduler's, off the trained ones by at most gap.
    """
    shown, comfyui, length = format_times(times), format == "comfyui", run.teacher.max_tokens
    padding = None
    if run.is_wan and length != WAN_TOKENS:  # Wan attends to the padding: another length is another sample
        padding = f"padded to {length} tokens in training, and the network attends to the padding; " + (
            f"ComfyUI pads it to {WAN_TOKENS} at least, so its samples differ from the run's"
            if comfyui
            else f"`sample.py` says so by `max_sequence_length`; a pipeline that is not told pads it to {WAN_TOKENS}"
        )
    card = render(run, "README.md.j2", comfyui=comfyui, scheduler=scheduler, stock=shown, gap=gap, padding=padding)
    (folder / "README.md").write_text(card, "utf-8")
    files = [{"phase": expert.phase, "network": expert.network, "file": expert.file} for expert in run.experts]
    about = {"format": format, "base": run.base, "experts": files, "config": portable_config(run)}
    (folder / EXPORT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    begins = [format_times([run.plan.times[step] for step in expert.steps]) for expert in run.experts]
    lines = [f"{each.file}: {each.part} from {times}" for each, times in zip(run.experts, begins, strict=True)]
    lines += [f"warning: teacher.max_tokens: text was {padding}"] if padding else []
    return [*lines, f"stock times ({scheduler}): {shown}; off the trained ones by at most {gap:.2g}"]


def portable_config(run: ExportedRun) -> dict[str, Any]:
    """Returns the run's config as the exported files have it, without paths of this machine."""
    data = run.config.model_dump(mode="json")
    data["generator"]["lora"]["alpha"] = run.config.generator.lora.rank
    data["generator"]["weights"] = "full" if run.fused else "lora"
    data["teacher"] |= {"path": run.base or run.model, "quantise": None}
    data["init_experts"] = None
    data["prompts"] = Path(data["prompts"]).name
    return data
