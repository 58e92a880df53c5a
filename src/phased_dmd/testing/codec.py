"""The checks of a codec: conditions are the prompt's own, and samples are decoded to pixels in [0, 1]."""

from collections.abc import Sequence

import torch
from torch import Tensor

from phased_dmd.engine.randomness import normal
from phased_dmd.engine.world import device
from phased_dmd.models.protocol import Codec, Condition
from phased_dmd.testing.prediction import ModelError, near, require

PROMPTS = ("a longer prompt, of several words",)  # where the user names none


def encode(codec: Codec, prompts: Sequence[str]) -> list[Condition]:
    """Returns the conditions of prompts; raises ModelError with the first one at which the codec fails."""
    try:
        rows = codec.encode_text(list(prompts))
    except Exception as error:  # whatever an encoder raises
        raise ModelError(f"codec.encode_text: {_failing(codec, prompts)}") from error
    finally:
        codec.free()
    require(len(rows) == len(prompts), f"codec.encode_text: {len(rows)} rows for {len(prompts)} prompts")
    return rows


def _failing(codec: Codec, prompts: Sequence[str]) -> str:
    """Says at which prompt the codec fails, and whose prompt that is."""
    for prompt in prompts:
        try:
            codec.encode_text([prompt])
        except Exception as error:
            whose = "" if prompt else ", what is told in place of a prompt: give another negative_prompt"
            whose = ", the check's own: give yours as prompts=[...]" if prompt in PROMPTS else whose
            return f"fails for {prompt!r}{whose}; {type(error).__name__}: {error}"
    return f"fails for {len(prompts)} prompts at once, and for none of them alone"


def check_conditions_of(codec: Codec, prompts: Sequence[str], rows: Sequence[Condition]) -> str:
    """Checks that conditions are on the CPU and do not depend on the prompts beside them; says how many."""
    for prompt, row in zip(prompts, rows, strict=True):
        alone = encode(codec, [prompt])[0]
        for name, tensor in row.items():
            where = f"codec.encode_text: {name}"
            require(tensor.device.type == "cpu", f"{where} is on {tensor.device}, not on the CPU")
            same = name in alone and tensor.shape == alone[name].shape and near(tensor, alone[name])
            require(same, f"{where} depends on the prompts beside it; rows are unpadded, `batch` pads")
    return f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}, each encoded as alone"


@torch.no_grad()
def check_decoding(codec: Codec, shape: Sequence[int], samples: Tensor | None) -> str:
    """Checks what samples, or noise of their shape, are decoded to; says what that is."""
    few = normal(tuple(shape), range(1), "check") if samples is None else samples[:2]
    few = few.to(device(), torch.float32)
    pixels = codec.decode(few)
    found = list(pixels.shape)
    if pixels.ndim == 2 and pixels.shape == few.shape:
        return "decodes to points, as they are"
    right = pixels.ndim == 5 and len(pixels) == len(few) and found[-1] == 3
    points = "; samples [b, n] may stay as they are" if few.ndim == 2 else ""
    require(right, f"codec.decode: {found}; must be [b, frames, height, width, 3] of {list(few.shape)}{points}")
    if samples is None:
        return f"decodes to {found}"
    low, high = pixels.min().item(), pixels.max().item()
    in_range = low >= -0.5 and high <= 1.5  # a VAE overshoots
    require(in_range, f"codec.decode: pixels from {low:.2g} to {high:.2g}; must be in [0, 1]")
    return f"decodes to {found}, from {low:.2g} to {high:.2g}"
