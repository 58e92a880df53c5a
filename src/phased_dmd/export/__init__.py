"""`export` writes a finished run as a folder that diffusers, ComfyUI and others load; `push` sends it to the hub."""

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from phased_dmd.checkpoint import partial_of
from phased_dmd.errors import UserError, refuse_full
from phased_dmd.export import comfyui, few_steps
from phased_dmd.export.card import write_card
from phased_dmd.export.exported_run import ExportedRun, format_times
from phased_dmd.export.fused import copy_parts, save_fused, stock_times
from phased_dmd.export.lora import save_lora
from phased_dmd.export.verify import verify as compare_samples
from phased_dmd.sampling.loading import EXPORT

Written = Literal["float32", "bfloat16"]


def export(
    run: Path, output: Path, fused: bool = False, verify: bool = False, dtype: Written | None = None,
    base_model: str | None = None, repo: str | None = None,
) -> list[str]:  # fmt: skip
    """Writes a finished run's experts into the folder `output`; returns what there is to say, line by line.

    fused: a whole pipeline, the experts merged into its transformers, instead of LoRA files. verify: load the export
    back and compare, which leaves nothing behind if it fails (VerificationError). dtype: of the weights; None takes the
    teacher's. base_model: the hub id of a teacher in a folder. repo: the hub id that the card names as its own.
    Raises UserError for what the user can mend.
    """
    exported = ExportedRun.open(run, fused, dtype, base_model)
    if not fused and exported.config.generator.weights == "full":
        raise UserError(f"{run}: its experts are full weights, not LoRA; export them with --fused")
    refuse_full(output)
    exported.check_experts()
    partial = partial_of(output.absolute())
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output: {output} cannot be written: {error.strerror}") from error
    try:
        lines = list(write(exported, partial))
        checked = compare_samples(exported, partial) if verify else []
        write_card(exported, partial, repo, checked[-1] if checked else None)
        partial.replace(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [*lines, *checked]


def write(run: ExportedRun, folder: Path) -> Iterator[str]:
    """Writes the weights, the pipeline and the workflow; yields what there is to say of each."""
    if run.fused:
        save_fused(run, folder)
    for expert in run.experts:
        if not run.fused:
            save_lora(run, expert, folder / expert.file)
        yield f"{expert.file}: {expert.part} from {format_times([run.plan.times[step] for step in expert.steps])}"
    if not run.fused and run.base_is_shipped:
        (folder / "base").mkdir()
        shutil.copy(run.source.folder / "model_index.json", folder / "base")
        copy_parts(run, folder / "base")
    elif not run.fused and run.base is None:
        yield "warning: the base is a folder of this machine; --base-model OWNER/NAME says what it is on the hub"
    write_pipeline(run, folder)
    if obstacle := comfyui.obstacle(run):
        yield f"no workflow for ComfyUI: {obstacle}"
    else:
        (folder / "workflow.json").write_text(json.dumps(comfyui.workflow(run), indent=2) + "\n", "utf-8")
        yield "workflow.json: ComfyUI, at exactly the trained times"
    if run.fused:
        times, gap = stock_times(run)
        yield f"stock times: {format_times(times)}; off the trained ones by at most {gap:.2g}"


def write_pipeline(run: ExportedRun, folder: Path) -> None:
    """Writes `pipeline.py`, which diffusers runs where it is trusted, and `export.json`, which says what is here."""
    own = Path(few_steps.__file__).read_text("utf-8")
    named = (
        f'\n\nPipeline = few_step_class("{run.pipeline}")  # what diffusers looks for: one class, of the base\'s kind\n'
    )
    (folder / "pipeline.py").write_text(own + named, "utf-8")
    size, stock = run.teacher.sizes[0], run.adapter.stock
    frames = {"num_frames": size.num_frames} if stock.frames else {}
    about = {
        "base": run.base, "revision": run.teacher.revision, "fused": run.fused, "pipeline": run.pipeline,
        "times": list(run.plan.times[:-1]), "boundary_ratio": run.boundary_ratio, "solver": run.config.ablation.solver,
        "max_sequence_length": run.teacher.max_tokens if stock.limits else None,
        "size": {"height": size.height, "width": size.width} | frames,
        "unguided": dict([stock.unguided]), "fixed": dict(stock.fixed), "padded": run.adapter.padded,
        "alone": stock.alone, "cleans": stock.cleans,
        "experts": [
            {key: getattr(expert, key) for key in ("phase", "network", "steps", "part", "name", "file")}
            for expert in run.experts
        ],
        "config": portable_config(run),
    }  # fmt: skip
    (folder / EXPORT).write_text(json.dumps(about, indent=2) + "\n", "utf-8")


def portable_config(run: ExportedRun) -> dict[str, Any]:
    """Returns the run's config as the exported files have it, without paths of this machine."""
    data = run.config.model_dump(mode="json")
    data["generator"]["lora"]["alpha"] = run.config.generator.lora.rank
    data["generator"]["weights"] = "full" if run.fused else "lora"
    data["teacher"] |= {"path": run.base or run.model, "quantise": None}
    data["init_experts"] = None
    data["prompts"] = Path(data["prompts"]).name
    return data


def push(folder: Path, repo: str, public: bool = False, dry_run: bool = False) -> Sequence[str]:
    """Sends an export to a repository of the hub, made if it is not there; returns what went, or would, line by line.

    The token is the hub library's own (`hf auth login` or HF_TOKEN). Raises UserError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(folder)}: {path.stat().st_size:,} bytes" for path in files]
    whole = f"{len(files)} files, {sum(path.stat().st_size for path in files):,} bytes"
    if dry_run:
        return [
            *lines,
            f"{repo}: {whole} would go there, {'for all to see' if public else 'private'}; nothing was sent",
        ]
    try:
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder)
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise UserError(f"--push: {repo}: {' '.join(str(error).split())}; the export is in {folder}") from error
    return [*lines, f"{repo}: {whole} sent"]
