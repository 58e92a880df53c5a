"""`make gpu` without a GPU: what the script refuses, that its parts run at tiny sizes, and what it makes of faults."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks
    spec.loader.exec_module(module)
    return module


def run(gpu: Any, *arguments: object, monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Runs the script in this process, its parts in their own; returns its exit status, or the line that it ends on."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    return stop.value.code


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = run(gpu, "--output", tmp_path / "results", monkeypatch=monkeypatch)
    assert said == "make gpu: this machine has no NVIDIA GPU that torch can use"
    assert capsys.readouterr().out == "" and not (tmp_path / "results").exists()


def test_on_a_cpu_the_page_says_that_it_is_no_gpus(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the parts that need no run; `python scripts/gpu.py --device cpu --tiny` has all of them."""
    arguments = ("--device", "cpu", "--tiny", "--only", "facts", "precision", "--output", tmp_path)
    assert run(gpu, *arguments, monkeypatch=monkeypatch) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in found["parts"]] == ["facts", "precision"] and not found["on_device"]
    (what, error, most), *_ = found["parts"][1]["checks"]
    assert what.startswith("bfloat16") and 1e-4 < error < most
    page = (tmp_path / "gpu.md").read_text()
    assert "**This was not run on a GPU.**" in page and f"{error:.3g} | {most:g} | holds" in page


def test_what_fails_or_takes_too_long_is_written_down_and_is_no_pass(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "nano").write_text("where the run's folder would be")
    setting = gpu.Setting("cpu", True, tmp_path, 989)
    faulty, slow = gpu.attempt("nano", setting, 300), gpu.attempt("facts", setting, 0.1)
    assert "exit status 2" in faulty["failed"] and "is not a run folder" in faulty["failed"]
    assert slow["failed"] == "did not end within 0.1 seconds" and slow["seconds"] < 30
    about = {"on_device": True, "tiny": False, "date": "today", "commit": "abc", "changed": False}
    high = {"part": "large", "seconds": 1.0, "failed": None, "checks": [["peak against plan, relative", 0.2, 0.1]]}
    fine = high | {"checks": [["peak against plan, relative", 0.05, 0.1], ["peak, GB", 12.5, None]]}
    for parts, holds in (([faulty], False), ([fine, slow], False), ([fine, high], False), ([fine], True)):
        assert gpu.passed(about | {"parts": parts}) == holds
    page = gpu.page(about | {"parts": [faulty, fine, high]})
    assert "| failed |" in page and "0.2 | 0.1 | does not hold" in page and "not run on a GPU" not in page


def test_the_parts_take_ten_minutes_together(gpu: Any) -> None:
    assert sum(limit for _, limit in gpu.PARTS.values()) <= 600
