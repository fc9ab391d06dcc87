"""Covariances of the two factors of every weight's gradient, instead of its sketches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer_attrib.tap.plan import WeightPlan
from trainer_attrib.tap.record import Record


class FactorRecord(Record):
    """Sums of l l^T and of r r^T over the factors of a forward pass's gradients, G = sum_s l_s r_s^T.

    The two together approximate the second moments of G as if its factors were independent (Martens & Grosse 2015,
    "K-FAC", equation 1); here only their eigenvectors are used. ``covariances`` is by weight name.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.covariances: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, module: str, weight: WeightPlan, left_BSK: Tensor, right_BSK: Tensor) -> None:
        """Add one layer call's factors."""
        self._count(module, weight, left_BSK.flatten(0, 1), right_BSK.flatten(0, 1))

    def add_routed(self, module: str, weight: WeightPlan, left_PK: Tensor, right_PK: Tensor, owner_P: Tensor) -> None:
        """Add factors of tokens in any order; it does not matter whose they are."""
        self._count(module, weight, left_PK, right_PK)

    def _count(self, module: str, weight: WeightPlan, left_PK: Tensor, right_PK: Tensor) -> None:
        pair = left_PK.T @ left_PK, right_PK.T @ right_PK
        known = self.covariances.get(weight.name)
        self.covariances[weight.name] = pair if known is None else (known[0] + pair[0], known[1] + pair[1])
        self._backwards[module] += 1


def eigenbasis(covariance_KK: Tensor, rank: int) -> Tensor:
    """The eigenvectors with the largest eigenvalues, as rows: [min(rank, K), K], of the covariance's dtype."""
    vectors_KK = torch.linalg.eigh(covariance_KK.double().cpu())[1]
    return vectors_KK.flip(1)[:, :rank].T.to(covariance_KK)
