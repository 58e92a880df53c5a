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
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # what collectives do to tensors without data
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the group that does nothing, too
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from phased_dmd import step, train
from phased_dmd.engine import collectives, world
from phased_dmd.models.loader import bare_model
from phased_dmd.models.wan import WanModel
from phased_dmd.networks import students
from phased_dmd.networks.build import add_adapters, add_expert, build_system
from phased_dmd.networks.roles import Roles
from phased_dmd.recipes import resolve

aten = torch.ops.aten
COUNTS = ("peak", "flops", "waits", "uploads", "float64", "now")
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


class Watch(TorchDispatchMode):
    """Counts what the device holds and does, and refuses what a real one would, where FakeTensorMode does not.

    now, peak: bytes. flops: a multiply-add as two. waits: how often the host reads from the device. uploads: copies
    from the host. float64: the most numbers of a float64 tensor on the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = self.waits = self.uploads = self.float64 = 0
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Counts anew, from what is there."""
        self.peak, self.flops, self.waits, self.uploads, self.float64 = self.now, 0, 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is asked again for the shards
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == "cuda"
        if not to_device and not any(value.is_cuda for value in given):
            with unset_fake_temporarily():  # the host's own
                return func(*args, **kwargs)
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
        else:
            made = func(*args, **kwargs)
        if isinstance(made, FakeTensor):
            made.known = value  # type: ignore[attr-defined]
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **kwargs, out_val=made)
        for tensor in tree_leaves(made):
            if isinstance(tensor, FakeTensor) and tensor.is_cuda:
                self._hold(tensor)
        return made

    def _hold(self, tensor: Tensor) -> None:
        if tensor.dtype == torch.float64:
            self.float64 = max(self.float64, tensor.numel())
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._freed, storage._cdata)
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Is told that a storage has another size; FSDP gives memory back by a size of 0."""
        if storage._cdata in self._sizes:
            self.now += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


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

    resize = torch.UntypedStorage.resize_

    def resized(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Watch):
                mode.resized(storage)

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]

    flash = aten._scaled_dot_product_flash_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
        assert attn_mask is None and torch.is_autocast_enabled("cuda"), "another kernel than flash attention"
        dtype = torch.get_autocast_dtype("cuda")
        return flash(query.to(dtype), key.to(dtype), value.to(dtype))[0]

    torch.nn.functional.scaled_dot_product_attention = attention  # a build without CUDA chooses one that keeps matrices

    infer = ShardingPropagator._propagate_tensor_meta_non_cached

    def infer_apart(*args: Any) -> Any:
        with _disable_current_modes():  # FSDP asks for the shapes of whole tensors, which are never there
            return infer(*args)

    ShardingPropagator._propagate_tensor_meta_non_cached = infer_apart  # type: ignore[method-assign]

    # Of several processes this is the first, and the others answer nothing.
    collectives.run_on_all_ranks = lambda action: [action()]

    copied = students.copy.deepcopy

    def deepcopy(value: Any, *more: Any) -> Any:
        with unset_fake_temporarily():  # an outline has parameters on the meta device, which cannot be copied inside
            return copied(value, *more)

    students.copy = SimpleNamespace(deepcopy=deepcopy)  # type: ignore[assignment]


@contextmanager
def group(gpus: int) -> Iterator[None]:
    """Is the first of some processes, each with a GPU, whose collectives do nothing."""
    if gpus == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        world.mesh.cache_clear()
        dist.destroy_process_group()


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Makes an update of the fake, and one of the expert; returns what the device held before, and what each took.

    recipe, changes: of the config. phase, gpus. blocks: how many each network has. tokens: of the prompt. fault: one of
    `FAULTS`.
    """
    config, watch = resolve(case["recipe"], case["changes"]), Watch()
    model: Any = bare_model(config.teacher, 0)
    for network in model.networks:
        name = next(name for name, child in network.named_children() if isinstance(child, torch.nn.ModuleList))
        setattr(network, name, getattr(network, name)[: case["blocks"]])
    width = model.networks[0].config.get("text_dim") or model.networks[0].config["joint_attention_dim"]
    text = {"text": torch.zeros(case["tokens"], width, dtype=torch.bfloat16)}
    with ExitStack() as stack:
        stack.enter_context(group(case["gpus"]))
        if case["gpus"] > 1:
            world.mesh(config.engine.replicas)  # it reads numbers, which is not possible inside
        model.device = world.device()
        system = build_system(config, model, text)
        fresh = add_adapters(system)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(watch)
        system.roles.shard(config.engine)
        fresh = {k: {n: torch.empty_like(t, device="cpu") for n, t in values.items()} for k, values in fresh.items()}
        conditions = SimpleNamespace(eligible=lambda bucket: range(1), row=lambda index, bucket: text)
        job: Any = SimpleNamespace(
            system=system, fresh_fakes=fresh, conditions=conditions, odds=step.bucket_odds(config, conditions),  # type: ignore[arg-type]
            micro_batches=world.split_batch(config.batch_size, config.engine), rank=0,
            signals=SimpleNamespace(asked=lambda: 0), run=SimpleNamespace(expert_path=lambda _: Path("none/such")),
        )  # fmt: skip
        for earlier in range(1, case["phase"]):
            add_expert(system, earlier, trainable=False)
        weights = watch.now
        learners = train.begin(job, case["phase"])
        assert learners is not None
        expert, fake = learners
        if "fault" in case:
            stack.enter_context(FAULTS[case["fault"]](list(fake.optimiser.state.values())))
        state = expert.state() | fake.state()
        found: dict[str, Any] = {"weights": weights, "held": watch.now}
        last = mock.patch.object(step, "choice", lambda count, *key: count - 1)  # the exit of the longest rollout
        for learner, update, loss in ((fake, 1, step.fake_loss), (expert, step.EXPERT_UPDATE, step.expert_loss)):
            watch.begin()
            with last:
                train.train_step(job, train.Position(case["phase"]), update, learner, loss, {}, state)
            name = "fake" if learner is fake else "expert"
            found[name] = {key: getattr(watch, key) for key in COUNTS}
        return found


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
    pretend()
    for line in sys.stdin:
        try:
            found = run_case(json.loads(line))
        except Exception as error:  # whatever it is, it is what the case came to
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
