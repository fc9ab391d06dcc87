"""Responses of a model to the loss of an example in which its curvature no longer has a part: one Newton step back."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer_attrib.numerics.curvature_fit import CurvatureFit


class LeavingOut:
    """Curvature of which the parts of single examples can be taken out again.

    Args:
        fit: the curvature, of all examples.
        count: it is the sum of the rows' outer products over this.
        damping: see :meth:`CurvatureFit.respond`.
    """

    def __init__(self, fit: CurvatureFit, count: int, damping: float | None) -> None:
        self.count, self.whole = count, fit.whole
        self._blocks = [(s, torch.linalg.cholesky(b) if fit.whole else b) for s, b in fit.blocks(count, damping)]

    def respond(self, forces_NK: Tensor) -> Tensor:
        """(A + damping)^(-1) f for each force, [N, K]."""
        found_NK = torch.zeros_like(forces_NK)
        for span, block in self._blocks:
            found_NK[:, span] = self._solve(block, forces_NK[:, span])
        return found_NK

    def respond_without(self, forces_NK: Tensor, own_NCK: Tensor) -> Tensor:
        """(A - own^T own / count + damping)^(-1) f for each example's force and own rows, [N, K].

        By Woodbury's identity, block by block, since blocks are what is summed. Of a linear model with squared loss it
        makes the residual e of an example e / (1 - h), h being its leverage, which is exact. Approximate
        cross-validation is the same step for other losses (Beirami et al. 2017, "On optimal generalizability in
        parametric learning", theorem 1; Giordano et al. 2019, "A swiss army infinitesimal jackknife", leaves out the
        change of curvature).

        Args:
            forces_NK: gradients of the examples' losses.
            own_NCK: the rows with which each example is part of the fit; zeros where it is not.
        """
        found_NK = torch.zeros_like(forces_NK)
        for span, block in self._blocks:
            forces, own_NCk = forces_NK[:, span], own_NCK[:, :, span]
            if not self.whole:
                found_NK[:, span] = forces / (block - own_NCk.square().sum(1) / self.count)
                continue
            with_own = self._solve(block, forces)
            solved_NCk = self._solve(block, own_NCk.flatten(0, 1)).view_as(own_NCk)
            leverage_NCC = own_NCk @ solved_NCk.transpose(1, 2) / self.count
            rest_NCC = torch.eye(own_NCk.shape[1]).to(leverage_NCC) - leverage_NCC
            seen_NC1 = own_NCk @ with_own[:, :, None] / self.count
            found_NK[:, span] = with_own + (solved_NCk.transpose(1, 2) @ torch.linalg.solve(rest_NCC, seen_NC1))[..., 0]
        return found_NK

    def _solve(self, block: Tensor, forces_NK: Tensor) -> Tensor:
        return torch.cholesky_solve(forces_NK.T, block).T if self.whole else forces_NK / block
