"""Reads the LoRA files of others in whichever of the public layouts they are.

A key is a prefix, the name of a layer, and what it holds of it. The names are looked up among those that the layers of
the network at hand have in public, so nothing is guessed from a key's form; a key that is not found is an error.
diffusers' own converters know these layouts too, but drop differences of norms and tables without a word, and refuse
files that adapt some of the layers only.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from phased_dmd.checkpoint import resolve_inside
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Names
from phased_dmd.networks.change import Change, check_change, parameter_shapes

PREFIX = re.compile(r"^(base_model\.model\.|(model\.)?diffusion_model\.|transformer\.|lora_unet_)+")
SECOND = "transformer_2."  # before the keys of the second network, in files that hold both
KEY = re.compile(  # a layer, and what is held of it; peft may put an adapter's name before the last part
    r"(.+?)\.(?:(?P<A>lora_(?:A|down)(?:\.\w+)?\.weight)|(?P<B>lora_(?:B|up)(?:\.\w+)?\.weight)|"
    r"(?P<bias>lora_(?:B|up)(?:\.\w+)?\.bias)|(?P<alpha>alpha)|(?P<diff>diff)|(?P<diff_b>diff_b)|(?P<diff_m>diff_m))"
)
TABLE = "scale_shift_table"  # Wan's own name is `modulation`
LEAVES = {"diff": "weight", "diff_b": "bias", "bias": "bias", "diff_m": TABLE}  # the parameter that is added to


class Part(NamedTuple):
    """Holds what a file says of one network: tensors by their keys without a prefix, and peft's settings, if any."""

    path: Path
    tensors: dict[str, Tensor]
    settings: Mapping[str, Any]


def read_changes(paths: Sequence[Path], networks: Sequence[nn.Module], original: Names = ()) -> list[Change]:
    """Returns the change of each network: of one file each, noisiest first, or of one file that holds them all.

    original: the names of the layers in the model's own program, see `Adapter`. Raises UserError for a file that is no
    LoRA, is another model's, or holds what is not read, and names the first such layer or key.
    """
    parts = [part for path in paths for part in read_parts(path)]
    if len(parts) != len(networks):
        named = ", ".join(map(str, paths))
        raise UserError(f"{named}: {len(parts)} for {len(networks)} networks; one LoRA file each, the noisiest first")
    shapes = [parameter_shapes(network) for network in networks]
    return [_change(part, each, original) for part, each in zip(parts, shapes, strict=True)]


def find_file(path: Path) -> Path:
    """Returns the LoRA file that a path leads to: itself, or the only one in a folder."""
    if not path.exists():
        raise UserError(f"{path}: is not there")
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = f" ({', '.join(file.name for file in found)})" if found else ""
        raise UserError(f"{path}: holds {len(found)} safetensors files{names}; name the one that is meant")
    return resolve_inside(path, found[0])


def read_parts(path: Path) -> list[Part]:
    """Reads a LoRA file, in float32; one that holds both networks of a model gives two parts."""
    path = find_file(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: only safetensors is read")
    try:
        settings, tensors = _settings(path), load_file(path)
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own, OSError, ValueError: all mean a bad file
        raise UserError(f"{path}: no LoRA file, or damaged ({error})") from error
    parts: list[Part] = []
    for prefix in ("transformer.", SECOND):
        own = {key: tensor for key, tensor in tensors.items() if key.startswith(SECOND) == (prefix == SECOND)}
        plain = {PREFIX.sub("", key.removeprefix(SECOND)): tensor.float() for key, tensor in own.items()}
        if len(plain) < len(own):
            raise UserError(f"{path}: {len(own) - len(plain)} tensors are there under two prefixes")
        if own:
            parts.append(Part(path, plain, {key.removeprefix(prefix): value for key, value in settings.items()}))
    return parts


def _settings(path: Path) -> dict[str, Any]:
    """Returns peft's settings of a LoRA file: from its header, where diffusers puts them, or from peft's own file."""
    beside = path.with_name("adapter_config.json")
    if path.name == "adapter_model.safetensors" and beside.exists():
        return dict(json.loads(resolve_inside(path.parent, beside).read_text("utf-8")))
    with safe_open(path, "pt") as file:
        return dict(json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}")))


def public_names(shapes: Iterable[str], originals: Names = ()) -> dict[str, str]:
    """Returns the layers of the network of these parameters by every public name: diffusers', the original, and both
    without dots, as kohya's trainers write them. The layer "" is the head, of which the network itself holds the table.
    """
    names = {}
    for layer in (name.rpartition(".")[0] for name in shapes if name.endswith((".weight", TABLE))):
        original = layer or "head"
        for pattern, name in originals:
            original = re.sub(pattern, name, original)
        for name in (layer, original):
            names |= {name: layer, name.replace(".", "_"): layer}
    return names


def _change(part: Part, shapes: Mapping[str, tuple[int, ...]], original: Names) -> Change:
    """Returns what a part of a file changes in the network of these parameters, see `read_changes`."""
    path, tensors, settings = part
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    odd = []
    for key, tensor in tensors.items():
        if match := KEY.fullmatch(key):
            found[match[1]][match.lastgroup or ""] = tensor
        else:
            odd.append(key)
    if odd:
        raise UserError(f"{path}: {len(odd)} of {len(tensors)} tensors are of no kind that is read, the first {odd[0]}")
    if settings.get("use_dora"):
        raise UserError(f"{path}: DoRA, which is not read")
    names = public_names(shapes, original)
    if odd := [layer for layer in found if layer not in names]:
        raise UserError(f"{path}: {len(odd)} of {len(found)} layers are none of this model's, the first {odd[0]}")
    change = Change()
    try:
        for layer, held in found.items():
            _add_layer(change, names[layer], held, _factor(layer, held, settings))
        check_change(change, shapes)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return change


def _add_layer(change: Change, layer: str, held: Mapping[str, Tensor], factor: float) -> None:
    """Adds to a change what a file holds of one layer, B and its bias times a factor; half of it is a ValueError."""
    if ("A" in held) != ("B" in held) or held.keys() <= {"alpha", "bias"}:
        raise ValueError(f"of {layer} it holds {', '.join(sorted(held))} alone")
    if "A" in held:
        if len(held["A"]) != held["B"].shape[1]:
            raise ValueError(f"of {layer} A has {len(held['A'])} ranks, and B {held['B'].shape[1]}")
        if layer in change.layers:
            raise ValueError(f"{layer} is there under two names")
        change.layers[layer] = held["A"], factor * held["B"]
    for kind in (kind for kind in LEAVES if kind in held and held[kind].any()):
        name = f"{layer}.{LEAVES[kind]}".removeprefix(".")
        added = factor * held[kind] if kind == "bias" else held[kind]
        change.differences[name] = change.differences.get(name, 0) + added


def _factor(layer: str, held: Mapping[str, Tensor], settings: Mapping[str, Any]) -> float:
    """Returns what a layer's B A is multiplied by: its own alpha / rank, or that of peft's settings; else 1."""
    rank = len(held.get("A", ())) or 1
    if "alpha" in held:
        return held["alpha"].item() / rank
    patterns = settings.get("alpha_pattern") or {}
    own = (alpha for pattern, alpha in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", layer))
    alpha = next(own, settings.get("lora_alpha"))
    return 1.0 if alpha is None else alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
