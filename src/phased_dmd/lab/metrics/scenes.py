"""The words of the world `scenes`: what a scene of coloured digits is, and its caption, written and read.

A caption names of each digit what it wants to and leaves the rest open; its order is that of depth, the nearest last.
"""

from dataclasses import astuple, dataclass

from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS

HEIGHT, WIDTH = 32, 48  # pixels of the canvas: WanPipeline asks for multiples of 16
COUNTS = {"two": 2, "three": 3}  # digits in a scene
COLOURS = {  # RGB in [0, 1], far apart in hue
    "red": (1.0, 0.12, 0.3), "green": (0.1, 0.85, 0.45), "blue": (0.2, 0.35, 1.0), "yellow": (1.0, 0.9, 0.1),
}  # fmt: skip
CELLS = {  # where the middle of a digit's path is, (right, down) pixels from the centre of the canvas
    "top left": (-12.0, -7.5), "top right": (12.0, -7.5), "bottom left": (-12.0, 7.5), "bottom right": (12.0, 7.5),
}  # fmt: skip
PANS = {"camera still": 0.0, "camera pans left": -0.6, "camera pans right": 0.6}  # pixels a frame to the right
STRIPES = 20  # pixels, the period of the background's


@dataclass(frozen=True)
class Digit:
    """What is named of a digit, each attribute a key of its table; None is left open."""

    label: str | None = None
    colour: str | None = None
    cell: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class Scene:
    """What is named of a scene: its digits, from the farthest to the nearest, or none of them, and the camera's pan."""

    digits: tuple[Digit, ...] = ()
    pan: str | None = None

    def is_whole(self, clip: bool) -> bool:
        """Says whether everything is named that a picture, or a clip, has."""
        named = [astuple(digit)[: 5 if clip else 3] for digit in self.digits]
        return bool(named) and all(None not in digit for digit in named) and (self.pan is not None or not clip)


def caption(scene: Scene, clip: bool) -> str:
    """Writes the caption of a scene: `a red three top left and a digit moving up fast, camera pans left`."""
    if any(digit != Digit() for digit in scene.digits):
        text = " and ".join(map(_phrase, scene.digits))
    else:
        count = next((word for word, n in COUNTS.items() if n == len(scene.digits)), "some")
        text = f"{count} digits{' moving' if clip else ''}"
    return text if scene.pan is None else f"{text}, {scene.pan}"


def parse(text: str) -> Scene:
    """Reads what a caption names, the inverse of `caption`; raises ValueError for other text."""
    text, _, pan = text.partition(", ")
    phrases = text.split(" and ")
    count, _, rest = text.partition(" digits")
    if rest in ("", " moving") and count in (*COUNTS, "some"):
        digits = (Digit(),) * COUNTS.get(count, 0)
    elif len(phrases) in COUNTS.values():
        digits = tuple(map(_digit, phrases))
    else:
        raise ValueError(f"{text!r} names no scene")
    if pan not in ("", *PANS):
        raise ValueError(f"{pan!r} names no camera")
    return Scene(digits, pan or None)


def _phrase(digit: Digit) -> str:
    """Writes a digit: its article, colour, class, cell and motion, as far as they are named."""
    moves = ["moving"] if digit.direction or digit.speed else []
    words = [digit.colour, digit.label or "digit", digit.cell, *moves, digit.direction, digit.speed]
    text = " ".join(word for word in words if word)
    return f"{'an' if text.startswith('eight') else 'a'} {text}"


def _digit(phrase: str) -> Digit:
    """Reads a digit, the inverse of `_phrase`."""
    still, _, moving = phrase.partition(" moving")
    words, moves = still.split()[1:], moving.split()
    found = Digit(
        label=next((word for word in words if word in WORDS), None),
        colour=next((word for word in words if word in COLOURS), None),
        cell=next((cell for cell in CELLS if still.endswith(cell)), None),
        direction=next((word for word in moves if word in DIRECTIONS), None),
        speed=next((word for word in moves if word in SPEEDS), None),
    )
    if _phrase(found) != phrase:
        raise ValueError(f"{phrase!r} names no digit")
    return found
