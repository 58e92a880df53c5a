"""A diffusers pipeline's folder, local or on the hub: its parts one by one, so that no more is loaded than is used."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from phased_dmd.config.teacher import PipelineTeacher, Size
from phased_dmd.engine.world import rank, sharded
from phased_dmd.errors import UserError
from phased_dmd.models.architectures import skeleton
from phased_dmd.models.contents import file_hash, tensors_hash
from phased_dmd.models.quantise import quantise
from phased_dmd.models.trust import check_index, check_part, read_json

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ("nano", "nano-moe", "nano-i2v")
WEIGHED = ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae")
ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # of `from_pretrained`: see `check_loaded`


class Source:
    """Where the parts of a teacher's pipeline come from."""

    def __init__(self, teacher: PipelineTeacher) -> None:
        self.path, self.revision = teacher.path, teacher.revision
        self.quantise: Literal["int8", "nf4"] | None = teacher.quantise

    @property
    def on_disk(self) -> bool:
        """Whether it is a folder of this machine, and no hub id."""
        return self.path in SHIPPED or Path(self.path).exists()

    @cached_property
    def folder(self) -> Path:
        """The local folder; a hub id is downloaded, or found in the hub's cache."""
        if self.on_disk:
            return ASSETS / self.path if self.path in SHIPPED else Path(self.path)
        try:
            return Path(DiffusionPipeline.download(self.path, revision=self.revision, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise UserError(
                f"teacher.path: {self.path} is no folder, and cannot be had from the hub: {str(error).split('. ')[0]}"
            ) from error

    @cached_property
    def index(self) -> dict[str, Any]:
        """`model_index.json`; one that names code of its own is a UserError."""
        index = read_json(self.folder / "model_index.json")
        check_index(index, self.folder)
        return index

    def has(self, name: str) -> bool:
        return (self.index.get(name) or (None,))[0] is not None

    def part_folder(self, name: str) -> Path:
        """The folder of a part; the variants of nano share most of theirs with nano."""
        own = self.folder / name
        found = own if own.exists() or self.path not in SHIPPED else ASSETS / "nano" / name
        if not found.is_dir():
            raise UserError(f"teacher.path: {self.folder} holds no {name}")
        return found

    def check_weights(self, name: str) -> None:
        """A UserError where a part's weights are not in safetensors: a pickle is never opened."""
        if not any(self.part_folder(name).glob("*.safetensors")):
            raise UserError(f"teacher.path: {self.part_folder(name)} holds no weights in safetensors")

    def load(self, kind: type, name: str, **options: Any) -> Any:
        """One part by its class; weights only from safetensors, all of them, and no code but the libraries' own."""
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

    def network(self, kind: type, name: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """A teacher's network on the device. Where it will be sharded: on the CPU, and of the first process alone.

        What its class keeps in float32 is so in bfloat16 alone: float64 is float64 throughout. A packed one, see
        `quantise`, is packed on its way to the device.
        """
        if self.quantise and sharded():
            raise UserError("teacher.quantise: a packed network cannot be sharded or offloaded")
        if sharded() and rank() > 0:
            network = skeleton(kind, self.config(kind, name), dtype)
        else:
            network = self.load(kind, name, dtype=dtype)
            if self.quantise and device.type != "meta":
                lists = [child for child in network.children() if isinstance(child, nn.ModuleList)]  # repeated blocks
                quantise([block for blocks in lists for block in blocks], self.quantise, dtype, device)
            network.to("cpu" if sharded() else device)
        return network.double() if dtype == torch.float64 else network

    def config(self, kind: Any, name: str) -> dict[str, Any]:
        """A part's configuration alone, with its class's defaults."""
        folder = self.part_folder(name)
        check_part(folder, kind)
        known = inspect.signature(kind.__init__).parameters.values()
        defaults = {field.name: field.default for field in known if field.default is not field.empty}
        return defaults | read_json(folder / "config.json")

    def fingerprint(self, parts: Sequence[str], *more: object) -> str:
        """A hash of the parts' files, by name and all bytes, and of more."""
        digest = hashlib.blake2b(repr(more).encode(), digest_size=16)
        for part in parts:
            for path in sorted(path for path in self.part_folder(part).glob("*") if path.is_file()):
                digest.update(f"{part}/{path.name} {file_hash(path)} ".encode())
        return digest.hexdigest()

    def contents(self) -> str:
        """A hash of the networks, encoders and VAE, wherever they lie: it sees `tensors_hash` of each."""
        hashes = [tensors_hash(self.part_folder(name)) if self.has(name) else "" for name in WEIGHED]
        about = self.index.get("boundary_ratio"), bool(self.index.get("expand_timesteps")), hashes
        return hashlib.blake2b(repr(about).encode(), digest_size=16).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' progress bars and notices."""
    before = diffusers.utils.logging.get_verbosity(), transformers.utils.logging.get_verbosity()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.utils.logging.set_verbosity(before[0])
        transformers.utils.logging.set_verbosity(before[1])


def check_loaded(where: str, part: nn.Module, report: Mapping[str, Iterable[Any]]) -> None:
    """A UserError that names a tensor which a library's loader, asked by REPORTED, did not find, or of another shape.

    diffusers believes an index of shards; what it does not find in them is left on the meta device.
    """
    unread = {name for name, tensor in part.state_dict().items() if tensor.is_meta}
    if odd := min(report["mismatched_keys"], default=None):
        name, found, needed = odd
        raise UserError(f"{where}: {name} is {list(found)}, where its {type(part).__name__} has {list(needed)}")
    if missing := unread | set(report["missing_keys"]):
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        surplus = min(report["unexpected_keys"], default=None)
        instead = f"; it holds {surplus} instead" if surplus else ""
        raise UserError(f"{where} lacks {min(missing)}{more} of its {type(part).__name__}{instead}")


def dtype_of(teacher: PipelineTeacher) -> torch.dtype:
    return {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}[teacher.dtype]


def encoder_dtype(teacher: PipelineTeacher, device: torch.device) -> torch.dtype:
    """Of the text encoder: the teacher's, but float32 on a CPU, where half precision is slow."""
    return torch.float32 if device.type == "cpu" else dtype_of(teacher)


def check_pipeline(source: Source, names: Sequence[str]) -> None:
    """A UserError where the folder holds another pipeline."""
    if (found := source.index.get("_class_name")) not in names:
        raise UserError(f"teacher.path: {source.path} is a {found}, not a {' or '.join(names)}")


def check_sizes(
    sizes: Sequence[Size], spatial: tuple[int, int], temporal: int, most: tuple[int, int, int] | None = None
) -> None:
    """A UserError, with the nearest size that is valid, where one does not fit the strides in pixels and frames.

    most: the frames, height and width up to which the network knows positions.
    """
    for i, size in enumerate(sizes):
        frames = 1 + temporal * round((size.num_frames - 1) / temporal)
        height, width = (
            stride * max(1, round(length / stride))
            for length, stride in zip((size.height, size.width), spatial, strict=True)
        )
        if (frames, height, width) != (size.num_frames, size.height, size.width):
            raise UserError(
                f"teacher.sizes.{i}: {size} does not fit the strides {temporal}, {spatial[0]}, {spatial[1]} of frames, "
                f"height and width; nearest is {frames}x{height}x{width}"
            )
        if most and any(a > b for a, b in zip((size.num_frames, size.height, size.width), most, strict=True)):
            limit = "x".join(map(str, most))
            raise UserError(
                f"teacher.sizes.{i}: {size} is beyond the network's table of positions, which ends at {limit}"
            )


def check_targets(network: nn.Module, targets: Sequence[str]) -> None:
    """A UserError where a LoRA target ends the name of no module, or of one that no adapter fits."""
    modules = dict(network.named_modules())
    for target in targets:
        found = [module for name, module in modules.items() if name == target or name.endswith(f".{target}")]
        if not found:
            raise UserError(f"teacher.lora_targets: {target} ends the name of no module of the transformer")
        if odd := next((module for module in found if not isinstance(module, ADAPTABLE)), None):
            raise UserError(f"teacher.lora_targets: {target} is a {type(odd).__name__}, which takes no adapter")


def guidance_of(teacher: PipelineTeacher, networks: int) -> tuple[float, ...]:
    """One guidance a network."""
    if len(teacher.guidance) not in (1, networks):
        raise UserError(f"teacher.guidance: {len(teacher.guidance)} values for {networks} network(s)")
    return teacher.guidance * (networks // len(teacher.guidance))
