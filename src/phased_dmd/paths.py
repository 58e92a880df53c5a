"""The generator's paths in training: without gradient, and each state computed once for all updates that share it."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phased_dmd.draws import Draws
from phased_dmd.engine.world import device
from phased_dmd.models.protocol import Condition
from phased_dmd.phases import Hop


class Paths:
    """The paths of one phase. Which updates share a state is said by the keys of `Draws` alone.

    folder: where the pool's states are kept; without one, in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._kept: dict[Hashable, tuple[Hashable, Tensor | Path]] = {}

    @torch.no_grad()
    def begin(self, draws: Draws, condition: Condition) -> Tensor:
        """x at the phase's begin [b, ...], from the experts of the phases before."""

        def make() -> Tensor:
            return _go(draws, condition, draws.system.start(draws.start()), draws.path[: draws.first])

        slot = "begin", draws.place, draws.rolled
        return self._once(slot, draws.origin, make, self._folder if draws.place is not None else None)

    @torch.no_grad()
    def before_exit(self, draws: Draws, condition: Condition) -> Tensor:
        """x where the path's last step begins [b, ...]."""

        def make() -> Tensor:
            return _go(draws, condition, self.begin(draws, condition), draws.path[draws.first : -1])

        return self._once(("exit", draws.rolled), (draws.cycle, draws.path), make)

    @torch.no_grad()
    def end(self, draws: Draws, condition: Condition) -> Tensor:
        """x_s, at the phase's end [b, ...]."""

        def make() -> Tensor:
            return _go(draws, condition, self.before_exit(draws, condition), draws.path[-1:])

        return self._once(("end", draws.rolled), (draws.cycle, draws.path), make)

    def _once(
        self, slot: Hashable, version: Hashable, make: Callable[[], Tensor], folder: Path | None = None
    ) -> Tensor:
        """What `make` gave, or gives now, for this version; the slot then holds no other."""
        if slot not in self._kept or self._kept[slot][0] != version:
            x: Tensor | Path = make()
            if folder is not None:
                number = list(self._kept).index(slot) if slot in self._kept else len(self._kept)
                save_file({"x": x}, path := folder / f"{number}.safetensors")
                x = path
            self._kept[slot] = version, x
        kept = self._kept[slot][1]
        return load_file(kept)["x"].to(device()) if isinstance(kept, Path) else kept


def _go(draws: Draws, condition: Condition, x: Tensor, hops: Sequence[Hop]) -> Tensor:
    return draws.system.roll(hops, x, condition, renoise=draws.renoise).x
