"""The most that training holds in tensors: networks, optimisers and averages, gradients, and what backward needs."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from resident import bytes_of
from torch import Tensor

from phased_dmd.conditions import Conditions
from phased_dmd.config import Config
from phased_dmd.engine.world import split_batch
from phased_dmd.lab.reproduce.memory_study import SavedBytes
from phased_dmd.networks.build import add_adapters, add_expert, add_fake, build_system, load_teacher
from phased_dmd.networks.optim import Learner
from phased_dmd.networks.roles import FAKE, expert_role
from phased_dmd.prompts import read_prompts
from phased_dmd.step import EXPERT_UPDATE, draw, expert_loss, fake_loss


class Peak(NamedTuple):
    """Bytes: held throughout, networks, optimisers and averages; and of the largest update its gradients, and what
    autograd saves for it.
    """

    resident: int
    gradients: int
    saved: int

    @property
    def in_all(self) -> int:
        return sum(self)


class Update(NamedTuple):
    """An update of one network: its trained parameters, and what makes its forwards and its backward."""

    trained: Sequence[Tensor]
    backward: Callable[[], None]


def largest(updates: Iterable[Update], resident: Iterable[Tensor]) -> Peak:
    """Makes the updates' backwards, and returns the peak of the largest; resident: all tensors that stay."""
    kept, peaks = list(resident), []
    for trained, backward in updates:
        saved = SavedBytes(kept)
        with saved:
            backward()
        gradients = [p.grad for p in trained if p.grad is not None]
        peaks.append(Peak(bytes_of(kept), bytes_of(gradients), saved.total))
        for p in trained:
            p.grad = None
    return max(peaks, key=lambda peak: peak.in_all)


def peak(config: Config) -> Peak:
    """Measures the last phase of a run of ours, whose experts are the most."""
    model, codec = load_teacher(config)
    with TemporaryDirectory() as folder:
        conditions = None
        if config.prompts is not None:
            prompts = read_prompts(config.prompts)
            conditions = Conditions(codec, prompts, config.teacher.negative_prompt, Path(folder))
        system = build_system(config, model, conditions.negative if conditions else {})
        fresh, phase, roles = add_adapters(system), system.plan.num_phases, system.roles
        for each in range(1, phase + 1):
            add_expert(system, each, trainable=each == phase)
        add_fake(system, phase, fresh.get(phase))
        role, samples = expert_role(phase), split_batch(config.batch_size, config.engine)[0][0]
        learners = [
            Learner(role, roles.parameters(role), config.optimiser, config.generator.lr, config.generator.ema),
            Learner(FAKE, roles.parameters(FAKE), config.optimiser, config.fake.lr),
        ]

        def backward(role: str) -> None:
            number, loss_of = (1, fake_loss) if role == FAKE else (EXPERT_UPDATE, expert_loss)
            with roles.active(role):
                loss_of(draw(system, phase, 0, number, samples, [1.0], conditions), {})[0].backward()

        names = [expert_role(each) for each in range(1, phase + 1)] + [FAKE]
        networks = [t for n in (*model.networks, *model.students) for t in (*n.parameters(), *n.buffers())]
        return largest(
            [Update([*roles.parameters(each).values()], partial(backward, each)) for each in (role, FAKE)],
            [
                *networks,
                *(p for name in names for p in roles.parameters(name).values()),
                *(t for learner in learners for t in learner.state().values()),
            ],
        )  # fmt: skip
