"""Defines the commands that measure, decide the paper's claims, and train the networks that the package ships."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from phased_dmd.cli.flags import Loras, Sigmas, check_prompts, check_subject, check_there
from phased_dmd.cli.own import OwnModel, call_own
from phased_dmd.config.overrides import build
from phased_dmd.errors import UserError, did_you_mean
from phased_dmd.lab.reproduce.claims import NAMES
from phased_dmd.recipes import read_recipe

Subjects = Annotated[
    list[Path],
    typer.Argument(
        help="Runs, checkpoints (RUN@phase-2/300), exports, or folders of samples; or a recipe, for --lora.",
        show_default=False,
    ),
]


def option(help: str, *flags: str, **more: Any) -> Any:
    """Returns an option whose default is not shown, because its help says it or there is none."""
    return typer.Option(*flags, help=help, show_default=False, **more)


def evaluate(
    subjects: Subjects,
    samples: Annotated[
        int, typer.Option(min=64, help="Samples in a set, for the embedded teachers and the toys.")
    ] = 1000,
    prompts: Annotated[str | None, option("Prompts: a shipped set's name or a file (default: the protocol's).")] = None,
    seeds: Annotated[str | None, option("Seeds of every prompt, 0-7 or 42 (default: as in the paper).")] = None,
    features: Annotated[
        str | None,
        option("Network that features come from: digits, efficientnet-lite0, or the hub id or folder of a vision model "
               "of transformers (DINOv3)."),
    ] = None,
    perceptual: Annotated[bool, typer.Option("--perceptual", help="Measure LPIPS too; needs torchvision.")] = False,
    alignment: Annotated[
        str | None, option("CLIP model, by hub id or folder, that measures how samples fit their prompts.")
    ] = None,
    real: Annotated[Path | None, option("Folder of real pictures or clips to compare with too.")] = None,
    floor: Annotated[bool, typer.Option("--floor", help="Compare the base with itself at other seeds too.")] = False,
    flow: Annotated[
        Literal["dis", "raft"], typer.Option(help="Optical flow to use: OpenCV's DIS, or torchvision's RAFT.")
    ] = "dis",
    fps: Annotated[float | None, option("Frames a second of clips (default: the files', 16, nano 8).")] = None,
    bucket: Annotated[int, typer.Option(min=0, help="Number of the teacher's sizes to sample at.")] = 0,
    base: Annotated[
        Path | None,
        option("Folder of samples to compare with, or the teacher of --lora or of an export whose teacher was local."),
    ] = None,
    cache: Annotated[Path | None, option("Folder of the base's samples (default: base, beside the subject).")] = None,
    output: Annotated[Path | None, option("Folder for the results (default: the subject's own).")] = None,
    again: Annotated[bool, typer.Option("--again", help="Evaluate even what was evaluated before.")] = False,
    wide: Annotated[bool, typer.Option("--wide", help="Print all measures, as Markdown.")] = False,
    lora: Loras = None,
    sigmas: Sigmas = None,
    own: OwnModel = None,
) -> None:  # fmt: skip
    """Measure runs, checkpoints, exports, folders of samples, or LoRA files of others against a base.

    Writes evaluation.json into each; of a checkpoint into RUN/evaluations.
    """
    for subject in subjects:
        check_subject(subject, lora, sigmas, own)
    check_prompts(prompts)
    if lora and (output is None or len(subjects) > 1):
        raise UserError("--lora: is evaluated on one recipe, into the folder that --output names")

    from phased_dmd.lab.evaluate import Protocol, parse_seeds

    protocol = Protocol(
        samples=samples, prompts=prompts, seeds=None if seeds is None else parse_seeds(seeds), features=features,
        perceptual=perceptual, alignment=alignment, real=None if real is None else str(real), flow=flow, fps=fps,
        floor=floor, bucket=bucket,
    )  # fmt: skip
    if lora:
        _measure_loras(subjects[0], lora, sigmas, protocol, again, base, cache, output or Path(), wide)
    else:
        _measure(list(dict.fromkeys(subjects)), protocol, again, base, cache, output, wide, own)


def _measure(
    subjects: list[Path], protocol: Any, again: bool, base: Path | None, cache: Path | None, output: Path | None,
    wide: bool, own: str | None,
) -> None:  # fmt: skip
    """Evaluates each subject and prints its table; says of which ones nothing was written anew."""
    from phased_dmd.lab.evaluate import evaluate, results_of

    files = [(output or results_of(subject)) / "evaluation.json" for subject in subjects]
    before = [file.stat().st_mtime_ns if file.exists() else None for file in files]
    model = call_own(own) if own else None
    found = evaluate(subjects, protocol, again, base=base, cache=cache, output=output, own=model)
    for file, stamp, (subject, result) in zip(files, before, found.items(), strict=True):
        print(f"{subject}{': already evaluated' if file.stat().st_mtime_ns == stamp else ''}")
        _print_table(result, wide, file)


def _print_table(evaluation: Mapping[str, Any], wide: bool, file: Path) -> None:
    """Prints all of an evaluation, or what matters and where the rest is."""
    from rich.console import Console

    from phased_dmd.lab.evaluate import table
    from phased_dmd.lab.evaluate.tables import WIDTH, show

    if wide:
        print(table(evaluation))
        return
    console = Console()
    console.width = min(WIDTH, console.width) if console.is_terminal else WIDTH
    show(evaluation, console)
    print(f"all measures: --wide, or {file}")


def _measure_loras(
    recipe: Path, loras: list[Path], sigmas: str | None, protocol: Any, again: bool, base: Path | None,
    cache: Path | None, output: Path, wide: bool,
) -> None:  # fmt: skip
    """Evaluates LoRA files of others on a recipe's base and prints the table."""
    from phased_dmd.lab.evaluate import evaluate_loras
    from phased_dmd.sampling.others import parse_sigmas

    config, times = build(read_recipe(str(recipe))), parse_sigmas(sigmas) if sigmas else ()
    place = str(base) if base else None
    found = evaluate_loras(config, loras, output, times, protocol, again, base=place, cache=cache)
    print(", ".join(map(str, loras)))
    _print_table(found, wide, output / "evaluation.json")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders and checkpoints (RUN@phase-2/300) of one teacher.", show_default=False),
    ],
    output: Annotated[Path | None, option("HTML file to write (default, of one run: RUN/report.html).")] = None,
) -> None:
    """Write a self-contained page that compares evaluated runs and checkpoints."""
    for run in runs:
        check_there(run)
    if output is None and len(runs) > 1:
        raise UserError("--output: a page of several runs needs one, an HTML file")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"--output: {output.parent} is no folder")
    from phased_dmd.lab.evaluate import results_of
    from phased_dmd.lab.report import write_report

    print(write_report(runs, output or results_of(runs[0]) / "report.html"))


def reproduce(
    claim: Annotated[
        str, typer.Argument(help=f"The claim to decide: {', '.join(NAMES)}, or all.", show_default=False)
    ],
    budget: Annotated[
        Literal["quick", "full"],
        typer.Option(help="What to spend: quick takes one seed, few updates and samples and gives no verdict; full "
                     "takes what a verdict needs."),
    ] = "full",
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds 0, 1, ...; gives no verdict.")] = None,
    samples: Annotated[int | None, typer.Option(min=64, help="Samples of each run; gives no verdict.")] = None,
    updates: Annotated[
        float | None, option("Factor on each run's generator updates; gives no verdict.", min=0.001, max=1000)
    ] = None,
    jobs: Annotated[
        int | None, option("Runs at a time (default: the number of CPU cores, or 1 with a GPU).", min=1)
    ] = None,
    recipe: Annotated[
        str | None, option("The only recipe to run; the page keeps others that have all their rows.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs; what is there is not done again.")] = Path(
        "runs/reproduce"
    ),
    output: Annotated[
        Path | None,
        option("Folder for the results, whose rows stand for runs that are gone (default: docs/results, or RUNS/quick "
               "for quick ones)."),
    ] = None,
) -> None:  # fmt: skip
    """Decide a claim of the paper, or repeat a study.

    Makes all runs, then tables, figures and a verdict.
    """
    if claim != "all" and claim not in NAMES:
        raise UserError(f"claim: unknown claim {claim!r}{did_you_mean(claim, [*NAMES, 'all'])}")
    from phased_dmd.lab.reproduce.run import reproduce as run

    results = output or (runs / "quick" if budget == "quick" else Path("docs/results"))
    for path in run(claim, budget, seeds, samples, updates, jobs, recipe, runs, results, print):
        print(path)


def teach(
    what: Annotated[
        Literal["nano", "nano-moe", "nano-i2v", "digits", "scenes", "scenes-moe", "scenes-reader", "clips"],
        typer.Argument(help="What to train: the embedded teacher, a variant of it, or the evaluation's classifier; "
                            "clips are made without training."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    data: Annotated[
        Path, typer.Option(help="Gzipped CSV of digits, with 784 pixels and a label in each row.")
    ] = Path("data/mnist_5k.csv.gz"),
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:  # fmt: skip
    """Train the networks that the package ships, from scratch.

    Takes 40 minutes on one core, of the scenes 150, of clips seconds. A teacher goes on where it was stopped.
    """
    if not data.is_file():
        raise UserError(f"--data: {data} is not a file")
    from phased_dmd.lab.teach.mixture import teach_clips
    from phased_dmd.lab.teach.nano import teach, teach_digits
    from phased_dmd.lab.teach.reader import teach_scenes_reader
    from phased_dmd.lab.teach.variants import teach_i2v, teach_moe
    from phased_dmd.lab.teach.worlds import COLOURED, DIGITS

    world = COLOURED if what.startswith("scenes") else DIGITS
    lessons = {
        "digits": teach_digits, "scenes-reader": teach_scenes_reader, "nano-i2v": teach_i2v,
        "clips": teach_clips,
        **dict.fromkeys(("nano", "scenes"), partial(teach, world)),
        **dict.fromkeys(("nano-moe", "scenes-moe"), partial(teach_moe, world)),
    }  # fmt: skip
    lessons[what](output, data, seed, world.budget, partial(print, flush=True))
