"""Laws that every field obeys are checked on every sample: a violation is reported with its size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from attnmonitor.functional import EnergySpectrum, query_gram
from attnmonitor.functional.key_basis import key_basis, key_gram
from attnmonitor.functional.positions import position_profiles, share_excess
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import head_cores, head_statistics


@pytest.mark.parametrize(
    ("law", "variances", "energy", "energy_squared", "violation"),
    [
        ("all hold", [0.5, 0.3], 1.0, 0.4, 0.0),
        ("the variances are no more than the energy", [0.6, 0.6], 1.0, 0.4, 0.2),
        ("the stable rank is at least 1", [1.25, -0.25], 1.0, 0.5, 0.2),
        ("the stable rank is at most the participation ratio", [0.5, 0.5], 1.0, 0.8, 0.6),
        ("the participation ratio is at most the head size", [0.5, 0.5], 1.0, 0.2, 0.25),
        ("a zero field breaks none", [0.0, 0.0], 0.0, 0.0, 0.0),
        ("a field that is not finite breaks none", [math.nan, math.nan], math.nan, math.nan, 0.0),
    ],
)
def test_violation_is_that_of_the_worst_law(law, variances, energy, energy_squared, violation):
    numbers = [torch.tensor([number], dtype=torch.float64) for number in (variances, energy, energy_squared)]
    variances, energy, energy_squared = numbers
    spectrum = EnergySpectrum(
        energy=energy,
        energy_squared=energy_squared,
        num_entries=energy,
        variances=variances,
        sum_bounds=variances.cumsum(-1),
        error=0 * energy,
        max_rank=4,
    )
    assert spectrum.violation().item() == pytest.approx(violation, abs=1e-12), law


def layer(seed=0):
    return torch.randn(2, 1, 2, 40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_residual_is_the_worst_head_or_position():
    query, key = layer()
    cores = head_cores(query_gram(query), key, scale=1.0, metrics=DEFAULT_METRICS)
    [sound] = head_statistics([cores])
    assert 0 <= sound.invariant_residual < 1e-6
    [seen, still_sound] = head_statistics([replace(cores, share_excess=torch.tensor(0.3)), cores])
    assert seen.invariant_residual.item() == pytest.approx(0.3)
    assert still_sound.invariant_residual == sound.invariant_residual
    # A core that is not positive semidefinite is that of no field: 3 - 1 - 1 has stable rank 1/3.
    broken = cores.fields.core.clone()
    broken[0, 1] = torch.diag(torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64))
    [seen] = head_statistics([replace(cores, fields=replace(cores.fields, core=broken))])
    assert seen.invariant_residual > 1


def test_share_above_leverage_is_reported():
    _, key = layer()
    basis = key_basis(key_gram(key))
    core = torch.diag(torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64)).expand(1, 2, 6, 6)
    profiles = position_profiles(basis, {"energy_shares", "leverage"}, core=core)
    excess = share_excess(profiles["energy_shares"], profiles["leverage"])
    left = torch.cat([block.clone() for block in basis.left_blocks()], 2)
    shares = (left.square() * torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64)).sum(-1)
    assert excess.item() == pytest.approx((shares - left.square().sum(-1)).max().item(), rel=1e-6)
    assert excess > 0.01
    torch.testing.assert_close(profiles["energy_shares"].participation(), 1 / (40 * shares.square().sum(-1)))
