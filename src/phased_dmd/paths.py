"""The generator's paths in training: without gradient, and each state computed once for all updates that share it."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from phased_dmd.draws import Draws
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.maths.phases import Hop
from phased_dmd.models.protocol import Condition


class Kept:
    """Tensors by slot, each of the version that it was last made for; in memory, or in a folder."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[Hashable, tuple[Hashable, Tensor | Path]] = {}
        self._files: dict[Hashable, Path] = {}

    def get(self, slot: Hashable, version: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What `make` gave for this version, or gives now."""
        if slot not in self._kept or self._kept[slot][0] != version:
            tensor = make()
            self._kept[slot] = version, tensor if self._folder is None else self._write(self._folder, slot, tensor)
        found = self._kept[slot][1]
        return load_file(found)["x"].to(device(), copy=True) if isinstance(found, Path) else found

    def _write(self, folder: Path, slot: Hashable, tensor: Tensor) -> Path:
        path = self._files.setdefault(slot, folder / f"{len(self._files)}.safetensors")
        try:
            path.write_bytes(save({"x": tensor.contiguous()}))
        except OSError as error:
            reason = f"{path}: cannot be written: {error.strerror}"
            raise UserError(f"{reason}; the same command goes on from the last checkpoint") from error
        return path


class Paths:
    """The paths of one phase. Which updates share a state is said by the keys of `Draws` alone.

    reuse: whether states are kept for other updates of the cycle. folder: where the pool's are; in memory without one.
    """

    def __init__(self, reuse: bool = False, folder: Path | None = None) -> None:
        self._cycle, self._pool = Kept() if reuse else None, Kept(folder)

    def begin(self, draws: Draws, condition: Condition) -> Tensor:
        """x at the phase's begin [b, ...], from the experts of the phases before."""
        kept, slot = (self._cycle, ()) if draws.place is None else (self._pool, (draws.place,))
        start, hops = lambda: draws.system.start(draws.start()), draws.path[: draws.first]
        return _state(kept, ("begin", *slot), draws.origin, draws, condition, start, hops)

    def before_exit(self, draws: Draws, condition: Condition) -> Tensor:
        """x where the path's last step begins [b, ...]."""
        start, hops = lambda: self.begin(draws, condition), draws.path[draws.first : -1]
        return _state(self._cycle, ("exit",), (draws.cycle, draws.path), draws, condition, start, hops)

    def end(self, draws: Draws, condition: Condition) -> Tensor:
        """x_s, at the phase's end [b, ...]."""
        start, hops = lambda: self.before_exit(draws, condition), draws.path[-1:]
        return _state(self._cycle, ("end",), (draws.cycle, draws.path), draws, condition, start, hops)


@torch.no_grad()
def _state(
    kept: Kept | None, slot: tuple, version: Hashable,
    draws: Draws, condition: Condition, start: Callable[[], Tensor], hops: Sequence[Hop],
) -> Tensor:  # fmt: skip
    """The state some hops behind another one, if it is not kept already."""

    def make() -> Tensor:
        return draws.system.roll(hops, start(), condition, renoise=draws.renoise).x

    return make() if kept is None else kept.get((*slot, draws.rolled), version, make)
