"""One process against two: FSDP2 under torchrun on gloo, the same global batch, in float64 and in float32.

All runs of a number of processes are made in one start of it; the tests look at what they left.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, Engine, Fake, Generator, Lora, Plan
from phased_dmd.config.overrides import apply_overrides
from phased_dmd.config.teacher import Size
from phased_dmd.recipes import resolve

WORKER = Path(__file__).parents[1] / "helpers" / "distributed_worker.py"
EXACT = 1e-9
NANO_ITERATIONS = int(os.environ.get("NANO_ITERATIONS", "3"))  # `make chaos` takes 20


def launch(processes: int, jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    path = folder / f"jobs-{processes}-{len(list(folder.glob('jobs-*')))}.json"
    path.write_text(json.dumps(jobs))
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = subprocess.run([sys.executable, *start, str(WORKER), str(path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]


def tiny_wan22(folder: Path, **changes: Any) -> Config:
    """Two networks that take turns at .875: (.8333, 1), phase 1's re-noise times, holds it, and so does (.02, 1)."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in pipelines.CAPTIONS))
    teacher = pipelines.teacher("wan22_t2v", folder / "wan22").model_dump() | {"dtype": "float64"}
    size = {"num_frames": 1, "height": 16, "width": 16}
    config = Config(
        recipe="tiny-wan22", teacher=teacher | {"sizes": [size]}, plan=Plan(phases=2), prompts=str(prompts),
        generator=Generator(lora=Lora(rank=2, alpha=2), lr=1e-3, ema=0.9),
        fake=Fake(lr=1e-3, updates=2, lora=Lora(rank=2, alpha=2)), iterations=20, batch_size=4,
        log_every=1, checkpoint_every=20, sample_every=1000,
    )  # fmt: skip
    return config.model_copy(update=changes)


def laid_over(config: Config, overrides: dict[str, Any]) -> Config:
    return Config.model_validate(apply_overrides(config.model_dump(), overrides))


def nano(**overrides: Any) -> Config:
    quick = {
        "batch_size": 4, "iterations": NANO_ITERATIONS, "log_every": 1, "checkpoint_every": NANO_ITERATIONS,
        "sample_every": 1000, "plan.phases": 2, "fake.updates": 2, "teacher.dtype": "float64",
    }  # fmt: skip
    return resolve("nano-t2i", quick | overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `<name>-<processes>`; `<name>-a-b`: begun by a processes, stopped in mid-cycle, ended by b."""
    folder = tmp_path_factory.mktemp("distributed")
    pipelines.build("wan22_t2v", folder / "wan22")
    wan22 = tiny_wan22(folder)
    three = wan22.model_copy(update={"iterations": 3, "checkpoint_every": 3})

    def changed(section: str, **changes: Any) -> Config:
        return three.model_copy(update={section: getattr(three, section).model_copy(update=changes)})

    fast = {"rollouts.reuse": True, "rollouts.antithetic": "start", "fake.pull": 1.0, "phase_shares": [1, 1.5],
            "renoise.sort": True, "engine.micro_batch": 2}  # fmt: skip
    fisher = {"objective": "fisher", "engine.batched_guidance": True}
    wide = {"fake.weights": "lora", "optimiser.second_moment": "bfloat16"}
    clips = changed("teacher", sizes=(Size(num_frames=5, height=32, width=32),))
    split = Engine(sequence_parallel=2, micro_batch=2, activation_checkpointing=True)
    everywhere = {
        "wan22": wan22, "nano": nano(), "lora": changed("fake", weights="lora"),
        "fast": laid_over(three, fast), "fisher": laid_over(three, fisher),
        "single": changed("teacher", dtype="float32"), "half": changed("teacher", dtype="bfloat16"),
        "wide": laid_over(three, wide),  # float64 as a user has it: what torch makes by default is float32
    }  # fmt: skip
    alone = {"plain": three, "offloaded": changed("engine", offload=True), "clips": clips}
    spread = {
        "plain": changed("engine", micro_batch=1, replicas=2, activation_checkpointing=True),
        "clips": clips.model_copy(update={"engine": split}),
    }

    def jobs(configs: dict[str, Config], count: int) -> list[dict[str, Any]]:
        return [job(config, f"{name}-{count}") for name, config in configs.items()]

    def job(config: Config, name: str, **more: Any) -> dict[str, Any]:
        double = config.teacher.dtype == "float64" and not name.startswith("wide")
        return {"config": config.model_dump(mode="json"), "output": str(folder / name), "double": double, **more}

    stop = 20 * 3 + 7 * 3 + 1  # in phase 2, iteration 7, after the first of the fake's two updates
    launch(1, [*jobs(everywhere | alone, 1), job(wan22, "wan22-1-2", stop=stop)], folder)
    launch(2, [*jobs(everywhere | spread, 2), job(wan22, "wan22-1-2"), job(wan22, "wan22-2-1", stop=stop)], folder)
    launch(1, [job(wan22, "wan22-2-1")], folder)
    return folder


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def trained(run: Path, phase: int) -> dict[str, Tensor]:
    return load_file(RunFolder(run).expert_path(phase))


def losses(run: Path) -> Tensor:
    """[rows, losses and norms]."""
    rows = RunFolder(run).metrics()
    return torch.tensor([[row[key] for key in row if key not in ("phase", "iteration")] for row in rows]).double()


def state(run: Path) -> dict[str, Tensor]:
    """Weights, averages and optimisers of the last checkpoint, whole."""
    folder = sorted((run / "checkpoints").iterdir())[-1]
    reader = HuggingFaceStorageReader(str(folder))
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {name: torch.empty(about.size, dtype=about.properties.dtype) for name, about in metadata.items()}
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("wan22-1", "wan22-2"), ("nano-1", "nano-2"), ("lora-1", "lora-2"),
        ("fast-1", "fast-2"), ("fisher-1", "fisher-2"),  # what saves network calls, and the other divergence
        ("plain-1", "plain-2"),  # micro-batches, all weights in both processes, blocks recomputed
        ("clips-1", "clips-2"),  # each sample shared by both
        ("plain-1", "offloaded-1"),
    ],
)  # fmt: skip
def test_however_it_is_shared_out_the_same_is_trained(first: str, second: str, runs: Path) -> None:
    """Losses, experts and every tensor of the optimisers, of both phases."""
    one, two, name = runs / first, runs / second, first.split("-")[0]
    each = {"wan22": (20, 20), "nano": (NANO_ITERATIONS, NANO_ITERATIONS), "fast": (3, 4)}.get(name, (3, 3))
    assert len(losses(one)) == sum(each)
    torch.testing.assert_close(losses(two), losses(one), rtol=EXACT, atol=EXACT)
    for phase in (1, 2):
        assert difference(trained(two, phase), trained(one, phase)) < EXACT
    mine, other = state(one), state(two)
    assert difference(mine, other) < EXACT
    assert {name.split("/")[1] for name in mine} == {"weights", "ema", "exp_avg_sq", "step"}
    assert all(t.any() for name, t in mine.items() if "exp_avg_sq" in name and "lora_A" not in name)


@pytest.mark.parametrize("name", ["wan22-1-2", "wan22-2-1"])
def test_a_run_goes_on_at_another_number_of_processes(name: str, runs: Path) -> None:
    """Stopped by a SIGTERM that one process got, between two updates of the fake."""
    torch.testing.assert_close(losses(runs / name), losses(runs / "wan22-1"), rtol=EXACT, atol=EXACT)
    for phase in (1, 2):
        assert difference(trained(runs / name, phase), trained(runs / "wan22-1", phase)) < EXACT
    assert difference(state(runs / name), state(runs / "wan22-1")) < EXACT


def test_in_float32_the_losses_agree_to_rounding(runs: Path) -> None:
    """AdamW without momentum starts as lr sign(g): a rounding may turn a sign, so that weights agree less."""
    torch.testing.assert_close(losses(runs / "single-2"), losses(runs / "single-1"), rtol=2e-3, atol=1e-5)


def test_in_bfloat16_what_is_trained_is_float32(runs: Path) -> None:
    """One process casts at each operation, two gather the fake's blocks in bfloat16: near, and not the same."""
    for count in (1, 2):
        assert {t.dtype for name, t in state(runs / f"half-{count}").items() if "/step/" not in name} == {torch.float32}
    torch.testing.assert_close(losses(runs / "half-2"), losses(runs / "half-1"), rtol=0.05, atol=1e-3)


def test_under_a_float64_teacher_what_is_trained_is_float64_in_every_process(runs: Path) -> None:
    """Also in those that hold no values of the base. What is drawn is float32, as it is for every user."""
    for count in (1, 2):
        assert {t.dtype for t in trained(runs / f"wide-{count}", 1).values()} == {torch.float64}
    torch.testing.assert_close(losses(runs / "wide-2"), losses(runs / "wide-1"), rtol=2e-3, atol=1e-5)
