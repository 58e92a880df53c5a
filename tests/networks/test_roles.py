"""Roles on shared networks: the silent traps of LoRA adapters, and that `Roles` keeps out of each.

Trap: what stands between an expert's forward and its backward (the table is that of peft's behaviour, measured). The
truth is the gradient of the same network without peft: its weights W + (alpha / rank) B A, differentiated in A and B.
"""

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import TEXT_DIM, TinyWan, draw
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointError

from phased_dmd.checkpoint import RunFolder
from phased_dmd.config import Lora
from phased_dmd.engine.world import device
from phased_dmd.errors import UserError
from phased_dmd.networks.build import build_system
from phased_dmd.networks.optim import MomentumFreeAdamW
from phased_dmd.networks.roles import FAKE, TEACHER, Roles, expert_role, route
from phased_dmd.recipes import resolve
from phased_dmd.sampling.initial import initial_expert
from phased_dmd.train import expert_header

LORA = Lora(rank=3, alpha=6)
ONE, TWO = expert_role(1), expert_role(2)
T = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64, device=device())
X, PROBE = (draw(3, *TinyWan.sample_shapes[0], seed=seed, dtype=torch.float64).to(device()) for seed in (1, 2))
CONDITION = {"text": draw(3, 5, TEXT_DIM, seed=3, dtype=torch.float64).to(device())}
OFF_ON = pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
FAKES = pytest.mark.parametrize("fake_lora", [None, LORA], ids=["full fake", "lora fake"])


@pytest.fixture(scope="module")
def untouched() -> nn.Module:
    """The teacher's network as it is before anything is done to it; never used with peft."""
    return TinyWan().networks[0].double()


def double_wan(networks: int = 1, checkpointing: bool = False) -> TinyWan:
    model = TinyWan(networks)
    for network in model.networks:
        network.double()
        if checkpointing:
            network.enable_gradient_checkpointing()
    return model


def direct(module: nn.Module) -> Tensor:
    return module(X, T * 1000, CONDITION["text"], return_dict=False)[0]


def predict(roles: Roles, role: str, network: int = 0) -> Tensor:
    return roles.predict(role, network, X, T, CONDITION)


@torch.no_grad()
def randomise(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """As if trained: while B is zero, nothing depends on A."""
    for i, p in enumerate(parameters.values()):
        p.copy_(0.2 * draw(*p.shape, seed=seed + i, dtype=torch.float64))


def bare_names(parameters: dict[str, nn.Parameter], role: str) -> dict[str, nn.Parameter]:
    return {"0." + name.replace(f".{role}.", "."): p for name, p in parameters.items()}


def reference_gradients(base: nn.Module, expert: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of sum(PROBE * network(X)) with merged weights, in A and B; no peft, no switching."""
    lora = {name: p.detach().clone().requires_grad_() for name, p in expert.items()}
    weights = dict(base.named_parameters())
    for name in [name for name in lora if "lora_A" in name]:
        target = name.removeprefix("0.").replace("lora_A.weight", "weight")
        weights[target] = (
            weights[target] + (LORA.alpha / LORA.rank) * lora[name.replace("lora_A", "lora_B")] @ lora[name]
        )
    out = functional_call(base, weights, (X, T * 1000, CONDITION["text"]), {"return_dict": False})[0]
    return dict(zip(lora, torch.autograd.grad((out * PROBE).sum(), list(lora.values())), strict=True))


def relative_error(parameters: dict[str, nn.Parameter], truth: dict[str, Tensor]) -> float:
    assert parameters.keys() == truth.keys()
    found = torch.cat([p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in parameters.values()])
    expected = torch.cat([truth[name].flatten() for name in parameters])
    return float((found - expected).norm() / expected.norm())


# ---------------------------------------------------------------- the traps, with peft alone


@OFF_ON
@pytest.mark.parametrize("trap", ["nothing", "left", "back", "disabled", "thawed"])
def test_what_peft_alone_does(trap: str, checkpointing: bool, untouched: nn.Module) -> None:
    """Every row of the table of traps; should a new peft behave otherwise, `Roles` may become simpler."""
    network = double_wan(checkpointing=checkpointing).networks[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (FAKE, ONE):
            config = LoraConfig(r=LORA.rank, lora_alpha=LORA.alpha, target_modules=list(TinyWan.lora_targets))
            network.add_adapter(config, adapter_name=name)
    own = {role: {n: p for n, p in network.named_parameters() if f".{role}." in n} for role in (FAKE, ONE)}
    randomise(own[FAKE], 100)
    randomise(own[ONE], 200)
    expert = bare_names(own[ONE], ONE)
    network.set_adapter(ONE)
    loss = (direct(network) * PROBE).sum()
    if trap in ("left", "back", "thawed"):
        network.set_adapter(FAKE)
    if trap == "back":
        network.set_adapter(ONE)
    if trap == "disabled":
        network.disable_adapters()
    if trap == "thawed":
        for p in expert.values():
            p.requires_grad_()
    if trap == "disabled" and checkpointing:
        with pytest.raises(CheckpointError):
            loss.backward()
        return
    loss.backward()
    if trap in ("left", "disabled"):
        assert all(p.grad is None for p in expert.values())  # and no error
    elif trap == "thawed" and checkpointing:
        assert relative_error(expert, reference_gradients(untouched, expert)) > 0.5  # wrong, and no error
    else:
        assert relative_error(expert, reference_gradients(untouched, expert)) < 1e-6


def test_peft_alone_thaws_what_it_activates() -> None:
    network = double_wan().networks[0]
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=ONE)
    network.requires_grad_(False)
    network.set_adapter(ONE)
    assert all(p.requires_grad for name, p in network.named_parameters() if f".{ONE}." in name)


# ---------------------------------------------------------------- the same through Roles


def enter_and_raise(roles: Roles) -> None:
    with pytest.raises(ZeroDivisionError), roles.active(FAKE):
        raise ZeroDivisionError


def thaw_inside(roles: Roles) -> None:
    with roles.active(FAKE):
        for p in roles.parameters(ONE).values():
            p.requires_grad_()
        predict(roles, FAKE)


def add_and_remove(roles: Roles) -> None:
    roles.add(TWO, [0], LORA, seed=9)
    predict(roles, TWO)
    roles.remove(TWO)


BETWEEN: dict[str, Callable[[Roles], object]] = {
    "nothing": lambda roles: None,
    "left by an error": enter_and_raise,
    "fake and back": lambda roles: predict(roles, FAKE),
    "teacher and back": lambda roles: predict(roles, TEACHER),
    "thawed inside": thaw_inside,
    "role added and removed": add_and_remove,
}


@OFF_ON
@FAKES
@pytest.mark.parametrize("between", BETWEEN)
def test_gradients_are_right_through_roles(
    between: str, fake_lora: Lora | None, checkpointing: bool, untouched: nn.Module
) -> None:
    roles = Roles(double_wan(checkpointing=checkpointing))
    roles.add(FAKE, [0], fake_lora, seed=1)
    roles.add(ONE, [0], LORA, seed=2)
    randomise(roles.parameters(FAKE), 100)
    randomise(roles.parameters(ONE), 200)
    with roles.active(ONE):
        loss = (predict(roles, ONE) * PROBE).sum()
        with torch.no_grad():
            BETWEEN[between](roles)
        loss.backward()
    assert relative_error(roles.parameters(ONE), reference_gradients(untouched, roles.parameters(ONE))) < 1e-6
    assert all(p.grad is None for p in roles.parameters(FAKE).values())
    assert all(p.grad is None for name, p in roles.model.networks[0].named_parameters() if "lora_" not in name)


@OFF_ON
def test_a_lora_fakes_gradients_are_right(checkpointing: bool, untouched: nn.Module) -> None:
    """The fake's turn: the expert's rollout and the teacher are called while the fake is in training."""
    roles = Roles(double_wan(checkpointing=checkpointing))
    for seed, role in enumerate((ONE, FAKE)):
        roles.add(role, [0], LORA, seed)
        randomise(roles.parameters(role), 100 * seed)
    with roles.active(FAKE):
        loss = (predict(roles, FAKE) * PROBE).sum()
        with torch.no_grad():
            predict(roles, ONE)
            predict(roles, TEACHER)
        loss.backward()
    assert relative_error(roles.parameters(FAKE), reference_gradients(untouched, roles.parameters(FAKE))) < 1e-6
    assert all(p.grad is None for p in roles.parameters(ONE).values())


@OFF_ON
def test_a_backward_outside_its_role_is_right_or_noticed(checkpointing: bool, untouched: nn.Module) -> None:
    """What trains does not change with the role that is on; recomputed blocks find that they are not what they were."""
    roles = Roles(double_wan(checkpointing=checkpointing))
    roles.add(ONE, [0], LORA, seed=2)
    randomise(roles.parameters(ONE), 200)
    loss = (predict(roles, ONE) * PROBE).sum()
    if checkpointing:
        with pytest.raises(CheckpointError):
            loss.backward()
    else:
        loss.backward()
        truth = reference_gradients(untouched, roles.parameters(ONE))
        assert relative_error(roles.parameters(ONE), truth) < 1e-6


# ---------------------------------------------------------------- what a role computes


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_a_new_role_computes_exactly_the_teacher(lora: Lora | None, untouched: nn.Module) -> None:
    roles = Roles(double_wan())
    roles.add(FAKE, [0], LORA, seed=1)
    randomise(roles.parameters(FAKE), 100)
    with roles.active(FAKE):  # whatever is on while the role is made
        roles.add(ONE, [0], lora, seed=2)
        assert not torch.equal(direct(roles.module(FAKE, 0)), direct(untouched))
    assert torch.equal(predict(roles, ONE), direct(untouched))
    randomise(roles.parameters(ONE), 300)
    assert not torch.equal(predict(roles, ONE), direct(untouched))


def test_a_copy_holds_no_adapters_and_shares_nothing(untouched: nn.Module) -> None:
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=1)
    roles.add(FAKE, [0], None, seed=2)
    fake, base = roles.module(FAKE, 0), roles.model.networks[0]
    assert not any(isinstance(module, BaseTunerLayer) for module in fake.modules())
    assert [name for name, _ in fake.named_parameters()] == [name for name, _ in untouched.named_parameters()]
    assert {p.data_ptr() for p in fake.parameters()}.isdisjoint(p.data_ptr() for p in base.parameters())
    assert all(p.requires_grad for p in fake.parameters())
    assert not any(p.requires_grad for name, p in base.named_parameters() if "lora_" not in name)


@FAKES
def test_the_teacher_stays_bit_identical(fake_lora: Lora | None, untouched: nn.Module) -> None:
    roles, truth = Roles(double_wan()), direct(untouched)
    assert torch.equal(predict(roles, TEACHER), truth)
    roles.add(ONE, [0], LORA, seed=1)
    roles.add(FAKE, [0], fake_lora, seed=2)
    for role in (ONE, FAKE):
        optimiser = MomentumFreeAdamW(roles.parameters(role).values(), lr=0.1)
        for _ in range(3):
            with roles.active(role):
                (predict(roles, role) * PROBE).sum().backward()
                assert torch.equal(predict(roles, TEACHER), truth)
            optimiser.step()
        assert (predict(roles, role) - truth).abs().max() > 0.1
    assert torch.equal(predict(roles, TEACHER), truth)
    roles.freeze(ONE)
    roles.remove(FAKE)
    assert torch.equal(predict(roles, TEACHER), truth)
    roles.remove(ONE)
    assert torch.equal(predict(roles, TEACHER), truth)
    kept = dict(roles.model.networks[0].named_parameters())
    assert not any("lora_" in name for name in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept.values(), untouched.parameters(), strict=True))


@FAKES
def test_a_fake_added_again_starts_afresh(fake_lora: Lora | None, untouched: nn.Module) -> None:
    """Phase onset. The same seed gives the first state bit for bit, another seed another A; B is zero."""
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=7)
    roles.add(FAKE, [0], fake_lora, seed=1)
    first = roles.state(FAKE)
    with roles.active(FAKE):
        (predict(roles, FAKE) * PROBE).sum().backward()
    MomentumFreeAdamW(roles.parameters(FAKE).values(), lr=0.1).step()
    assert not torch.equal(predict(roles, FAKE), direct(untouched))
    roles.remove(FAKE)
    with pytest.raises(KeyError):
        predict(roles, FAKE)
    roles.add(FAKE, [0], fake_lora, seed=1)
    again = roles.state(FAKE)
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert torch.equal(predict(roles, FAKE), direct(untouched))
    assert all(p.grad is None for p in roles.parameters(FAKE).values())
    if fake_lora is None:
        return
    assert all(not t.any() for name, t in again.items() if "lora_B" in name)
    roles.remove(FAKE)
    roles.add(FAKE, [0], fake_lora, seed=2)
    other = roles.state(FAKE)
    assert all(not torch.equal(other[name], first[name]) for name in first if "lora_A" in name)


def test_adding_roles_leaves_the_global_generator_alone() -> None:
    roles = Roles(double_wan())
    before = torch.get_rng_state()
    roles.add(ONE, [0], LORA, seed=1)
    roles.add(FAKE, [0], None, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- which role is on


def test_active_restores_the_former_role(untouched: nn.Module) -> None:
    roles = Roles(double_wan())
    base = roles.model.networks[0]
    for seed, role in enumerate((FAKE, ONE, TWO)):
        roles.add(role, [0], LORA, seed)
        randomise(roles.parameters(role), 100 * seed)
    outputs = {role: predict(roles, role) for role in (TEACHER, FAKE, ONE, TWO)}
    assert len({out.sum().item() for out in outputs.values()}) == 4
    with roles.active(ONE):
        with roles.active(TEACHER):
            assert torch.equal(direct(base), outputs[TEACHER])
            with roles.active(TWO):
                assert torch.equal(direct(base), outputs[TWO])
            assert torch.equal(direct(base), outputs[TEACHER])
        assert torch.equal(direct(base), outputs[ONE])
        with pytest.raises(ZeroDivisionError), roles.active(FAKE), roles.active(TWO):
            raise ZeroDivisionError
        assert torch.equal(direct(base), outputs[ONE])
        with pytest.raises(RuntimeError):  # the network itself fails, on a text of the wrong width
            roles.predict(FAKE, 0, X, T, {"text": CONDITION["text"][..., :-1]})
        assert torch.equal(direct(base), outputs[ONE])
        assert all(p.requires_grad for p in roles.parameters(ONE).values())
    assert torch.equal(direct(base), direct(untouched))


def test_an_active_role_cannot_be_removed() -> None:
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=1)
    randomise(roles.parameters(ONE), 100)
    before = predict(roles, ONE)
    with roles.active(ONE), pytest.raises(RuntimeError, match="active"):
        roles.remove(ONE)
    assert torch.equal(predict(roles, ONE), before)


def test_an_unknown_role_or_network_is_an_error() -> None:
    roles = Roles(double_wan(networks=2))
    roles.add(ONE, [0], LORA, seed=1)
    randomise(roles.parameters(ONE), 100)
    with pytest.raises(KeyError, match=f"no {ONE} on network 1"):
        predict(roles, ONE, 1)
    before = predict(roles, ONE)
    assert not torch.equal(before, predict(roles, TEACHER))
    for role in (TWO, FAKE, "phase_", ""):
        with pytest.raises(KeyError, match=f"there is no role {role}"):
            predict(roles, role)
        with roles.active(ONE):
            with pytest.raises(KeyError, match=f"there is no role {role}"), roles.active(role):
                raise AssertionError("an unknown role must not become active")
            assert torch.equal(direct(roles.module(ONE, 0)), before)  # ONE is on still
    roles.remove(ONE)
    with pytest.raises(KeyError, match=f"there is no role {ONE}"), roles.active(ONE):
        raise AssertionError("a removed role must not become active")
    with roles.active(TEACHER):  # the teacher always may
        pass


def test_a_role_starts_with_another_seed_on_each_network() -> None:
    """No two networks, and no two roles, of one run share their A."""
    roles = Roles(double_wan(networks=2))
    roles.add(ONE, [0, 1], LORA, seed=7)
    roles.add(TWO, [0, 1], LORA, seed=7)
    state, other = roles.state(ONE), roles.state(TWO)
    first = {name.removeprefix("0."): t for name, t in state.items() if name.startswith("0.") and "lora_A" in name}
    assert first and all(not torch.equal(tensor, state[f"1.{name}"]) for name, tensor in first.items())
    assert all(
        not torch.equal(other[f"{k}.{name}"], state[f"{n}.{name}"]) for name in first for k in (0, 1) for n in (0, 1)
    )


def test_rollouts_never_thaw_a_frozen_expert() -> None:
    """A forward and a backward of phase 2 through the frozen phase 1, gradient mode on throughout."""
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=1)
    randomise(roles.parameters(ONE), 100)
    roles.freeze(ONE)
    roles.add(TWO, [0], LORA, seed=2)
    roles.add(FAKE, [0], LORA, seed=3)
    before = roles.state(ONE)
    optimiser = MomentumFreeAdamW(roles.parameters(TWO).values(), lr=0.1)
    for _ in range(3):
        with roles.active(TWO):
            with roles.active(ONE):
                x = direct(roles.module(ONE, 0))
                assert not x.requires_grad and not any(p.requires_grad for p in roles.parameters(ONE).values())
            assert not any(p.requires_grad for p in roles.parameters(ONE).values())
            out = roles.predict(TWO, 0, X - 0.5 * x, T / 2, CONDITION)
            predict(roles, FAKE)
            (out * PROBE).sum().backward()
        assert all(p.grad is None for p in roles.parameters(ONE).values())
        optimiser.step()
        optimiser.zero_grad()
    after = roles.state(ONE)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(p.abs().max() > 0.1 for name, p in roles.parameters(TWO).items() if "lora_B" in name)  # it did train


def test_freezing_drops_a_gradient_already_there() -> None:
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=1)
    with roles.active(ONE):
        (predict(roles, ONE) * PROBE).sum().backward()
    assert all(p.grad is not None for p in roles.parameters(ONE).values())
    roles.freeze(ONE)
    assert all(p.grad is None and not p.requires_grad for p in roles.parameters(ONE).values())


# ---------------------------------------------------------------- parameters, states, files


def test_parameters_are_collected_by_name(untouched: nn.Module) -> None:
    """One A and one B for every adapted layer, whichever role is on: `requires_grad` would find none with them off."""
    targets = [
        name for name, module in untouched.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(TinyWan.lora_targets)
    ]  # fmt: skip
    expected = {f"0.{name}.lora_{ab}.weight" for name in targets for ab in "AB"}
    roles, ten = Roles(double_wan()), expert_role(10)
    for seed, role in enumerate((FAKE, ONE, ten)):
        roles.add(role, [0], LORA, seed)
    roles.freeze(ten)
    for on in (TEACHER, ONE, FAKE):
        with roles.active(on):
            for role in (FAKE, ONE, ten):
                assert set(roles.parameters(role)) == expected
    owned = [{id(p) for p in roles.parameters(role).values()} for role in (FAKE, ONE, ten)]
    assert len(set.union(*owned)) == sum(len(ids) for ids in owned) == 3 * len(expected)
    adapters = {id(p) for name, p in roles.model.networks[0].named_parameters() if "lora_" in name}
    assert set.union(*owned) == adapters
    assert roles.parameters(TEACHER) == {}


def test_parameters_of_two_networks_and_two_kinds_are_disjoint() -> None:
    roles = Roles(double_wan(networks=2))
    roles.add(ONE, [0], LORA, seed=1)
    roles.add(TWO, [0, 1], LORA, seed=2)
    roles.add(FAKE, [0, 1], None, seed=3)
    owned = [{id(p) for p in roles.parameters(role).values()} for role in (ONE, TWO, FAKE)]
    base = {id(p) for network in roles.model.networks for name, p in network.named_parameters() if "lora_" not in name}
    assert len(set.union(base, *owned)) == len(base) + sum(len(ids) for ids in owned)
    assert len(owned[1]) == 2 * len(owned[0]) and len(owned[2]) == len(base)


def test_a_role_touches_only_its_own_networks() -> None:
    """Expert 1 on network 0, expert 2 on network 1: with either on, the other network is the plain teacher."""
    model = double_wan(networks=2)
    plain = [copy.deepcopy(network) for network in model.networks]
    roles = Roles(model)
    for network, role in enumerate((ONE, TWO)):
        roles.add(role, [network], LORA, seed=network)
        randomise(roles.parameters(role), 100 * network)
    for network, role in enumerate((ONE, TWO)):
        other = 1 - network
        with roles.active(role):
            assert not torch.equal(direct(model.networks[network]), direct(plain[network]))
            assert torch.equal(direct(model.networks[other]), direct(plain[other]))


def test_state_and_load_carry_a_role_over() -> None:
    """state is a copy: later training leaves it alone. load in another process's roles computes the same."""
    roles, others = Roles(double_wan()), Roles(double_wan())
    for seed, r in enumerate((roles, others)):
        r.add(ONE, [0], LORA, seed)
    randomise(roles.parameters(ONE), 100)
    out, state = predict(roles, ONE), roles.state(ONE)
    randomise(roles.parameters(ONE), 200)
    others.load(ONE, state)
    assert torch.equal(predict(others, ONE), out)
    assert not torch.equal(predict(roles, ONE), out)


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_load_refuses_missing_and_surplus_names(lora: Lora | None) -> None:
    roles = Roles(double_wan())
    roles.add(ONE, [0], lora, seed=1)
    before = roles.state(ONE)
    changed = {name: tensor + 1 for name, tensor in before.items()}
    first = next(iter(changed))
    missing = {name: tensor for name, tensor in changed.items() if name != first}
    surplus = {**changed, "0.blocks.9.nowhere": torch.zeros(1)}
    for tensors, odd in ((missing, first), (surplus, "0.blocks.9.nowhere"), ({}, min(changed))):
        with pytest.raises(KeyError, match=odd.replace(".", r"\.")):
            roles.load(ONE, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in roles.state(ONE).items())


def test_load_refuses_another_shape() -> None:
    """Else copy_ would broadcast, and an adapter of rank 1 fill one of rank 3."""
    roles = Roles(double_wan())
    roles.add(ONE, [0], LORA, seed=1)
    before = roles.state(ONE)
    rank_one = {name: 2 * (t[:1] if "lora_A" in name else t[:, :1]) for name, t in before.items()}
    with pytest.raises(KeyError, match=r"lora_A\.weight is \(1, 24\), not \(3, 24\)"):
        roles.load(ONE, rank_one)
    assert all(torch.equal(tensor, before[name]) for name, tensor in roles.state(ONE).items())


# ---------------------------------------------------------------- two networks


@pytest.mark.parametrize("owners", [[0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]])
def test_route_equals_a_call_a_sample(owners: list[int]) -> None:
    networks = double_wan(networks=2).networks
    seen = []

    def batch_call(network: int, x: Tensor, t: Tensor, condition: dict[str, Tensor]) -> Tensor:
        seen.append((network, len(x)))
        return networks[network](x, t * 1000, condition["text"], return_dict=False)[0]

    single = [
        networks[owner](X[i : i + 1], T[i : i + 1] * 1000, CONDITION["text"][i : i + 1], return_dict=False)[0]
        for i, owner in enumerate(owners)
    ]
    x = X.clone().requires_grad_()
    out = route(dict(zip(T.tolist(), owners, strict=True)).__getitem__, batch_call, x, T, CONDITION)
    torch.testing.assert_close(out, torch.cat(single), rtol=0, atol=1e-12)
    assert seen == [(network, owners.count(network)) for network in sorted(set(owners))]  # one call a network
    (out[1] * PROBE[1]).sum().backward()  # gradients go home as well
    assert x.grad is not None and x.grad[1].any() and not x.grad[0].any() and not x.grad[2].any()


# ---------------------------------------------------------------- experts that start from another run's


def finished(folder: Path, lora: Lora | None) -> tuple[Path, list[Tensor]]:
    """A run of one phase over two networks, as if trained, and what its expert predicts on each."""
    weights = {"generator.lora": lora.model_dump()} if lora else {"generator.weights": "full"}
    config, model = resolve("nano-t2i", {"plan.phases": 1, "plan.gradient": "last"} | weights), double_wan(2)
    model.switches = (0.9,)
    system = build_system(config, model, {})
    system.roles.add(ONE, [0, 1], lora, seed=0)
    randomise(system.roles.parameters(ONE), seed=1)
    run = RunFolder(folder)
    folder.mkdir()
    run.config_path.write_text(config.model_dump_json())
    run.save_expert(1, system.roles.state(ONE), expert_header(config, system, 1))
    return folder, [predict(system.roles, ONE, network) for network in (0, 1)]


@pytest.mark.parametrize(("lora", "alpha"), [(LORA, 6.0), (LORA, 1.5), (LORA, 24.0), (None, 8.0)])
def test_an_expert_starts_as_the_function_it_was_in_a_run_of_another_alpha(
    lora: Lora | None, alpha: float, tmp_path: Path
) -> None:
    """W + (alpha / rank) B A is the same: with a quarter of the alpha, four times the B. Full weights have no scale."""
    other, expected = finished(tmp_path / "other", lora)
    settings = {"plan.phases": 1, "plan.gradient": "last", "init_experts": str(other), "generator.lora.alpha": alpha}
    weights = {"generator.lora.rank": lora.rank} if lora else {"generator.weights": "full"}
    config, model = resolve("nano-t2i", settings | weights), double_wan(2)
    model.switches = (0.9,)
    roles = Roles(model)
    roles.add(ONE, [0, 1], config.generator.lora if lora else None, seed=5)
    roles.load(ONE, initial_expert(config, model, 1, roles.state(ONE)))
    for network in (0, 1):
        torch.testing.assert_close(predict(roles, ONE, network), expected[network], rtol=0, atol=1e-9)
        assert (expected[network] - predict(roles, TEACHER, network)).abs().max() > 0.01


def test_experts_that_were_swapped_by_name_are_not_started_from(tmp_path: Path) -> None:
    other, _ = finished(tmp_path / "other", LORA)
    experts = other / "experts"
    shutil.copy(experts / "phase-1.safetensors", experts / "phase-2.safetensors")
    settings = {"plan.phases": 2, "plan.gradient": "last"}
    (other / "config.json").write_text(resolve("nano-t2i", settings).model_dump_json())
    config, model = resolve("nano-t2i", settings | {"init_experts": str(other)}), TinyWan()
    with pytest.raises(UserError, match="^init_experts: .*phase-2.safetensors: its header says phase 1, not 2"):
        initial_expert(config, model, 2, {})
