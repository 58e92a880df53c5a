"""The command `phased-dmd`. Heavy imports wait until a command runs, so that `-h` is fast."""

import codecs
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TextIO

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small models on spinning threads are far slower
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it recommends torchvision, which nothing here needs

import typer
from typer.exceptions import TyperException

from phased_dmd import __version__
from phased_dmd.config.overrides import read_yaml
from phased_dmd.errors import LostPeer, Stopped, UserError, did_you_mean, refuse_full
from phased_dmd.lab.reproduce.claims import NAMES
from phased_dmd.prompts import read_prompts

logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it reports what it could be faster with

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Prompts = Annotated[
    str | None,
    typer.Option(help="a shipped set's name, a txt, jsonl, csv or parquet file, or OWNER/NAME, a data set of the hub"),
]
Run = Annotated[Path, typer.Argument(help="a run folder", show_default=False, exists=True)]


def _version(asked: bool) -> None:
    if asked:
        print(f"phased-dmd {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_version, help="say which")] = False,
) -> None:
    """Distil slow diffusion and flow models into few-step generators with Phased DMD (arXiv 2510.27684)."""


@app.command()
def distill(
    recipe: Annotated[
        str,
        typer.Argument(
            help="toy-1d, toy-2d, toy-2d-fast, nano-t2i, nano-t2i-fast, nano-t2v, nano-moe, nano-i2v, wan21-t2i, "
            "wan21-t2v-1.3b, wan22-t2i, wan22-t2v, wan22-i2v, qwen-image, or a YAML or JSON file"
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="the run folder [default: runs/RECIPE]", show_default=False)
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="generator updates a phase, before --method makes more or fewer phases")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="network calls of the distilled generator")] = None,
    phases: Annotated[int | None, typer.Option(help="phases the steps are split into")] = None,
    method: Annotated[
        Literal["dmd", "dmd-sgts", "phased", "phased-sgts"] | None,
        typer.Option(help="sets phases and gradient; keeps the generator updates in all, --iterations or not"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of every random draw")] = None,
    prompts: Prompts = None,
    log_every: Annotated[int | None, typer.Option(help="iterations between lines of metrics.jsonl")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="iterations between checkpoints")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="any field, as in --set generator.lora.rank=16")
    ] = None,
    init_experts: Annotated[str | None, typer.Option(help="a run whose experts these start from")] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="encoded prompts, for runs to share [default: RUN/conditions]", show_default=False),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse prompts longer than the text encoder takes")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check all but weights, print the config")] = False,
) -> None:
    """Distil a teacher; on an unfinished run folder, go on with it."""
    from phased_dmd.recipes import resolve

    flags = {
        "iterations": iterations, "plan.steps": steps, "plan.phases": phases, "seed": seed, "prompts": prompts,
        "log_every": log_every, "checkpoint_every": checkpoint_every, "init_experts": init_experts,
    }  # fmt: skip
    overrides = {key: value for key, value in flags.items() if value is not None} | dict(map(_assignment, set_ or []))
    config = resolve(recipe, overrides, method)
    folder = output or Path("runs") / config.recipe
    _readable(config.prompts)

    from phased_dmd.checkpoint import RunFolder

    RunFolder(folder).check(config)
    if not dry_run and RunFolder(folder).finished(config):
        from phased_dmd.train import distill as run

        tell(f"{run(config, folder)}: already distilled")
        return
    plan = config.plan
    about = f"{config.method} on {config.recipe}, {_count(plan.steps, 'step')} in {_count(plan.phases, 'phase')}"
    about = f"{folder}: {about}, {_count(config.updates, 'update')} in all"
    if dry_run:
        from phased_dmd.plan.dry_run import dry_run as check

        check(config, strict)
        tell(about, sys.stderr)
        text = config.model_dump_json(indent=2)
        utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
        print(text if utf8 else json.dumps(json.loads(text), indent=2))  # a file of it is read as UTF-8 again
    else:
        from phased_dmd.train import distill as run

        tell(about)
        run(config, folder, cache=cache, strict=strict)
        after = f"`phased-dmd sample {folder} --output FOLDER`, `phased-dmd evaluate {folder}`"
        tell(f"{folder}: done; experts in {folder / 'experts'}; next: {after}")


@app.command()
def sample(
    run: Run,
    output: Annotated[Path, typer.Option(help="a folder for pictures or clips and a contact sheet")],
    prompt: Annotated[list[str] | None, typer.Option(help="may be given several times")] = None,
    image: Annotated[Path | None, typer.Option(help="the first frame of every --prompt, for image-to-video")] = None,
    prompts: Prompts = None,
    seeds: Annotated[str, typer.Option(help="how many samples of a prompt: seeds 0, 1, ...")] = "1",
    base: Annotated[int | None, typer.Option(min=1, help="sample the teacher with that many steps instead")] = None,
    bucket: Annotated[int, typer.Option(min=0, help="which of the run's teacher.sizes")] = 0,
    teacher: Annotated[str | None, typer.Option(help="the base's folder, for an export of a local teacher")] = None,
) -> None:
    """Sample a finished run or an export: PNG pictures, or WebP clips, with a contact sheet."""
    from phased_dmd.prompts import Prompt, read_prompts

    refuse_full(output)
    if not seeds.isdecimal() or int(seeds) < 1:
        raise UserError(f"--seeds: {seeds!r} is no count of samples; 8 makes those of seeds 0 to 7")
    if image is not None and not prompt:
        raise UserError("--image: the first frame of every --prompt, and there is none; --prompts FILE names its own")
    asked = [Prompt(text, image) for text in prompt or []] + (read_prompts(prompts) if prompts is not None else [])

    from phased_dmd.finished import assemble, read
    from phased_dmd.sample_files import prompts_for, write_samples

    config, experts = read(run, teacher)
    asked = prompts_for(config, asked)
    sampler = assemble(config, experts, bucket=bucket)
    if image is not None and not sampler.codec.takes_images:
        raise UserError(f"--image: {config.recipe} takes no first frame")
    for path in write_samples(sampler, asked, int(seeds), output, base):
        print(path)


@app.command()
def export(
    run: Run,
    output: Annotated[Path, typer.Option(help="a new folder")],
    format: Annotated[Literal["diffusers", "comfyui"], typer.Option(help="who will load it")] = "diffusers",
    fused: Annotated[bool, typer.Option("--fused", help="full transformers instead of LoRA files")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="load it back, count keys, compare samples")] = False,
) -> None:
    """Write a finished run's experts for stock diffusers or ComfyUI."""
    from phased_dmd.export import export as write

    for line in write(run, format, output, fused, verify):
        print(line)


@app.command()
def evaluate(
    subjects: Annotated[
        list[Path], typer.Argument(help="runs, exports, or folders of samples", show_default=False, exists=True)
    ],
    samples: Annotated[int, typer.Option(min=64, help="a set, for the embedded teachers and the toys")] = 1000,
    prompts: Annotated[
        str | None, typer.Option(help="a shipped set's name or a file, instead of the protocol's", show_default=False)
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="of every prompt, 0-7 or 42 [default: as in the paper]", show_default=False)
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="digits, efficientnet-lite0, or the hub id or folder of a vision model of transformers (DINOv3)",
            show_default=False,
        ),
    ] = None,
    perceptual: Annotated[bool, typer.Option("--perceptual", help="measure LPIPS too; needs torchvision")] = False,
    alignment: Annotated[
        str | None, typer.Option(help="a CLIP model's hub id or folder: how samples fit prompts", show_default=False)
    ] = None,
    real: Annotated[Path | None, typer.Option(help="a folder of real pictures or clips", show_default=False)] = None,
    floor: Annotated[bool, typer.Option("--floor", help="sample the base with other seeds too")] = False,
    flow: Annotated[Literal["dis", "raft"], typer.Option(help="optical flow: OpenCV's, or torchvision's RAFT")] = "dis",
    fps: Annotated[
        float | None, typer.Option(help="of clips [default: the files', 16, nano 8]", show_default=False)
    ] = None,
    bucket: Annotated[int, typer.Option(min=0, help="which of the teacher's sizes")] = 0,
    base: Annotated[
        Path | None,
        typer.Option(help="the other folder of samples, or the teacher of a local one's export", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="where the base's samples are kept [default: base, beside the subject]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="another folder than the subject's own", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="even if evaluated before")] = False,
) -> None:
    """Measure runs, exports or folders of samples against their base; writes evaluation.json into each."""
    _readable(prompts)

    from phased_dmd.lab.evaluate import Protocol, parse_seeds, table
    from phased_dmd.lab.evaluate import evaluate as measure

    protocol = Protocol(
        samples=samples, prompts=prompts, seeds=None if seeds is None else parse_seeds(seeds), features=features,
        perceptual=perceptual, alignment=alignment, real=None if real is None else str(real), flow=flow, fps=fps,
        floor=floor, bucket=bucket,
    )  # fmt: skip
    subjects = list(dict.fromkeys(subjects))
    files = [(output or subject) / "evaluation.json" for subject in subjects]
    before = [file.stat().st_mtime_ns if file.exists() else None for file in files]
    found = measure(subjects, protocol, again, base=base, cache=cache, output=output)
    for file, stamp, (subject, result) in zip(files, before, found.items(), strict=True):
        print(f"{subject}{': already evaluated' if file.stat().st_mtime_ns == stamp else ''}\n{table(result)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders of one teacher", show_default=False, exists=True)],
    output: Annotated[
        Path | None, typer.Option(help="an HTML file [default, of one run: RUN/report.html]", show_default=False)
    ] = None,
) -> None:
    """Write one self-contained page that compares finished and evaluated runs."""
    if output is None and len(runs) > 1:
        raise UserError("--output: a page of several runs needs one, an HTML file")
    from phased_dmd.lab.report import write_report

    print(write_report(runs, output or runs[0] / "report.html"))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="as for distill: a name, or a YAML or JSON file", show_default=False)],
    gpus: Annotated[int, typer.Option(min=1, help="in all, over all machines")],
    memory_gb: Annotated[float, typer.Option(help="of each GPU")],
    utilisation: Annotated[float, typer.Option(help="the share of --tflops that a run reaches")] = 0.4,
    tflops: Annotated[float, typer.Option(help="of a GPU, dense, in bfloat16 [H100: 989]")] = 989.0,
    prompts: Prompts = None,
    method: Annotated[
        Literal["dmd", "dmd-sgts", "phased", "phased-sgts"] | None,
        typer.Option(help="sets phases and gradient; keeps the generator updates in all, --iterations or not"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="any field, as in --set engine.micro_batch=1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="all figures, sizes in bytes")] = False,
) -> None:
    """Say what a run will need, without weights or network: parameters, memory, work, hours, and what is amiss."""
    from phased_dmd.recipes import resolve

    overrides = ({} if prompts is None else {"prompts": prompts}) | dict(map(_assignment, set_ or []))
    config = resolve(recipe, overrides, method)
    _readable(config.prompts)

    from rich.console import Console

    from phased_dmd.plan import needs, page

    found = needs(config, gpus, memory_gb, utilisation, tflops)
    if as_json:
        print(page.as_json(found))
    else:
        page.show(found, Console())


@app.command()
def reproduce(
    claim: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, or all", show_default=False)],
    budget: Annotated[
        Literal["quick", "full"],
        typer.Option(help="one seed, few updates and samples, no verdict; or what a verdict takes"),
    ] = "full",
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds 0, 1, ...; then without a verdict")] = None,
    samples: Annotated[int | None, typer.Option(min=64, help="a cell; then without a verdict")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="runs at a time [default: the number of CPU cores, or 1 with a GPU]", show_default=False
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="the runs; what is there is not done again")] = Path("runs/reproduce"),
    output: Annotated[
        Path | None,
        typer.Option(
            help="where the results go [default: docs/results, or RUNS/quick for quick ones]", show_default=False
        ),
    ] = None,
) -> None:
    """Decide a claim of the paper, or repeat a study: all runs, then tables, figures and a verdict."""
    if claim != "all" and claim not in NAMES:
        raise UserError(f"claim: unknown claim {claim!r}{did_you_mean(claim, [*NAMES, 'all'])}")
    from phased_dmd.lab.reproduce.run import reproduce as run

    results = output or (runs / "quick" if budget == "quick" else Path("docs/results"))
    for path in run(claim, budget, seeds, samples, jobs, runs, results, print):
        print(path)


@app.command()
def teach(
    what: Annotated[
        Literal["nano", "nano-moe", "nano-i2v", "digits"],
        typer.Argument(help="the embedded teacher or a variant, or the evaluation's classifier"),
    ],
    output: Annotated[Path, typer.Option(help="the folder to write")],
    data: Annotated[Path, typer.Option(help="gzipped CSV: 784 pixels and a label a row")] = Path(
        "data/mnist_5k.csv.gz"
    ),
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the networks that the package ships, from scratch (40 minutes on one core)."""
    if not data.is_file():
        raise UserError(f"--data: {data} is not a file")
    from phased_dmd.lab.teach.nano import TrainingBudget, teach_digits, teach_nano
    from phased_dmd.lab.teach.variants import teach_i2v, teach_moe

    lessons = {"nano": teach_nano, "nano-moe": teach_moe, "nano-i2v": teach_i2v, "digits": teach_digits}
    lessons[what](output, data, seed, TrainingBudget(), print)


def _readable(prompts: str | None) -> None:
    """A UserError for prompts that cannot be read, before the imports that take seconds."""
    if prompts is not None:
        read_prompts(prompts)


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise UserError(f"--set: {text!r} is not of the form field=value")
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise UserError(f"--set: {text!r} is not read: {error}; quote what is text: --set '{key}=\"...\"'") from None


def tell(message: str, file: TextIO | None = None) -> None:
    """Of the processes that torchrun starts, the first one speaks for all."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=file)


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
        _end(2, " ".join(error.format_message().split()) or "a command is needed")
    except UserError as error:
        _end(2, " ".join(str(error).split()))
    except OSError as error:
        _end(2, _unusable(error, sys.argv[1:]))
    except ArithmeticError as error:
        _end(1, str(error))
    except LostPeer as error:
        print(f"phased-dmd: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stop:
        _end(128 + stop.number, str(stop))
    if status == 130:  # typer's, for a KeyboardInterrupt
        raise KeyboardInterrupt
    if status:
        sys.exit(status)


def _end(status: int, message: str) -> NoReturn:
    tell(f"phased-dmd: {message}", sys.stderr)
    sys.exit(status)


def _unusable(error: OSError, arguments: Sequence[str]) -> str:
    """The file, the flag that led to it if one did, and what is wrong with it."""
    if not isinstance(error.filename, str) or not error.strerror:
        return " ".join(str(error).split())
    words = [word for argument in arguments for word in argument.split("=", 1)]
    flags = [flag for flag, value in pairwise(words) if flag.startswith("--") and _leads(value, error.filename)]
    return f"{flags[0] + ': ' if flags else ''}{error.filename}: {error.strerror}"


def _leads(value: str, file: str) -> bool:
    return bool(value) and not value.startswith("--") and Path(file).is_relative_to(value)
