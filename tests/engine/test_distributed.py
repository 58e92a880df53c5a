"""One process against two: FSDP2 on gloo, the same global batch, in float64 and in float32.

All runs are made once, by processes that are forked as torchrun would start them; the tests look at what they left.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pipelines
import pytest
import torch
import torch.distributed.checkpoint as dcp
from faults import end, forked, launch
from recorded import watched_steps
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Config, Fake, Generator, Lora, Plan
from phased_dmd.config.overrides import apply_overrides
from phased_dmd.engine.world import processes, rank, world_size
from phased_dmd.errors import Stopped
from phased_dmd.recipes import resolve
from phased_dmd.train import distill

EXACT = 1e-9
ITERATIONS = 2  # of a phase
NANO_ITERATIONS = int(os.environ.get("NANO_ITERATIONS", "1"))  # `make chaos` takes 20
IN_MID_CYCLE = 3 * ITERATIONS + 3 + 1  # in phase 2, iteration 1, after the first of the fake's two updates


class Job(NamedTuple):
    """A run to make. stop: the update after which the last process gets a SIGTERM."""

    config: Config
    output: Path
    stop: int | None = None

    @property
    def doubled(self) -> bool:
        """Whether what torch makes by default is float64 too; `wide` is a float64 teacher as a user has it."""
        return self.config.teacher.dtype == "float64" and not self.output.name.startswith("wide")  # type: ignore[union-attr]


@contextmanager
def doubled() -> Iterator[None]:
    """Where diffusers calls `.float()`, differences of 1e-16 would become those of float32."""
    as_float = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    yield
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = as_float


def make(job: Job) -> None:
    """Distils one job, alone or with the other processes of the group."""
    updates: list[str] = []

    def after(role: str, _: Any) -> None:
        updates.append(role)
        if len(updates) == job.stop and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with watched_steps(after=after):
            distill(job.config, job.output, quiet=True)
        assert job.stop is None
    except Stopped:
        assert job.stop == len(updates)


def make_all(jobs: list[Job]) -> None:
    if torch.accelerator.device_count() == 0:
        torch.accelerator.device_count = lambda: 1  # diffusers' context parallelism divides by it
    with processes():
        for job in jobs:
            if not job.doubled:
                make(job)
                continue
            with doubled():
                make(job)


def tiny_wan22(folder: Path) -> Config:
    """Two networks that take turns at .875: (.8333, 1), phase 1's re-noise times, holds it, and so does (.02, 1).

    A sample is four tokens, two frames of two, so that self-attention has something to attend to.
    """
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"{caption}\n" for caption in pipelines.CAPTIONS))
    teacher = pipelines.teacher("wan22_t2v", folder / "wan22").model_dump() | {"dtype": "float64"}
    size = {"num_frames": 5, "height": 16, "width": 32}
    return Config(
        recipe="tiny-wan22", teacher=teacher | {"sizes": [size]}, plan=Plan(phases=2), prompts=str(prompts),
        generator=Generator(lora=Lora(rank=2, alpha=2), lr=1e-3, ema=0.9),
        fake=Fake(lr=1e-3, updates=2, lora=Lora(rank=2, alpha=2)), iterations=ITERATIONS,
        batch_size=4, log_every=1, checkpoint_every=ITERATIONS, sample_every=None,
    )  # fmt: skip


def nano() -> Config:
    quick = {
        "batch_size": 4, "iterations": NANO_ITERATIONS, "log_every": 1, "checkpoint_every": NANO_ITERATIONS,
        "sample_every": None, "plan.phases": 2, "fake.updates": 2, "teacher.dtype": "float64",
    }  # fmt: skip
    return resolve("nano-t2i", quick)


def changed(config: Config, **overrides: Any) -> Config:
    """The config with fields by their dotted names, `__` for the dot."""
    dotted = {name.replace("__", "."): value for name, value in overrides.items()}
    return Config.model_validate(apply_overrides(config.model_dump(), dotted))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `<name>-<processes>`; `<name>-a-b`: begun by a processes, stopped in mid-cycle, ended by b."""
    folder = tmp_path_factory.mktemp("distributed")
    pipelines.build("wan22_t2v", folder / "wan22")
    wan22 = tiny_wan22(folder)
    short = changed(wan22, iterations=1, checkpoint_every=1)
    everywhere = {
        "wan22": wan22, "nano": nano(), "lora": changed(short, fake__weights="lora"),
        "fast": changed(short, rollouts__reuse=True, rollouts__antithetic="start", fake__pull=1.0,
                        phase_shares=[1, 2], renoise__network="update", engine__micro_batch=2),
        "fisher": changed(short, objective="fisher"),
        "single": changed(short, teacher__dtype="float32"), "half": changed(short, teacher__dtype="bfloat16"),
        "wide": changed(short, fake__weights="lora", optimiser__second_moment="bfloat16"),
    }  # fmt: skip
    alone = {"offloaded": changed(wan22, engine__offload=True)}
    spread = {
        "replicas": changed(wan22, engine__micro_batch=1, engine__replicas=2, engine__activation_checkpointing=True),
        "split": changed(wan22, engine__sequence_parallel=2, engine__micro_batch=2,
                         engine__activation_checkpointing=True),
    }  # fmt: skip

    def jobs(configs: dict[str, Config], count: int) -> list[Job]:
        return [Job(config, folder / f"{name}-{count}") for name, config in configs.items()]

    one_two, two_one = folder / "wan22-1-2", folder / "wan22-2-1"
    first = [*jobs(everywhere | alone, 1), Job(wan22, one_two, stop=IN_MID_CYCLE)]
    second = [*jobs(everywhere | spread, 2), Job(wan22, one_two), Job(wan22, two_one, stop=IN_MID_CYCLE)]
    assert forked(lambda: make_all(first), seconds=600) == 0
    assert [end(process) for process in launch(2, lambda: make_all(second), seconds=600)] == [0, 0]
    assert forked(lambda: make_all([Job(wan22, two_one)]), seconds=600) == 0
    return folder


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys() and a
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def trained(run: Path, phase: int) -> dict[str, Tensor]:
    return load_file(RunFolder(run).expert_path(phase))


def losses(run: Path) -> Tensor:
    """[rows, losses, norms and errors]: not what is a quotient of small differences, nor of a third that is empty."""
    rows = RunFolder(run).metrics()
    quotients = {"fake_gain", "distance", *(f"fake_error_{third}" for third in (1, 2, 3))}
    names = [key for key in rows[0] if key not in quotients | {"phase", "iteration"}]
    return torch.tensor([[row[key] for key in names] for row in rows]).double()


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
        ("wan22-1", "replicas-2"),  # micro-batches, all weights in both processes, blocks recomputed
        ("wan22-1", "split-2"),  # each sample shared by both
        ("wan22-1", "offloaded-1"),
    ],
)  # fmt: skip
def test_however_it_is_shared_out_the_same_is_trained(first: str, second: str, runs: Path) -> None:
    """Losses, experts and every tensor of the optimisers, of both phases."""
    one, two, name = runs / first, runs / second, first.split("-")[0]
    each = {"wan22": (ITERATIONS, ITERATIONS), "nano": (NANO_ITERATIONS, NANO_ITERATIONS), "fast": (1, 2)}.get(
        name, (1, 1)
    )
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
