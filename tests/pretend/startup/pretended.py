"""Tells torch's Python side of the pretended GPU: `torch.cuda`, storages, and a group of processes for its tensors."""

import ctypes
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

DEVICES = 2  # kDevices in device.cpp
MEMORY = 80 << 30  # bytes that are said to be free and there


class Nothing:
    """A stream, an event, and all that they do: nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device, self.cuda_stream = torch.device("cuda", torch.accelerator.current_device_index()), 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: self

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def record(self, *_: Any) -> None:
        """Returns nothing, as torch's own."""

    def record_event(self, *_: Any) -> torch.Event:
        return torch.Event("cuda")  # what torch's own stream, which FSDP2 has wait for it, takes


def install() -> None:
    """Makes `torch.cuda` and storages believe in the device, and gives its tensors a backend for collectives."""
    cuda: Any = torch.cuda
    fixed = {
        "is_available": True, "is_initialized": True, "_lazy_init": None, "_is_in_bad_fork": False,
        "device_count": DEVICES, "get_device_name": "pretended", "get_device_capability": (9, 0),
        "is_bf16_supported": True, "is_current_stream_capturing": False, "mem_get_info": (MEMORY, MEMORY),
        "empty_cache": None, "reset_peak_memory_stats": None, "memory_stats": {}, "memory_allocated": 0,
        "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "manual_seed": None, "manual_seed_all": None, "get_rng_state": torch.empty(0, dtype=torch.uint8),
        "get_rng_state_all": [], "set_rng_state": None, "set_rng_state_all": None,
    }  # fmt: skip
    for name, value in fixed.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    for name in ("current_stream", "default_stream", "stream"):
        setattr(cuda, name, lambda *_, **__: Nothing())
    cuda.Stream = cuda.Event = cuda.StreamContext = Nothing
    torch._C._cuda_getCurrentRawStream = lambda index: 0  # type: ignore[attr-defined]
    exchange: Any = torch._C._accelerator_exchangeDevice  # type: ignore[attr-defined]
    same = {
        "current_device": torch.accelerator.current_device_index, "set_device": torch.accelerator.set_device_index,
        "_exchange_device": exchange, "_maybe_exchange_device": exchange, "synchronize": torch.accelerator.synchronize,
    }  # fmt: skip
    for name, function in same.items():  # wrapped, since dynamo wants a function of its own under each name
        setattr(cuda, name, lambda *args, function=function: function(*args))
    cuda.amp.common.amp_definitely_not_available = lambda: False
    _replace_storages()
    _start_threads()
    _make_groups_of_gloo()


def _make_groups_of_gloo() -> None:
    """Gives groups of processes gloo for the device too, which device.cpp hands the memory behind tensors."""
    dist.Backend.default_device_backend_map["cuda"] = "gloo"
    groups: Any = dist.distributed_c10d
    make = groups._new_process_group_helper

    def made(*args: Any, **more: Any) -> Any:
        group, store = make(*args, **more)
        if isinstance(group, dist.ProcessGroup):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)  # as it would be NCCL
        return group, store

    groups._new_process_group_helper = made


def _start_threads() -> None:
    """Starts the threads that differentiate on the devices, here and in every child of this process; see forks.cpp."""
    starting = ctypes.c_int.in_dll(ctypes.CDLL(None), "torch_starts_threads")
    starting.value = 1
    torch.ones((), requires_grad=True).backward()
    starting.value = 0
    os.register_at_fork(after_in_child=torch.ops.pretend.restart)


def _replace_storages() -> None:
    """Makes, resizes and copies storages, which torch does by code for the devices that it was built for."""
    make, resize, clone = torch.UntypedStorage.__new__, torch.UntypedStorage.resize_, torch.UntypedStorage.clone

    def over(storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]

    def made(kind: Any, *args: Any, device: Any = None, **more: Any) -> Any:
        if device is None or torch.device(device).type != "cuda":
            return make(kind, *args, **more | ({"device": device} if device is not None else {}))
        return torch.empty(*args or (0,), dtype=torch.uint8, device=device).untyped_storage()

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        torch.ops.pretend.resize_storage(over(storage), size)
        return storage

    def cloned(storage: torch.UntypedStorage) -> Any:
        return over(storage).clone().untyped_storage() if storage.device.type == "cuda" else clone(storage)

    kind: Any = torch.UntypedStorage
    kind.__new__, kind.resize_, kind.clone = staticmethod(made), resized, cloned
