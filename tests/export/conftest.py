"""Finished runs of every tiny pipeline, made once for all tests of exports."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pipelines
import pytest
from PIL import Image
from runs import TINY, Make, finished_run

from phased_dmd.checkpoint import RunFolder
from phased_dmd.export import export
from phased_dmd.recipes import resolve


@pytest.fixture(scope="package")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs."""
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="package")
def make(workshop: Path) -> Make:
    """A finished run by its teacher, with experts that differ from the teacher a lot; made once for all tests."""
    frame = workshop / "frame.png"
    Image.effect_noise((48, 32), 80).convert("RGB").save(frame)
    (workshop / "texts.txt").write_text("\n".join(pipelines.CAPTIONS))
    rows = [json.dumps({"prompt": text, "image": frame.name}) for text in pipelines.CAPTIONS]
    (workshop / "frames.jsonl").write_text("\n".join(rows))

    def build(name: str, method: Any = None, **overrides: Any) -> Path:
        changes = {key.replace("__", "."): value for key, value in overrides.items()}
        run = workshop / "-".join([name, *map(str, (method, *changes.values()))]).replace("/", "_")
        if RunFolder(run).config_path.exists():
            return run
        texts = str(workshop / ("frames.jsonl" if "_i2v" in name or "_edit" in name else "texts.txt"))
        settings = ({} if method else TINY) | {"prompts": texts}
        if name in pipelines.NAMES:
            teacher = workshop / "teachers" / name
            if not teacher.exists():
                pipelines.build(name, teacher)
            settings["teacher"] = json.loads(pipelines.teacher(name, teacher).model_dump_json())
        else:
            settings["teacher.path"] = name
        return finished_run(run, resolve("nano-t2i", settings | changes, method))

    return build


@pytest.fixture(scope="package")
def exported(make: Make, workshop: Path) -> Callable[[str], Path]:
    """The export of a model's finished run as LoRA files, by its name; made once, for tests that change nothing."""

    @cache
    def build(name: str) -> Path:
        export(make(name), folder := workshop / "exported" / name)
        return folder

    return build
