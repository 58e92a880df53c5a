"""Simulates updates: the training loop itself, on tensors without data, in a process of its own.

`train_step` runs under FSDP2, over a group whose other processes do nothing, on the real shapes. The tensors say that
they are on a CPU, so that no device and no compiler is needed; where autocast on CUDA chooses otherwise it is made to.
Networks have a few blocks, and then one more: what each further one takes is the difference.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives  # what collectives do to tensors without data
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the group that does nothing, too
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)
from torch.utils._pytree import tree_leaves, tree_map_only

from phased_dmd import step, train
from phased_dmd.config import Anchor, Config
from phased_dmd.config.overrides import build
from phased_dmd.config.teacher import PipelineTeacher
from phased_dmd.engine import collectives, world
from phased_dmd.errors import UserError
from phased_dmd.models.loader import adapter_of, bare_model
from phased_dmd.networks import students
from phased_dmd.networks.build import add_adapters, add_expert, build_system
from phased_dmd.networks.optim import Learner
from phased_dmd.plan.measure import (
    bucket_shapes,
    condition_shapes,
    largest,
    longest_list,
    meta_model,
    with_numbers,
)
from phased_dmd.progress import progress

aten = torch.ops.aten
SMALL = 2**16  # numbers of a tensor of the host's, which has values: draws, times, masks
UPDATES = {"fake": (1, step.fake_loss), "expert": (step.EXPERT_UPDATE, step.expert_loss)}
LAPS = ("loss", "backward", "step")  # of an update; each has a most of its own, which grows linearly with the blocks
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


class Watch(TorchDispatchMode):
    """Counts the bytes of the tensors without data, each storage once: those there `now`, and the most in each lap.

    Tensors with data are the host's, and computed as they are while they are small.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.laps: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def begin(self) -> None:
        """Counts anew, from what is there."""
        self.peak, self.laps = self.now, {}

    def lap(self, name: str) -> None:
        """Ends a lap: `name` has what was the most since the one before, or an earlier lap's of that name."""
        self.laps[name], self.peak = max(self.laps.get(name, 0), self.peak), self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it is asked again for the shards
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self.is_hosts(func, args, kwargs, given):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return self.run(func, args, kwargs, given)

    def is_hosts(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> bool:
        """Says whether an operation is the host's own, or one on outlines, whose parameters are on the meta device."""
        if any(isinstance(value, FakeTensor) for value in given):
            return False
        target = kwargs.get("device")
        if (target is not None and torch.device(target).type == "meta") or any(value.is_meta for value in given):
            return target is None or torch.device(target).type == "meta"
        made = torch.Size(args[0]).numel() if args and isinstance(args[0], list | tuple) and not given else 0
        without_values = func in (aten.empty.memory_format, aten.empty_strided.default)  # to gather what others have
        return not without_values and max([made, *(value.numel() for value in given)]) <= SMALL

    def run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """Runs an operation of the device's; a number that the host would read is 1."""
        if func is aten._local_scalar_dense.default:
            return 1
        made = func(*with_numbers(func, args), **kwargs)
        for tensor in tree_leaves(made):
            if isinstance(tensor, FakeTensor) and not tensor.is_meta:
                self.hold(tensor)
        return made

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            weakref.finalize(storage, self._freed, storage._cdata)
            self.resized(storage)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Is told that a storage has another size; FSDP gives memory back by a size of 0."""
        if storage._cdata in self._sizes:
            self.now += storage.nbytes() - self._sizes[storage._cdata]
            self._sizes[storage._cdata] = storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def pretend() -> None:
    """Has torch, and this process for good, tell a `Watch` of sizes, and do without the other processes' answers."""
    resize, infer = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached
    copied = students.copy.deepcopy

    def resized(storage: torch.UntypedStorage, size: int) -> None:
        resize(storage, size)
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, Watch):
                mode.resized(storage)

    def infer_apart(*args: Any) -> Any:
        with _disable_current_modes():  # FSDP asks for the shapes of whole tensors, which are never there
            return infer(*args)

    def deepcopy(value: Any, *more: Any) -> Any:
        with unset_fake_temporarily():  # an outline has parameters on the meta device, which cannot be copied inside
            return copied(value, *more)

    torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign]
    ShardingPropagator._propagate_tensor_meta_non_cached = infer_apart  # type: ignore[method-assign]
    students.copy = SimpleNamespace(deepcopy=deepcopy)  # type: ignore[assignment]
    collectives.run_on_all_ranks = lambda action: [action()]  # this is the first, and the others answer nothing


def choose_as_cuda() -> None:
    """Has autocast on a CPU run the norms in float32, as it does on CUDA, and diffusers find a device to share."""
    torch.accelerator.device_count = lambda: 1

    def in_float32(norm: Any) -> Any:
        def chosen(*args: Any, **more: Any) -> Any:
            if torch.is_autocast_enabled("cpu"):
                args, more = tree_map_only(Tensor, Tensor.float, (args, more))
            return norm(*args, **more)

        return chosen

    functions = torch.nn.functional
    functions.rms_norm, functions.layer_norm = in_float32(functions.rms_norm), in_float32(functions.layer_norm)


@contextmanager
def group(gpus: int) -> Iterator[None]:
    """Is the first of some processes, each with a GPU, whose collectives do nothing."""
    if gpus == 1:
        yield
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    try:
        yield
    finally:
        world.mesh.cache_clear()
        world.sequence_mesh.cache_clear()
        dist.destroy_process_group()


def short_model(config: Config, blocks: int | None) -> Any:
    """Builds the teacher without weights, its networks with so many blocks in their longest list, or all."""
    model: Any = bare_model(config.teacher, config.seed)
    for network in model.networks:  # made here, on the meta device: later the model is told to be elsewhere
        whole = longest_list(model.blocks(network), network)
        name = next(name for name, child in network.named_children() if child is whole)
        setattr(network, name, whole[:blocks])
    return model


@contextmanager
def begun(config: Config, phase: int, gpus: int, blocks: int | None, watch: Watch) -> Iterator[tuple[Any, Any, Any]]:
    """Begins a phase as the first of some processes; gives the job, and who learns: the expert and the fake.

    Of the config's sizes the first is used, with prompts of the most tokens. blocks: how many each network has; None
    leaves them all.
    """
    teacher: Any = config.teacher
    shapes = condition_shapes(teacher, bucket_shapes(teacher)[0])
    row = {
        name: torch.zeros(shape, dtype=torch.float32 if name == "image" else getattr(torch, teacher.dtype))
        for name, shape in shapes.items()
    }
    conditions = SimpleNamespace(eligible=lambda bucket: range(1), row=lambda index, bucket: row)
    model = short_model(config, blocks)
    with group(gpus):
        if gpus > 1:  # they read numbers, which is not possible inside
            world.mesh(config.engine.replicas)
            world.sequence_mesh(config.engine.sequence_parallel)
        model.device = world.device()
        system = build_system(config, model, {"text": row["text"]})
        fresh = add_adapters(system)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fresh = {k: {n: torch.empty_like(t, device="cpu") for n, t in own.items()} for k, own in fresh.items()}
            with watch:
                system.roles.shard(config.engine)
                job: Any = SimpleNamespace(
                    system=system, fresh_fakes=fresh, conditions=conditions, odds=[1.0], pool=None, rank=0,
                    micro_batches=world.split_batch(config.batch_size, config.engine),
                    signals=SimpleNamespace(asked=lambda: 0),
                    run=SimpleNamespace(expert_path=lambda _: Path("none/such")),
                )  # fmt: skip
                for earlier in range(1, phase):
                    add_expert(system, earlier, trainable=False)
                learners = train.begin(job, phase)
                assert learners is not None
                yield job, *learners


def run_update(job: Any, phase: int, name: str, expert: Learner, fake: Learner, watch: Watch) -> None:
    """Makes an update of the fake or of the expert, whose laps `watch` counts."""
    learner, (update, loss_of) = {"fake": fake, "expert": expert}[name], UPDATES[name]

    def loss_lap(batch: Any, states: Any) -> step.Loss:
        loss = loss_of(batch, states)
        watch.lap("loss")
        return loss

    watch.begin()
    hook = learner.optimiser.register_step_pre_hook(lambda *_: watch.lap("backward"))
    train.train_step(job, train.Position(phase), update, learner, loss_lap, {}, expert.state() | fake.state())
    watch.lap("step")
    hook.remove()


def run_case(case: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the most bytes of every lap of both updates. case: config, phase, gpus, blocks."""
    watch, phase = Watch(), case["phase"]
    with begun(build(case["config"]), phase, case["gpus"], case["blocks"], watch) as (job, expert, fake):
        found = {}
        for name in UPDATES:
            run_update(job, phase, name, expert, fake, watch)
            found[name] = watch.laps
        return found


def main() -> None:
    """Runs cases, each a line of JSON on stdin; each becomes a line of what was found, or of the error."""
    warnings.simplefilter("ignore")
    pretend()
    choose_as_cuda()
    # A rollout without gradient holds less than the call with one that follows it.
    step.roll_out = lambda batch, hops, states: batch.system.start(batch.first_noise())
    for line in sys.stdin:
        try:
            found = run_case(json.loads(line))
        except Exception as error:  # whatever it is, it is what the case came to
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), flush=True)


class Peaks(NamedTuple):
    """The most bytes on each GPU in an update of the fake, and in one of the generator."""

    fake: int
    generator: int


def simulated(config: Config, gpus: int, phases: Sequence[int]) -> list[Peaks]:
    """Simulates the updates of phases, none of them anchored. Raises UserError for what a simulation does not know."""
    if config.engine.offload or getattr(config.teacher, "quantise", None):
        raise UserError("--simulate: neither engine.offload nor teacher.quantise can be simulated")
    teacher = config.teacher
    if not isinstance(teacher, PipelineTeacher):
        raise UserError(f"--simulate: knows the networks of pipelines alone, and teacher.kind is {teacher.kind}")
    one_size = teacher.model_copy(update={"sizes": (teacher.sizes[largest(bucket_shapes(teacher))],)})
    engine = config.engine.model_copy(update={"compile": False})
    rollouts = config.rollouts.model_copy(update={"start": "experts"})  # whose calls are no part of what is simulated
    changes = {"teacher": one_size, "engine": engine, "init_experts": None, "anchor": Anchor(), "rollouts": rollouts}
    network, few = meta_model(teacher).networks[0], adapter_of(teacher).alike
    count = len(longest_list(meta_model(teacher).blocks(network), network))
    lengths = (few, few + 1) if count > few + 1 else (None, None)
    case = {"config": config.model_copy(update=changes).model_dump(mode="json"), "gpus": gpus}
    answers = _ask([case | {"phase": phase, "blocks": length} for phase in phases for length in lengths])
    pairs, rest = zip(answers[::2], answers[1::2], strict=True), max(0, count - few)
    return [Peaks(*(extrapolated(short[name], longer[name], rest) for name in UPDATES)) for short, longer in pairs]


def extrapolated(short: Mapping[str, int], longer: Mapping[str, int], rest: int) -> int:
    """Returns the most of all laps with `rest` more blocks than the short network has; the longer one has one more."""
    return max(short[lap] + rest * (longer[lap] - short[lap]) for lap in LAPS)


def _ask(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Has another process run the cases: it sees no GPU, is none of torchrun's, and is patched for good."""
    environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
    command = [sys.executable, "-c", "from phased_dmd.plan.simulate import main; main()"]
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said, progress("updates simulated", len(cases)) as show:
        with subprocess.Popen(
            command, encoding="utf-8", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
            env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        ) as worker:  # fmt: skip
            assert worker.stdin is not None and worker.stdout is not None
            with suppress(BrokenPipeError), worker.stdin:
                worker.stdin.write("\n".join(map(json.dumps, cases)))
            for line in worker.stdout:
                answers.append(json.loads(line))
                show(len(answers))
        if len(answers) < len(cases):
            said.seek(0)
            raise UserError(f"--simulate: its process ended with {worker.returncode}: {said.read().strip()[-200:]}")
    if error := next((answer["error"] for answer in answers if "error" in answer), None):
        raise UserError(f"--simulate: {error}")
    return answers
