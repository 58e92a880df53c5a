"""Defines the commands that go on from a run's checkpoints: promote, branch, prune."""

from pathlib import Path
from typing import Annotated

import typer

from phased_dmd.cli.flags import Settings, assignment
from phased_dmd.cli.messages import count

CHECKPOINT = "RUN@phase-2/300, the checkpoint after 300 iterations of phase 2."


def promote(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT, show_default=False)],
    drop_later: Annotated[
        bool, typer.Option("--drop-later", help="Remove the phases behind it, which have learnt from another expert.")
    ] = False,
) -> None:
    """Take a checkpoint as the expert of its phase, as if the phase had ended there."""
    from phased_dmd.checkpoint import Reference
    from phased_dmd.onward import promote as take

    reference = Reference.needed(checkpoint)
    if not take(reference, drop_later):
        print(f"{checkpoint}: is the expert of phase {reference.phase} already")
        return
    print(f"{checkpoint}: is the expert of phase {reference.phase} now; {_next(reference.run)}")


def _next(run: Path) -> str:
    """Returns what to do with a run after one of its experts has changed."""
    from phased_dmd.checkpoint import RunFolder

    folder = RunFolder(run)
    if folder.finished(folder.config()):
        return f"next: `phased-dmd evaluate {run}`"
    return "next: `phased-dmd distill`, by the command that began the run, which trains the phases behind it"


def branch(
    checkpoint: Annotated[str, typer.Argument(help=CHECKPOINT, show_default=False)],
    output: Annotated[Path, typer.Option(help="New run folder to write.", show_default=False)],
    set_: Settings = None,
) -> None:
    """Begin a run that can have other settings at a checkpoint of another one.

    Takes every field as a flag, as in --generator.lr 1e-5 or --iterations 600.
    """
    from phased_dmd.checkpoint import Reference
    from phased_dmd.onward import branch as begin

    reference = Reference.needed(checkpoint)
    config = begin(reference, output, dict(map(assignment, set_ or [])))
    left = config.phase_iterations(reference.phase) - reference.iteration
    print(f"{output}: begun at {checkpoint}, with {count(left, 'iteration')} of phase {reference.phase} to go")
    print(f"next: phased-dmd distill {output / 'config.json'} --output {output}")


def prune(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", show_default=False)],
    everything: Annotated[
        bool,
        typer.Option("--all", help="Of finished runs, remove the last checkpoint and the encoded prompts too: they can "
                     "then be sampled, evaluated and exported, and not become longer."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:  # fmt: skip
    """Remove what runs do not need, and say how many GB that is.

    Checkpoints of phases that are done (a finished run keeps its last), kept failures, what was half written, and the
    teacher's trajectories of finished runs.
    """
    from phased_dmd.checkpoint import RunFolder
    from phased_dmd.onward import prune as remove

    for run in runs:  # before anything is removed
        RunFolder(run).config()
    total = 0
    for run in runs:
        pruned = remove(run, everything, dry_run)
        size = sum(each.size for each in pruned)
        what = ", ".join(count(each.number, each.what) for each in pruned) or "nothing"
        print(f"{run}: {what}, {size / 1e9:.3g} GB {'would be removed' if dry_run else 'removed'}")
        total += size
    if len(runs) > 1:
        print(f"in all {total / 1e9:.3g} GB")
