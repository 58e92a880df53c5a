"""The runs of a page: what is read of each, whether they can be compared, and which make up one method."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Measurement

NO_METHOD = {"recipe", "seed", "log_every", "checkpoint_every", "sample_every", "trackers"}  # fields of a config
NO_BASE = {"fit_steps", "lora_targets"}  # fields of a teacher


@dataclass(frozen=True)
class EvaluatedRun:
    """A finished and evaluated run: its config, `evaluation.json`, the lines of `metrics.jsonl`.

    shown: by prompt set, the prompt and the seed of each sample that the evaluation left on disk.
    """

    path: Path
    config: Config
    evaluation: dict[str, Any]
    metrics: list[dict[str, Any]]
    shown: dict[str, list[dict[str, Any]]]

    @property
    def row(self) -> str:
        """Returns the name of its own generator's row in the evaluation."""
        return f"{self.config.method}, {self.config.plan.steps} steps"

    def measurements(self, name: str, row: str) -> dict[str, Measurement]:
        """Returns the measurements of a row in a prompt set, by measure."""
        return self.evaluation["sets"][name]["rows"][row]

    @property
    def fields(self) -> dict[str, Any]:
        """Returns its config by dotted names, without the fields that do not change the method."""
        return flatten({k: v for k, v in self.config.model_dump(mode="json").items() if k not in NO_METHOD})

    @property
    def basis(self) -> dict[str, Any]:
        """Returns, by dotted names, what must be equal in two runs for their numbers and samples to be compared."""
        plan, teacher = self.config.plan, self.config.teacher.model_dump(mode="json")
        sets = {name: {"about": s["about"], "base": s["base"]} for name, s in self.evaluation["sets"].items()}
        return flatten({
            "teacher": {key: value for key, value in teacher.items() if key not in NO_BASE},
            "plan": {"shift": plan.shift, "start": plan.start},  # the grid on which the base is sampled
            "protocol": self.evaluation["protocol"],
            "nets": self.evaluation["nets"],
            "sets": sets,
            "shown": self.shown,
        })  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Runs that differ in the training seed alone, in its order; detail: what other runs of this name do not share."""

    name: str
    detail: str
    runs: list[EvaluatedRun]

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.name, self.detail)))


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns {"a": {"b": 1}} into {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def read_runs(paths: Sequence[Path | str]) -> list[EvaluatedRun]:
    """Reads the runs of folders; raises UserError where one is not ready, is there twice, or cannot be compared."""
    runs = [_read(Path(path)) for path in paths]
    for i, run in enumerate(runs):
        key = next(iter(varying([run.basis, runs[0].basis])), None)
        if key is not None:
            ours, theirs = (_short(r.basis.get(key)) for r in (run, runs[0]))
            raise UserError(
                f"{runs[0].path} and {run.path} cannot be compared: they differ in {key}, {theirs} and {ours}"
            )
        for other in runs[:i]:
            if (other.fields, other.config.seed) == (run.fields, run.config.seed):
                raise UserError(f"{other.path} and {run.path} are one run: same configuration, same seed")
    return runs


def group(runs: Sequence[EvaluatedRun]) -> list[Group]:
    """Returns the methods in the order of their first run; those of one name tell the fields that they differ in."""
    groups: dict[str, list[EvaluatedRun]] = {}
    for run in sorted(runs, key=lambda run: run.config.seed):
        groups.setdefault(json.dumps(run.fields), []).append(run)
    members = sorted(groups.values(), key=lambda members: min(runs.index(run) for run in members))
    return [Group(runs[0].row, _detail(runs[0], [other[0] for other in members]), runs) for runs in members]


def base_rows(groups: Sequence[Group], name: str) -> dict[str, EvaluatedRun]:
    """Returns the rows of a prompt set that are the base's, each with the first run that has it."""
    rows: dict[str, EvaluatedRun] = {}
    for run in (group.runs[0] for group in groups):
        for row in run.evaluation["sets"][name]["rows"]:
            if row != run.row:
                rows.setdefault(row, run)
    return rows


def varying(mappings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all of the mappings, in their order."""
    keys = {key: None for mapping in mappings for key in mapping}
    return [key for key in keys if any(mapping.get(key) != mappings[0].get(key) for mapping in mappings)]


def _detail(run: EvaluatedRun, others: Sequence[EvaluatedRun]) -> str:
    differing = varying([other.fields for other in others if other.row == run.row])
    return ", ".join(f"{key}={written(run.fields[key])}" for key in differing)


def written(value: Any) -> str:
    """Writes a field's value as a user would."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _read(path: Path) -> EvaluatedRun:
    folder = RunFolder(path)
    config = folder.config()
    if not folder.finished(config):
        raise UserError(f"{path}: the run is not finished")
    if not (path / "evaluation.json").exists():
        raise UserError(f"{path}: not evaluated yet; {_evaluating(path, config)} first")
    evaluation = _json(path / "evaluation.json")
    if "protocol" not in evaluation:
        raise UserError(f"{path}: evaluated by an older version; {_evaluating(path, config, again=True)}")
    files = {name: path / "samples" / name / "shown.json" for name in evaluation["sets"]}
    return EvaluatedRun(
        path, config, evaluation, folder.metrics(), {name: _json(f) for name, f in files.items() if f.exists()}
    )


def _evaluating(path: Path, config: Config, again: bool = False) -> str:
    """Says what a user does to have the run evaluated."""
    own = " --own module:function" if config.teacher.kind == "own" else ""
    return f"run `phased-dmd evaluate {path}{own}{' --again' if again else ''}`"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
