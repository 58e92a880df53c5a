"""The nearest product of a lower rank, and norms, against the singular values of the whole matrix."""

import pytest
import torch
from tiny import draw

from phased_dmd.maths.low_rank import product_norm, reduce_rank


@pytest.mark.parametrize(("m", "n", "r"), [(20, 30, 6), (30, 20, 6), (4, 30, 6), (30, 4, 6)])  # r above m or n, too
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reduced_product_is_the_best_of_its_rank(m: int, n: int, r: int, rank: int, dtype: torch.dtype) -> None:
    """Eckart and Young: what is left out has the norm of the singular values left out; no product of the rank is
    nearer.
    """
    a, b = draw(r, n, seed=0, dtype=dtype), draw(m, r, seed=1, dtype=dtype)
    whole = b.double() @ a.double()
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    best = u[:, :rank] @ s[:rank].diag() @ v[:rank]
    reduced_a, reduced_b, lost = reduce_rank(a, b, rank)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    ranks = min(rank, m, n)
    assert reduced_a.shape == (ranks, n) and reduced_b.shape == (m, ranks)
    assert reduced_a.dtype == reduced_b.dtype == dtype
    torch.testing.assert_close(reduced_b.double() @ reduced_a.double(), best, rtol=0, atol=tolerance)
    assert lost == pytest.approx(s[rank:].norm().item(), abs=1e-10)
    assert (whole - reduced_b.double() @ reduced_a.double()).norm().item() == pytest.approx(lost, abs=tolerance * 20)
    torch.testing.assert_close(reduced_a.norm(dim=1), reduced_b.norm(dim=0))  # each singular value is shared evenly


def test_a_product_of_less_than_its_rank_loses_nothing() -> None:
    a, b = draw(6, 30, seed=0, dtype=torch.float64), draw(20, 6, seed=1, dtype=torch.float64)
    b[:, 3:] = b[:, :3]
    reduced_a, reduced_b, lost = reduce_rank(a, b, 3)
    torch.testing.assert_close(reduced_b @ reduced_a, b @ a)
    assert lost < 1e-12


def test_the_norm_of_a_product_is_that_of_the_matrix() -> None:
    a, b = draw(6, 30, seed=0), draw(20, 6, seed=1)
    assert product_norm(a, b) == pytest.approx((b.double() @ a.double()).norm().item(), rel=1e-12)
    assert product_norm(a, torch.zeros(20, 6)) == 0
