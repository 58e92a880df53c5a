"""From a teacher's configuration to its model and codec: one line a model."""

from phased_dmd.config import AnalyticTeacher, OwnTeacher, QwenImageTeacher, Teacher, UserError, WanTeacher
from phased_dmd.engine.world import device
from phased_dmd.models.protocol import Codec, VelocityModel


def load_model(teacher: Teacher, seed: int, fit: bool = True) -> tuple[VelocityModel, Codec]:
    """The frozen teacher and its codec; what the teacher's fields get wrong is a UserError.

    fit: fit the student of an analytic teacher, which experts start from; those of a finished run replace it.
    """
    try:
        match teacher:
            case AnalyticTeacher():
                from phased_dmd.models.analytic import AnalyticModel, PlainCodec

                return AnalyticModel(teacher, seed, fit), PlainCodec()
            case WanTeacher():
                from phased_dmd.models.wan import WanCodec, WanModel

                return WanModel(teacher, device()), WanCodec(teacher, device())
            case QwenImageTeacher():
                from phased_dmd.models.qwen_image import QwenImageCodec, QwenImageModel

                return QwenImageModel(teacher, device()), QwenImageCodec(teacher, device())
            case OwnTeacher():
                raise UserError("teacher.kind: own needs a model given from Python, see docs/extending.md")
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"teacher: {' '.join(str(error).split())}") from error
