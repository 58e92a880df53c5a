"""Writes the prompt sets of the scenes: captions of any specificity to train on, and whole ones to evaluate."""

from pathlib import Path

import torch

from phased_dmd.lab.metrics.scenes import caption
from phased_dmd.lab.teach.scene_batches import MOST, draw_scene, leave_out

FOLDER = Path(__file__).parents[1] / "src" / "phased_dmd" / "assets" / "prompts"
TRAINED, EVALUATED = 200, 48  # prompts of a set


def write() -> None:
    """Writes the four files, all drawn from one seed."""
    generator = torch.Generator().manual_seed(0)
    for clip, name in ((False, "scenes-t2i"), (True, "scenes-t2v")):
        drawn = []
        for _ in range(TRAINED + EVALUATED):
            labels = torch.randint(10, (MOST,), generator=generator).tolist()
            drawn.append(draw_scene(labels, clip, generator))
        trained = [caption(leave_out(scene, clip, generator), clip) for scene in drawn[:TRAINED]]
        evaluated = [caption(scene, clip) for scene in drawn[TRAINED:]]
        assert not set(trained) & set(evaluated)
        for suffix, texts in (("", trained), ("-specific", evaluated)):
            (FOLDER / f"{name}{suffix}.txt").write_text("".join(f"{text}\n" for text in texts), "utf-8")


if __name__ == "__main__":
    write()
