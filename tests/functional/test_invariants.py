"""Laws that every field obeys are checked on every sample: a violation is reported with its size."""

from __future__ import annotations

import math

import pytest
import torch

from attnmonitor.functional import EnergySpectrum, query_gram
from attnmonitor.functional.cores import FieldCores
from attnmonitor.functional.key_basis import key_basis, key_gram
from attnmonitor.functional.positions import position_profiles, share_excess
from attnmonitor.functional.spectrum import core_spectrum
from attnmonitor.metrics import statistics
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import LayerHeads, head_statistics


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
        margin=0 * energy,
        max_rank=4,
    )
    assert spectrum.violation().item() == pytest.approx(violation, abs=1e-12), law


def layer(seed=0):
    return torch.randn(2, 2, 2, 40, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_residual_is_the_worst_head_or_position(monkeypatch):
    layers = [LayerHeads(query_gram(query), key) for query, key in (layer(0), layer(1))]
    sound = head_statistics(layers, DEFAULT_METRICS)
    assert all(0 <= each.invariant_residual.amax() < 1e-6 for each in sound)
    excess = torch.tensor([0.3, 0.0])
    monkeypatch.setattr(statistics, "share_excess", lambda *_: excess)
    monkeypatch.setattr(EnergySpectrum, "violation", lambda spectrum: torch.tensor([[0.1, 0.2], [0.0, 0.5]]))
    for found in (head_statistics([each], DEFAULT_METRICS)[0] for each in layers):
        assert found.invariant_residual.tolist() == pytest.approx([0.3, 0.5])


def test_core_of_no_field_is_reported():
    """One that is not positive semidefinite: 3 - 1 - 1 has stable rank 1/3."""
    core = torch.diag(torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64))[None]
    none = torch.zeros(1, dtype=torch.float64)
    assert core_spectrum(FieldCores(core, none + 1, none, none, none, none)).violation() > 1


def test_share_above_leverage_is_reported():
    _, key = layer()
    basis = key_basis(key_gram(key))
    core = torch.diag(torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64)).expand(2, 2, 6, 6)
    profiles = position_profiles(basis, {"energy_shares", "leverage"}, core=core)
    excess = share_excess(profiles["energy_shares"], profiles["leverage"])
    left = torch.cat([block.clone() for block in basis.left_blocks()], 2)
    shares = (left.square() * torch.tensor([3.0, -1, -1, 0, 0, 0], dtype=torch.float64)).sum(-1)
    torch.testing.assert_close(excess, (shares - left.square().sum(-1)).amax((1, 2)), rtol=1e-6, atol=0)
    assert (excess > 0.01).all()
    torch.testing.assert_close(profiles["energy_shares"].participation(), 1 / (40 * shares.square().sum(-1)))
