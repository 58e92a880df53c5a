"""Draws docs/images/plan.svg: where shift, steps, phases, boundary and switch of wan22-t2v lie on the axis of noise.

python scripts/plan_picture.py > docs/images/plan.svg
"""

from phased_dmd.config import phase_plan, renoise_interval
from phased_dmd.maths.phases import step_times
from phased_dmd.recipes import resolve

SWITCH = 0.875  # of the base Wan2.2-T2V-A14B: its boundary_ratio
LEFT, WIDTH, HEIGHT = 250, 800, 306
ROWS = {  # and the height of their words
    "evenly spaced times": 70, "shift 5 moves them to noise": 130, "steps of expert 1 and expert 2": 179,
    "phase 1: scored after noise to": 219, "phase 2: scored after noise to": 251,
}  # fmt: skip
COLOURS = {1: "#1d7a3a", 2: "#2858a8"}  # of a phase
STYLE = """<style>
    text { fill: #223; } .small { font-size: 12px; fill: #445; } .title { font-weight: bold; } .step { fill: #fff; }
    .axis, .even { stroke: #889; stroke-width: 1.2; } .even { stroke-dasharray: 2 3; }
    .cut { stroke: #b3640c; stroke-width: 1.6; } .switch { stroke: #823; stroke-width: 1.4; stroke-dasharray: 6 4; }
  </style>"""


def place(t: float) -> float:
    """Returns the pixel of a time: noise is on the left, data on the right."""
    return LEFT + (1 - t) * WIDTH


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def line(x: float, y: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y2}" class="{kind}"/>'


def bar(begin: float, end: float, y: int, height: int, phase: int) -> str:
    """Returns a bar from one time down to another, in the colour of a phase."""
    left, right = place(begin), place(end)
    size = f'width="{right - left - 2:.1f}" height="{height}"'
    return f'<rect x="{left + 1:.1f}" y="{y}" {size} rx="4" fill="{COLOURS[phase]}" opacity=".8"/>'


def label(t: float) -> str:
    """Returns a time as the pages write it, without a 0 before the point."""
    return f"{t:.4g}".lstrip("0") or "0"


def picture() -> str:
    """Returns the picture as an SVG file's text."""
    config = resolve("wan22-t2v")
    plan, even = phase_plan(config, (SWITCH,)), step_times(config.plan.steps, 1.0, 1.0)
    drawn = [text(20, 28, "The few-step plan of wan22-t2v: four steps in two phases", "title", "start")]
    for words, y in ROWS.items():
        drawn.append(text(LEFT - 18, y, words, "small", "end"))
    drawn += [line(place(1), y, place(0), y, "axis") for y in (66, 126)]
    for raw, t in zip(even, plan.times, strict=True):
        drawn += [line(place(raw), 60, place(raw), 72, "axis"), line(place(raw), 72, place(t), 120, "even")]
        drawn += [line(place(t), 120, place(t), 132, "axis"), text(place(t), 149, label(t), "small")]
    drawn += [text(place(1), 54, "noise", "small"), text(place(0), 54, "data", "small")]
    for phase in (1, 2):
        for step in plan.steps(phase):
            begin, end = plan.times[step], plan.times[step + 1]
            drawn += [bar(begin, end, 164, 22, phase), text(place((begin + end) / 2), 179, f"{step + 1}", "step")]
        low, high = bounds(config, plan, phase)
        drawn.append(bar(high, low, 176 + 32 * phase, 14, phase))
    boundary, switch = place(plan.end(1)), place(SWITCH)
    drawn += [line(boundary, 156, boundary, 272, "cut"), line(switch, 156, switch, 272, "switch")]
    drawn.append(text(boundary, 290, f"boundary {label(plan.end(1))}: phase 1 ends", "small", "start"))
    drawn.append(text(switch, 290, f"switch {label(SWITCH)} of the base's two networks", "small", "end"))
    body = "\n  ".join(drawn)
    box = f'viewBox="0 0 {LEFT + WIDTH + 30} {HEIGHT}" font-family="DejaVu Sans, Arial, sans-serif" font-size="14"'
    paper = f'<rect width="{LEFT + WIDTH + 30}" height="{HEIGHT}" fill="#fff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n  {STYLE}\n  {paper}\n  {body}\n</svg>'


def bounds(config, plan, phase: int) -> tuple[float, float]:
    """Returns the times between which a phase's samples are noised again."""
    interval = renoise_interval(config, plan, phase)
    return max(interval.low, interval.floor), interval.high


if __name__ == "__main__":
    print(picture())
