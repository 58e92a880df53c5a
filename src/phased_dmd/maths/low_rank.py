"""Products B A of few columns and rows, as LoRA adapters are: their norm, and the nearest one of a lower rank."""

import torch
from torch import Tensor


def product_norm(a: Tensor, b: Tensor) -> float:
    """Returns the Frobenius norm of B A for A [r, n] and B [m, r], without making the product [m, n]."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()


def reduce_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Returns A' [rank, n] and B' [m, rank], whose product is the nearest to B A of that rank, and how far it is off.

    They have no more than n or m ranks. B' and A' share each singular value evenly; the distance is the Frobenius norm
    of B A - B' A'. The singular values are those of R_B R_A^T [r, r], of the factors' QR decompositions: exact, and B A
    itself is never made.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    reduced_a = root[:, None] * (v[:rank] @ q_a.T)
    return reduced_a.to(a.dtype), (q_b @ u[:, :rank] * root).to(b.dtype), s[rank:].norm().item()
