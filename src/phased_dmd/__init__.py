"""Phased DMD: few-step distribution matching distillation by score matching within subintervals (arXiv 2510.27684)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from phased_dmd.config import Config as Config
    from phased_dmd.errors import UserError as UserError
    from phased_dmd.export.few_steps import load_pipeline as load_pipeline
    from phased_dmd.maths.losses import distribution_matching_loss as distribution_matching_loss
    from phased_dmd.maths.losses import score_matching_loss as score_matching_loss
    from phased_dmd.maths.losses import subinterval_target as subinterval_target
    from phased_dmd.maths.phases import PhasePlan as PhasePlan
    from phased_dmd.maths.rollout import rollout as rollout
    from phased_dmd.maths.schedules import FlowSchedule as FlowSchedule
    from phased_dmd.maths.schedules import VESchedule as VESchedule
    from phased_dmd.maths.schedules import VPSchedule as VPSchedule
    from phased_dmd.sampling.loading import load as load
    from phased_dmd.train import distill as distill

__version__ = "0.1.0"

_HOMES = {
    "Config": "config", "UserError": "errors", "PhasePlan": "maths.phases",
    "FlowSchedule": "maths.schedules", "VPSchedule": "maths.schedules", "VESchedule": "maths.schedules",
    "subinterval_target": "maths.losses", "score_matching_loss": "maths.losses",
    "distribution_matching_loss": "maths.losses", "rollout": "maths.rollout", "distill": "train",
    "load": "sampling.loading", "load_pipeline": "export.few_steps",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `phased-dmd --help` need not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"phased_dmd.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
