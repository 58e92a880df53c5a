"""What stays in memory throughout a phase: weights and optimiser, beside the layout of three whole networks."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from phased_dmd.config import Config
from phased_dmd.networks.build import add_adapters, add_expert, add_fake, build_system, load_teacher
from phased_dmd.networks.optim import Learner
from phased_dmd.networks.roles import FAKE, expert_role


def resident(config: Config) -> dict[str, Any]:
    """Bytes of the last phase, counted over distinct storages, and those of a teacher, generator and fake that are
    networks of their own, the last two trained in full by AdamW with both moments.
    """
    model, codec = load_teacher(config)
    system = build_system(config, model, codec.encode_text([config.teacher.negative_prompt])[0])
    base = bytes_of(list(_parameters(model.networks)))
    fresh, phase = add_adapters(system), system.plan.num_phases
    add_expert(system, phase, trainable=True)
    add_fake(system, phase, fresh.get(phase))
    own = [expert_role(earlier) for earlier in range(1, phase + 1)]
    adapters = bytes_of([p for role in own for p in system.roles.parameters(role).values()])
    learners = [
        Learner(own[-1], system.roles.parameters(own[-1]), config.optimiser, config.generator.lr, config.generator.ema),
        Learner(FAKE, system.roles.parameters(FAKE), config.optimiser, config.fake.lr),
    ]
    optimisers = bytes_of([t for learner in learners for name, t in learner.state().items() if "/weights/" not in name])
    fake = bytes_of(list(system.roles.parameters(FAKE).values()))
    return {
        "base": base, "experts": adapters, "fake": fake, "optimisers": optimisers,
        "in_all": base + adapters + fake + optimisers, "three_copies": 3 * base + 2 * 2 * base,
    }  # fmt: skip


def _parameters(networks: Any) -> list[Tensor]:
    return [p for network in networks for p in nn.Module.parameters(network)]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
