"""One thread and no network, set before torch is imported; fixtures that several files share."""

import ctypes
import gc
import os
import sys
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # torch's spinning threads are up to 500 times slower on a shared machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # diffusers copies custom pipelines there, all under one name

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TinyCodec, TinyWan

torch.set_num_threads(1)
M_MMAP_THRESHOLD = -3  # of malloc.h
if sys.platform == "linux":  # else the heap keeps the room of large tensors, until no process of its size can be forked
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)

# What cannot pass on the pretended GPU (tests/pretend/run.py), by the beginning of its name, and why. Ten at most.
PACKED = "bitsandbytes packs weights on a GPU by kernels of its own, in a library that is only there with CUDA"
NOT_ON_A_PRETENDED_GPU = {
    "tests/models/test_quantise.py::test_a_quantised_base_computes_and_differentiates": PACKED,  # 2
    "tests/models/test_quantise.py::test_a_run_on_a_quantised_base_trains_its_adapters": PACKED,  # 2
    "tests/test_first_words.py::test_offload_without_a_gpu_says_that_it_changes_nothing": "there is a GPU",
    "tests/export/test_export.py::test_a_run_on_a_packed_base_is_exported_for_the_full_one": PACKED,  # 2
    "tests/test_one_card.py::test_a_run_on_a_packed_base_is_exported_and_verified_on_it": PACKED,  # 3
}


# The longest files begin first, or a process would be left alone with one of them at the end.
LONGEST = (
    "models/test_pipelines.py", "test_fake_gpu.py", "engine/test_distributed.py", "export/test_export.py",
    "plan/test_plan.py", "test_examples.py", "test_train.py", "test_pages.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = [Path(__file__).parent / name for name in LONGEST]
    items.sort(key=lambda item: order.index(item.path) if item.path in order else len(order))
    if "PRETEND_GPU" in os.environ:
        for item in items:
            for begin, reason in NOT_ON_A_PRETENDED_GPU.items():
                if item.nodeid.startswith(begin):
                    item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported by then stays: no search for garbage goes over it again, nor has a forked process copy it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def plan_on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts what a CPU computes, and so does what it is compared with, even where there is a GPU."""
    if request.path.parent.name == "plan":
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: None)


@pytest.fixture
def tiny_wan() -> Callable[..., TinyWan]:
    return TinyWan


@pytest.fixture
def tiny_codec() -> TinyCodec:
    return TinyCodec()
