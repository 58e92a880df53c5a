"""The pretended GPU itself: it computes as the CPU does, and refuses what a real one would."""

import copy
import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from faults import forked, group
from torch import Tensor, nn

pytestmark = pytest.mark.skipif("PRETEND_GPU" not in os.environ, reason="for `make test-gpu-path`")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_forward_and_backward_are_the_cpus() -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(4 * 36, 2))
    there = copy.deepcopy(host).to("cuda")
    for network, x in ((host, drawn(2, 3, 8, 8)), (there, drawn(2, 3, 8, 8).cuda())):
        network(x).square().sum().backward()
    for mine, other in zip(host.parameters(), there.parameters(), strict=True):
        assert mine.grad is not None and other.grad is not None and other.grad.device == torch.device("cuda:0")
        torch.testing.assert_close(other.grad.cpu(), mine.grad)


REFUSED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "a sum with the host's": lambda there, host: there + host,
    "a product with the host's": lambda there, host: there @ host,
    "a list of both": lambda there, host: torch.cat([there, host]),
    "another GPU's": lambda there, host: there + host.to("cuda:1"),
    "the host's as output": lambda there, host: torch.add(there, there, out=host),
    "the host's generator": lambda there, host: there.normal_(generator=torch.Generator()),
    "numpy": lambda there, host: there.numpy(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match="same device|generator|can't convert"):
        REFUSED[name](drawn(3, 3).cuda(), drawn(3, 3))


def test_a_number_of_the_host_is_taken_as_it_is() -> None:
    assert torch.equal((drawn(3).cuda() * torch.tensor(2.0)).cpu(), 2 * drawn(3))


def test_waits_and_copies_are_counted() -> None:
    x = drawn(3)
    waits, uploads = torch.ops.pretend.counts()
    there = x.cuda()
    assert torch.ops.pretend.counts() == (waits, uploads + 1)
    there.sum().item(), there.cpu(), there.mul_(2)
    assert torch.ops.pretend.counts() == (waits + 2, uploads + 1)


def test_memory_is_pinned_where_it_is_asked_for() -> None:
    assert not drawn(3).is_pinned() and drawn(3).pin_memory().is_pinned()


def test_a_child_differentiates_after_its_parent_has() -> None:
    def differentiate() -> None:
        x = drawn(3).cuda().requires_grad_()
        x.square().sum().backward()
        assert torch.equal(x.grad.cpu(), 2 * drawn(3))  # type: ignore[union-attr]

    differentiate()
    assert forked(lambda: (differentiate(), forked(differentiate) and os._exit(1))) == 0


def test_processes_reduce_and_gather_what_is_on_their_gpus() -> None:
    """Means too, of which gloo knows nothing; to whom and how often one waits does not matter."""

    def member(rank: int) -> None:
        mine = torch.full((4,), rank + 1.0, device="cuda")
        mean, part, all_of_it = mine.clone(), mine.new_empty(2), mine.new_empty(8)
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        work = dist.reduce_scatter_tensor(part, mine, dist.ReduceOp.AVG, async_op=True)
        work.wait(), work.wait()  # type: ignore[union-attr]
        dist.all_gather_into_tensor(all_of_it, mine)
        assert mean.tolist() == [1.5] * 4 and part.tolist() == [1.5] * 2 and mine.tolist() == [rank + 1] * 4
        assert all_of_it.tolist() == [1] * 4 + [2] * 4

    assert group(2, member) == [0, 0]
