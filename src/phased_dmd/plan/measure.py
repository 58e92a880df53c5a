"""What one forward costs: operations, and bytes kept for the backward, counted on tensors without data.

The tensors are `FakeTensor`s that say they are on a CPU: autocast and fused attention then choose as they do in reality
(on the meta device there is no autocast, and attention would keep its whole matrix).
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from phased_dmd.config import Config, Lora
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.plan.bare import META, condition_of

T = TypeVar("T")
KNOWN: dict[tuple[Any, ...], Any] = {}  # what was counted in this process, by all that it depends on


def once(make: Callable[[], T], *key: Any) -> T:
    """What `make` gave for this key before, or gives now."""
    if key not in KNOWN:
        KNOWN[key] = make()
    return KNOWN[key]


@dataclass(frozen=True)
class Forward:
    """One network call: FLOPs (a multiply-add is two), the bytes that stay until its backward, and what then learns.

    saved: all. checkpointed: if the repeated blocks keep their inputs alone. learning: the parameters that a gradient
    reaches; the text's half of Qwen-Image's last block has none. block: bytes that one block keeps more while its
    backward runs.
    """

    flops: int
    saved: int
    checkpointed: int
    learning: int
    block: int


class Kept(saved_tensors_hooks):
    """Counts the storages that autograd saves, each once, within repeated blocks and outside; parameters not at all."""

    def __init__(self, network: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        self._alive: list[Tensor] = []  # so that no storage is taken for another that was freed
        self._within: dict[int, int] | None = None
        self.outside: dict[int, int] = {}
        self.inputs: dict[int, int] = {}
        self.blocks: list[dict[int, int]] = []
        for block in blocks:
            block.register_forward_pre_hook(self._enter, with_kwargs=True)
            block.register_forward_hook(self._leave)
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._count(tensor, self.outside if self._within is None else self._within)
        return tensor

    def _enter(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        for value in _tensors([*args, *kwargs.values()]):
            self._count(value, self.inputs)
        self._within = {}
        self.blocks.append(self._within)

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._within = None

    def _count(self, tensor: Tensor, into: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters:
            self._alive.append(tensor)
            into[storage._cdata] = storage.nbytes()


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    """Those among the values, and in tuples among them."""
    inner = [value if isinstance(value, tuple | list) else [value] for value in values]
    return [value for group in inner for value in group if isinstance(value, Tensor)]


def repeated(model: VelocityModel, network: nn.Module) -> nn.ModuleList | None:
    """The module list that the network's blocks stand in."""
    blocks = list(model.blocks(network))
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if list(found) == blocks), None)


def adapted(network: nn.Module, lora: Lora, targets: Sequence[str]) -> nn.Module:
    """The network itself, with a trainable adapter in float32 and all else frozen, as `Roles.add` makes it."""
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(targets))  # type: ignore[arg-type]
    with META:
        inject_adapter_in_model(config, network, adapter_name="measured")
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return network


def over_blocks(
    model: VelocityModel, network: nn.Module, count: Callable[[nn.Module], tuple[int, ...]]
) -> tuple[int, ...]:
    """Sums over a network, from copies of no more than two of its blocks where all are alike: the others add as much.

    count: of a copy, which it may change.
    """
    blocks = repeated(model, network)
    if blocks is None or len(blocks) < 3 or len({tuple(p.shape for p in block.parameters()) for block in blocks}) > 1:
        return count(copy.deepcopy(network))
    one, two = (count(copy.deepcopy(network, {id(blocks): copy.deepcopy(blocks[:length])})) for length in (1, 2))
    return tuple(a + (len(blocks) - 1) * (b - a) for a, b in zip(one, two, strict=True))


def adapter_parameters(model: VelocityModel, network: nn.Module, lora: Lora) -> int:
    """Parameters of an adapter on a network."""

    def count(network: nn.Module) -> tuple[int, ...]:
        trained = adapted(network, lora, model.lora_targets).parameters()
        return (sum(p.numel() for p in trained if p.requires_grad),)

    return over_blocks(model, network, count)[0]


def measure(
    config: Config, model: VelocityModel, network: nn.Module, shape: tuple[int, ...], batch: int, lora: Lora | None
) -> Forward:
    """A call of the network at samples of a shape, training an adapter, or (lora None) all of the weights."""
    block = 0

    def count(network: nn.Module) -> tuple[int, ...]:
        nonlocal block
        network.requires_grad_(True)
        if lora is not None:
            adapted(network, lora, model.lora_targets)
        found = _run(config, model, network, shape, batch)
        block = found.block
        return found.flops, found.saved, found.checkpointed, found.learning

    return Forward(*over_blocks(model, network, count), block=block)


def _run(config: Config, model: VelocityModel, network: nn.Module, shape: tuple[int, ...], batch: int) -> Forward:
    """As it is."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        x, t = torch.zeros(batch, *shape), torch.zeros(batch, dtype=torch.float64)
        condition = condition_of(config, network, shape, batch, most_common_dtype(network))
    if "text" in condition:  # not a fake one: Qwen-Image asks whether anything is masked
        condition["mask"] = torch.ones(condition["text"].shape[:2], dtype=torch.bool)
    kept = Kept(network, model.blocks(network))
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, kept:
        result = model.predict(network, x, t, condition)
    checkpointed = kept.outside | kept.inputs
    inner = [sum(size for key, size in block.items() if key not in checkpointed) for block in kept.blocks]
    saved = kept.outside
    for block in kept.blocks:
        saved = saved | block
    return Forward(
        counter.get_total_flops(), sum(saved.values()), sum(checkpointed.values()), learning(result),
        block=max(inner, default=0),
    )  # fmt: skip


def learning(output: Tensor) -> int:
    """Numbers of all parameters that the backward of an output ends at."""
    found: dict[int, int] = {}
    seen, left = set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [following for following, _ in node.next_functions]
        if node.name() == "torch::autograd::AccumulateGrad":
            parameter: Any = node.variable  # type: ignore[attr-defined] these nodes alone have one
            found[id(parameter)] = parameter.numel()
    return sum(found.values())


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **more: Any) -> int:
    return sdpa_flop_count(query, key, value)


def most_common_dtype(network: nn.Module) -> torch.dtype:
    """The dtype of the most parameters."""
    count: dict[torch.dtype, int] = {}
    for parameter in network.parameters():
        count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=lambda dtype: count[dtype])
