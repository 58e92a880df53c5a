"""Holds the command `phased-dmd`. Heavy imports wait until a command runs, so that `-h` is fast."""

import io
import logging
import os
import sys
import warnings
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small models on spinning threads are far slower
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # torch's older name, which the other would overrule
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # or large blocks leave holes on a GPU
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it recommends torchvision, which nothing here needs

import typer
from typer.exceptions import TyperException

from phased_dmd import __version__
from phased_dmd.cli.checkpoints import branch, promote, prune
from phased_dmd.cli.commands import distill, export, plan, sample
from phased_dmd.cli.flags import FieldsCommand
from phased_dmd.cli.lab import evaluate, report, reproduce, teach
from phased_dmd.cli.lists import config, prompts, recipes
from phased_dmd.cli.messages import end, unusable
from phased_dmd.cli.watch import watch
from phased_dmd.errors import LostPeer, OutOfMemory, Stopped, UserError

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports what it could be faster with

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain help: shorter, and read as well through a pipe
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"phased-dmd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Distil slow diffusion and flow models into few-step generators with Phased DMD (arXiv 2510.27684)."""


app.command(cls=FieldsCommand)(distill)
for command in (sample, export, evaluate, report, watch, promote):
    app.command()(command)
app.command(cls=FieldsCommand)(branch)
app.command()(prune)
app.command(cls=FieldsCommand)(plan)
for command in (recipes, config, prompts, reproduce, teach):
    app.command()(command)


def main() -> None:
    """Runs a command; what the user can mend is one line on stderr and exit status 2, and a warning is one line too."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale's encoding may lack letters of a prompt
    warnings.formatwarning = lambda message, *_: f"phased-dmd: {message}\n"  # type: ignore[assignment] fewer parameters
    if os.environ.get("RANK", "0") != "0":
        warnings.simplefilter("ignore")  # the first process tells the same
    try:
        status = app(standalone_mode=False)  # of a typer.Exit; else None
    except TyperException as error:
        end(2, error.format_message() or "a command is needed")
    except UserError as error:
        end(2, str(error))
    except OSError as error:
        end(2, unusable(error, sys.argv[1:]))
    except ArithmeticError as error:
        end(1, str(error))
    except (LostPeer, OutOfMemory) as error:
        print(f"phased-dmd: {error}", file=sys.stderr)  # from whichever process noticed it
        sys.exit(1)
    except Stopped as stop:
        end(128 + stop.number, str(stop))
    if status == 130:  # typer's, for a KeyboardInterrupt
        raise KeyboardInterrupt
    if status:
        sys.exit(status)
