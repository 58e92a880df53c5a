"""Defines the command that shows a run while it goes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from phased_dmd.errors import UserError


def watch(
    run: Annotated[
        Path, typer.Argument(help="The run's folder, which is waited for.", show_default=False, file_okay=False)
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of this machine to serve at; 0 takes a free one.")
    ] = 8123,
    output: Annotated[
        Path | None,
        typer.Option(help="HTML file to write, again and again until the run is finished, in place of serving.",
                     show_default=False),
    ] = None,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two writings of --output.")] = 60,
) -> None:  # fmt: skip
    """Show a run while it goes, in a browser of this machine, until Ctrl-C.

    The page says where the run stands, and shows its curves and previews; with --output it is a file beside the job.
    """
    if output is not None and not (output.absolute().parent.is_dir() or output.absolute().parent == run.absolute()):
        raise UserError(f"--output: {output.parent} is no folder")
    from phased_dmd.checkpoint import RunFolder
    from phased_dmd.lab.report.live import keep_writing, serve, wait_for

    if RunFolder(run).begins():
        print(f"{run}: not begun yet; shown as soon as its run begins (Ctrl-C ends it)", file=sys.stderr, flush=True)
        wait_for(run)
    if output is None:
        serve(run, port, lambda address: print(f"{run}: {address} (Ctrl-C ends it)", flush=True))
    else:
        keep_writing(run, output, every, lambda path: print(path, flush=True))
