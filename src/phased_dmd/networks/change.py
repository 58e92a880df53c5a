"""What was trained into a network, as a change of its weights from which a role of another size can start."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from phased_dmd.config import Lora
from phased_dmd.errors import UserError
from phased_dmd.maths.low_rank import product_norm, reduce_rank

A, B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Change:
    """Says how one network differs from its base: by scale B A in some layers, by a tensor in other parameters, or in
    everything.

    layers: A [r, in, ...] and B [out, r, ...] by the module's name. differences: what is added, by the parameter's
    name. whole: all parameters as they are, in place of both.
    """

    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0


def expert_change(tensors: Mapping[str, Tensor], lora: Lora | None) -> Change:
    """Returns the change that an expert's tensors, by their names in one network, are; lora: its size, if it has one.

    A tensor that is no half of an adapter's layer is a ValueError.
    """
    if lora is None:
        return Change(whole=dict(tensors))
    modules = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    if odd := min(tensors.keys() ^ {module + half for module in modules for half in (A, B)}, default=None):
        raise ValueError(f"{odd} is no half, or has no other half, of a layer's adapter")
    layers = {module: (tensors[module + A], tensors[module + B]) for module in modules}
    return Change(layers, scale=lora.alpha / lora.rank)


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a network's own parameters, by name, whatever adapters it carries; of a layer that
    is packed the shape that it has unpacked.
    """
    own = {name: p for name, p in network.named_parameters() if ".lora_" not in name}
    shapes = {name.replace(".base_layer", ""): tuple(p.shape) for name, p in own.items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            shapes[f"{name.replace('.base_layer', '')}.weight"] = (module.out_features, module.in_features)
    return shapes


def check_change(change: Change, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises a UserError that names the first tensor which is none of a network's, or has another shape there.

    shapes: see `parameter_shapes`.
    """
    changed = {f"{name}.weight": (b.shape[0], *a.shape[1:]) for name, (a, b) in change.layers.items()}
    changed |= {name: tuple(tensor.shape) for name, tensor in (change.differences | change.whole).items()}
    for name, shape in changed.items():
        if shapes.get(name) != shape:
            here = f"is {list(shapes[name])}" if name in shapes else "does not exist"
            raise UserError(f"it changes {name} {list(shape)}, which {here} in this run's network")
    if change.whole and (missing := min(shapes.keys() - changed.keys(), default=None)):
        raise UserError(f"it lacks {missing}")


def start_from(fresh: Mapping[str, Tensor], changes: Mapping[int, Change], lora: Lora | None) -> dict[str, Tensor]:
    """Returns a role's tensors that compute what its networks do with their changes, as far as the role can hold them.

    fresh: the role's tensors as it was added, by `<network>.<name>`, of its own networks; lora: the size of its
    adapters, None for copies.
    An adapter that is given less than its rank keeps the rest of its fresh A, beside zeros in B: it computes the same,
    and trains. One that is given more takes the nearest of its rank.
    """
    found = dict(fresh)
    for network, change in changes.items():
        own = f"{network}."
        if not any(name.startswith(own) for name in fresh):
            continue
        found |= {own + name: tensor for name, tensor in change.whole.items()}
        for name, tensor in change.differences.items() if lora is None else ():
            found[own + name] = found[own + name] + tensor
        for module, (a, b) in change.layers.items():
            stem = own + module
            if lora is None:
                weight = found[f"{stem}.weight"]
                a, b = _flat((a, b))
                found[f"{stem}.weight"] = weight + change.scale * (b @ a).reshape(weight.shape)
            elif stem + A in fresh:
                pair = a, (change.scale / (lora.alpha / lora.rank)) * b
                found[stem + A], found[stem + B] = _of_rank(pair, fresh[stem + A], fresh[stem + B])
    return found


def _of_rank(pair: tuple[Tensor, Tensor], fresh_a: Tensor, fresh_b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns A and B of an adapter's own rank, see `start_from`."""
    (a, b), rank = pair, len(fresh_a)
    if len(a) > rank:
        a, b, _ = reduce_rank(*_flat(pair), rank)
        a, b = a.reshape(-1, *fresh_a.shape[1:]), b.reshape(len(b), -1, *fresh_b.shape[2:])
    rest = torch.zeros_like(fresh_b[:, len(a) :])
    return torch.cat([a, fresh_a[len(a) :].to(a)]), torch.cat([b, rest.to(b)], dim=1)


def describe_loss(change: Change, lora: Lora | None, targets: Sequence[str]) -> str:
    """Says which parts of a change are lost to adapters of this size on these targets, each with its share of the
    whole change's norm; nothing where that is less than .01 %.
    """
    if lora is None:
        return ""
    norms = {name: change.scale * product_norm(*_flat(pair)) for name, pair in change.layers.items()}
    differences = {name: tensor.double().norm().item() for name, tensor in change.differences.items()}
    left_out = [name for name in change.layers if not is_target(name, targets)]
    larger = {name: pair for name, pair in change.layers.items() if len(pair[0]) > lora.rank and name not in left_out}
    cut = [change.scale * reduce_rank(*_flat(pair), lora.rank)[2] for pair in larger.values()]
    rank = max((len(a) for a, _ in larger.values()), default=0)
    lost = {
        f"as rank {rank} becomes {lora.rank}": cut,
        f"in {len(left_out)} layers that teacher.lora_targets leave out, the first {min(left_out, default='')}":
            [norms[name] for name in left_out],
        f"in {len(differences)} biases, norms and tables, the first {min(differences, default='')}, which only full "
        "experts have": [*differences.values()],
    }  # fmt: skip
    whole = math.hypot(*norms.values(), *differences.values())
    shares = {what: math.hypot(*parts) / whole if parts else 0.0 for what, parts in lost.items()}
    return "; ".join(f"{share:.2%} {what}" for what, share in shares.items() if share >= 1e-4)


def _flat(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns A [r, in] and B [out, r] of a layer's adapter, a convolution's kernel as part of `in`."""
    return pair[0].flatten(1), pair[1].flatten(1)


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Says whether one of the LoRA targets ends a module's name."""
    return any(module == target or module.endswith(f".{target}") for target in targets)
