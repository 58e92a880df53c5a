"""Distils the jobs of a list, in one process or in those that torchrun has started: python distributed_worker.py LIST.

A job is a JSON object: config, output, and optionally `double` (float64 throughout) and `stop`, the number of times
that the last process is asked whether it should stop before it gets a SIGTERM.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"], os.environ["HF_HUB_OFFLINE"] = "1", "1"

import torch  # noqa: E402

from phased_dmd.config import Config  # noqa: E402
from phased_dmd.engine.signals import Signals  # noqa: E402
from phased_dmd.engine.world import processes, rank, world_size  # noqa: E402
from phased_dmd.errors import Stopped  # noqa: E402
from phased_dmd.train import distill  # noqa: E402

if torch.accelerator.device_count() == 0:
    torch.accelerator.device_count = lambda: 1  # diffusers' context parallelism divides by it
AS_FLOAT = torch.Tensor.float


@contextmanager
def doubled(on: bool) -> Iterator[None]:
    """Where diffusers calls `.float()`, differences of 1e-16 would become those of float32."""
    if on:
        torch.set_default_dtype(torch.float64)
        torch.Tensor.float = torch.Tensor.double
    yield
    torch.set_default_dtype(torch.float32)
    torch.Tensor.float = AS_FLOAT


def stop_at(count: int) -> None:
    """SIGTERM for the last process when it is asked for the count-th time."""
    asked, calls = Signals.asked, [0]

    def counted(self: Signals) -> int:
        calls[0] += 1
        if calls[0] == count and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(self)

    Signals.asked = counted


original = Signals.asked
with processes():
    for job in json.loads(Path(sys.argv[1]).read_text()):
        Signals.asked = original
        if "stop" in job:
            stop_at(job["stop"])
        with doubled(job.get("double", False)):
            try:
                distill(Config.model_validate(job["config"]), job["output"], quiet=True)
            except Stopped:
                assert "stop" in job
