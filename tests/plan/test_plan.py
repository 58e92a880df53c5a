"""Plans say what real networks, optimisers and graphs hold, and give the figures worked out beforehand."""

import json
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import bitsandbytes as bnb
import pipelines
import pytest
import torch
import yaml
from tiny import draw, newest_checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from phased_dmd.cli import app
from phased_dmd.cli.flags import assignment
from phased_dmd.config import (
    Config,
    Engine,
    Fake,
    Generator,
    Lora,
    Optimiser,
    Plan,
    phase_plan,
    renoise_interval,
)
from phased_dmd.config.overrides import changed
from phased_dmd.config.teacher import AnyPipeline, OwnTeacher, PipelineTeacher
from phased_dmd.engine import world
from phased_dmd.errors import UserError
from phased_dmd.models.loader import adapter_of, bare_codec, bare_model, load_model
from phased_dmd.models.protocol import VelocityModel
from phased_dmd.models.quantise import quantise
from phased_dmd.models.source import META, BareSource, architecture, skeleton
from phased_dmd.networks.build import add_expert, build_system
from phased_dmd.networks.optim import Learner
from phased_dmd.networks.roles import FAKE, Roles, expert_role
from phased_dmd.plan import advice, needs, page, peak, proposals
from phased_dmd.plan.measure import PeakBytes, block_bytes, bucket_shapes, call, plan_of
from phased_dmd.plan.memory import (
    activations,
    autocast_copies,
    checkpoint_bytes,
    gathered,
    network_bytes,
    parameters_by_role,
    phase_memory,
    score_calls,
)
from phased_dmd.plan.memory import states as state_bytes
from phased_dmd.plan.preview import decode_cost, encode_cost, preview_cost
from phased_dmd.plan.simulate import extrapolated, simulated
from phased_dmd.plan.stages import encoding, stages
from phased_dmd.plan.work import forward_flops, mean_flops, phase_work
from phased_dmd.recipes import RECIPES, SYSTEMS, resolve
from phased_dmd.sampling.sampler import Sampler
from phased_dmd.step import draw_times
from phased_dmd.train import distill

TINY = (
    "wan21_t2v",
    "wan22_t2v",
    *(name for name in pipelines.PICTURES if name != "qwen_image_edit"),
)  # is Qwen-Image's
BASES = {
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14.29e9, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1.42e9,
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": 14.29e9, "Wan-AI/Wan2.2-I2V-A14B-Diffusers": 14.29e9,
    "Qwen/Qwen-Image": 20.43e9, "Tongyi-MAI/Z-Image": 6.15e9, "black-forest-labs/FLUX.2-klein-base-4B": 3.88e9,
    "black-forest-labs/FLUX.2-klein-base-9B": 9.08e9, "Qwen/Qwen-Image-2.1": 7.12e9, "krea/Krea-2-Raw": 12.82e9,
    "Alpha-VLLM/Lumina-Image-2.0": 2.61e9, "Qwen/Qwen-Image-Edit-2509": 20.43e9,
}  # fmt: skip
ENCODERS = {
    "wan": 5.68e9, "qwen_image": 8.29e9, "z_image": 4.02e9, "4B": 4.02e9, "9B": 8.19e9, "qwen_image_21": 8.77e9,
    "krea_2": 4.44e9, "lumina_2": 2.61e9, "qwen_image_edit": 8.29e9,
}  # fmt: skip
BATCH, TOKENS = 3, 24  # samples of a call, and of a prompt, the most that the tiny pipelines take
LARGEST = {"teacher.sizes": [{"height": 1328, "width": 1328}]}  # of Qwen-Image's sizes
QUIET = {"sample_every": None}  # without previews, whose bytes are counted for nothing in most tests


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: pipelines.build(name, tmp_path_factory.mktemp(name)) for name in TINY}


def tiny(folders: dict[str, Path], name: str, dtype: str = "float32", **sections: Any) -> Config:
    teacher = pipelines.teacher(name, folders[name]).model_copy(update={"dtype": dtype, "max_tokens": TOKENS})
    return Config(
        recipe="tiny", teacher=teacher, prompts="default-t2i", batch_size=BATCH,
        generator=sections.pop("generator", Generator(lora=Lora(rank=4, alpha=4))), **sections,
    )  # fmt: skip


def part(base: str, name: str) -> dict[str, Any]:
    folder = architecture(base)
    assert folder is not None
    return json.loads((folder / name / "config.json").read_text())


def teacher_of(base: str) -> Any:
    made = (resolve(recipe, {"prompts": "default-t2i"}).teacher for recipe in SYSTEMS)
    return next(teacher for teacher in made if isinstance(teacher, PipelineTeacher) and teacher.path == base)


# Architectures and skeletons


@pytest.mark.parametrize("base", BASES)
def test_shipped_architectures_have_the_published_numbers_of_parameters(base: str) -> None:
    teacher = teacher_of(base)
    adapter = adapter_of(teacher)
    network = skeleton(adapter.transformer, part(base, "transformer"), torch.bfloat16)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(
        BASES[base], abs=5e6
    )  # as published, in hundredths of 10^9
    with torch.device("meta"):
        adapter.vae.from_config(part(base, "vae"))
        kind = adapter.encoder.kind
        encoder: nn.Module = kind(kind.config_class(**part(base, "text_encoder")))
    expected = ENCODERS.get(base[-2:]) or ENCODERS[teacher.adapter]
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(expected, abs=5e6)


def test_every_base_of_a_recipe_is_shipped_with_all_of_its_parts() -> None:
    named = {
        config.teacher.path for make in RECIPES.values() if "path" in type((config := make()).teacher).model_fields
    }
    assert {path for path in named if "/" in path} == set(BASES)
    for base in BASES:
        folder = architecture(base)
        assert folder is not None
        index = json.loads((folder / "model_index.json").read_text())
        parts = {name for name, value in index.items() if isinstance(value, list) and isinstance(value[0], str)}
        parts -= {"tokenizer", "processor"}
        assert parts == {path.name for path in folder.iterdir() if path.is_dir()}


@pytest.mark.parametrize("path", ["nano", "Wan-AI/none", "../nano", "Wan-AI/../Qwen/Qwen-Image", "", "*/*"])
def test_other_paths_have_no_shipped_architecture(path: str) -> None:
    assert architecture(path) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in TINY if name != "wan22_t2v"])
def test_a_skeleton_is_what_from_pretrained_gives_but_for_the_weights(
    folders: dict[str, Path], name: str, dtype: torch.dtype
) -> None:
    kind = adapter_of(pipelines.teacher(name, folders[name])).transformer
    folder = folders[name] / "transformer"
    real = kind.from_pretrained(folder, dtype=dtype)
    bare = skeleton(kind, dict(kind.load_config(folder)), dtype)
    assert torch.get_default_dtype() == torch.float32 and not bare.training
    described = [
        [(key, p.shape, p.dtype, p.requires_grad) for key, p in model.named_parameters()] for model in (real, bare)
    ]
    assert described[0] == described[1] and all(p.is_meta for p in bare.parameters())
    assert {p.dtype for p in real.parameters()} == (
        {dtype, torch.float32} if name in ("wan21_t2v", "krea_2") else {dtype}
    )
    buffers = dict(real.named_buffers())
    assert buffers.keys() == dict(bare.named_buffers()).keys()
    for key, buffer in bare.named_buffers():
        assert buffer.dtype == buffers[key].dtype and torch.equal(buffer, buffers[key])
    if name == "qwen_image":
        assert torch.equal(bare.pos_embed.pos_freqs, real.pos_embed.pos_freqs)


# Figures worked out beforehand (bytes: parameters times bytes each; FLOPs: 23.9 GFLOP a video token, and 4 L d a layer)


def test_wan_14b_needs_the_bytes_and_flops_worked_out_by_hand() -> None:
    plan = needs(resolve("wan22-t2v", QUIET), gpus=64, memory_gb=80)
    assert plan.forward_flops["81x480x832"] == pytest.approx(1.68e15, rel=0.005)
    assert plan.forward_flops["81x1280x720"] == plan.forward_flops["81x720x1280"] == pytest.approx(6.52e15, rel=0.005)
    assert plan.parameters["teacher"] == 2 * plan.parameters["fake_1"] == plan.parameters["fake_2"]
    assert "28.6 GB" in plan.remarks[0] and "228.6 GB" in plan.remarks[1] and "171.5 GB" in plan.remarks[1]
    assert 16 * plan.parameters["phase_1"] == pytest.approx(4.9e9, rel=0.01)  # with gradients and two moments
    first, second = (phase.memory for phase in plan.phases)
    assert 64 * (first.gradients + first.optimiser) == pytest.approx((2 * 14.29 + 0.307) * 4e9, rel=0.001)
    assert 64 * (second.weights - first.weights) == pytest.approx(14.29e9 * 4, rel=0.001)  # a fake of each network


def test_checkpoints_weigh_what_was_worked_out_by_hand() -> None:
    """Weights and second moments of fakes and experts in float32; of three at a time. A shard, of 1.8 GB and more,
    goes through each GPU's host in files of 256 MiB, four of which it may hold. Those kept for good come on top.
    """
    plan = needs(resolve("wan22-t2v", QUIET), gpus=64, memory_gb=80)
    assert [phase.checkpoint for phase in plan.phases] == pytest.approx([117e9, 231e9], rel=0.01)
    saved = [stage for stage in plan.stages if stage.name == "checkpoint"]
    assert [stage.disk for stage in saved] == [3 * phase.checkpoint for phase in plan.phases]
    assert [stage.host for stage in saved] == [4 * 2**28] * 2
    counted = needs(resolve("wan22-t2v", QUIET | {"keep_last": "all", "checkpoint_every": 150}), gpus=64, memory_gb=80)
    first, second = (phase.checkpoint for phase in counted.phases)  # of 500 iterations, three of each phase
    disks = [stage.disk for stage in counted.stages if stage.name == "checkpoint"]
    assert disks == [3 * first + 2 * first, 3 * first + 3 * second + 2 * second]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_checkpoint_weighs_what_is_planned(folders: dict[str, Path], tmp_path: Path, ema: float | None) -> None:
    lora = Generator(lora=Lora(rank=4, alpha=4), ema=ema)
    config = tiny(
        folders, "wan22_t2v", "bfloat16", generator=lora, fake=Fake(updates=1), iterations=1, checkpoint_every=1,
        keep_last="all", sample_every=None, plan=Plan(steps=2, phases=2), optimiser=Optimiser(second_moment="bfloat16"),
    )  # fmt: skip
    (tmp_path / "prompts.txt").write_text("a boat\n")
    run = distill(config.model_copy(update={"prompts": str(tmp_path / "prompts.txt")}), tmp_path / "run", quiet=True)
    for phase in (1, 2):
        _, tensors = newest_checkpoint(run, phase)
        held = sum(tensor.nbytes for name, tensor in tensors.items() if "/step/" not in name)
        assert held == checkpoint_bytes(config, phase)


def test_qwen_image_forward_costs_what_was_worked_out_by_hand() -> None:
    config = resolve("qwen-image", LARGEST)
    assert forward_flops(config.teacher) == [pytest.approx(0.133e15, rel=0.005)]


@pytest.mark.parametrize(("recipe", "flops"), [("z-image", 0.0576e15), ("flux2-klein-4b", 0.0348e15)])
def test_a_megapixel_costs_what_was_worked_out_by_hand(recipe: str, flops: float) -> None:
    """2 x 5.66e9 weights x (4096 + 192) tokens, and 4 L^2 d a layer; 2 x 3.07e9 x (4096 + 512), whatever the prompt."""
    config = resolve(recipe, {"teacher.sizes": [{"height": 1024, "width": 1024}]})
    assert forward_flops(config.teacher) == [pytest.approx(flops, rel=0.005)]


def test_calls_and_forwards_are_those_of_the_table_of_costs() -> None:
    """Mean rollouts 1.5 and 3.5, the fake's 2 and 4; LoRA step 3 F, full step 4 F, guided teacher 2 F: 36.5 F and
    48.5 F an iteration.
    """
    config = resolve("wan22-t2v", {"engine.activation_checkpointing": True})
    plan = phase_plan(config, [0.875])
    costs = [phase_work(config, plan, phase, guided=True) for phase in (1, 2)]
    assert [(cost.generator_forwards, cost.fake_forwards) for cost in costs] == [(6.5, 5 * (2 + 4)), (8.5, 5 * (4 + 4))]
    assert [(cost.generator_calls, cost.fake_calls) for cost in costs] == [(4.5, 5 * (2 + 1)), (6.5, 5 * (4 + 1))]
    every = config.model_copy(update={"plan": config.plan.model_copy(update={"gradient": "all"})})
    assert phase_work(every, plan, 1, guided=True).generator_forwards == 2 * 3 + 3
    assert phase_work(config, plan, 1, guided=False).generator_calls == 3.5


def test_what_begins_with_the_teacher_or_is_anchored_costs_what_was_worked_out_by_hand() -> None:
    """wan22-t2v: the boundary is the base's 20th step of 40, of two calls each. A phase that begins there makes no
    earlier steps, an anchored update 1.5 calls, of which one trains; anchored throughout there is no fake to be held.
    """
    config = resolve("wan22-t2v", {"rollouts.start": "teacher", "engine.activation_checkpointing": True})
    first, second = (phase_work(config, plan_of(config), phase, guided=True) for phase in (1, 2))
    assert (first.generator_calls, first.fake_calls) == (second.generator_calls, second.fake_calls) == (4.5, 15)
    plan = needs(config, 64, 80)
    assert plan.pool is not None and plan.side_by_side is not None
    assert plan.pool.calls == 1024 * 20 * 2
    frames = {"81x480x832": 21 * 60 * 104, "81x720x1280": 21 * 90 * 160}
    numbers = 16 * (0.8 * frames["81x480x832"] + 0.2 * frames["81x720x1280"])
    assert plan.pool.disk == pytest.approx(4 * 1024 * numbers)
    forwards = 500 * 64 * sum(phase.work.forwards for phase in plan.phases)
    assert plan.pool.hours == pytest.approx(plan.hours * plan.pool.calls / forwards)
    assert plan.side_by_side == pytest.approx(max(phase.hours for phase in plan.phases) + plan.pool.hours / 2)
    assert [line for line in plan.remarks if line.startswith("phase")] == [
        "phase 1 by itself: trains an expert on network 0, and asks teacher and fake on 0",
        "phase 2 by itself: trains an expert on network 1, and asks teacher and fake on 0 and 1",
    ]

    anchored = needs(changed(config, {"anchor.updates": [500, 100]}), 64, 80)
    assert anchored.pool is not None and anchored.pool.calls == 1024 * 40 * 2
    alone = phase_work(config, plan_of(config), 1, guided=True, anchored=True)
    assert (alone.calls, alone.forwards) == (1.5, 0.5 + 3) and anchored.phases[0].work.calls == 1.5
    assert anchored.parameters["fake_1"] == 0 and anchored.parameters["fake_2"] > 0
    assert anchored.phases[0].memory.optimiser < plan.phases[0].memory.optimiser / 40
    fewer = 100 * anchored.phases[0].hours / 500 + 400 * plan.phases[1].hours / 500
    assert anchored.phases[1].hours == pytest.approx(fewer)
    assert needs(resolve("wan22-t2v"), 64, 80).pool is None and needs(resolve("wan22-t2v"), 64, 80).side_by_side is None


@pytest.mark.parametrize(("gpus", "micro_batch"), [(1, 4), (2, 1), (2, 3), (8, 1)])
def test_calls_of_networks_without_a_sample_are_counted(gpus: int, micro_batch: int) -> None:
    """In phase 2 of two networks, by 500 updates of real draws: each process calls every network that any one needs."""
    config = resolve("nano-moe", {"batch_size": gpus * micro_batch, "engine.micro_batch": micro_batch})
    system, everywhere = SimpleNamespace(config=config, plan=plan_of(config)), [range(0)]
    system.intervals = [renoise_interval(config, system.plan, phase) for phase in (1, 2)]
    everywhere = [range(start, start + micro_batch) for start in range(0, gpus * micro_batch, micro_batch)]
    calls = 0
    for update in range(500):
        found = [
            [system.plan.network(t) for t in draw_times(system, 2, (0, 2, 0, update), samples, False).tolist()]
            for samples in everywhere
        ]
        present = {network for own in found for network in own}
        calls += sum(max(1, found[0].count(network)) for network in present)
    expected = score_calls(config, 2, gpus)
    assert calls / 500 / micro_batch == pytest.approx(expected, abs=0.06)
    assert (expected == 1) is (gpus == 1) and score_calls(config, 1, gpus) == 1
    once = changed(config, {"renoise.network": "update"})
    assert score_calls(once, 2, gpus) == 1 and activations(once, 2, gpus) <= activations(config, 2, gpus)


def test_phase_2_of_two_networks_takes_both_in_every_update_unless_an_update_draws_one() -> None:
    """Of Wan2.2 with a sample on each GPU: to the forwards come 3 for the expert's scores and one more of the fake's
    five updates; and two samples wait for the backward, in which one block at a time is computed.
    """
    config = resolve("wan22-t2v", {"engine.activation_checkpointing": True})
    both = changed(config, {"renoise.network": "sample"})
    one, two = (needs(each, 64, 80).phases[1] for each in (config, both))
    attention = mean_flops(config.teacher)[1]
    assert one.work.forwards == pytest.approx(48.5 + 1.5 * attention + 5 * 0.5 * attention, abs=0.01)
    assert two.work.forwards - one.work.forwards == pytest.approx(3 + 5 * (4 + 0.5 * attention), abs=0.01)
    assert two.memory.activations > 1.4 * one.memory.activations
    first = [needs(each, 64, 80).phases[0] for each in (config, both)]
    assert first[0] == first[1]  # the noisier network alone


def test_hours_follow_from_flops_and_peak() -> None:
    """A forward of a sample at 480p is 1.68 PFLOP, of which attention, 4 x 32,760 tokens x 5120 x 40 blocks a token, is
    .53: of 36.5 and 48.5 of them, and 4 more of attention, 164 and 215 s an
    iteration of 64 samples on 64 GPUs at 40 % of 989 TFLOP/s.
    """
    attention = 4 * (32_760 + 512) * 5120 * 40 * 32_760 / 1.68e15
    more = (1.5 + 5 * 0.5) * attention  # backwards of attention are 2.5 forwards, not 1 or, with weights, 2
    first, second = (1.68e15 * forwards / (0.4 * 989e12) for forwards in (36.5 + more, 48.5 + more))
    sizes = [{"num_frames": 81, "height": 480, "width": 832}]
    changes = {"teacher.sizes": sizes, "iterations": 1800, "engine.activation_checkpointing": True} | QUIET
    plan = needs(resolve("wan22-t2v", changes), 64, 80)
    assert [phase.iteration_seconds for phase in plan.phases] == pytest.approx([first, second], rel=0.01)
    assert plan.hours == pytest.approx((first + second) / 2, rel=0.01)
    half = needs(resolve("wan22-t2v", changes | {"engine.micro_batch": 1}), 32, 80, 0.8, 494.5)
    assert half.hours == pytest.approx(2 * plan.hours)
    uneven = needs(resolve("wan22-t2v", changes | {"phase_shares": [2, 0.5]}), 64, 80)
    assert uneven.hours == pytest.approx((2 * first + 0.5 * second) / 2, rel=0.01)


# Against reality


def real_roles(config: Config, phase: int) -> tuple[VelocityModel, Roles, list[int]]:
    """The networks, every phase's expert, and the phase's fake; the fake's networks."""
    model = load_model(config.teacher, 0)[0]
    roles, plan = Roles(model), phase_plan(config, model.switches)
    for other in range(1, plan.num_phases + 1):
        owned = [expert.network for expert in plan.experts(other)]
        roles.add(expert_role(other), owned, config.generator.lora, seed=0, trainable=other == phase)
    phases = [phase] if config.fake.weights == "full" else range(1, plan.num_phases + 1)
    served = sorted({n for k in phases for n in plan.fakes(k, renoise_interval(config, plan, k).support)})
    roles.add(FAKE, served, config.fake.lora if config.fake.weights == "lora" else None, seed=0)
    return model, roles, served


def example(model: VelocityModel, batch: int = BATCH) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    network: Any = model.networks[0]
    adapter = next(found for found in map(adapter_of, get_args(AnyPipeline)) if found.model is type(model))
    shapes = adapter.condition(network.config, TOKENS, tuple(model.sample_shapes[0]))
    condition = model.batch([{name: torch.randn(shape) for name, shape in shapes.items()}] * batch)
    return torch.randn(batch, *model.sample_shapes[0]), torch.full((batch,), 0.7, dtype=torch.float64), condition


def nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize(
    ("name", "dtype", "fake"),
    [("wan21_t2v", "float32", "full"), *((name, "bfloat16", fake) for name in TINY for fake in ("full", "lora"))],
)
def test_weights_gradients_and_optimisers_hold_the_bytes_that_were_planned(
    folders: dict[str, Path], name: str, dtype: str, fake: str
) -> None:
    ema = Generator(lora=Lora(rank=4, alpha=4), ema=0.9)
    config = tiny(folders, name, dtype, generator=ema, fake=Fake(weights=fake, lora=Lora(rank=2, alpha=2)))
    parameters = parameters_by_role(config)
    for phase in (1, 2):
        model, roles, served = real_roles(config, phase)
        role, x_t_c = expert_role(phase), example(model)
        learners = [
            Learner(role, roles.parameters(role), config.optimiser, config.generator.lr, config.generator.ema),
            Learner(FAKE, roles.parameters(FAKE), config.optimiser, config.fake.lr),
        ]
        weights = {id(p): p for network in model.networks for p in network.parameters()}
        weights |= {id(p): p for p in roles.parameters(FAKE).values()}
        gradients = []
        owned = [expert.network for expert in phase_plan(config, model.switches).experts(phase)]
        for learner, networks in zip(learners, (owned, served), strict=True):
            with roles.active(learner.role):
                loss = sum((roles.predict(learner.role, n, *x_t_c).square().mean() for n in networks), torch.zeros(()))
                loss.backward()
            gradients.append(nbytes([p.grad for p in learner.parameters.values() if p.grad is not None]))
            learner.optimiser.step()
            learner.optimiser.zero_grad()
        moments = [
            tensor for learner in learners for p in learner.parameters.values()
            for tensor in learner.optimiser.state[p].values() if tensor.shape == p.shape
        ]  # fmt: skip
        average = learners[0].ema
        assert average is not None
        real = nbytes([*weights.values(), *average.values()]), max(gradients), nbytes(moments)
        assert state_bytes(config, phase) == pytest.approx(real, rel=0.01)
        trained = {role: learners[0], f"fake_{phase}": learners[1]}
        for named, learner in trained.items():
            assert parameters[named] == sum(p.numel() for p in learner.parameters.values())


class RealBytes(saved_tensors_hooks):
    """Bytes of the distinct storages that are saved, parameters' left out."""

    def __init__(self, network: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
        self.tensors: list[Tensor] = []  # kept, so that no address comes twice
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor: Tensor) -> Tensor:
        self.tensors.append(tensor.detach())
        return tensor

    @property
    def total(self) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors}
        return sum(size for address, size in storages.items() if address not in self.parameters)


def deeper(config: Config, folder: Path, layers: int) -> tuple[Config, Any]:
    """A config whose folder, without weights, has a network of that many layers; and that network."""
    teacher: Any = config.teacher
    copy_configurations(Path(teacher.path), folder)
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_layers": layers}))
    changed = config.model_copy(update={"teacher": teacher.model_copy(update={"path": str(folder)})})
    torch.manual_seed(0)
    return changed, bare_model(changed.teacher, 0).networks[0].to_empty(device="cpu")


def copy_configurations(source: Path, target: Path) -> None:
    for file in source.rglob("*.json"):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        (target / file.relative_to(source)).write_bytes(file.read_bytes())


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=4)])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "bfloat16") for name in TINY if name != "wan22_t2v"),
        ("wan21_t2v", "float32"),
        ("qwen_image", "float32"),
    ],
)  # a network of Wan2.2's is Wan2.1's, and what a model casts it casts in bfloat16
def test_activations_are_what_a_real_forward_saves(
    folders: dict[str, Path], name: str, dtype: str, lora: Lora | None
) -> None:
    config = tiny(folders, name, dtype)
    model = load_model(config.teacher, 0)[0]
    x_t_c = example(model)
    planned = call(config.teacher, tuple(x_t_c[0].shape[1:]), BATCH, lora)
    network = model.networks[0]
    if lora is None:
        network.requires_grad_(True)
    else:
        Roles(model).add(FAKE, [0], lora, seed=0)
        for module in network.modules():
            if "lora_A" in dict(module.named_children()):
                module.set_adapter([FAKE])  # type: ignore[operator]
    with (real := RealBytes(network)):
        output = model.predict(network, *x_t_c)
    assert output.requires_grad
    assert planned.saved == pytest.approx(real.total, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["wan21_t2v", "qwen_image"])
def test_of_many_blocks_two_tell_what_all_save_with_and_without_checkpointing(
    folders: dict[str, Path], name: str, dtype: str, tmp_path: Path
) -> None:
    """Five blocks. Checkpointed in torch's own way, the forward saves inputs, and each block's backward saves again."""
    config, layers = tiny(folders, name, dtype), 5
    model = load_model(config.teacher, 0)[0]
    (config, network), x_t_c = deeper(config, tmp_path, layers), example(model)
    planned = call(config.teacher, tuple(x_t_c[0].shape[1:]), BATCH, None)
    network.requires_grad_(True)
    with (whole := RealBytes(network)):
        model.predict(network, *x_t_c)
    assert planned.saved == pytest.approx(whole.total, rel=0.05)

    network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    with (inputs := RealBytes(network)):
        output = model.predict(network.train(), *x_t_c)
    rotary = network.pos_embed.pos_freqs.nbytes if name == "qwen_image" else 0  # an argument no hook is told of
    assert planned.checkpointed == pytest.approx(inputs.total + rotary, rel=0.1)
    assert planned.checkpointed < planned.saved

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    with PeakBytes(network) as peak:
        output = model.predict(network, *x_t_c)
        waiting = peak.most = peak.now
        output.sum().backward()
    inside = block_bytes(config.teacher, tuple(x_t_c[0].shape[1:]), BATCH, None)
    assert inside == pytest.approx(peak.most - waiting, rel=0.1)


# What fits


def test_bfloat16_moments_shards_replicas_and_offload_change_what_they_should(folders: dict[str, Path]) -> None:
    config = tiny(folders, "wan22_t2v")
    whole = phase_memory(config, 1, 1)
    four, two_groups = (
        phase_memory(config.model_copy(update={"engine": Engine(replicas=replicas)}), 1, 4) for replicas in (1, 2)
    )
    assert (four.weights, two_groups.weights) == pytest.approx((whole.weights / 4, whole.weights / 2), abs=1)
    half = {"optimiser": Optimiser(second_moment="bfloat16")}
    rounded = tiny(folders, "wan22_t2v", generator=Generator(lora=Lora(rank=4, alpha=4)), **half)
    assert state_bytes(rounded, 1)[2] * 2 == whole.optimiser
    away = phase_memory(config.model_copy(update={"engine": Engine(offload=True)}), 1, 4)
    assert away.host == four.weights + four.gradients + four.optimiser
    assert away.gpu == away.gathered + max(away.training, away.preview)
    states = four.weights + four.optimiser
    assert four.gpu == states + four.gathered + max(four.training, four.preview)
    with pytest.raises(UserError, match="engine.replicas: 3 GPUs cannot be split into 2"):
        needs(config.model_copy(update={"engine": Engine(replicas=2)}), 3, 80)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_weighs_what_bitsandbytes_stores(kind: Any, folders: dict[str, Path]) -> None:
    """Within 1 %: nf4 has a scale of 8 bits for every 64 weights; int8's float32 scale a row is not counted."""
    config = tiny(folders, "wan21_t2v")
    teacher = config.teacher.model_copy(update={"quantise": kind})
    model = load_model(config.teacher, 0)[0]
    network = model.networks[0]
    quantise(model.blocks(network), kind, torch.float32, torch.device("cpu"))
    stored = sum(nbytes(p) for p in network.parameters())
    for layer in network.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            stored += nbytes(layer.weight.quant_state.absmax)
    assert network_bytes(teacher) == pytest.approx(stored, rel=0.01)
    assert network_bytes(teacher) < 0.8 * network_bytes(config.teacher)


def test_processes_that_share_samples_have_a_share_of_the_activations() -> None:
    """16 GPUs in pairs hold 8 samples' activations, half a sample's each; the states are in 16 shards as before."""
    alone, pairs = (
        resolve("wan21-t2v-1.3b", QUIET | {"batch_size": 8, "engine.sequence_parallel": ways}) for ways in (1, 2)
    )
    for phase in (1, 2):
        one, two = phase_memory(alone, phase, 8), phase_memory(pairs, phase, 16)
        assert two.activations == one.activations // 2
        assert two.weights == pytest.approx(one.weights / 2, abs=1)
    assert not any("batch_size" in warning for warning in advice.warnings(pairs, phase_plan(pairs), 16))


def test_a_divergence_that_differentiates_the_teacher_takes_memory() -> None:
    """Graphs of the generator's call, and of the teacher's two or the fake's, whichever is larger."""

    def found(divergence: str, fake: str) -> int:
        changes = {"engine.micro_batch": 1, "objective": divergence, "fake.weights": fake}
        return activations(resolve("wan21-t2i", changes), 1, 8)

    one, three, two = (found(name, "lora") for name in ("normalised", "fisher", "fisher-stop-gradient"))
    assert three == pytest.approx(3 * one, rel=1e-3) and two == pytest.approx(2 * one, rel=1e-3)
    full = found("normalised", "full")  # the graph of a fake with all weights
    assert found("fisher-stop-gradient", "full") == pytest.approx(one + full, rel=1e-3)
    assert found("fisher", "full") == one + max(2 * one, full)


def test_gathered_are_two_blocks_and_the_gradients_of_one() -> None:
    """By hand, in numbers of d = 5120 and ffn 13824; what surrounds the blocks is gathered when they are not."""
    attention = 4 * (5120**2 + 5120) + 2 * 5120
    block = 2 * attention + 2 * 5120 + 2 * 5120 * 13824 + 13824 + 5120 + 6 * 5120
    full, lora = (resolve("wan21-t2i", {"fake.weights": weights}) for weights in ("full", "lora"))
    assert gathered(full, 8) == 2 * block * 2 + block * 4
    assert gathered(lora, 8) == 2 * block * 2
    assert gathered(full, 1) == gathered(lora, 1) == 0
    assert autocast_copies(full.teacher, full.fake) == 14_288_491_584 * 2
    assert autocast_copies(full.teacher, full.generator) == 0  # adapters, whose own are small


def test_advice_is_the_cheapest_that_fits_and_its_flags_make_it_fit() -> None:
    config = resolve("qwen-image", LARGEST)
    plan = needs(config, 8, 80)
    assert not plan.fits and plan.options is not None and plan.enough_gpus is None
    assert plan.options == "--set engine.activation_checkpointing=true"
    mended = resolve("qwen-image", LARGEST | dict(map(_pair, plan.options.replace("--set ", "").split())))
    assert needs(mended, 8, 80).fits
    tight = needs(config, 8, 32)
    assert tight.options is not None and "second_moment" not in tight.options and "offload" not in tight.options
    assert "fake.weights=lora" in tight.options and "fake.weights: loses quality" in tight.option_notes
    assert (
        tight.enough_gpus is not None and needs(advice.changed(config, advice.free(config)), tight.enough_gpus, 32).fits
    )


def test_the_least_number_of_gpus_is_found_with_what_changes_no_result() -> None:
    config = resolve("qwen-image", {"engine.replicas": 2})

    def fits(config: Config, gpus: int) -> bool:
        return gpus >= 37 and config.engine.micro_batch == 1 and config.engine.activation_checkpointing

    assert advice.least_gpus(config, 8, fits) == 64
    assert advice.least_gpus(config, 8, lambda config, gpus: False) is None


def test_what_does_not_go_with_the_rest_is_not_advised() -> None:
    """A fake that is pulled along has all weights, and so have the students of an analytic teacher."""
    pulled = resolve("wan22-t2v", {"fake.pull": 1.0})
    for config in (pulled, resolve("toy-2d", {})):
        assert advice.cheapest(config, 8, lambda config, _: config.engine.offload) == (advice.OFFLOAD,)
        assert advice.cheapest(config, 8, lambda config, _: config.fake.weights == "lora") is None
    assert "lora" not in (needs(resolve("wan22-t2v", QUIET | {"fake.pull": 1.0}), 64, 24).options or "")


def test_what_is_advised_for_pairs_parts_none() -> None:
    config = resolve("wan22-t2i", {"rollouts.antithetic": "start"})
    chosen = advice.cheapest(config, 8, lambda config, _: config.engine.micro_batch is not None)
    assert chosen is not None and advice.flags(chosen) == "--set engine.micro_batch=2"
    assert advice.least_gpus(config, 8, lambda _, gpus: gpus >= 20) == 32
    assert advice.least_gpus(config, 8, lambda _, gpus: gpus >= 33) is None, "64 would have a sample each"
    warnings = list(advice.warnings(config, phase_plan(config, [0.875]), 64))
    assert "of 1 samples on each of 64 GPUs no pairs can be made" in warnings[0]
    with pytest.raises(UserError, match="1 samples in calls of 1 cannot be paired$"):
        world.split_batch(1, config.engine, pairs=True)  # a process's one sample


def _pair(text: str) -> tuple[str, Any]:
    key, value = text.split("=")
    return key, yaml.safe_load(value)


@pytest.mark.parametrize(
    ("least", "chosen"),
    [
        ({"engine.micro_batch"}, ("engine.micro_batch",)),
        ({"engine.offload"}, ("engine.offload",)),
        ({"optimiser.second_moment"}, ("optimiser.second_moment",)),
        ({"engine.activation_checkpointing", "engine.offload"}, ("engine.activation_checkpointing", "engine.offload")),
    ],
)
def test_no_option_is_advised_that_is_not_needed(least: set[str], chosen: tuple[str, ...]) -> None:
    config = resolve("qwen-image", {})
    done = {option.key: option for option in (*advice.free(config), *advice.OPTIONS, advice.OFFLOAD)}

    def fits(config: Config, gpus: int) -> bool:
        return all(advice.changed(config, (done[key],)) == config for key in least)

    found = advice.cheapest(config, 8, fits)
    assert found is not None and tuple(key for key, _, _ in found) == chosen
    assert advice.cheapest(config, 8, lambda config, gpus: False) is None


def test_a_packed_network_is_advised_on_one_gpu_and_never_with_what_distill_refuses() -> None:
    """Weights of 4 bits need a LoRA fake, and go with neither other GPUs nor offload."""
    config = resolve("wan21-t2i", {})
    packed = advice.cheapest(config, 1, lambda config, _: getattr(config.teacher, "quantise", None) == "nf4")
    assert packed is not None and advice.flags(packed) == "--set fake.weights=lora --set teacher.quantise=nf4"
    assert advice.cheapest(config, 8, lambda config, _: getattr(config.teacher, "quantise", None) == "nf4") is None
    away = advice.cheapest(config, 1, lambda config, _: config.engine.offload)
    assert away == (advice.OFFLOAD,), "offload is tried without it"
    small = changed(config, {"fake.weights": "lora", "teacher.quantise": "nf4"})
    assert advice.cheapest(small, 1, lambda config, _: config.engine.offload) is None
    assert advice.least_gpus(small, 1, lambda *_: True) is None
    with pytest.raises(
        UserError, match=r"^teacher\.quantise: a packed network stays whole on one GPU, and --gpus is 2$"
    ):
        needs(small, 2, 80)
    for field, value in (("engine.offload", True), ("engine.replicas", 2), ("engine.sequence_parallel", 2)):
        with pytest.raises(UserError, match=r"teacher\.quantise: a packed network stays whole on one GPU"):
            changed(small, {field: value})


def test_smaller_sizes_are_advised_before_offload_and_can_be_typed() -> None:
    """Of Wan2.2's clips at 480 and 720 lines, those at 480."""
    config = resolve("wan22-t2v", {})
    found = advice.cheapest(config, 8, lambda config, _: all(size.width < 1000 for size in config.teacher.sizes))
    assert found is not None
    (flag, setting) = shlex.split(advice.flags(found))
    assert flag == "--set" and assignment(setting)[1] == found[0].value
    chosen = advice.changed(config, found).teacher
    assert [(size.height, size.width) for size in chosen.sizes] == [(480, 832), (832, 480)]
    assert advice.smaller(resolve("qwen-image", LARGEST)) == ()
    assert advice.smaller(resolve("toy-2d", {})) == ()


def test_samples_are_shared_by_four_where_they_can_be() -> None:
    """Of Wan, by a number of GPUs that four divides."""
    config, ways = resolve("wan22-t2v", {}), advice.WAYS

    def fits(config: Config, _: int) -> bool:
        return config.engine.sequence_parallel == ways

    found = advice.cheapest(config, 8, fits)
    assert found is not None and advice.flags(found) == "--set engine.sequence_parallel=4"
    odd = [{"num_frames": 81, "height": 496, "width": 848}]  # 21 x 31 x 53 tokens
    for other, gpus in ((config, 2), (resolve("qwen-image", {}), 8), (changed(config, {"teacher.sizes": odd}), 8)):
        assert advice.cheapest(other, gpus, fits) is None


# Stages


def test_stages_hold_what_was_worked_out_by_hand() -> None:
    """umT5-XXL of 5.68e9 and Qwen2.5-VL of 8.29e9 parameters in bfloat16, and a VAE of .5 GB; a network of 28.6 GB."""
    wan, qwen = resolve("wan22-t2v", QUIET), resolve("qwen-image", QUIET)
    assert [encoding(config.teacher)[0] for config in (wan, qwen)] == pytest.approx([11.87e9, 17.09e9], rel=0.005)
    many, one = (next(s for s in stages(wan, gpus) if s.name == "loading") for gpus in (64, 1))
    assert (many.host, one.host) == pytest.approx((57.2e9, 28.6e9), rel=0.005)  # sharded ones are all there first
    assert (many.gpu, one.gpu) == pytest.approx((57.2e9 / 64, 57.2e9), rel=0.005)
    full = changed(wan, {"generator.weights": "full"})
    expert = next(stage for stage in stages(full, 64) if stage.name == "expert")
    assert expert.host == expert.disk == pytest.approx(57.2e9, rel=0.005)  # gathered in float32


@pytest.mark.parametrize("name", ["wan21_t2v", "qwen_image", "z_image", "flux2_klein"])
def test_an_encoder_holds_what_a_real_one_does(folders: dict[str, Path], name: str) -> None:
    """Sixty-four prompts of Wan's, as many as a file of the cache has, and eight of others', Qwen's in a template."""
    config = tiny(folders, name)
    codec: Any = load_model(config.teacher, 0)[1]
    shape, more = (64, TOKENS), {}
    if name != "wan21_t2v":
        codec.encode_text(["a boat"])
        encoder, more = codec.pipeline.text_encoder, {"output_hidden_states": True, "use_cache": name != "flux2_klein"}
        shape = (8, TOKENS + (34 if name == "qwen_image" else 0))
    else:
        encoder = codec.encoder.text_encoder
    ids = torch.zeros(shape, dtype=torch.long)
    with torch.no_grad(), PeakBytes(encoder) as peak_bytes:
        encoder(input_ids=ids, attention_mask=ids + 1, **more)
    weights, most = encoding(config.teacher)
    assert most == pytest.approx(peak_bytes.most, rel=0.1)
    assert weights == nbytes(list(encoder.parameters())) + nbytes(list(codec.vae.parameters()))


def test_a_first_frame_is_encoded_with_what_a_real_one_takes() -> None:
    """The clip of a first frame by nano's own VAE."""
    config = resolve("nano-i2v", {})
    codec: Any = load_model(config.teacher, 0)[1]
    shape, vae = tuple(bare_model(config.teacher, 0).sample_shapes[0]), codec.vae
    size = config.teacher.sizes[0]
    with torch.no_grad(), PeakBytes(vae) as peak_bytes:
        vae.encode(torch.zeros(1, 3, size.num_frames, size.height, size.width))
    pixels = 12 * size.num_frames * size.height * size.width
    assert encode_cost(config.teacher, shape, True)[1] == pytest.approx(peak_bytes.most + pixels, rel=0.1)


def test_the_verdict_names_the_stage_that_holds_the_most() -> None:
    small = resolve("wan21-t2i", QUIET | {"engine.micro_batch": 1, "engine.activation_checkpointing": True})
    plan = needs(small, 64, 16)
    assert peak(plan.stages).name == "encoding" and not plan.fits  # no option makes an encoder smaller
    assert page.verdict(plan)[0] == "it does not fit: 17.8 GB on each GPU in encoding, and 14.7 GB can be used"
    assert plan.options is None
    assert "at most in updates of phase" in page.verdict(needs(small, 8, 80))[0]


def test_gathers_between_nodes_are_remarked_on_where_they_bound_a_run() -> None:
    """Pictures on 64 GPUs: a network's 28.6 GB 31.5 times for calls and 6 for backwards, and 5 times float32 gradients
    of the fake, of which a 64th is its own.
    """
    config = resolve("wan21-t2i", QUIET | {"engine.activation_checkpointing": True})
    plan = needs(config, 64, 80)
    assert plan.phases[1].gathered == pytest.approx((37.5 * 28.58e9 + 5 * 57.15e9) * 63 / 64, rel=0.005)
    (line,) = (remark for remark in plan.remarks if remark.startswith("gathers: "))
    assert "33.4 s at 40 GB/s" in line and "--set engine.replicas=8 gathers within nodes of 8, and fits with" in line
    within = needs(changed(config, {"engine.replicas": 8}), 64, 80)
    assert within.fits and not any(
        remark.startswith("gathers") for remark in (*within.remarks, *needs(config, 8, 80).remarks)
    )


def test_what_is_proposed_fits_and_can_be_typed() -> None:
    """Wan's pictures on one GPU: packed on 24 GB, with a full fake from 80 GB on the host of many only."""
    config = resolve("wan21-t2i", QUIET)
    found = {(each.memory_gb, each.gpus): each for each in proposals(config)}
    assert {gpus for _, gpus in found} >= {1, 8, 64} and {memory for memory, _ in found} == {24, 48, 80, 141}
    for (memory, gpus), each in found.items():
        assert each.options is not None
        words = shlex.split(each.options)[1::2]
        assert needs(changed(config, dict(map(assignment, words))), gpus, memory).fits
    assert "teacher.quantise=nf4" in (found[24, 1].options or "")
    assert found[141, 64].options == "--set engine.micro_batch=1"
    big = resolve("wan22-t2v", QUIET)
    cannot = next(proposals(big))
    assert cannot.options is None and cannot.peak.name == "updates"


# The updates themselves


def test_of_more_blocks_each_lap_is_extrapolated_by_itself() -> None:
    """The optimiser's step is the least of few blocks and the most of many."""
    short, longer = {"loss": 10, "backward": 20, "step": 4}, {"loss": 11, "backward": 22, "step": 9}
    assert extrapolated(short, longer, 0) == 20
    assert extrapolated(short, longer, 10) == 54


def test_what_cannot_be_simulated_is_a_user_error() -> None:
    for recipe, changes in (("toy-1d", {}), ("nano-t2i", {"engine.offload": True})):
        with pytest.raises(UserError, match="^--simulate: "):
            simulated(resolve(recipe, changes), 2, [1])


def test_simulated_updates_stand_in_the_place_of_planned_ones() -> None:
    """By the command, of a small model with first frames on two GPUs; a bfloat16 moment is float32 for a moment."""
    arguments = ["plan", "nano-i2v", "--gpus", "2", "--memory-gb", "80", "--simulate", "--json"]
    shown = CliRunner().invoke(app, [*arguments, "--set", "plan.phases=1"])
    assert shown.stderr.splitlines()[-1].startswith("updates simulated: 2/2 in ")  # with three blocks and with four
    plan = json.loads(shown.stdout)
    found = {stage["name"]: stage["gpu"] for stage in plan["stages"]}
    assert found.keys() >= {"fake updates", "generator updates"} and "updates" not in found
    states = plan["phases"][0]["memory"]["weights"] + plan["phases"][0]["memory"]["optimiser"]
    assert all(found[name] > states for name in ("fake updates", "generator updates"))


# Warnings


def warned(gpus: int = 8, **changes: Any) -> str:
    config = resolve("wan22-t2i", {key.replace("__", "."): value for key, value in changes.items()})
    return "\n".join(advice.warnings(config, phase_plan(config, [0.875]), gpus))


def test_what_is_likely_a_mistake_is_warned_of() -> None:
    assert warned() == ""
    assert "batch_size: 64 samples cannot be shared equally by 24 GPUs: distill" in warned(24)
    assert "batch_size: 64 samples cannot be shared equally by 100 GPUs, 36 of which have none" in warned(100)
    assert "switch 0.875 is a point of the grid" in warned(plan__shift=7.0)
    assert "phase 1 crosses the teacher's switch" in warned(plan__phases=1)
    assert "no step starts in the range of network 1" in warned(plan__shift=40.0)


def test_a_sample_that_no_gpu_holds_is_warned_of() -> None:
    sizes = [{"num_frames": 1281, "height": 720, "width": 1280}]
    plan = needs(resolve("wan21-t2v-1.3b", QUIET | {"teacher.sizes": sizes, "engine.micro_batch": 1}), 8, 24)
    assert "teacher.sizes: one sample of 1281x720x1280 keeps" in plan.warnings[-1]
    assert (plan.fits, plan.options, plan.enough_gpus) == (False, None, None)


def test_sizes_off_the_strides_and_own_teachers_are_user_errors() -> None:
    sizes = [{"num_frames": 81, "height": 481, "width": 832}]
    with pytest.raises(UserError, match="nearest is 81x480x832"):
        needs(resolve("wan22-t2v", {"teacher.sizes": sizes}), 8, 80)
    with pytest.raises(UserError, match="teacher.kind: own"):
        needs(Config(recipe="mine", teacher=OwnTeacher()), 8, 80)
    with pytest.raises(UserError, match="teacher.path: nobody/none is no folder and no shipped architecture"):
        needs(resolve("wan22-t2v", {"teacher.path": "nobody/none"}), 8, 80)
    for words in (["--gpus", "8"], ["--memory-gb", "80"], ["--simulate"]):
        assert CliRunner().invoke(app, ["plan", "toy-1d", *words]).exit_code != 0
    for changes in ({"memory_gb": 0.0}, {"utilisation": 1.5}, {"tflops": -1.0}, {"gpus": 0}):
        with pytest.raises(UserError, match="--"):
            needs(resolve("toy-1d", {}), **({"gpus": 1, "memory_gb": 80.0} | changes))


# The command


def test_prompt_cache_is_bounded_by_full_prompts(tmp_path: Path) -> None:
    (tmp_path / "three.txt").write_text("a\nb\nc\n")
    plan = needs(resolve("wan22-t2v", QUIET | {"prompts": str(tmp_path / "three.txt")}), 64, 80)
    assert (plan.prompts, plan.prompt_cache) == (3, 4 * 512 * 4096 * 2)


@pytest.mark.parametrize("recipe", ["toy-1d", "nano-i2v"])
def test_the_command_prints_tables_or_json(recipe: str) -> None:
    arguments = ["plan", recipe, "--gpus", "2", "--memory-gb", "80", "--set", "iterations=7"]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0 and "Memory on each GPU" in shown.output and "fit" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["gpus"] == 2 and found["phases"][0]["memory"]["weights"] > 0
    assert found["hours"] == pytest.approx(sum(phase["iteration_seconds"] for phase in found["phases"]) * 7 / 3600)


def test_a_folder_without_weights_is_enough(folders: dict[str, Path], tmp_path: Path) -> None:
    copy_configurations(folders["wan22_t2v"], tmp_path)
    config = tiny({"wan22_t2v": tmp_path}, "wan22_t2v")
    whole = needs(tiny(folders, "wan22_t2v"), 1, 80)
    assert needs(config, 1, 80) == whole


# Previews


class OfSmallPictures:
    """A codec that decodes on tensors without data, and then gives pictures that have some."""

    def __init__(self, codec: Any) -> None:
        self.codec = codec

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(*self.codec.decode(latents).shape[:2], 2, 2, 3)


def test_a_preview_of_the_largest_clip_stays_within_what_is_stated() -> None:
    """wan22-t2v at 81 x 720 x 1280, by the sampler itself on tensors without data, of two blocks a network.

    The other 38 would only keep autocast's copies of their adapters: 2 bytes a number, .6 GB.
    """
    config = resolve("wan22-t2v", {"teacher.sizes": [{"num_frames": 81, "height": 720, "width": 1280}]})
    stated = preview_cost(config, 64).memory
    source = BareSource(config.teacher)
    model, codec = bare_model(config.teacher, 0), bare_codec(config.teacher, source)
    for network in model.networks:
        network.blocks = network.blocks[:2]  # type: ignore[index]
    system = build_system(config, model, {})
    with META:
        for phase in (1, 2):
            add_expert(system, phase, trainable=True)
    model.device, networks = torch.device("cpu"), nn.ModuleList([*model.networks, codec.vae])  # type: ignore[attr-defined]
    with FakeTensorMode(allow_non_fake_inputs=True):
        networks.to_empty(device="cpu")
    sampler = Sampler(system, OfSmallPictures(codec))
    with PeakBytes(networks) as peak:
        shown = sampler.preview(2, [{"text": torch.zeros(300, 4096, dtype=torch.bfloat16)}])
    assert shown.shape[0] == 1 and shown.shape[2:] == (2, 2, 3)
    found = peak.most + sum(p.nbytes for p in codec.vae.parameters())  # type: ignore[attr-defined]
    assert 0.9 * stated < found <= stated


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("wan21_t2v", (16, 9, 4, 6)), ("qwen_image", (16, 1, 4, 6)), ("z_image", (16, 1, 4, 6)),
        ("flux2_klein", (32, 1, 2, 3)),
    ],
)  # fmt: skip
def test_a_decode_holds_and_costs_what_a_real_one_does(
    folders: dict[str, Path], name: str, shape: tuple[int, ...]
) -> None:
    """Counted on real tensors; of nine latent frames all, where the plan runs three and four."""
    config = tiny(folders, name)
    codec: Any = load_model(config.teacher, 0)[1]
    latents = draw(2, *shape, seed=0)
    with torch.no_grad(), FlopCounterMode(display=False) as flops, PeakBytes(codec.vae) as peak:
        codec.decode(latents)
    weights, most, planned = decode_cost(config.teacher, shape, 2)
    assert most == pytest.approx(peak.most, rel=0.05) and planned == flops.get_total_flops()
    assert weights == nbytes(list(codec.vae.parameters()))


def test_a_decode_of_wan_holds_what_its_resident_memory_grew_by() -> None:
    """.50 GB a clip of 5 x 120 x 208 in float32: Wan's architecture with random weights, 1, 2 and 4 clips."""
    assert decode_cost(resolve("wan22-t2v", {}).teacher, (16, 2, 15, 26), 1)[1] == pytest.approx(0.5e9, rel=0.15)


def test_what_fits_is_the_more_of_training_and_preview(folders: dict[str, Path]) -> None:
    """A preview stands in the place of gradients and activations; without previews there is neither memory nor time."""
    config = tiny(folders, "wan21_t2v")
    plan = needs(config, 1, 80)
    for memory in (phase.memory for phase in plan.phases):
        assert memory.preview > memory.training
        assert memory.gpu == memory.weights + memory.optimiser + memory.gathered + memory.preview
    assert [phase.previews for phase in plan.phases] == [4, 4]  # of 400 iterations, every 100th
    seconds = sum(4 * phase.preview_seconds + phase.base_seconds for phase in plan.phases)
    assert plan.preview_hours == pytest.approx(seconds / 3600) and plan.phases[1].base_seconds > 0
    assert all(phase.preview_seconds > 0 for phase in plan.phases)

    tight = needs(config, 1, plan.phases[0].memory.preview / 0.92e9)
    assert not tight.fits
    assert tight.options == "--set engine.micro_batch=1"
    never = config.model_copy(update={"sample_every": None})
    assert preview_cost(never, 1).memory == 0
    quiet = advice.cheapest(config, 1, lambda config, _: config.sample_every is None)
    assert quiet is not None and advice.flags(quiet) == "--set sample_every=null"


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=4)])
def test_a_block_is_measured_behind_an_index_of_booleans(folders: dict[str, Path], lora: Lora | None) -> None:
    """Qwen-Image-2.1 puts latents into its sequence by a mask, through which gradients pass where all weights learn."""
    config = tiny(folders, "qwen_image_21")
    shape = tuple(load_model(config.teacher, 0)[0].sample_shapes[0])
    one, three = (block_bytes(config.teacher, shape, batch, lora) for batch in (1, 3))
    assert 0 < one < three


@pytest.mark.parametrize("memory_gb", [16, 24])
def test_the_recipe_for_one_card_fits_one(memory_gb: float) -> None:
    """Packed to 8 bits a weight, of 2.61 x 10^9; and on the smaller card it would fit unpacked, too."""
    plan = needs(resolve("lumina-2"), 1, memory_gb, tflops=165)
    assert plan.fits and peak(plan.stages).gpu < 8e9
    assert needs(resolve("lumina-2", {"teacher.quantise": None}), 1, 16).fits


class Data(TorchDispatchMode):
    """Notes the bytes of the largest tensor with data that is made inside."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor) and tensor.device.type == "cpu":
                self.most = max(self.most, tensor.nbytes)
        return made


@pytest.mark.parametrize("recipe", ["z-image", "lumina-2"])
def test_a_call_is_measured_without_its_data(recipe: str) -> None:
    """Z-Image pads its sequences by `pad_sequence`, whose result has data: 64 pictures took 22 GB of the host."""
    config = resolve(recipe)
    shape = bucket_shapes(config.teacher)[0]
    with Data() as data:
        call.__wrapped__(config.teacher, shape, 3, config.generator.lora)  # type: ignore[attr-defined] cached
    assert 0 < data.most < 20e6  # positions' sines and cosines; three pictures' states have 100 MB
