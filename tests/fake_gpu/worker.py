"""Makes updates of the fake and of the expert on cuda tensors without data: `worker.py HOOKS`, cases on stdin.

What the host computes is real: draws, prompts, lists. What the device computes has shapes, dtypes and devices, and no
values, but for small tensors that follow from the host's alone, as times and masks do: those are read as they would be.
Each line of stdin is a case in JSON, see `run_case`; each becomes a line of what was counted, or of the error.
"""

import ctypes
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before torch is imported, which asks once whether there is CUDA
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    libraries = Path(spec.origin).parent / "lib"
    for library in (libraries / "libtorch_global_deps.so", libraries / "libtorch_cpu.so", sys.argv[1]):
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from phased_dmd import step
from phased_dmd.config.overrides import build
from phased_dmd.models.wan import WanModel
from phased_dmd.networks.roles import Roles
from phased_dmd.plan import simulate

aten = torch.ops.aten
COUNTS = ("laps", "flops", "waits", "uploads", "float64", "now")
SMALL = 4096  # numbers of a tensor that keeps its values


class Nothing:
    """A stream, an event, and all that they do: nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., "Nothing"]:
        return lambda *_, **__: self

    def __enter__(self) -> "Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Watch(simulate.Watch):
    """Counts what the device holds and does, and refuses what a real one would, where FakeTensorMode does not.

    flops: a multiply-add as two. waits: how often the host reads from the device. uploads: copies from the host.
    float64: the most numbers of a float64 tensor on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.begin()

    def begin(self) -> None:
        super().begin()
        self.flops = self.waits = self.uploads = self.float64 = 0

    def is_hosts(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> bool:
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        return not to_device and not any(value.is_cuda for value in given)

    def run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        check_devices(func, kwargs, given, to_device)
        if func is aten._local_scalar_dense.default:
            self.waits += 1
            value = known(given[0])
            with unset_fake_temporarily():
                return 1 if value is None else value.item()
        if func is aten._to_copy.default and target is not None and not to_device:
            self.waits += 1
            value = known(given[0])
            with unset_fake_temporarily():
                return torch.ones(given[0].shape, dtype=kwargs.get("dtype")) if value is None else func(value, **kwargs)
        if func is aten.copy_.default and not given[0].is_cuda:
            raise RuntimeError("a tensor of the host would be given values that there are none of")
        self.uploads += func in (aten._to_copy.default, aten.copy_.default) and not given[-1].is_cuda
        value = follow(func, args, kwargs, given)
        if func is aten.nonzero.default:
            self.waits += 1  # its length is read
            assert value is not None, "the length of nonzero is not known"
            made = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            self.hold(made)
        else:
            made = super().run(func, args, kwargs, given)
        if isinstance(made, FakeTensor):
            made.known = value  # type: ignore[attr-defined]
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        return made

    def hold(self, tensor: Tensor) -> None:
        if not tensor.is_cuda:
            return
        if tensor.dtype == torch.float64:
            self.float64 = max(self.float64, tensor.numel())
        super().hold(tensor)


def known(tensor: Tensor) -> Tensor | None:
    """Returns the values of a tensor of the host, or of one of the device that keeps them; None where it has none."""
    return getattr(tensor, "known", None) if isinstance(tensor, FakeTensor) else tensor


def follow(func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Tensor | None:
    """Returns the values of what an operation makes, where all that it is given is small and has values."""
    values = [known(tensor) for tensor in given]
    if any(value is None or value.numel() > SMALL or value.is_meta for value in values):
        if func._schema.is_mutable and given:
            given[0].known = None  # type: ignore[attr-defined]
        return None
    replaced = tree_map(lambda value: known(value) if isinstance(value, Tensor) else value, (args, kwargs))
    more = replaced[1] | ({"device": torch.device("cpu")} if "device" in kwargs else {})
    if not given and torch.Size(args[0] if isinstance(args[0], list | tuple) else ()).numel() > SMALL:
        return None
    if func._schema.name.startswith(("aten::rand", "c10d::")):
        return None
    with unset_fake_temporarily():
        made = func(*replaced[0], **more)
    return made if isinstance(made, Tensor) else None


def check_devices(func: Any, kwargs: Any, given: list[Tensor], to_device: bool) -> None:
    """Raises where a kernel of the device would be given the host's generator, or lists of tensors of both."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"{func}: a generator on {generator.device} draws on the device")
    name = func._schema.name
    if name.startswith(("aten::_fused_", "aten::_foreach_")) and len({value.device.type for value in given}) > 1:
        raise RuntimeError(f"{func}: lists of tensors on several devices")


def read_list(tensor: Tensor) -> Any:
    """Reads a tensor of the device as a list, waiting once."""
    return tensor.cpu().tolist()


def pretend() -> None:
    """Makes torch's Python side, and the processes of ours, believe in the device."""
    fixed = {
        "is_available": True, "_lazy_init": None, "current_device": 0, "is_bf16_supported": True, "device_count": 1,
        "is_initialized": True, "current_stream": Nothing(), "stream": Nothing(),
    }  # fmt: skip
    for name, value in fixed.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.Stream = torch.cuda.Event = Nothing  # type: ignore[misc]
    torch.accelerator.current_stream = Nothing  # type: ignore[misc,assignment]
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
    FakeTensor.tolist = read_list  # type: ignore[method-assign]

    flash = aten._scaled_dot_product_flash_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        if torch.is_autocast_enabled("cuda"):
            query, key, value = (each.to(torch.get_autocast_dtype("cuda")) for each in (query, key, value))
        dtypes = {each.dtype for each in (query, key, value)}
        assert attn_mask is None and dtypes == {torch.bfloat16}, "another kernel than flash attention"
        return flash(query, key, value)[0]

    torch.nn.functional.scaled_dot_product_attention = attention  # a build without CUDA chooses one that keeps matrices


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Makes an update of the fake, and one of the expert; returns what the device held before, and what each took.

    config: as JSON. phase, gpus. blocks: how many each network has. fault: one of `FAULTS`. updates: "fake", "expert",
    or by default both. rollouts: whether what begins with a rollout without gradient makes it, as by default.
    """
    watch = Watch()
    with (
        simulate.begun(build(case["config"]), case["phase"], case["gpus"], case["blocks"], watch) as (
            job,
            expert,
            fake,
        ),
        mock.patch.object(step, "choice", lambda count, *key: count - 1),  # the exit of the longest rollout
        mock.patch.object(step, "roll_out", step.roll_out if case.get("rollouts", True) else first_noise),
        FAULTS[case["fault"]](list(fake.optimiser.state.values())) if "fault" in case else nullcontext(),
    ):
        found: dict[str, Any] = {"held": watch.now}
        for name in case.get("updates", simulate.UPDATES):
            simulate.run_update(job, case["phase"], name, expert, fake, watch)
            found[name] = {key: getattr(watch, key) for key in COUNTS}
        return found


def first_noise(batch: step.Batch, hops: int, states: step.States) -> Tensor:
    """Stands in the place of a rollout, which holds less than the call with gradient that follows it."""
    return batch.system.start(batch.first_noise())


# Faults that are seeded in a case, each with the optimiser's states of the fake at hand


def noise_on_the_host(states: list[Any]) -> Any:
    return mock.patch.object(step.Batch, "first_noise", lambda batch: torch.zeros(len(batch.samples), *batch.shape))


def text_on_the_host(states: list[Any]) -> Any:
    batch = WanModel.batch
    return mock.patch.object(
        WanModel, "batch", lambda model, rows: batch(SimpleNamespace(**(vars(model) | {"device": "cpu"})), rows)
    )


def times_on_the_host(states: list[Any]) -> Any:
    return mock.patch.object(step, "times_like", lambda time, like: torch.full((len(like),), time, dtype=like.dtype))


def generator_of_the_host(states: list[Any]) -> Any:
    def first_noise(batch: step.Batch) -> Tensor:
        shape = len(batch.samples), *batch.shape
        return torch.randn(shape, generator=torch.Generator(), device=batch.system.device)

    return mock.patch.object(step.Batch, "first_noise", first_noise)


def noise_in_float64(states: list[Any]) -> Any:
    normal = step.normal
    return mock.patch.object(step, "normal", lambda *key: normal(*key).double())


def role_left_before_backward(states: list[Any]) -> Any:
    """Has nothing but each network's call run inside its role."""
    active, depth = Roles.active, 0

    @contextmanager
    def switched_late(roles: Roles, role: str) -> Iterator[None]:
        nonlocal depth
        depth += 1
        try:
            with active(roles, role) if depth > 1 else nullcontext():
                yield
        finally:
            depth -= 1

    return mock.patch.object(Roles, "active", switched_late)


def role_of_another(states: list[Any]) -> Any:
    """Trains the fake inside the expert's role."""
    active = Roles.active
    return mock.patch.object(Roles, "active", lambda roles, role: active(roles, "phase_1" if role == "fake" else role))


def steps_on_the_host(states: list[Any]) -> Any:
    with unset_fake_temporarily():
        for state in states:
            state["step"] = torch.zeros(())
    return nullcontext()


FAULTS = {
    fault.__name__: fault
    for fault in (
        noise_on_the_host, text_on_the_host, times_on_the_host, generator_of_the_host, noise_in_float64,
        role_left_before_backward, role_of_another, steps_on_the_host,
    )
}  # fmt: skip


def main() -> None:
    """Runs the cases, one after the other: what one leaves behind is no part of the next."""
    warnings.simplefilter("ignore")
    simulate.pretend()
    pretend()
    for line in sys.stdin:
        try:
            found = run_case(json.loads(line))
        except Exception as error:  # whatever it is, it is what the case came to
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
