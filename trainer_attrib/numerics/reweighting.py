"""The least change of examples' weights that brings linear predictions where they should be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS, TOLERANCE = 200, 1e-9


@dataclass(frozen=True)
class Bounds:
    """What ``C w`` must satisfy, row by row: at least ``low``, at most ``high``, [K]; infinite where it is free."""

    low: Tensor
    high: Tensor


def least_change(C_KN: Tensor, bounds: Bounds, most: float = 2.0) -> tuple[Tensor, bool]:
    """min |w - 1|^2 subject to low <= C w <= high and 0 <= w <= most: a quadratic program, by Newton's method on the
    dual of the constraints that hold with equality, which are found one after the other.

    Args:
        C_KN: contributions, float64.
        bounds: K of each.
        most: largest weight.

    Returns:
        Weights [N], and whether all bounds are met. Where they cannot be met, the weights come as near as they can.
    """
    scale_K = C_KN.norm(dim=1).clamp(min=1e-300)
    C_KN = C_KN / scale_K[:, None]
    low_K, high_K = bounds.low / scale_K, bounds.high / scale_K
    weights_N = torch.ones(C_KN.shape[1], dtype=torch.float64)
    active: dict[int, float] = {}
    for _ in range(4 * len(C_KN) + 1):
        value_K = C_KN @ weights_N
        over_K = torch.maximum(value_K - high_K, low_K - value_K)
        for row in active:
            over_K[row] = -1.0
        worst = int(over_K.argmax()) if len(over_K) else -1
        if worst < 0 or over_K[worst] <= 1e-7:
            break
        active[worst] = float(high_K[worst] if value_K[worst] > high_K[worst] else low_K[worst])
        weights_N, multipliers = _on(C_KN, active, most)
        for row, multiplier in zip(list(active), multipliers.tolist(), strict=True):
            pushes_down = active[row] == float(high_K[row]) and low_K[row] < high_K[row]
            pushes_up = active[row] == float(low_K[row]) and low_K[row] < high_K[row]
            if (pushes_down and multiplier < -TOLERANCE) or (pushes_up and multiplier > TOLERANCE):
                del active[row]  # the bound would hold without it
    value_K = C_KN @ weights_N
    met = bool((torch.maximum(value_K - high_K, low_K - value_K) <= 1e-6).all())
    return weights_N, met


def _on(C_KN: Tensor, active: dict[int, float], most: float) -> tuple[Tensor, Tensor]:
    """Weights with these rows at these values, and the multipliers."""
    A_AN = C_KN[list(active)]
    target_A = torch.tensor(list(active.values()), dtype=torch.float64)
    multipliers_A = torch.zeros_like(target_A)

    def weights(multipliers_A: Tensor) -> Tensor:
        return (1 - multipliers_A @ A_AN).clamp(0, most)

    def dual(multipliers_A: Tensor) -> float:
        """Negative dual function, convex; its gradient is target - A w."""
        w_N = weights(multipliers_A)
        return -float(0.5 * (w_N - 1).square().sum() + multipliers_A @ (A_AN @ w_N - target_A))

    for _ in range(ITERATIONS):
        w_N = weights(multipliers_A)
        miss_A = A_AN @ w_N - target_A
        if miss_A.abs().max() < TOLERANCE:
            break
        free_N = ((w_N > 0) & (w_N < most)).double()
        curvature_AA = (A_AN * free_N) @ A_AN.T
        curvature_AA += (1e-12 + 1e-9 * curvature_AA.diagonal().mean()) * torch.eye(len(target_A), dtype=torch.float64)
        step_A, size = torch.linalg.solve(curvature_AA, miss_A), 1.0
        now, slope = dual(multipliers_A), float(miss_A @ step_A)
        while size > 1e-8 and dual(multipliers_A + size * step_A) > now - 1e-4 * size * slope:
            size /= 2
        if size <= 1e-8:
            break
        multipliers_A = multipliers_A + size * step_A
    return weights(multipliers_A), multipliers_A
