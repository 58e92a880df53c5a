"""The runs of a page: what is read of each, whether they can be compared, and which make up one method."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import Reference, RunFolder
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Measurement, results_of
from phased_dmd.lab.report.standing import Standing, stand
from phased_dmd.sampling.loading import experts_made_by

NO_METHOD = {  # fields of a config
    "recipe", "seed", "log_every", "checkpoint_every", "keep_last", "sample_every", "trackers",
}  # fmt: skip
NO_BASE = {"fit_steps", "lora_targets"}  # fields of a teacher


@dataclass(frozen=True)
class ReportedRun:
    """A run, or a checkpoint, as its folder shows it: its config, where the run stands, the lines of its log up to
    there, and `evaluation.json` if it is evaluated.

    path: where it is evaluated. checkpoint: after which iterations, or the end.

    shown: by prompt set, the prompt and the seed of each sample that the evaluation left on disk.
    """

    path: Path
    config: Config
    checkpoint: str
    standing: Standing
    metrics: list[dict[str, Any]]
    previews: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    shown: dict[str, list[dict[str, Any]]]

    @property
    def row(self) -> str:
        """Returns the name of its own generator's row in the evaluation, or what it would be."""
        return self.evaluation["row"] if self.evaluation else f"{self.config.method}, {self.config.plan.steps} steps"

    def measurements(self, name: str, row: str) -> dict[str, Measurement]:
        """Returns the measurements of a row in a prompt set, by measure."""
        return self.sets[name]["rows"][row]

    @property
    def sets(self) -> dict[str, Any]:
        """Returns what was measured, by prompt set; nothing of a run that is not evaluated."""
        return self.evaluation["sets"] if self.evaluation else {}

    @property
    def fields(self) -> dict[str, Any]:
        """Returns its config by dotted names, without the fields that do not change the method, and its checkpoint."""
        fields = {k: v for k, v in self.config.model_dump(mode="json").items() if k not in NO_METHOD}
        return flatten(fields | {"checkpoint": self.checkpoint})

    @property
    def basis(self) -> dict[str, Any]:
        """Returns, by dotted names, what must be equal in two runs that stand on one page; of evaluated ones also what
        their numbers and samples depend on.
        """
        plan, teacher = self.config.plan, self.config.teacher.model_dump(mode="json")
        basis = {
            "teacher": {key: value for key, value in teacher.items() if key not in NO_BASE},
            "plan": {"shift": plan.shift, "start": plan.start},  # the grid on which the base is sampled
        }
        if self.evaluation:
            sets = {name: {"about": s["about"], "base": s["base"]} for name, s in self.sets.items()}
            nets = {"protocol": self.evaluation["protocol"], "nets": self.evaluation["nets"]}
            basis |= nets | {"sets": sets, "shown": self.shown}
        return flatten(basis)


@dataclass(frozen=True)
class Group:
    """Runs that differ in the training seed alone, in its order; detail: what other runs of this name do not share."""

    name: str
    detail: str
    runs: list[ReportedRun]

    @property
    def label(self) -> str:
        """Returns its name and its detail."""
        return ", ".join(filter(None, (self.name, self.detail)))


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_runs(paths: Sequence[Path | str], now: float) -> list[ReportedRun]:
    """Reads the runs of folders, as they are at a time in seconds since 1970; raises UserError where one is there
    twice, or two cannot be compared.
    """
    runs = [_read(Path(path), now) for path in paths]
    first = next((run for run in runs if run.evaluation), runs[0])
    for i, run in enumerate(runs):
        for other in (runs[0], first):
            _compare(other, run)
        for other in runs[:i]:
            if (other.fields, other.config.seed) == (run.fields, run.config.seed):
                raise UserError(f"{other.path} and {run.path} are one run: same configuration, same seed")
    return runs


def _compare(a: ReportedRun, b: ReportedRun) -> None:
    """Raises a UserError where two runs cannot stand on one page."""
    both = [run.basis for run in (a, b)]
    differing = [key for key in varying(both) if (a.evaluation and b.evaluation) or all(key in each for each in both)]
    if differing:
        theirs, ours = (_short(basis.get(differing[0])) for basis in both)
        what = f"they differ in {differing[0]}, {theirs} and {ours}"
        raise UserError(f"{a.path} and {b.path} cannot be compared: {what}")


def group(runs: Sequence[ReportedRun]) -> list[Group]:
    """Returns the methods in the order of their first run; those of one name tell the fields that they differ in."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        groups.setdefault(json.dumps(run.fields), []).append(run)
    members = sorted(groups.values(), key=lambda members: min(runs.index(run) for run in members))
    return [Group(runs[0].row, _detail(runs[0], [other[0] for other in members]), runs) for runs in members]


def evaluated(groups: Sequence[Group]) -> list[Group]:
    """Returns the methods with those of their runs that are evaluated."""
    kept = [replace(group, runs=[run for run in group.runs if run.evaluation]) for group in groups]
    return [group for group in kept if group.runs]


def base_rows(groups: Sequence[Group], name: str) -> dict[str, ReportedRun]:
    """Returns the rows of a prompt set that are the base's, each with the first run that has it."""
    rows: dict[str, ReportedRun] = {}
    for run in (group.runs[0] for group in groups):
        for row in run.sets[name]["rows"]:
            if row != run.row:
                rows.setdefault(row, run)
    return rows


def varying(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all of the mappings, in their order."""
    keys = {key: None for mapping in mappings for key in mapping}
    return [key for key in keys if any(mapping.get(key) != mappings[0].get(key) for mapping in mappings)]


def _detail(run: ReportedRun, others: Sequence[ReportedRun]) -> str:
    differing = varying([other.fields for other in others if other.row == run.row])
    return ", ".join(f"{key}={written(run.fields[key])}" for key in differing)


def written(value: Any) -> str:
    """Writes a field's value as a user would."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read(path: Path, now: float) -> ReportedRun:
    reference, place = Reference.of(path), results_of(path)
    folder = RunFolder(path if reference is None else reference.run)
    config, at = folder.config(), "the end"
    metrics = rows = folder.metrics()
    evaluation = _evaluation(path, place, config) if reference or folder.finished(config) else None
    if reference is not None:
        if evaluation is None:
            raise UserError(f"{path}: not evaluated yet; {evaluating(path, config)} first")
        at = f"phase {reference.phase}, iteration {reference.iteration}"
        rows = [row for row in rows if (row["phase"], row["iteration"]) <= (reference.phase, reference.iteration)]
    files = {name: place / "samples" / name / "shown.json" for name in (evaluation["sets"] if evaluation else {})}
    shown = {name: _json(file) for name, file in files.items() if file.exists()}
    standing, previews = stand(folder, config, metrics, now), [] if reference else folder.previews()
    return ReportedRun(place, config, at, standing, rows, previews, evaluation, shown)


def _evaluation(path: Path, place: Path, config: Config) -> dict[str, Any] | None:
    """Returns what was measured of a run or checkpoint, None if nothing was; a UserError where that is out of date."""
    if not (place / "evaluation.json").exists():
        return None
    evaluation = _json(place / "evaluation.json")
    if not {"protocol", "row", "experts"} <= evaluation.keys():
        raise UserError(f"{path}: evaluated by an older version; {evaluating(path, config, again=True)}")
    if evaluation["experts"] != experts_made_by(path):
        raise UserError(f"{path}: evaluated before its experts became what they are; {evaluating(path, config)}")
    return evaluation


def evaluating(path: Path, config: Config, again: bool = False) -> str:
    """Says what a user does to have a run evaluated."""
    own = " --own module:function" if config.teacher.kind == "own" else ""
    return f"run `phased-dmd evaluate {path}{own}{' --again' if again else ''}`"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
