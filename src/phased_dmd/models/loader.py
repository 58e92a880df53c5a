"""From a teacher's configuration to its model and codec: one line a model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from phased_dmd.config.teacher import (
    AnalyticTeacher,
    OwnTeacher,
    PipelineTeacher,
    QwenImageTeacher,
    Teacher,
    WanTeacher,
)
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.models.protocol import Codec, VelocityModel
from phased_dmd.models.source import Source, quiet
from phased_dmd.models.weightless import META, BareSource


def load_model(teacher: Teacher, seed: int, fit: bool = True) -> tuple[VelocityModel, Codec]:
    """The frozen teacher and its codec; what the teacher's fields get wrong is a UserError.

    fit: fit the student of an analytic teacher, which experts start from; those of a finished run replace it.
    """
    source = Source(teacher) if isinstance(teacher, PipelineTeacher) else None
    with _mendable():
        return _model(teacher, seed, fit, device(), source), _codec(teacher, device(), source)


def bare_model(teacher: Teacher, seed: int, source: BareSource | None = None) -> VelocityModel:
    """The teacher with all but its weights, on the meta device; what cannot be is a UserError.

    source: where the configurations of a pipeline teacher are read.
    """
    if source is None and isinstance(teacher, PipelineTeacher):
        source = BareSource(teacher)
    with _mendable():
        return _model(teacher, seed, False, META, source)


def bare_codec(teacher: Teacher, source: BareSource | None) -> Codec:
    """What checks prompts and first frames; it neither encodes nor decodes."""
    with _mendable():
        return _codec(teacher, META, source)


def _model(teacher: Teacher, seed: int, fit: bool, where: torch.device, source: Source | None) -> VelocityModel:
    match teacher:
        case AnalyticTeacher():
            from phased_dmd.models.analytic import AnalyticModel

            return AnalyticModel(teacher, seed, fit, where)
        case WanTeacher():
            with quiet():  # it recommends torchvision, which nothing here needs
                from phased_dmd.models.wan import WanModel

            return WanModel(teacher, where, source)
        case QwenImageTeacher():
            from phased_dmd.models.qwen_image import QwenImageModel

            return QwenImageModel(teacher, where, source)
        case OwnTeacher():
            raise UserError("teacher.kind: own needs a model given from Python, see docs/extending.md")


def _codec(teacher: Teacher, where: torch.device, source: Source | None) -> Codec:
    match teacher:
        case WanTeacher():
            with quiet():
                from phased_dmd.models.wan import WanCodec

            return WanCodec(teacher, where, source)
        case QwenImageTeacher():
            from phased_dmd.models.qwen_image import QwenImageCodec

            return QwenImageCodec(teacher, where, source)
        case _:
            from phased_dmd.models.analytic import PlainCodec

            return PlainCodec()


@contextmanager
def _mendable() -> Iterator[None]:
    """What the fields of a teacher, or its folder's configurations, get wrong becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"teacher.path: a configuration there lacks {error}") from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(f"teacher: {' '.join(str(error).split())}") from error
