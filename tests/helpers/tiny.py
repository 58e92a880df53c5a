"""Tiny Wan networks that many tests share, and runs that are killed where a test wants it."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from faults import interrupted
from safetensors.torch import load_file
from torch import Tensor, nn

from phased_dmd.config import Config
from phased_dmd.engine.world import device
from phased_dmd.maths.schedules import FlowSchedule
from phased_dmd.models.analytic import PlainCodec
from phased_dmd.networks.build import build_system, load_teacher
from phased_dmd.sampling.sampler import Sampler

TEXT_DIM = 32


class TinyWan:
    """`VelocityModel` of randomly initialised Wan transformers of 25k parameters each."""

    schedule, prediction = FlowSchedule(), "flow"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    sample_shapes = ((16, 1, 4, 4),)

    def __init__(self, networks: int = 1, switches: tuple[float, ...] = (), guidance: float = 1.0) -> None:
        self.networks = [wan_transformer(seed).to(device()) for seed in range(networks)]
        self.students, self.switches, self.guidance = self.networks, switches, (guidance,) * networks

    def predict(self, network: nn.Module, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return network(x, t * 1000, condition["text"], return_dict=False)[0]

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
        return unconditional + guidance * (conditional - unconditional)

    def blocks(self, network: nn.Module) -> Sequence[nn.Module]:
        return list(network.blocks)

    def batch(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"text": torch.stack([row["text"] for row in rows]).to(device())}


class TinyCodec(PlainCodec):
    """`Codec` whose text embedding is noise seeded by the prompt's length; latents are decoded to grey values."""

    def encode_text(self, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        return [{"text": draw(5, TEXT_DIM, seed=len(prompt))} for prompt in prompts]

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :3].permute(0, 2, 3, 4, 1).sigmoid()


class CountingCodec(TinyCodec):
    """Keeps how many samples each decode had."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.calls.append(len(latents))
        return super().decode(latents)


def teacher_alone(config: Config) -> Sampler:
    """The sampler of a config's teacher, without experts."""
    model, codec = load_teacher(config)
    return Sampler(build_system(config, model, codec.encode_text([config.teacher.negative_prompt])[0]), codec)


@contextmanager
def killed_after(phase: int, iteration: int) -> Iterator[None]:
    """Around a run that is killed when it has just saved a checkpoint, before it touches any other file of its own."""
    name = f"phase-{phase}-iteration-{iteration:06d}-update-0"
    with interrupted(lambda path: any((folder / "checkpoints" / name).exists() for folder in (path, *path.parents))):
        yield


def newest_checkpoint(run: Path, phase: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Where the newest checkpoint of a phase stands, and its tensors, read without the program; ({}, {}) if none."""
    folders = sorted((run / "checkpoints").glob(f"phase-{phase}-iteration-*"))
    if not folders:
        return {}, {}
    tensors = {name: t for file in folders[-1].glob("*.safetensors") for name, t in load_file(file).items()}
    return json.loads((folders[-1] / "manifest.json").read_text())["at"], tensors


def wan_transformer(seed: int) -> nn.Module:
    from diffusers import WanTransformer3DModel  # here, because it takes seconds and most tests need none

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        network = WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
            text_dim=TEXT_DIM, freq_dim=64, ffn_dim=32, num_layers=2, cross_attn_norm=True,
            qk_norm="rms_norm_across_heads", rope_max_seq_len=64,
        )  # fmt: skip
    return network.eval().requires_grad_(False)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
