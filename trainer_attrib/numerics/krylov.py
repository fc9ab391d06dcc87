"""Functions of a symmetric positive semi-definite operator that is known only by its products, times a vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""[P] -> [P], linear and symmetric."""
Spectral = Callable[[Tensor], Tensor]
"""Eigenvalues [K] -> values of the function at them [K]."""


def decay(time: float) -> Spectral:
    """exp(-time * a): what is left of a displacement after gradient flow for this time along curvature a."""
    return lambda a_K: torch.exp(-time * a_K)


def response(time: float) -> Spectral:
    """(1 - exp(-time * a)) / a, and ``time`` at a = 0: the displacement that a constant unit force leaves."""
    return lambda a_K: torch.where(a_K > 0, -torch.expm1(-time * a_K) / a_K.clamp_min(1e-300), time)


def apply_function(product: Product, vector_P: Tensor, function: Spectral, products: int) -> Tensor:
    """f(A) v by the Lanczos process with full reorthogonalisation (Saad 1992, "Analysis of some Krylov subspace
    approximations to the matrix exponential operator", section 2).

    Curvature is taken to be positive semi-definite: Ritz values that rounding or an indefinite operator put below 0
    count as 0, so that a decaying function never amplifies.

    Args:
        product: of A with a vector.
        vector_P: v.
        function: of the eigenvalues.
        products: how many products with A are spent at most; exact from the number of distinct eigenvalues on.

    Returns:
        [P], of v's dtype.
    """
    norm = vector_P.norm()
    if not norm > 0 or products < 1:
        return vector_P * float(function(torch.zeros(1, dtype=torch.float64))[0])
    basis, diagonal, beside = [vector_P / norm], [], []
    for step in range(products):
        image_P = product(basis[-1])
        diagonal.append(float(image_P @ basis[-1]))
        for _ in range(2):  # once is not enough in floating point
            for known_P in basis:
                image_P = image_P - (image_P @ known_P) * known_P
        left = float(image_P.norm())
        scale = max(abs(a) for a in [*diagonal, *beside])
        if step == products - 1 or left <= 1e-10 * scale:
            break
        beside.append(left)
        basis.append(image_P / left)
    small = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, entry in enumerate(beside[: len(diagonal) - 1]):
        small[i, i + 1] = small[i + 1, i] = entry
    values_K, vectors_KK = torch.linalg.eigh(small)
    weights_K = vectors_KK @ (function(values_K.clamp_min(0)) * vectors_KK[0])
    result_P = torch.zeros_like(vector_P)
    for weight, known_P in zip(weights_K.tolist(), basis, strict=False):
        result_P += weight * known_P
    return norm * result_P
