"""Reads a diffusers pipeline's folder, local or on the hub, part by part, so that no more is loaded than is used."""

import hashlib
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin, no_init_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import nn

from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine.world import rank, sharded
from phased_dmd.errors import UserError
from phased_dmd.models.hashes import file_hash, tensors_hash, weight_files
from phased_dmd.models.quantise import check_installed, quantise
from phased_dmd.models.trust import check_index, check_part, read_json
from phased_dmd.recipes import fitting

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {  # the teachers inside the package, and whose VAE, tokenizer and text encoder each has
    "nano": "nano", "nano-moe": "nano", "nano-i2v": "nano", "scenes": "scenes", "scenes-moe": "scenes",
}  # fmt: skip
WEIGHED = ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae")
META = torch.device("meta")  # tensors there have shapes and no values
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # of `from_pretrained`: see `check_loaded`


def _shipped(name: str) -> Path:
    """Returns the folder of an embedded teacher; raises UserError with the command that makes one that is not there."""
    folder = ASSETS / name
    if not (folder / "model_index.json").exists():
        how = f"`phased-dmd teach {name} --output {folder}` makes it, in two hours or so on one core"
        raise UserError(f"teacher.path: {name} is not in the package yet; {how}")
    return folder


class Source:
    """Reads the parts of a teacher's pipeline from its folder."""

    def __init__(self, teacher: PipelineTeacher) -> None:
        self.path, self.revision = teacher.path, teacher.revision
        self.quantise: Literal["int8", "nf4"] | None = teacher.quantise

    @property
    def on_disk(self) -> bool:
        """Says whether the teacher's path is a folder of this machine, and no hub id."""
        return self.path in SHIPPED or Path(self.path).exists()

    @cached_property
    def folder(self) -> Path:
        """Finds the local folder; a hub id is downloaded, or found in the hub's cache."""
        if self.path in SHIPPED:
            return _shipped(self.path)
        if self.on_disk:
            return Path(self.path)
        try:
            return Path(DiffusionPipeline.download(self.path, revision=self.revision, use_safetensors=True))
        except (OSError, ValueError) as error:
            reason = f"cannot be had from the hub: {str(error).split('. ')[0]}"
            raise UserError(f"teacher.path: {self.path} is no folder, and {reason}") from error

    @cached_property
    def index(self) -> dict[str, Any]:
        """Reads `model_index.json`; one that names code of its own is a UserError."""
        index = read_json(self.folder / "model_index.json")
        check_index(index, self.folder)
        return index

    def has(self, name: str) -> bool:
        """Says whether the pipeline has a part of that name."""
        named = self.index.get(name)
        return isinstance(named, list) and isinstance(named[0], str)

    def part_folder(self, name: str) -> Path:
        """Finds the folder of a part; the variants of an embedded teacher share most of theirs with it."""
        own = self.folder / name
        found = own if own.exists() or self.path not in SHIPPED else ASSETS / SHIPPED[self.path] / name
        if not found.is_dir():
            kind = self.index.get("_class_name")
            raise UserError(f"teacher.path: {self.folder} holds no {name}, a part of any {kind}; {fitting(str(kind))}")
        return found

    def check_weights(self, name: str) -> None:
        """Raises a UserError where a part's weights are not in safetensors: a pickle is never opened."""
        if not any(self.part_folder(name).glob("*.safetensors")):
            raise UserError(f"teacher.path: {self.part_folder(name)} holds no weights in safetensors")

    def shapes(self, name: str) -> dict[str, list[int]]:
        """Reads the shapes of a part's tensors, by name, from the heads of its files; a damaged one is a UserError."""
        found, folder = {}, self.part_folder(name)
        try:
            for path in weight_files(folder):
                with safe_open(path, "pt") as file:
                    found |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 no dict
        except Exception as error:  # safetensors raises its own, and OSError
            raise UserError(f"teacher.path: {folder} cannot be loaded: {' '.join(str(error).split())}") from error
        return found

    def count_weights(self) -> int:
        """Counts the numbers of all networks, encoders and the VAE, from the heads of their files."""
        return sum(math.prod(shape) for name in WEIGHED if self.has(name) for shape in self.shapes(name).values())

    def load(self, kind: type, name: str, **options: Any) -> Any:
        """Loads one part by its class: weights only from safetensors, all of them, and no code but the libraries'."""
        folder = self.part_folder(name)
        is_network = issubclass(kind, nn.Module)
        if is_network:
            self.check_weights(name)
            options |= {"use_safetensors": True} | REPORTED
        check_part(folder, kind)
        try:
            with quiet():
                loaded = kind.from_pretrained(folder, **options)  # type: ignore[attr-defined] every part has it
        except Exception as error:  # safetensors and tokenizers raise their own: all mean a folder that is damaged
            raise UserError(f"teacher.path: {folder} cannot be loaded: {' '.join(str(error).split())}") from error
        if not is_network:
            return loaded
        part, report = loaded
        check_loaded(f"teacher.path: {folder}", part, report)
        return part.eval().requires_grad_(False)

    def outline(self, kind: type, name: str, dtype: torch.dtype) -> nn.Module:
        """Builds a teacher's network, its parameters on the meta device; what its weights lack is a UserError."""
        self.check_weights(name)
        config = self.config(kind, name)
        try:
            with quiet():
                return skeleton(kind, config, dtype).requires_grad_(False)  # type: ignore[arg-type] of diffusers
        except Exception as error:  # what a class makes of another's configuration
            reason = " ".join(str(error).split())
            raise UserError(f"teacher.path: {self.part_folder(name)} makes no {kind.__name__}: {reason}") from error

    def check_loadable(self, outline: nn.Module, name: str) -> None:
        """Raises a UserError where `network` would, by the heads of the files: it may be called an hour from now."""
        if self.quantise and sharded():
            raise UserError("teacher.quantise: a packed network cannot be sharded or offloaded")
        if self.quantise:
            check_installed()
        needed, found = {key: list(t.shape) for key, t in outline.state_dict().items()}, self.shapes(name)
        odd = [(key, found[key], shape) for key, shape in needed.items() if found.get(key, shape) != shape]
        missing, surplus = needed.keys() - found.keys(), found.keys() - needed.keys()
        check_tensors(f"teacher.path: {self.part_folder(name)}", type(outline), odd, missing, surplus)

    def network(self, outline: nn.Module, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Loads a teacher's network to the device; one that will be sharded to the first process's CPU alone, where the
        others keep the outline.

        What its class keeps in float32 is so in bfloat16 alone: float64 is float64 throughout. With `quantise` the
        repeated blocks are packed on their way to the device.
        """
        if device == META or (sharded() and rank() > 0):
            network = outline
        else:
            network = self.load(type(outline), name, dtype=dtype)
            if self.quantise:
                quantise(repeated(network), self.quantise, dtype, device)
            network.to("cpu" if sharded() else device)
        return network.double() if dtype == torch.float64 else network

    def config(self, kind: Any, name: str) -> dict[str, Any]:
        """Reads a part's configuration, with its class's defaults."""
        folder = self.part_folder(name)
        check_part(folder, kind)
        known = inspect.signature(kind.__init__).parameters.values()
        defaults = {field.name: field.default for field in known if field.default is not field.empty}
        return defaults | read_json(folder / "config.json")

    def fingerprint(self, parts: Sequence[str], *more: object) -> str:
        """Hashes the parts' files, by name and all bytes, and of more."""
        digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
        for part in parts:
            for path in sorted(path for path in self.part_folder(part).glob("*") if path.is_file()):
                digest.update(f"{part}/{path.name} {file_hash(path)} ".encode())
        return digest.hexdigest()

    def contents(self) -> str:
        """Hashes the networks, encoders and VAE, wherever they lie: it sees `tensors_hash` of each."""
        hashes = [tensors_hash(self.part_folder(name)) if self.has(name) else "" for name in WEIGHED]
        about = self.index.get("boundary_ratio"), bool(self.index.get("expand_timesteps")), hashes
        return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


class BareSource(Source):
    """Reads no weight: the networks of the pipeline are on the meta device. The configurations of known hub ids ship.

    look: whether a folder of this machine must hold all that a run reads; else its configurations are enough.
    """

    def __init__(self, teacher: PipelineTeacher, look: bool = False) -> None:
        super().__init__(teacher)
        self.look = look

    @cached_property
    def folder(self) -> Path:
        if self.on_disk:
            return super().folder
        if shipped := architecture(self.path):
            return shipped
        try:
            return Path(snapshot_download(self.path, revision=self.revision, allow_patterns=["*.json"]))
        except (OSError, ValueError) as error:
            raise UserError(
                f"teacher.path: {self.path} is no folder and no shipped architecture, and its configuration cannot be "
                "had from the hub"
            ) from error

    def check_weights(self, name: str) -> None:
        if self.look and self.on_disk:
            super().check_weights(name)

    def load(self, kind: type, name: str, **options: Any) -> Any:
        """Returns a skeleton of a network; a tokenizer itself, or None where the folder is not on this machine."""
        if issubclass(kind, nn.Module):
            return self.outline(kind, name, options["dtype"])
        return super().load(kind, name, **options) if self.on_disk else None

    def check_loadable(self, outline: nn.Module, name: str) -> None:
        """Looks into no file."""


def architecture(path: str) -> Path | None:
    """Finds the shipped folder of a hub id: each part's configuration, as on the hub, no weights; None if unknown."""
    shipped = (ASSETS / "architectures").glob("*/*/model_index.json")
    return {f"{index.parts[-3]}/{index.parts[-2]}": index.parent for index in shipped}.get(path)


def skeleton(kind: type[ModelMixin], config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Builds the model that `kind.from_pretrained(folder, dtype=dtype)` gives, its parameters on the meta device.

    Buffers and plain attributes are real. As there, what the class keeps in float32 is float32 whatever the dtype.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model: nn.Module = kind.from_config(config)  # type: ignore[attr-defined] every model is a ConfigMixin too
    finally:
        torch.set_default_dtype(before)
    kept = set(kind._keep_in_fp32_modules or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype if kept.isdisjoint(name.split(".")) else torch.float32)
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silences the libraries' progress bars and notices."""
    before = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before[0])
        transformers.utils.logging.set_verbosity(before[1])


def repeated(network: nn.Module) -> list[nn.Module]:
    """Lists the repeated blocks of a network."""
    return [block for child in network.children() if isinstance(child, nn.ModuleList) for block in child]


def check_loaded(where: str, part: nn.Module, report: Mapping[str, Iterable[Any]]) -> None:
    """Raises a UserError that names a tensor which a library's loader, asked by REPORTED, did not find or fit.

    diffusers believes an index of shards; what it does not find in them is left on the meta device.
    """
    unread = {name for name, tensor in part.state_dict().items() if tensor.is_meta}
    missing = unread | set(report["missing_keys"])
    check_tensors(where, type(part), report["mismatched_keys"], missing, report["unexpected_keys"])


def check_tensors(
    where: str, kind: type, odd: Iterable[tuple[str, Any, Any]], missing: Iterable[str], surplus: Iterable[str]
) -> None:
    """Raises a UserError that names a tensor which a part of a pipeline lacks, or has in another shape.

    odd: names, with the shapes that are there and those that are needed. surplus: names that are there instead.
    """
    if first := min(odd, default=None):
        name, found, needed = first
        raise UserError(f"{where}: {name} is {list(found)}, where its {kind.__name__} has {list(needed)}")
    if names := sorted(missing):
        more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
        other = min(surplus, default=None)
        instead = f"; it holds {other} instead" if other else ""
        raise UserError(f"{where} lacks {names[0]}{more} of its {kind.__name__}{instead}")
