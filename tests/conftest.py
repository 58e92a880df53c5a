"""One thread and no network, set before torch is imported; fixtures that several files share."""

import os
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # torch's spinning threads are up to 500 times slower on a shared machine
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp()  # diffusers copies custom pipelines there, all under one name

from collections.abc import Callable

import pytest
import torch
from tiny import TinyCodec, TinyWan

torch.set_num_threads(1)


@pytest.fixture
def tiny_wan() -> Callable[..., TinyWan]:
    return TinyWan


@pytest.fixture
def tiny_codec() -> TinyCodec:
    return TinyCodec()
