"""What one network call costs: FLOPs, and the bytes that wait for its backward, counted on tensors without data.

The tensors are FakeTensors that say they are on a CPU: autocast and fused attention then choose as they do in reality
(on the meta device there is no autocast, and attention would keep its whole matrix).
"""

import copy
import functools
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from phased_dmd.config import Config, Fake, Generator, Lora, phase_plan
from phased_dmd.config.teacher import OwnTeacher, PipelineTeacher, Teacher
from phased_dmd.engine.sharding import recompute
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import PhasePlan
from phased_dmd.models.loader import adapter_of, bare_model
from phased_dmd.models.protocol import Condition, VelocityModel
from phased_dmd.models.source import META

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2}
FAKE_CPU = FakeTensorMode(allow_non_fake_inputs=True)
F = TypeVar("F", bound=Callable[..., Any])


def cached(function: F) -> F:
    """Caches what a function returns for its arguments; pyright does not know that a config's sections are hashable."""
    return functools.cache(function)  # type: ignore[return-value]


@cached
def meta_model(teacher: Teacher) -> VelocityModel:
    """Returns the teacher on the meta device; callers must not change it. Raises UserError where none can be made."""
    if isinstance(teacher, OwnTeacher):
        raise UserError("teacher.kind: own has no plan: only the recipes' pipelines can be built without their weights")
    return bare_model(teacher, seed=0)


@cached
def network_parameters(teacher: Teacher) -> int:
    """Returns the number of parameters of one of a teacher's networks, which are alike."""
    return sum(p.numel() for p in meta_model(teacher).students[0].parameters())


def plan_of(config: Config) -> PhasePlan:
    """Returns the phases over the teacher's networks. Raises UserError where a phase has no re-noise times."""
    try:
        return phase_plan(config, meta_model(config.teacher).switches)
    except ValueError as error:
        raise UserError(str(error)) from None


def itemsizes(teacher: Teacher) -> tuple[int, int]:
    """Returns the bytes of a number that computes, and of one that is trained: those of float32 at least."""
    item = ITEMSIZE[teacher.dtype] if isinstance(teacher, PipelineTeacher) else ITEMSIZE["float32"]
    return item, max(item, ITEMSIZE["float32"])


def bucket_shapes(teacher: Teacher) -> list[tuple[int, ...]]:
    """Returns the shapes of the resolution buckets' latents, all upright: lying pictures cost the same."""
    return [(*shape[:-2], *sorted(shape[-2:])) for shape in meta_model(teacher).sample_shapes]


def largest(shapes: Sequence[tuple[int, ...]]) -> int:
    """Returns the index of the shape of the most numbers."""
    return max(range(len(shapes)), key=lambda i: math.prod(shapes[i]))


def condition_shapes(teacher: Teacher, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a sample's condition with the longest prompt; `shape` is that of the sample's latents."""
    if not isinstance(teacher, PipelineTeacher):
        return {}
    config: Any = meta_model(teacher).networks[0].config
    return adapter_of(teacher).condition(config, teacher.max_tokens, tuple(shape))


def fake_inputs(teacher: Teacher, shape: Sequence[int], batch: int) -> tuple[Tensor, Condition]:
    """Returns latents [batch, *shape] and the condition of the longest prompts, as tensors without data."""
    with FAKE_CPU:
        x = torch.zeros(batch, *shape)
        if not isinstance(teacher, PipelineTeacher):
            return x, {}
        condition = {
            name: torch.zeros(batch, *rest, dtype=torch.float32 if name == "image" else getattr(torch, teacher.dtype))
            for name, rest in condition_shapes(teacher, shape).items()
        }
    condition["mask"] = torch.ones(batch, teacher.max_tokens, dtype=torch.bool)  # with values: some models read them
    return x, condition


def fake_networks(teacher: Teacher, lora: Lora | None, train: bool) -> list[tuple[int, nn.Module]]:
    """Returns short copies of a network, with weights: what is counted of the copies, weighted, sums to the network's.

    Where the longest list's are alike these are copies with one block, a, and two, b: L count a + (L - 1) (b - a).
    Their tensors have no data. With lora they get a trainable adapter in float32 or more, as from `Roles.add`; without
    it all of their weights are trainable, or, if not train, none.
    """
    model = meta_model(teacher)
    network, blocks = model.students[0], longest_list(model.blocks(model.students[0]), model.students[0])
    if len(blocks) < 3 or len({tuple(p.shape for p in block.parameters()) for block in blocks}) > 1:
        copies = [(1, copy.deepcopy(network))]
    else:
        one, two = (copy.deepcopy(network, {id(blocks): copy.deepcopy(blocks[:length])}) for length in (1, 2))
        copies = [(2 - len(blocks), one), (len(blocks) - 1, two)]
    for _, each in copies:
        each.requires_grad_(train)
        if lora is not None:
            adapter = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(model.lora_targets))  # type: ignore[arg-type]
            with META:
                inject_adapter_in_model(adapter, each, adapter_name="measured")
            for parameter in each.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        with FAKE_CPU:
            each.to_empty(device="cpu")
    return copies


def longest_list(blocks: Sequence[nn.Module], network: nn.Module) -> nn.ModuleList:
    """Returns the longest of a network's lists of modules that are repeated blocks; an empty one if there is none."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList) and set(module) <= set(blocks)]
    return max(lists, key=len, default=nn.ModuleList())


class SavedBytes(saved_tensors_hooks):
    """Counts the storages that autograd saves, each once, inside and outside of the blocks, without parameters.

    outside, inputs, blocks: bytes by storage: saved outside of all blocks, the blocks' inputs, and saved in each block.
    """

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self._alive: list[Tensor] = []  # a freed storage's address could be given to another one
        self.outside: dict[int, int] = {}
        self.inputs: dict[int, int] = {}
        self.blocks: list[dict[int, int]] = []
        self._saved = self.outside
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._count(tensor, self._saved)
        return tensor

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._count(value, self.inputs)
        self._saved = {}
        self.blocks.append(self._saved)

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._saved = self.outside

    def _count(self, tensor: Tensor, sizes: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._alive.append(tensor)
            sizes[storage._cdata] = storage.nbytes()


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside, each storage once and without the network's own.

    now, most: bytes that are there, and the most there were.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in (*network.parameters(), *network.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*with_numbers(func, args), **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return made

    def _freed(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


def with_numbers(func: Any, args: Any) -> Any:
    """Returns an operation's arguments, an index of booleans among them as one of numbers: a tensor without data can be
    asked for so many, and not for those that are true.
    """
    if func is not torch.ops.aten.index.Tensor:
        return args
    with unset_fake_temporarily():
        indices = [
            index.nonzero().squeeze(1) if index is not None and index.dtype == torch.bool else index
            for index in args[1]
        ]
    return args[0], indices


class WithoutData(TorchDispatchMode):
    """Keeps `pad_sequence` from making a tensor with data of tensors without: what it fills first gets none either."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.full.default and (kwargs.get("dtype") or torch.bool).is_floating_point:
            with FAKE_CPU:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


class Call(NamedTuple):
    """The cost of one network call.

    flops: of the forward, a multiply-add as two. attention: the part of it in attention's own products. saved: bytes
    that wait for the backward. checkpointed: those bytes if each repeated block keeps its inputs only. trained:
    parameters that the call trains. learning: those that a gradient reaches; the text's half of Qwen-Image's last block
    has none.
    """

    flops: int
    attention: int
    saved: int
    checkpointed: int
    trained: int
    learning: int


def adapter(role: Generator | Fake) -> Lora | None:
    """Returns what a role trains on a network: an adapter, or None for all weights."""
    return role.lora if role.weights == "lora" else None


def largest_call(config: Config, batch: int, role: Generator | Fake) -> Call:
    """Returns the cost of a call that trains a role, with a batch of samples of the largest bucket."""
    shapes = bucket_shapes(config.teacher)
    return call(config.teacher, shapes[largest(shapes)], batch, adapter(role))


def largest_block(config: Config, batch: int, role: Generator | Fake) -> int:
    """Returns the `block_bytes` of a call that trains a role, with a batch of samples of the largest bucket."""
    shapes = bucket_shapes(config.teacher)
    return block_bytes(config.teacher, shapes[largest(shapes)], batch, adapter(role))


@cached
def call(teacher: Teacher, shape: tuple[int, ...], batch: int, lora: Lora | None) -> Call:
    """Returns the cost of a call of a network with a batch of samples of a shape; a teacher's networks are alike.

    The call trains an adapter, or all weights where lora is None.
    """
    weights, networks = zip(*fake_networks(teacher, lora, train=True), strict=True)
    calls = [_count_call(teacher, network, shape, batch) for network in networks]
    totals = (sum(map(operator.mul, weights, numbers)) for numbers in zip(*calls, strict=True))
    return Call(*totals)


def _count_call(teacher: Teacher, network: nn.Module, shape: tuple[int, ...], batch: int) -> Call:
    model, (x, condition) = meta_model(teacher), fake_inputs(teacher, shape, batch)
    with FAKE_CPU:
        t = torch.zeros(batch, dtype=torch.float64)
    saved = SavedBytes(network, model.blocks(network))
    attention = {  # the one operation that torch's counter leaves out on a CPU
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    }
    with WithoutData(), FlopCounterMode(display=False, custom_mapping=attention) as counter, saved:
        output = model.predict(network, x, t, condition)
    checkpointed, whole = saved.outside | saved.inputs, dict(saved.outside)
    for block in saved.blocks:
        whole |= block
    return Call(
        flops=counter.get_total_flops(),
        attention=sum(counter.get_flop_counts()["Global"].get(kernel, 0) for kernel in attention),
        saved=sum(whole.values()), checkpointed=sum(checkpointed.values()),
        trained=sum(p.numel() for p in network.parameters() if p.requires_grad),
        learning=learning(output),
    )  # fmt: skip


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


@cached
def block_bytes(teacher: Teacher, shape: tuple[int, ...], batch: int, lora: Lora | None) -> int:
    """Returns the further bytes that a checkpointed block needs while its backward runs: its own activations, and the
    gradients on their way through it, without those that its parameters keep.
    """
    model, (x, condition) = meta_model(teacher), fake_inputs(teacher, shape, batch)
    network = fake_networks(teacher, lora, train=True)[-1][1]
    for block in model.blocks(network):
        recompute(block)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    with FAKE_CPU:
        t = torch.zeros(batch, dtype=torch.float64)
    with WithoutData(), PeakBytes(network) as peak:
        output = model.predict(network, x, t, condition)
        waiting = peak.most = peak.now
        output.backward(torch.zeros_like(output))
    return peak.most - waiting


def learning(output: Tensor) -> int:
    """Returns how many numbers the gradient of an output reaches; a backward would tell, and take as long again."""
    numbers, seen, left = 0, set(), [output.grad_fn]
    while left:
        node: Any = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad":
            numbers += node.variable.numel()
    return numbers
