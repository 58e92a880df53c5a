"""Numbers and tables as text."""

import math
from collections.abc import Iterable, Sequence


def number(value: float, digits: int = 3, signed: bool = False, scale: float | None = None) -> str:
    """Writes a value with `digits` significant digits, without an exponent where there is room.

    scale: the size that decides how many decimals there are where it is larger than the value: of a value its half
    width, beside which more digits would be noise.
    """
    if value == round(value):
        text = f"{abs(value):,.0f}"
    else:
        decimals = max(0, digits - 1 - math.floor(math.log10(max(abs(value), scale or 0))))
        text = f"{abs(value):,.{decimals}f}" if decimals < 7 else f"{abs(value):.{digits - 1}e}"
    is_zero = not any(digit in text for digit in "123456789")
    return text if is_zero else f"{'−' if value < 0 else '+' if signed else ''}{text}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table of column titles, which may be empty, and rows of cells."""
    lines = ["|" + "".join(f" {title} |" if title else " |" for title in head), "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])
