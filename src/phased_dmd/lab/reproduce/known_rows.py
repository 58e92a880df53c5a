"""Rows that stand: what result files say of runs, so that a claim can be run on several days and machines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from phased_dmd.config import Config
from phased_dmd.config.overrides import build
from phased_dmd.errors import UserError
from phased_dmd.lab.evaluate import Protocol
from phased_dmd.lab.reproduce.workers import PlannedRun

Standing = Mapping[str, Mapping[str, Any]]  # rows by what was run and how it was evaluated


def standing_rows(results: Path, name: str) -> Standing:
    """Returns the rows of runs that the result files of a folder hold, for a claim or study of a name.

    fig5 compares pictures of the runs themselves, so that no row can stand for one of its runs.
    """
    found: dict[str, Mapping[str, Any]] = {}
    for path in sorted(results.glob("*.jsonl")) if name != "fig5" else ():
        for row in map(json.loads, path.read_text("utf-8").splitlines()):
            if {"config", "protocol", "sets", "trainable_parameters"} <= row.keys():
                try:
                    found[_key(build(row["config"]), row["protocol"])] = row
                except UserError:  # a config that this version has no field for
                    continue
    return found


def row_that_stands(run: PlannedRun, rows: Standing) -> Mapping[str, Any] | None:
    """Returns the row of a run with an equal config and protocol, whatever its folder was; None if there is none."""
    return rows.get(_key(run.config, asdict(run.protocol)))


def still_to_run(runs: Sequence[PlannedRun], rows: Standing) -> list[PlannedRun]:
    """Returns the runs that no row stands for."""
    return [run for run in runs if row_that_stands(run, rows) is None]


def _key(config: Config, protocol: Mapping[str, Any]) -> str:
    """Returns what tells a run and its evaluation from all others; a protocol's absent fields are the defaults."""
    return config.model_dump_json() + json.dumps(asdict(Protocol()) | dict(protocol), sort_keys=True)
