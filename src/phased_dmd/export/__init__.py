"""`export`: a finished run as files that stock diffusers and ComfyUI load."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from phased_dmd.checkpoint import partial_of
from phased_dmd.config.teacher import WanTeacher
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.export.comfyui import SCHEDULE, comfyui_tensors, comfyui_times, workflow
from phased_dmd.export.scripts import nearest_scheduler, render, stock_times
from phased_dmd.export.subject import Subject
from phased_dmd.export.verify import verify_comfyui, verify_diffusers
from phased_dmd.export.weights import copy_base, lora_tensors, save_full, save_lora
from phased_dmd.finished import EXPORT
from phased_dmd.models.source import quiet

Format = Literal["diffusers", "comfyui"]
WAN_TOKENS = 512  # that Wan's text is padded to, by stock pipelines and ComfyUI alike


def export(run: Path, format: Format, output: Path, fused: bool = False, verify: bool = False) -> list[str]:
    """Writes a finished run's experts into the folder `output`; returns what there is to say, line by line.

    fused: full transformers, the experts merged into them, instead of LoRA files. verify: load the export back and
    compare, which leaves nothing behind if it fails (VerificationError). Raises UserError for what the user can mend.
    """
    subject = Subject.of(run, fused)
    if format == "comfyui" and fused:
        raise UserError("--fused: full experts are written for diffusers only")
    if not fused and subject.config.generator.weights == "full":
        raise UserError(f"{run}: its experts are full weights, not LoRA; export them with --format diffusers --fused")
    refuse_full(output)
    subject.check_experts()
    partial = partial_of(output.absolute())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error
    try:
        lines = (write_diffusers if format == "diffusers" else write_comfyui)(subject, partial)
        if verify:
            lines += (verify_diffusers if format == "diffusers" else verify_comfyui)(subject, partial)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return lines


def write_diffusers(subject: Subject, folder: Path) -> list[str]:
    """Weights, `sample.py`, the nearest stock scheduler, the card, and for a shipped teacher the pipeline itself."""
    if subject.fused:
        save_full(subject, folder)
    else:
        for piece in subject.pieces:
            save_lora(folder / piece.file, lora_tensors(subject, piece), subject.header(piece))
    if subject.base_is_shipped:
        copy_base(subject.source, folder / "base")
    scheduler = nearest_scheduler(subject)
    with quiet():
        scheduler.save_pretrained(folder / "scheduler")
    (folder / "sample.py").write_text(render(subject, "sample.py.j2"), "utf-8")
    return finish(subject, folder, "diffusers", type(scheduler).__name__, *stock_times(subject, scheduler))


def write_comfyui(subject: Subject, folder: Path) -> list[str]:
    """LoRA files by ComfyUI's names, a workflow, and the card."""
    for piece in subject.pieces:
        save_lora(folder / piece.file, comfyui_tensors(subject, piece), subject.header(piece), diffusers=False)
    (folder / "workflow.json").write_text(json.dumps(workflow(subject), indent=2) + "\n", "utf-8")
    return finish(subject, folder, "comfyui", SCHEDULE, *comfyui_times(subject))


def finish(
    subject: Subject, folder: Path, format: Format, scheduler: str, times: Sequence[float], gap: float
) -> list[str]:
    """The card, and what `load` reads: the run's config as these files have it, without paths of this machine.

    times: those of the stock scheduler, off the trained ones by at most gap. Returns what there is to say.
    """
    shown, comfyui = numbers(times), format == "comfyui"
    padding = odd_padding(subject, comfyui)
    card = render(subject, "README.md.j2", comfyui=comfyui, scheduler=scheduler, stock=shown, gap=gap, padding=padding)
    (folder / "README.md").write_text(card, "utf-8")
    files = [{"phase": piece.phase, "network": piece.network, "file": piece.file} for piece in subject.pieces]
    about: dict[str, Any] = {
        "format": format, "base": subject.base, "experts": files, "config": subject.portable_config(),
    }  # fmt: skip
    (folder / EXPORT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    lines = [f"{piece.file}: {piece.part} from {numbers(piece.times)}" for piece in subject.pieces]
    lines += [f"warning: teacher.max_tokens: text was {padding}"] if padding else []
    return [*lines, f"stock times ({scheduler}): {shown}; off the trained ones by at most {gap:.2g}"]


def odd_padding(subject: Subject, comfyui: bool) -> str | None:
    """What has to be known where Wan's text was padded to another length than everywhere else; else None.

    Wan attends to the padding: another length is another sample.
    """
    length = subject.teacher.max_tokens
    if not isinstance(subject.teacher, WanTeacher) or length == WAN_TOKENS:
        return None
    where = (
        f"ComfyUI pads it to {WAN_TOKENS} at least, so its samples differ from the run's"
        if comfyui
        else f"`sample.py` says so by `max_sequence_length`; a pipeline that is not told pads it to {WAN_TOKENS}"
    )
    return f"padded to {length} tokens in training, and the network attends to the padding; {where}"


def numbers(times: Sequence[float]) -> str:
    return ", ".join(f"{time:.6g}" for time in times)
