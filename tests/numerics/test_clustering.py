"""Clusters by direction, Welch's z, false discovery rates."""

from __future__ import annotations

import torch

from trainer_attrib.numerics.clustering import false_discovery_rates, spherical_clusters, welch, z_values


def test_directions_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(5, dtype=torch.float64)[:3]
    kinds = torch.arange(90) % 3
    lengths = 1 + 9 * torch.rand(90, 1, generator=generator, dtype=torch.float64)
    x_NF = lengths * (centres[kinds] + 0.1 * torch.randn(90, 5, generator=generator, dtype=torch.float64))
    assigned_N, found_KF = spherical_clusters(x_NF, 3, generator)
    assert len(assigned_N.unique()) == 3
    for kind in range(3):
        assert len(assigned_N[kinds == kind].unique()) == 1
    torch.testing.assert_close(found_KF.norm(dim=1), torch.ones(3, dtype=torch.float64))
    few_N, few_KF = spherical_clusters(torch.ones(4, 2), 3, generator)
    assert few_N.tolist() == [0, 0, 0, 0]
    assert len(few_KF) == 1


def test_welch_by_hand() -> None:
    inside, outside = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]])
    expected = (2 - 1) / ((2 + 1 / 2) / 2 + (3 + 1 / 3) / 3) ** 0.5
    torch.testing.assert_close(welch(inside, outside), torch.tensor([expected, 0.0]))
    torch.testing.assert_close(z_values(inside)[0], torch.tensor(2 / (2.5 / 2) ** 0.5))


def test_false_discovery_rates_by_hand() -> None:
    z_M = torch.tensor([0.0, 3.0, -2.0, 2.5], dtype=torch.float64)
    p = torch.erfc(z_M.abs() / 2**0.5)
    expected = torch.tensor([p[0] * 4 / 4, p[1] * 4 / 1, p[2] * 4 / 3, p[3] * 4 / 2])
    torch.testing.assert_close(false_discovery_rates(z_M), expected)
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (false_discovery_rates(noise) <= 0.05).sum() == 0
