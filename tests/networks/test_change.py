"""A role starts from a change as the function that the change makes of the network, or as near as it can come."""

import pytest
import torch
from tiny import TinyWan, draw, wan_transformer
from torch import Tensor

from phased_dmd.config import Lora
from phased_dmd.engine.world import device
from phased_dmd.networks.change import Change, check_change, describe_loss, expert_change, parameter_shapes, start_from
from phased_dmd.networks.roles import Roles

TARGETS = TinyWan.lora_targets
QUERY, HEAD = "blocks.0.attn1.to_q", "proj_out"


def change_of(rank: int, *layers: str, scale: float = 1.0) -> Change:
    """A random change of layers of a tiny Wan transformer; of all that a tiny Wan adapts by default."""
    shapes = parameter_shapes(wan_transformer(0))
    names = layers or [n.removesuffix(".weight") for n in shapes if n.removesuffix(".weight").endswith(TARGETS)]
    pairs = {}
    for i, name in enumerate(names):
        out, into = shapes[f"{name}.weight"]
        pairs[name] = draw(rank, into, seed=2 * i) / 10, draw(out, rank, seed=2 * i + 1) / 10
    return Change(pairs, scale=scale)


def predict(roles: Roles, role: str) -> Tensor:
    x, t, text = (
        each.to(device()) for each in (draw(2, 16, 1, 4, 4, seed=0), torch.tensor([0.9, 0.4]), draw(2, 5, 32, seed=1))
    )
    return roles.predict(role, 0, x, t, {"text": text})


def expected(change: Change) -> Tensor:
    """What the network predicts once the change is written into its weights by hand."""
    model = TinyWan()
    parameters = dict(model.networks[0].named_parameters())
    for name, (a, b) in change.layers.items():
        parameters[f"{name}.weight"].data += (change.scale * b @ a).to(device())
    for name, tensor in change.differences.items():
        parameters[name].data += tensor.to(device())
    return predict(Roles(model), "teacher")


def started(change: Change, lora: Lora | None) -> Tensor:
    roles = Roles(TinyWan())
    roles.add("role", [0], lora, seed=3)
    roles.load("role", start_from(roles.state("role"), {0: change}, lora))
    return predict(roles, "role")


@pytest.mark.parametrize("lora", [Lora(rank=4, alpha=4), Lora(rank=4, alpha=1.5), Lora(rank=7, alpha=3), None])
def test_a_role_of_the_same_rank_of_a_higher_one_and_a_copy_compute_what_the_change_makes(lora: Lora | None) -> None:
    change = change_of(4, scale=0.75)
    assert describe_loss(change, lora, TARGETS) == ""
    plain = predict(Roles(TinyWan()), "teacher")
    found = started(change, lora)
    assert (found - plain).abs().max() > 0.05
    torch.testing.assert_close(found, expected(change), rtol=0, atol=2e-6)


def test_ranks_that_a_change_does_not_fill_train() -> None:
    """With zeros in both halves neither would ever get a gradient."""
    lora, roles = Lora(rank=7, alpha=7), Roles(TinyWan())
    roles.add("role", [0], lora, seed=3)
    roles.load("role", start_from(roles.state("role"), {0: change_of(4)}, lora))
    with roles.active("role"):
        predict(roles, "role").square().sum().backward()
    gradient = roles.parameters("role")[f"0.{QUERY}.lora_B.weight"].grad
    assert gradient is not None and (gradient.abs().amax(0) > 0).all()


def test_a_role_of_a_lower_rank_takes_the_nearest_product_and_the_loss_is_said() -> None:
    change, lora = change_of(4, QUERY, scale=3.0), Lora(rank=2, alpha=5)
    roles = Roles(TinyWan())
    roles.add("role", [0], lora, seed=3)
    found = start_from(roles.state("role"), {0: change}, lora)
    a, b = found[f"0.{QUERY}.lora_A.weight"], found[f"0.{QUERY}.lora_B.weight"]
    whole = 3 * change.layers[QUERY][1] @ change.layers[QUERY][0]
    u, s, v = torch.linalg.svd(whole)
    torch.testing.assert_close(lora.alpha / lora.rank * b @ a, u[:, :2] @ s[:2].diag() @ v[:2], rtol=0, atol=1e-6)
    share = (s[2:].norm() / s.norm()).item()
    assert describe_loss(change, lora, TARGETS) == f"{share:.2%} as rank 4 becomes 2"


def test_what_adapters_cannot_hold_is_said_by_its_share_of_the_norm() -> None:
    """3, 4 and 12 of 13: a layer that is a target, one that is none, and a bias."""
    head, bias = "proj_out", "blocks.0.attn1.to_q.bias"
    change = change_of(1, QUERY, head)
    lengths = {QUERY: 3.0, head: 4.0}
    for name, (a, b) in change.layers.items():
        change.layers[name] = a / a.norm(), lengths[name] * b / b.norm()
    change.differences[bias] = torch.full((24,), 12 / 24**0.5)
    assert describe_loss(change, Lora(rank=1, alpha=1), TARGETS) == (
        f"{4 / 13:.2%} in 1 layers that teacher.lora_targets leave out, the first proj_out; "
        f"{12 / 13:.2%} in 1 biases, norms and tables, the first {bias}, which only full experts have"
    )
    assert describe_loss(change, Lora(rank=1, alpha=1), (*TARGETS, "proj_out")).startswith(f"{12 / 13:.2%} in 1 biases")
    assert describe_loss(change, None, TARGETS) == ""
    torch.testing.assert_close(started(change, None), expected(change), rtol=0, atol=2e-6)


def test_networks_that_a_role_is_not_on_are_left_out() -> None:
    roles = Roles(TinyWan(2))
    roles.add("role", [1], None, seed=3)
    fresh, change = roles.state("role"), change_of(2, HEAD)
    found = start_from(fresh, {0: change, 1: change}, None)
    assert found.keys() == fresh.keys()
    assert not torch.equal(found[f"1.{HEAD}.weight"], fresh[f"1.{HEAD}.weight"])


def test_shapes_are_those_of_the_bare_network_whatever_adapters_it_carries() -> None:
    model = TinyWan()
    before = parameter_shapes(model.networks[0])
    assert before == {name: tuple(p.shape) for name, p in model.networks[0].named_parameters()}
    Roles(model).add("role", [0], Lora(rank=2, alpha=2), seed=0)
    assert parameter_shapes(model.networks[0]) == before
    check_change(change_of(2), before)


def test_an_experts_tensors_are_the_change_that_they_make() -> None:
    lora, roles = Lora(rank=2, alpha=3), Roles(TinyWan())
    roles.add("role", [0], lora, seed=3)
    for i, p in enumerate(roles.parameters("role").values()):
        p.data = draw(*p.shape, seed=i).to(device()) / 10
    tensors = {name.removeprefix("0."): tensor for name, tensor in roles.state("role").items()}
    change = expert_change(tensors, lora)
    assert change.scale == 1.5
    torch.testing.assert_close(expected(change), predict(roles, "role"), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="lora_B.weight is no half, or has no other half, of a layer's adapter"):
        expert_change({f"{QUERY}.lora_B.weight": torch.zeros(2)}, lora)
