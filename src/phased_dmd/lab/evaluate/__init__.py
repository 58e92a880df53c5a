"""`evaluate`: what a few-step generator makes beside what its base makes, in numbers and pictures.

A subject is a run, a checkpoint, an export, or a folder of samples. All rows of its tables have the same prompts and
seeds; gaps are taken to the row of the base at its own number of steps. Where a set has a seed for each sample, Fréchet
distances are measured twice: to the base's samples of other seeds, where the base's own row shows how far apart two
sets of one distribution are, and (`paired`) to those of the same seeds, where a student that keeps to the base's
trajectories may come closer than that. In the paper's protocol, of few seeds, only the second is there.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import Reference, RunFolder, write_atomically
from phased_dmd.config import Config
from phased_dmd.config.teacher import AnalyticTeacher, PipelineTeacher
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate.compare import compare_media, compare_mixture, slug
from phased_dmd.lab.evaluate.instruments import Readings, load_instruments
from phased_dmd.lab.evaluate.measures import Measurement
from phased_dmd.lab.evaluate.sample_sets import Protocol, parse_seeds, sample_sets
from phased_dmd.lab.evaluate.samples import Base, SampleFolder, generate
from phased_dmd.lab.evaluate.tables import BETTER, COSTS, HEADINGS, NET_OF, table, title
from phased_dmd.models.analytic import ExactMixture
from phased_dmd.models.exact_clips import load_clips
from phased_dmd.models.hashes import file_hash
from phased_dmd.networks.build import Own
from phased_dmd.progress import progress
from phased_dmd.sampling.loading import EXPORT, experts_made_by, load
from phased_dmd.sampling.others import load_loras
from phased_dmd.sampling.sampler import Sampler

__all__ = [
    "BETTER", "COSTS", "HEADINGS", "NET_OF", "Measurement", "Protocol", "evaluate", "evaluate_loras", "parse_seeds",
    "results_of",
    "slug", "table", "title",
]  # fmt: skip
FLOOR_SEEDS = 10**9  # added to a set's seeds for the base's other samples


def evaluate(
    subjects: Sequence[Path | str], protocol: Protocol | None = None, again: bool = False, *,
    base: Path | None = None, cache: Path | None = None, output: Path | None = None, own: Own | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Writes `evaluation.json` and pictures into each subject, see `results_of`; returns the evaluations by subject.

    What was evaluated by the same protocol, and with the same experts, is left alone unless `again`. base: a folder of
    samples that folders of samples are compared with, or the teacher's folder for exports of a local one. cache: where
    the base's samples are kept (the folder `base` beside the run). output: another folder than the subject's own. own:
    the model and codec of runs with a teacher of the user's own. Raises UserError for what the user can mend.
    """
    protocol = protocol or Protocol()
    if output is not None and len(subjects) > 1:
        raise UserError("--output: takes one subject, and there are several")
    done: dict[str, dict[str, Any]] = {}
    seen: dict[str, Readings] = {}
    for subject in dict.fromkeys(map(Path, subjects)):
        path, reference = (output or results_of(subject)) / "evaluation.json", Reference.of(subject)
        about: dict[str, Any] = {"subject": str(subject), "protocol": json.loads(json.dumps(asdict(protocol)))}
        is_folder = not (reference or RunFolder(subject).config_path.exists() or (subject / EXPORT).exists())
        if not (again or is_folder) and path.exists():
            sought = {"experts": experts_made_by(subject), "protocol": about["protocol"]}
            if known := _known(path, sought | ({"subject": str(subject)} if output is not None else {})):
                done[str(subject)] = known
                continue
        if is_folder:
            found = _of_folder(subject, base, protocol, path.parent)
        else:
            kept = cache or (reference.run if reference else subject).absolute().parent / "base"
            teacher = str(base) if base is not None and (subject / EXPORT).exists() else None
            with progress(f"{subject}: networks loaded", 1) as show:
                sampler = load(subject, own, teacher, protocol.bucket)
                show(1)
            found = _of_sampler(sampler, protocol, path.parent, kept, seen)
        done[str(subject)] = about | {"experts": experts_made_by(subject)} | found
        write_atomically(path, (json.dumps(done[str(subject)], indent=1) + "\n").encode())
    return done


def evaluate_loras(
    config: Config, files: Sequence[Path], output: Path, sigmas: Sequence[float] = (),
    protocol: Protocol | None = None, again: bool = False, *, base: str | None = None, cache: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes `evaluation.json` and pictures of others' LoRA files into a folder; returns the evaluation.

    The rows of its tables have the files' names. config, files, sigmas, base: see `load_loras`; the rest: see
    `evaluate`.
    """
    protocol, path = protocol or Protocol(), output / "evaluation.json"
    about = {"subject": ", ".join(map(str, files)), "protocol": json.loads(json.dumps(asdict(protocol)))}
    about |= {"sigmas": list(sigmas), "files": [file_hash(file) for file in files]}
    if not again and (known := _known(path, about)):
        return known
    with progress(f"{config.recipe}: networks loaded", 1) as show:
        sampler = load_loras(config, files, sigmas, base, protocol.bucket)
        show(1)
    name = " + ".join(file.stem for file in files)
    found = about | _of_sampler(sampler, protocol, output, cache or output.absolute().parent / "base", {}, name)
    write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
    return found


def results_of(subject: Path) -> Path:
    """Returns the folder that the evaluation of a subject is written to: its own, or of a checkpoint one in the run, as
    RUN/evaluations/phase-2/300.
    """
    reference = Reference.of(subject)
    return subject if reference is None else reference.results


def _known(path: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the evaluation that a file holds, where it is of the same subject by the same protocol."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found if about.items() <= found.items() else None


def _of_folder(subject: Path, base: Path | None, protocol: Protocol, folder: Path) -> dict[str, Any]:
    """Compares a folder of samples with another one."""
    samples = SampleFolder(subject)
    if base is None:
        raise UserError(f"{subject}: a folder of samples is compared with another one: --base FOLDER")
    if protocol.prompts or protocol.seeds or protocol.bucket:
        raise UserError(f"{subject}: --prompts, --seeds and --bucket are for runs; a folder holds its own samples")
    other, name = SampleFolder(base), subject.resolve().name
    sample_set = samples.sample_set(other)
    sources = {"base": other.samples(samples), "samples" if name == "base" else name: samples.samples(samples)}
    clips = sources["base"].pixels([0]).shape[1] > 1
    tools = load_instruments(protocol, None, clips)
    found = compare_media(sources, sample_set, None, tools, folder / "samples", {})
    return {"nets": tools.nets(clips), "sets": {sample_set.name: found}}


def _of_sampler(
    sampler: Sampler, protocol: Protocol, folder: Path, cache: Path, seen: dict[str, Readings], name: str | None = None
) -> dict[str, Any]:
    """Compares a sampler with its base. seen: readings of base samples, which runs of one teacher share. name: of what
    is sampled, in place of the method's.
    """
    config, base, tools = sampler.system.config, Base(sampler, cache), None
    whole = sampler.last == config.plan.phases
    name = name or (config.method if whole else f"{config.method} to the end of phase {sampler.last}")
    row = f"{name}, {sampler.calls} step{'s' * (whole or sampler.calls > 1)}"
    few, many, clips = config.plan.steps, config.teacher.base_steps, False
    if isinstance(config.teacher, PipelineTeacher):
        clips = config.teacher.sizes[protocol.bucket].num_frames > 1
    if not isinstance(config.teacher, AnalyticTeacher):
        tools = load_instruments(protocol, config, clips)
    sets = {}
    for sample_set in sample_sets(config, protocol, sampler.codec.takes_images):
        prompts, seeds = sample_set.prompts, sample_set.seeds
        told, rows = f"{folder.name}, {sample_set.name}: ", {f"base, {steps} steps": steps for steps in (many, few)}
        sources = {of: base.samples(prompts, seeds, steps, told + of) for of, steps in rows.items()}
        sources[row] = generate(sampler, sample_set, told + row)
        if tools is None:
            exact = sampler.system.model.networks[0]
            assert isinstance(exact, ExactMixture)
            known = load_clips() if exact.means.ndim > 2 else None
            sets[sample_set.name] = compare_mixture(sources, sample_set, exact, known, folder / "samples")
            continue
        others = [seed + FLOOR_SEEDS for seed in seeds]
        again = f"{told}base, {many} steps, other seeds"
        floor = base.samples(prompts, others, many, again) if sample_set.floor else None
        sets[sample_set.name] = compare_media(sources, sample_set, floor, tools, folder / "samples", seen)
    return {
        "recipe": config.recipe, "method": name, "row": row, "seed": config.seed,
        "weighting": config.objective, "nets": tools.nets(clips) if tools else {}, "sets": sets,
    }  # fmt: skip
