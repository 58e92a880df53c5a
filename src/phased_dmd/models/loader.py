"""From a teacher's configuration to its model and codec: one line a model."""

from phased_dmd.config import AnalyticTeacher, UserError, WanTeacher
from phased_dmd.engine import device
from phased_dmd.models.protocol import Codec, VelocityModel


def load_model(teacher: AnalyticTeacher | WanTeacher, seed: int) -> tuple[VelocityModel, Codec]:
    """The frozen teacher and its codec; what the teacher's fields get wrong is a UserError."""
    try:
        match teacher:
            case AnalyticTeacher():
                from phased_dmd.models.analytic import AnalyticModel, PlainCodec

                return AnalyticModel(teacher, seed), PlainCodec()
            case WanTeacher():
                from phased_dmd.models.wan import load_wan

                return load_wan(teacher, device())
    except (ValueError, OSError) as error:
        raise UserError(f"teacher: {' '.join(str(error).split())}") from error
