"""Defines the commands that configure, plan, run, sample and export a distillation."""

import codecs
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from phased_dmd.cli import flags
from phased_dmd.cli.flags import ChosenMethod, Loras, Prompts, Recipe, Settings, Sigmas, check_subject, flag, resolved
from phased_dmd.cli.messages import count, tell
from phased_dmd.cli.own import OwnModel, own_of
from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.errors import OutOfMemory, UserError, refuse_full
from phased_dmd.recipes import licence, read_recipe

Output = Annotated[
    Path | None, typer.Option(help="The run folder to write (default: runs/RECIPE).", show_default=False)
]
Cache = Annotated[
    Path | None,
    typer.Option(help="Folder of encoded prompts, for runs to share (default: RUN/conditions).", show_default=False),
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse prompts longer than the text encoder takes.")]
OnlyPhase = Annotated[
    int | None,
    typer.Option(
        "--only-phase",
        help="Train this phase alone, while other processes train the others into the same folder, the last of which "
        "makes a run of them. Needs rollouts.start=teacher.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything but the weights, print the configuration, write nothing.")
]


def distill(
    recipe: Recipe,
    output: Output = None,
    iterations: Annotated[int | None, flag("iterations")] = None,
    steps: Annotated[int | None, flag("plan.steps")] = None,
    phases: Annotated[int | None, flag("plan.phases")] = None,
    method: ChosenMethod = None,
    seed: Annotated[int | None, flag("seed")] = None,
    prompts: Prompts = None,
    log_every: Annotated[int | None, flag("log_every")] = None,
    checkpoint_every: Annotated[int | None, flag("checkpoint_every")] = None,
    set_: Settings = None,
    init_experts: Annotated[list[str] | None, flag("init_experts")] = None,
    cache: Cache = None,
    strict: Strict = False,
    only_phase: OnlyPhase = None,
    own: OwnModel = None,
    dry_run: DryRun = False,
) -> None:
    """Distil a teacher; on an unfinished run folder, go on with it."""
    flags = {
        "iterations": iterations, "plan.steps": steps, "plan.phases": phases, "seed": seed, "prompts": prompts,
        "log_every": log_every, "checkpoint_every": checkpoint_every, "init_experts": init_experts,
    }  # fmt: skip
    config = resolved(recipe, flags, set_, method)
    folder = output or Path("runs") / config.recipe

    from phased_dmd.checkpoint import RunFolder

    RunFolder(folder, only_phase).check(config)
    _tell_licence(config)
    if dry_run:
        _check_all(config, folder, strict, own)
    else:
        _run(config, folder, cache, strict, only_phase, own)


def _tell_licence(config: Config) -> None:
    """Prints the licence that the base has, if it is known, beside the command's output."""
    if line := licence(config):
        tell(line, sys.stderr)


def _check_all(config: Config, folder: Path, strict: bool, own: str | None) -> None:
    """Checks what can be known without weights, or a model of the user's own; prints the configuration as JSON."""
    from phased_dmd.dry_run import dry_run

    if passed := dry_run(config, strict, own_of(config, own)):
        tell(passed, sys.stderr)
    tell(_about(config, folder), sys.stderr)
    text = config.model_dump_json(indent=2)
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    print(text if utf8 else json.dumps(json.loads(text), indent=2))  # a file of it is read as UTF-8 again


def _run(
    config: Config, folder: Path, cache: Path | None, strict: bool, only_phase: int | None, own: str | None
) -> None:  # fmt: skip
    """Distils, or says that the folder holds the finished run."""
    from phased_dmd.checkpoint import RunFolder
    from phased_dmd.train import distill

    if RunFolder(folder).finished(config):
        tell(f"{distill(config, folder)}: already distilled")
        return
    model = own_of(config, own)
    tell(_about(config, folder))
    try:
        distill(config, folder, cache=cache, strict=strict, only_phase=only_phase, own=model)
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}; {_plan_of_this_machine(config)}") from error
    if not RunFolder(folder).finished(config):
        tell(f"{folder}: phase {only_phase} is done; the run is, once all others are")
        return
    flag = f" --own {own}" if own else ""
    after = f"`phased-dmd sample {folder} --output FOLDER{flag}`, `phased-dmd evaluate {folder}{flag}`"
    tell(f"{folder}: done; experts in {folder / 'experts'}; next: {after}")


def _plan_of_this_machine(config: Config) -> str:
    """Returns what the plan says of a run on the GPUs that it was started on."""
    import torch

    from phased_dmd.plan import needs, page

    gpus, memory = int(os.environ.get("WORLD_SIZE", "1")), torch.accelerator.get_memory_info()[1] / 1e9
    try:
        return f"`phased-dmd plan` says: {', '.join(page.verdict(needs(config, gpus, memory)))}"
    except UserError as error:
        return f"`phased-dmd plan` says: {error}"


def _about(config: Config, folder: Path) -> str:
    """Returns one line on what a run does."""
    plan = config.plan
    about = f"{config.method} on {config.recipe}, {count(plan.steps, 'step')} in {count(plan.phases, 'phase')}"
    return f"{folder}: {about}, {count(config.updates, 'update')} in all"


def sample(
    run: Annotated[Path, typer.Argument(help="A run's folder, a checkpoint (RUN@phase-2/300), or an export's folder; "
                                        "or a recipe, for --lora.", show_default=False)],
    output: Annotated[Path, typer.Option(help="New folder for pictures or clips and a contact sheet.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    image: Annotated[Path | None, typer.Option(help="First frame of every --prompt, for image-to-video.")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to sample: a shipped set's name, a file, or a data set of the hub.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Samples of each prompt, made from the seeds 0, 1, ...")] = "1",
    base: Annotated[int | None, typer.Option(min=1, help="Sample the teacher in that many steps instead.")] = None,
    bucket: Annotated[int, typer.Option(min=0, help="Number of the run's teacher.sizes to sample at.")] = 0,
    teacher: Annotated[
        str | None,
        typer.Option(help="Folder of the base, for --lora or an export whose teacher was a local folder."),
    ] = None,
    lora: Loras = None,
    sigmas: Sigmas = None,
    own: OwnModel = None,
) -> None:  # fmt: skip
    """Sample a finished run, a checkpoint or an export, or LoRA files of others.

    Writes PNG pictures, or WebP clips, with a contact sheet.
    """
    from phased_dmd.prompts import Prompt, read_prompts

    check_subject(run, lora, sigmas, own)
    refuse_full(output)
    if not seeds.isdecimal() or int(seeds) < 1:
        raise UserError(f"--seeds: {seeds!r} is no count of samples; 8 makes those of seeds 0 to 7")
    if image is not None and not prompt:
        raise UserError("--image: the picture of every --prompt, and there is none; --prompts FILE names its own")
    asked = [Prompt(text, image) for text in prompt or []] + (read_prompts(prompts) if prompts is not None else [])

    from phased_dmd.networks.build import load_teacher
    from phased_dmd.progress import progress
    from phased_dmd.sampling.loading import assemble, read
    from phased_dmd.sampling.others import load_loras, parse_sigmas
    from phased_dmd.sampling.writing import prompts_for, write_samples

    with progress(f"{run}: prompts encoded, networks loaded", 1) as show:
        if lora:
            config, times = build(read_recipe(str(run))), parse_sigmas(sigmas) if sigmas else ()
            asked = prompts_for(config, asked)
            sampler = load_loras(config, lora, times, teacher, bucket, asked)
        else:
            trained = read(run, teacher)
            config = trained.config
            asked = prompts_for(config, asked)
            sampler = assemble(trained, load_teacher(config, own_of(config, own), fit=False), bucket, asked)
        if image is not None and not sampler.codec.takes_images:
            raise UserError(f"--image: {config.recipe} takes no picture")
        show(1)
    for path in write_samples(sampler, asked, int(seeds), output, base):
        print(path)


def export(
    run: flags.Run,
    output: Annotated[Path, typer.Option(help="New folder to write.")],
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="Of the weights (default: the teacher's own).", show_default=False),
    ] = None,
    fused: Annotated[bool, typer.Option("--fused", help="Write a whole pipeline instead of LoRA files.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the export back, count its keys, and compare samples.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the base, where the teacher is a folder.", show_default=False)
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="Send it to that repository of the hub, private if new.", show_default=False)
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push for all to see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what --push would send, and send nothing.")] = False,
) -> None:
    """Write a finished run's experts as a folder that diffusers, ComfyUI and other programs load.

    The folder holds its own pipeline, workflow and card, and can be sent to the hub as it is.
    """
    from phased_dmd.export import export as write
    from phased_dmd.export import push as send
    from phased_dmd.progress import progress

    if push is None and (public or dry_run):
        raise UserError(f"--{'public' if public else 'dry-run'}: is of --push, which is not given")
    with progress(f"{output}: written{' and verified' if verify else ''}", 1) as show:
        lines = write(run, output, fused, verify, dtype, base_model, push)
        show(1)
    for line in lines:
        print(line)
    for line in send(output, push, public, dry_run) if push else []:
        print(line)


def plan(
    recipe: Recipe,
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs in all, over all machines.")] = None,
    memory_gb: Annotated[float | None, typer.Option(help="Memory of each GPU in GB.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of --tflops that a run reaches.")] = 0.4,
    tflops: Annotated[float, typer.Option(help="Dense bfloat16 speed of a GPU in TFLOPS (H100: 989).")] = 989.0,
    prompts: Prompts = None,
    method: ChosenMethod = None,
    set_: Settings = None,
    simulate: Annotated[bool, typer.Option(help="Run the updates themselves, on tensors without data.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, sizes in bytes.")] = False,
) -> None:
    """Say what a run needs: parameters, memory, work and hours.

    Without --gpus and --memory-gb, say what would run on common ones. Needs no weights, no network and no GPU; warns of
    what is amiss.
    """
    config = resolved(recipe, {"prompts": prompts}, set_, method)
    _tell_licence(config)
    if (gpus is None) != (memory_gb is None):
        raise UserError(f"{'--gpus' if gpus is None else '--memory-gb'}: missing; give both, or neither for proposals")
    if gpus is None and simulate:
        raise UserError("--simulate: needs --gpus and --memory-gb")

    from rich.console import Console

    from phased_dmd.plan import needs, page, proposals, simulated_needs

    if gpus is None or memory_gb is None:
        proposed = proposals(config, utilisation)
        print(page.as_json(list(proposed))) if as_json else page.show_proposals(proposed, Console())
        return
    found = needs(config, gpus, memory_gb, utilisation, tflops)
    if simulate:
        found = simulated_needs(found, config)
    print(page.as_json(found)) if as_json else page.show(found, Console())
