"""Scenes of two or three coloured digits before stripes, in pictures and clips, with captions of any specificity."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from phased_dmd.lab.metrics.digit_classifier import DIRECTIONS, SPEEDS, WORDS
from phased_dmd.lab.metrics.scenes import CELLS, COLOURS, COUNTS, HEIGHT, PANS, STRIPES, WIDTH, Digit, Scene, caption
from phased_dmd.lab.teach.mnist import NUM_FRAMES, Digits

SPAN = 21  # pixels that a digit's 28 x 28 are drawn in: its strokes take up about 15
MOST = max(COUNTS.values())  # digits in a scene
JITTER = 0.7  # pixels, standard deviation of a digit's distance from its cell's centre in each direction
GREY, STRIPE = 0.12, 0.08  # the mean and the amplitude of the background
TABLES = (WORDS, COLOURS, CELLS, DIRECTIONS, SPEEDS)  # of what is named of a digit, in the order of its fields
ANSWERS = (*(len(table) + 1 for table in TABLES), MOST + 1, len(PANS) + 1)  # to each question of a caption's word
WHOLE, VAGUE = 0.3, 0.2  # shares of the captions that name everything, and that name no attribute of a digit
FEW, MANY = 0.2, 0.9  # between which lies the share of the attributes that another caption names


def picture_batch(digits: Digits, size: int, generator: torch.Generator) -> tuple[Tensor, list[str], list[Scene]]:
    """Draws pictures: (pixels [size, 3, 1, 32, 48], captions, scenes)."""
    return _batch(digits, size, generator, False)


def clip_batch(digits: Digits, size: int, generator: torch.Generator) -> tuple[Tensor, list[str], list[Scene]]:
    """Draws clips of digits that move before a camera that may pan: (pixels [size, 3, 9, 32, 48], captions, scenes)."""
    return _batch(digits, size, generator, True)


def _batch(digits: Digits, size: int, generator: torch.Generator, clip: bool) -> tuple[Tensor, list[str], list[Scene]]:
    index = torch.randint(len(digits.labels), (size, MOST), generator=generator)
    scenes = [draw_scene(labels, clip, generator) for labels in digits.labels[index].tolist()]
    pixels = render(digits.pixels[index], scenes, generator)
    return pixels, [caption(leave_out(scene, clip, generator), clip) for scene in scenes], scenes


def draw_scene(labels: list[int], clip: bool, generator: torch.Generator) -> Scene:
    """Draws all that a caption can name but the classes of the digits, of which the first two or three are taken."""

    def one(table: Iterable[str]) -> str:
        names = list(table)
        return names[int(torch.randint(len(names), (1,), generator=generator))]

    def several(table: Iterable[str]) -> list[str]:
        names = list(table)
        return [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]

    count, colours, cells = COUNTS[one(COUNTS)], several(COLOURS), several(CELLS)
    found = [Digit(WORDS[label], *at) for label, *at in zip(labels[:count], colours, cells, strict=False)]
    if not clip:
        return Scene(tuple(found))
    moving = tuple(replace(digit, direction=one(DIRECTIONS), speed=one(SPEEDS)) for digit in found)
    return Scene(moving, one(PANS))


def leave_out(scene: Scene, clip: bool, generator: torch.Generator) -> Scene:
    """Returns what a caption of random specificity names of a scene."""
    kind, share, count = torch.rand(3, generator=generator).tolist()
    if kind < WHOLE:
        return scene
    if kind < WHOLE + VAGUE:
        return Scene((Digit(),) * (len(scene.digits) if count < 0.5 else 0))
    named = torch.rand(MOST, 5, generator=generator) < FEW + (MANY - FEW) * share
    digits = tuple(
        Digit(*(value if keep else None for value, keep in zip(vars(digit).values(), kept, strict=True)))
        for digit, kept in zip(scene.digits, named.tolist(), strict=False)
    )
    return Scene(digits, scene.pan if float(torch.rand(1, generator=generator)) < share else None)


def render(pixels: Tensor, scenes: list[Scene], generator: torch.Generator) -> Tensor:
    """Draws scenes that are whole from their digits [b, 3, 28, 28]: [b, 3, f, 32, 48] in [-1, 1].

    The last digit is in front. The frame moves with the camera, so that all else moves the other way in it.
    """
    b, clip = len(scenes), scenes[0].pan is not None
    frames = torch.arange(NUM_FRAMES if clip else 1) - (NUM_FRAMES - 1) / 2 * clip
    pan = torch.tensor([PANS[scene.pan or "camera still"] for scene in scenes])
    middle, velocity, colour = torch.zeros(b, MOST, 2), torch.zeros(b, MOST, 2), torch.zeros(b, MOST, 3)
    there = torch.zeros(b, MOST)
    for i, scene in enumerate(scenes):
        for j, digit in enumerate(scene.digits):
            assert digit.cell and digit.colour
            middle[i, j], colour[i, j] = torch.tensor(CELLS[digit.cell]), torch.tensor(COLOURS[digit.colour])
            there[i, j] = 1
            if digit.direction and digit.speed:
                velocity[i, j] = torch.tensor(DIRECTIONS[digit.direction]) * SPEEDS[digit.speed]
    middle += JITTER * torch.randn(middle.shape, generator=generator)
    velocity[..., 0] -= pan[:, None]
    phase = STRIPES * torch.rand(b, 1, generator=generator) - frames * pan[:, None]  # [b, f]
    turn = 2 * torch.pi * (torch.arange(WIDTH) - phase[..., None]) / STRIPES
    canvas = (GREY + STRIPE * turn.cos())[:, None, :, None].expand(b, 3, len(frames), HEIGHT, WIDTH)
    for j in range(MOST):
        shift = middle[:, j, None] + frames[None, :, None] * velocity[:, j, None]
        cover = there[:, j].reshape(b, 1, 1, 1, 1) * _cover(pixels[:, j], shift)
        canvas = canvas * (1 - cover) + cover * colour[:, j].reshape(b, 3, 1, 1, 1)
    return canvas * 2 - 1


def _cover(pixels: Tensor, shift: Tensor) -> Tensor:
    """Returns how much digits [b, 28, 28], shift [b, f, 2] pixels from the centre, cover: [b, 1, f, 32, 48]."""
    b, f, _ = shift.shape
    theta = torch.zeros(b, f, 2, 3)
    theta[..., 0, 0], theta[..., 1, 1] = WIDTH / SPAN, HEIGHT / SPAN
    theta[..., 2] = -2 * shift / SPAN
    grid = F.affine_grid(theta.flatten(0, 1), [b * f, 1, HEIGHT, WIDTH], align_corners=False)
    source = pixels[:, None, None].expand(b, f, 1, 28, 28).flatten(0, 1)
    return F.grid_sample(source, grid, align_corners=False).reshape(b, 1, f, HEIGHT, WIDTH)


def draw_captions(size: int, tokens: int, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Draws captions of pictures and clips, and what each of their tokens belongs to: [size, tokens, questions].

    Of a digit's words the answers are its attributes as named and its place in the caption, 0 for none; of all words
    the camera's pan. Words between digits, and a caption that names no attribute, have no digit: -1.
    """
    captions, answers = [], torch.full((size, tokens, len(ANSWERS)), -1)
    for found in answers:
        clip = float(torch.rand(1, generator=generator)) < 0.5
        labels = torch.randint(len(WORDS), (MOST,), generator=generator).tolist()
        scene = leave_out(draw_scene(labels, clip, generator), clip, generator)
        captions.append(caption(scene, clip))
        phrases, _, camera = captions[-1].partition(", ")
        words = phrases.split()
        found[: len(words) + bool(camera) + len(camera.split()) + 1, -1] = _number(PANS, scene.pan)  # comma and end too
        if all(digit == Digit() for digit in scene.digits):
            continue
        first = 0
        for place, (phrase, digit) in enumerate(zip(phrases.split(" and "), scene.digits, strict=True), 1):
            last = first + len(phrase.split())
            named = [_number(table, value) for table, value in zip(TABLES, vars(digit).values(), strict=True)]
            found[first:last, :-1] = torch.tensor([*named, place])
            first = last + 1
    return captions, answers


def _number(table: Iterable[str], name: str | None) -> int:
    """Returns the number of a name in a table, from 1; 0 of None."""
    return 0 if name is None else 1 + list(table).index(name)


def all_words() -> list[str]:
    """Returns captions that hold every word, which the tokenizer is trained on."""
    digits = [Digit(label, colour, cell) for label in WORDS for colour in COLOURS for cell in CELLS]
    still = [caption(Scene((digit, digit)), False) for digit in digits]
    moves = [replace(digits[0], direction=direction, speed=speed) for direction in DIRECTIONS for speed in SPEEDS]
    moving = [caption(Scene((move, move), pan), True) for move in moves for pan in PANS]
    return still + moving + [caption(Scene((Digit(),) * count), True) for count in (0, *COUNTS.values())]
