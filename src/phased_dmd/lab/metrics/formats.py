"""Numbers as text."""

import math


def number(value: float, digits: int = 3, signed: bool = False, scale: float | None = None) -> str:
    """Significant digits without an exponent where there is room; those of `scale` where that is larger.

    scale: of a value, its half width, beside which more digits would be noise.
    """
    if value == round(value):
        text = f"{abs(value):,.0f}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(max(abs(value), scale or 0))))
        text = f"{abs(value):,.{decimals}f}" if decimals < 7 else f"{abs(value):.{digits - 1}e}"
    zero = not any(digit in text for digit in "123456789")
    return text if zero else f"{'−' if value < 0 else '+' if signed else ''}{text}"
