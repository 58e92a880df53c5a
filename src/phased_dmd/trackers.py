"""Experiment trackers, from the extra `trackers`; their keys come from the environment, never from a config."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from phased_dmd.config import Config
from phased_dmd.errors import UserError

Track = Callable[[int, dict[str, float]], object]  # (generator updates so far, over all phases; the logged row)


def check_trackers(names: Sequence[str]) -> None:
    """A UserError where a tracker's package is missing."""
    for name in names:
        if find_spec(name) is None:
            raise UserError(f"trackers: {name} is not installed; pip install 'phased-dmd[trackers]'")


def open_tracker(name: str, folder: Path, config: Config) -> Track:
    """A function that writes one row of metrics to the tracker."""
    match name:
        case "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / "tensorboard"))
            return lambda step, row: [writer.add_scalar(key, value, step) for key, value in row.items()]
        case "wandb":
            import wandb  # type: ignore[import-not-found]

            run = wandb.init(project="phased-dmd", name=folder.name, dir=str(folder), config=config.model_dump())
            return lambda step, row: run.log(row, step=step)
        case "trackio":
            import trackio  # type: ignore[import-not-found]

            trackio.init(project="phased-dmd", name=folder.name, config=config.model_dump())
            return lambda step, row: trackio.log(row, step=step)
    raise UserError(f"trackers: {name!r} is none of tensorboard, wandb, trackio")
