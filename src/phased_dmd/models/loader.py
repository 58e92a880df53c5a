"""Builds the model and codec of a teacher's configuration, a pipeline's by the adapter of its kind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch

from phased_dmd.config.teacher import AnalyticTeacher, OwnTeacher, PipelineTeacher, Teacher
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.models.adapter import Adapter
from phased_dmd.models.protocol import Codec, VelocityModel
from phased_dmd.models.source import META, BareSource, Source, quiet


def load_model(teacher: Teacher, seed: int, fit: bool = True) -> tuple[VelocityModel, Codec]:
    """Loads the frozen teacher and its codec; what the teacher's fields get wrong is a UserError.

    fit: fit the student of an analytic teacher, which experts start from; those of a finished run replace it.
    """
    source = Source(teacher) if isinstance(teacher, PipelineTeacher) else None
    with _user_errors():
        model, codec = _builders(teacher, device(), source, seed, fit)
        return model(), codec()


def bare_model(teacher: Teacher, seed: int, source: BareSource | None = None) -> VelocityModel:
    """Builds the teacher without weights, on the meta device; what cannot be is a UserError.

    source: where the configurations of a pipeline teacher are read.
    """
    if source is None and isinstance(teacher, PipelineTeacher):
        source = BareSource(teacher)
    with _user_errors():
        return _builders(teacher, META, source, seed, fit=False)[0]()


def bare_codec(teacher: Teacher, source: BareSource | None) -> Codec:
    """Builds a codec that checks prompts and first frames, and neither encodes nor decodes."""
    with _user_errors():
        return _builders(teacher, META, source, seed=0, fit=False)[1]()


def _builders(
    teacher: Teacher, where: torch.device, source: Source | None, seed: int, fit: bool
) -> tuple[Callable[[], VelocityModel], Callable[[], Codec]]:
    """Imports a teacher's file, and no other's; returns what builds its model and its codec."""
    match teacher:
        case AnalyticTeacher():
            from phased_dmd.models.analytic import AnalyticModel, ClipCodec, PlainCodec

            codec = ClipCodec if teacher.means == "clips" else PlainCodec
            return partial(AnalyticModel, teacher, seed, fit, where), codec
        case PipelineTeacher():
            adapter = adapter_of(teacher)
            return partial(adapter.model, teacher, where, source), partial(adapter.codec, teacher, where, source)
        case OwnTeacher():
            raise UserError("teacher.kind: own is a model of yours, which cannot be built from files")


def adapter_of(teacher: PipelineTeacher) -> Adapter:
    """Imports the file that knows a teacher's kind, and no other's."""
    with quiet():  # it may recommend torchvision, which nothing here needs
        return import_module(f"phased_dmd.models.{teacher.adapter}").ADAPTER


def stock_times(teacher: Teacher, bucket: int, steps: int) -> Sequence[float] | None:
    """Returns the times of a base's own pipeline at a resolution, and 0; None where those are on the plan's grid."""
    if not isinstance(teacher, PipelineTeacher) or (sigmas := adapter_of(teacher).sigmas) is None:
        return None
    with _user_errors():
        return sigmas(Source(teacher), teacher.sizes[bucket], steps)


def stock_solver(teacher: Teacher, steps: int) -> Any:
    """Returns the scheduler of a base's own pipeline, set to a number of steps; None where it is Euler's method."""
    if not isinstance(teacher, PipelineTeacher):
        return None
    with _user_errors():
        scheduler = adapter_of(teacher).solver(Source(teacher))
        if scheduler is not None:
            scheduler.set_timesteps(steps, device=device())
            scheduler.set_begin_index(0)  # as the pipeline: of many steps the first two times are one whole number
        return scheduler


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns what the fields of a teacher, or its folder's configurations, get wrong into a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"teacher.path: a configuration there lacks {error}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"teacher: {' '.join(str(error).split())}") from error
