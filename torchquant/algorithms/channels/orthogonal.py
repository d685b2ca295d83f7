"""Orthogonal matrices that spread every feature over all others: Hadamard's, by constructions, or random ones.

Sylvester's doubling gives the powers of two; Paley's constructions (Journal of Mathematics and Physics 1933) give q + 1
for primes q = 3 mod 4 and 2 (q + 1) for primes q = 1 mod 4, and Kronecker products all sizes times powers of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hadamard", "rotation"]


def hadamard(size: int) -> Tensor | None:
    """A matrix (size, size) of +-1 float64 with orthogonal rows, or None if no construction here has one."""
    base, doublings = size, 0
    while True:
        core = torch.ones(1, 1, dtype=torch.float64) if base == 1 else _paley(base)
        if core is not None:
            break
        if base % 2:
            return None
        base, doublings = base // 2, doublings + 1
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    for _ in range(doublings):
        core = torch.kron(pair, core)
    return core


def rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Tensor:
    """An orthogonal R (size, size) float64: a Hadamard matrix with random signs of its rows and columns.

    Where no Hadamard matrix of this size is known, a random orthogonal one.

    Args:
        seed: of the signs.
        keeps_mean: also R 1 = 1, so that the mean of a row x stays that of x R, and LayerNorm commutes with R: a
            reflection G in front takes the vector R 1 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    known = hadamard(size)
    if known is None:
        gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix, upper = torch.linalg.qr(gaussian)
        matrix = matrix * upper.diagonal().sign()
    else:
        signs = torch.randint(0, 2, (2, size), generator=generator, dtype=torch.float64) * 2 - 1
        matrix = signs[0][:, None] * known * signs[1] / size**0.5
    if not keeps_mean:
        return matrix
    normal = matrix.sum(1) - 1
    if float(normal.square().sum()) < 1e-12 * size:
        return matrix
    return matrix - torch.outer(normal, normal @ matrix) * (2 / normal.square().sum())


def _paley(size: int) -> Tensor | None:
    """A Hadamard matrix of Paley's first or second kind, or None."""
    if size >= 4 and size % 4 == 0 and _is_prime(size - 1):  # q = 3 mod 4
        return _bordered(size - 1, -1.0) + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 4 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _bordered(q, 1.0)
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        corner = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, pair) + torch.kron(torch.eye(q + 1, dtype=torch.float64), corner)
    return None


def _bordered(q: int, sign: float) -> Tensor:
    """The Jacobsthal matrix of a prime, (q, q), a row of ones and a column of `sign` around it, 0 at the corner."""
    residues = torch.zeros(q, dtype=torch.float64) - 1
    residues[torch.arange(1, q) ** 2 % q] = 1
    residues[0] = 0
    places = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, sign
    matrix[1:, 1:] = residues[(places[:, None] - places[None]) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
