"""Measures what `teacher.quantise` changes of nano-moe's guided teacher, and tiles of a VAE of its pictures.

    python benchmarks/packing.py

Weights are rounded as bitsandbytes stores them; on a GPU its int8 kernel rounds the layers' inputs too.
"""

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor, nn

from phased_dmd.engine.randomness import normal
from phased_dmd.models.protocol import Codec
from phased_dmd.networks.build import System, build_system, load_teacher
from phased_dmd.recipes import resolve

PROMPTS = ["a handwritten seven", "a handwritten three", "a handwritten zero", "a handwritten digit"] * 2
TIMES = (0.95, 0.9, 0.8, 0.6, 0.4, 0.2)
ROWS, COLUMNS = 9, 10  # digits in the picture that is decoded in tiles: 288 x 320 pixels


def teacher(recipe: str = "nano-moe", **changes: Any) -> tuple[System, Codec]:
    config = resolve(recipe, {f"teacher.{key}": value for key, value in changes.items()})
    model, codec = load_teacher(config)
    return build_system(config, model, codec.encode_text([""])[0]), codec


def layers(system: System) -> list[nn.Linear]:
    """Lists the layers that are packed."""
    blocks = [block for network in system.model.networks for block in system.model.blocks(network)]
    return [module for block in blocks for module in block.modules() if type(module) is nn.Linear]


def rounded(x: Tensor) -> Tensor:
    """Rounds each row to 8 bits."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    return torch.round(x / scale) * scale


def nf4(x: Tensor) -> Tensor:
    return dequantize_4bit(*quantize_4bit(x, quant_type="nf4", compress_statistics=True))


def velocities(system: System, codec: Codec) -> Tensor:
    """Predicts at noised latents that are the same for all."""
    shape, seeds = system.model.sample_shapes[0], range(len(PROMPTS))
    condition = system.model.batch(codec.encode_text(PROMPTS))
    x_0, eps = (normal(shape, seeds, name) for name in ("latents", "noise"))
    ts = [torch.full((len(PROMPTS),), t, dtype=torch.float64) for t in TIMES]
    return torch.stack([system.teacher((1 - t[0]) * x_0 + t[0] * eps, t, condition).double() for t in ts])


def packing() -> None:
    """Prints how far the guided velocity of each form of the teacher is from that of float32."""
    whole = velocities(*teacher())
    for name in ("bfloat16", "int8", "int8, on a GPU", "nf4"):
        system, codec = teacher(dtype="bfloat16") if name == "bfloat16" else teacher()
        for layer in layers(system) if name != "bfloat16" else ():
            layer.weight.data = (nf4 if name == "nf4" else rounded)(layer.weight.data)
            if name == "int8, on a GPU":
                layer.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
        off = (velocities(system, codec) - whole).norm() / whole.norm()
        print(f"{name}: the guided velocity is {100 * off:.2g} % off that of float32", flush=True)


def tiling() -> None:
    """Prints how far a picture of digits is from itself when it is decoded in diffusers' tiles."""
    system, codec = teacher("nano-t2i")
    count = ROWS * COLUMNS
    noise = normal(system.model.sample_shapes[0], range(count), "latents")
    z = system.sample_teacher(noise, system.model.batch(codec.encode_text(["a handwritten digit"]) * count), 4)
    rows = [torch.cat(list(row), dim=3) for row in z.split(COLUMNS)]
    picture = torch.cat(rows, dim=2)[None]
    whole = codec.decode(picture)
    codec.vae.enable_tiling()  # type: ignore[attr-defined] of diffusers
    off = (codec.decode(picture) - whole).abs()
    share = (off > 1 / 255).double().mean()
    print(f"in tiles: pixels are off by up to {off.max():.2g}, {100 * share:.2g} % by more than 1/255")


if __name__ == "__main__":
    with torch.no_grad():
        packing()
        tiling()
