"""What a right model has passed, with its margins, and a first guess at its plan."""

from typing import NamedTuple

import torch

from phased_dmd.engine.world import device
from phased_dmd.models.protocol import VelocityModel

LEAST_SIGNAL = 0.01  # alpha / sigma at an eps prediction's start: x_0 is off by sigma / alpha times what eps is off by


class Passed(NamedTuple):
    """Holds what `check_model` has checked.

    rows: by what was checked, what was found. shift, start: a first guess at `plan.shift` and `plan.start`, not tuned.
    """

    rows: dict[str, str]
    shift: float
    start: float

    def __str__(self) -> str:
        width = max(map(len, self.rows))
        return "\n".join(["check_model: passed", *(f"  {name:<{width}}  {found}" for name, found in self.rows.items())])


def first_guess(model: VelocityModel, deviation: float) -> tuple[float, float, str]:
    """Returns a shift and a start that suit the schedule, and why.

    The shift makes half of the steps begin where noise outweighs the samples, whose standard deviation is given, and
    half where it does not. The start is 1, but for eps prediction where hardly any signal is left there.
    """
    t = torch.linspace(0.001, 0.999, 999, dtype=torch.float64, device=device())
    signal = model.schedule.alpha(t) * deviation / model.schedule.sigma(t)
    middle = t[(signal.log()).abs().argmin()].item()
    shift = float(f"{middle / (1 - middle):.2g}")
    start = 1.0
    if model.prediction == "eps":
        hundredths = torch.arange(1, 101, dtype=torch.float64, device=device()) / 100
        ratio = model.schedule.alpha(hundredths) / model.schedule.sigma(hundredths)
        enough = hundredths[ratio >= LEAST_SIGNAL]
        start = enough[-1].item() if len(enough) else hundredths[0].item()
    why = f"plan.shift={shift:g}, plan.start={start:g}, not tuned: signal and noise are equal at t = {middle:.2g}"
    return shift, start, why
