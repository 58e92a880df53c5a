"""A quantised base against the same network with its weights unpacked: predictions, and gradients of its adapters."""

import copy
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from tiny import TEXT_DIM, TinyWan, draw, killed_after
from torch import Tensor, nn

from phased_dmd import distill, load
from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Lora
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.models.quantise import quantise
from phased_dmd.networks.roles import TEACHER, Roles, expert_role
from phased_dmd.recipes import resolve

ONE = expert_role(1)
X, PROBE = (draw(3, *TinyWan.sample_shapes[0], seed=seed).to(device()) for seed in (1, 2))
T = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, device=device())
CONDITION = {"text": draw(3, 5, TEXT_DIM, seed=3).to(device())}


def unpacked(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.data.float() * weight.SCB[:, None] / 127


def pair(kind: str) -> tuple[TinyWan, TinyWan]:
    """A quantised network, and a plain one of the same values."""
    packed = TinyWan()
    plain = copy.deepcopy(packed)
    quantise(packed.blocks(packed.networks[0]), kind, torch.float32, device())
    changed = {
        name: m for name, m in packed.networks[0].named_modules() if isinstance(m, nn.Linear) and "blocks" in name
    }
    assert len(changed) == 20 and not any(type(m) is nn.Linear for m in changed.values())
    for name, layer in changed.items():
        target = plain.networks[0].get_submodule(name).weight
        assert 1e-4 < (unpacked(layer) - target).norm() / target.norm() < {"int8": 0.02, "nf4": 0.15}[kind]
        target.data = unpacked(layer).to(target)
    return packed, plain


def gradients(model: TinyWan) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's prediction; an expert's; and the gradient in all of its adapter."""
    roles = Roles(model)
    roles.add(ONE, [0], Lora(rank=3, alpha=6), seed=5)
    parameters = roles.parameters(ONE)
    with torch.no_grad():
        for i, p in enumerate(parameters.values()):
            p.copy_(0.2 * draw(*p.shape, seed=10 + i))
    teacher = roles.predict(TEACHER, 0, X, T, CONDITION)
    with roles.active(ONE):
        out = roles.predict(ONE, 0, X, T, CONDITION)
        (out * PROBE).sum().backward()
    return teacher, out.detach(), torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-4), ("int8", 0.03)])
def test_a_quantised_base_computes_and_differentiates_with_its_unpacked_weights(kind: str, tolerance: float) -> None:
    """int8 rounds the activations, too."""
    for found, expected in zip(*map(gradients, pair(kind)), strict=True):
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_trains_its_adapters(kind: str, tmp_path: Path) -> None:
    """The teacher loaded anew is packed alike: a resumed run ends byte-identical, and can be sampled."""
    quick = {"batch_size": 2, "iterations": 2, "fake.updates": 1, "plan.phases": 2, "checkpoint_every": 1}
    config = resolve("nano-t2i", quick | {"teacher.quantise": kind, "fake.weights": "lora", "sample_every": None})
    whole = distill(config, tmp_path / "whole", quiet=True)
    with killed_after(2, 1):
        distill(config, tmp_path / "run", quiet=True)
    run = distill(config, tmp_path / "run", quiet=True)
    for phase in (1, 2):
        path = RunFolder(run).expert_path(phase)
        assert path.read_bytes() == RunFolder(whole).expert_path(phase).read_bytes()
        assert all(t.any() for name, t in load_file(path).items() if "lora_B" in name)
    assert load(run)(["a handwritten seven"], [0]).isfinite().all()


def test_a_quantised_base_cannot_be_offloaded() -> None:
    with pytest.raises(UserError, match=r"^teacher\.quantise: a packed network stays whole on one GPU, without engine"):
        resolve("nano-t2i", {"teacher.quantise": "nf4", "fake.weights": "lora", "engine.offload": True})


def test_full_weights_cannot_start_from_a_quantised_base() -> None:
    with pytest.raises(UserError, match=r"^teacher\.quantise: full weights cannot be copied from it"):
        resolve("nano-t2i", {"teacher.quantise": "nf4"})
    assert resolve("nano-t2i", {"teacher.quantise": "nf4", "fake.weights": "lora"}).teacher.quantise == "nf4"
