"""Effective rank at any fraction, exact ties, and the spread of a weight over positions."""

from __future__ import annotations

import pytest
import reference
import torch
from drawn_layers import draw

from attnmonitor.functional import energy_effective_rank, energy_spectrum
from attnmonitor.functional.ranks import effective_rank, participation_ratio, spread_over_positions


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.99, 1.0])
def test_effective_rank_equals_dense_at_any_fraction(fraction):
    query, key = draw((1, 3, 1, 60, 10), torch.float64)
    expected = [reference.effective_rank(reference.field(query[0, h], key[0, 0], 1.0), fraction) for h in range(3)]
    assert energy_effective_rank(query, key, fraction=fraction)[0].tolist() == expected


@pytest.mark.parametrize(("method", "target_rank"), [("exact", None), ("randomized", 5), ("randomized", 3)])
def test_three_directions_hold_the_whole_variance(method, target_rank):
    query, key = draw((1, 3, 1, 60, 10), torch.float64)
    query[..., 3:] = 0
    found = energy_effective_rank(query, key, fraction=1.0, method=method, target_rank=target_rank)
    assert found.tolist() == [[3, 3, 3]]


def test_exact_tie_counts_as_reached():
    query = key = torch.eye(11, dtype=torch.float64)[None, None]  # the centered identity has ten equal singular values
    assert energy_effective_rank(query, key).item() == 9
    assert not energy_spectrum(query, key).certified().item(), "rounding could flip an exact tie"


@pytest.mark.parametrize(
    ("variances", "fraction", "rank"),
    [
        ([5.0, 4.0, 1.0], 0.9, 2),
        ([5.0, 4.0, 1.0], 0.91, 3),
        ([5.0, 4.0, 1.0], 1.0, 3),
        ([2.0], 0.1, 1),
        ([0.0] * 3, 0.9, 0),
    ],
)
def test_effective_rank_of_a_given_spectrum(variances, fraction, rank):
    assert effective_rank(torch.tensor(variances), fraction).item() == rank


def test_participation_ratio_of_a_given_spectrum():
    spectra = torch.tensor([[1.0, 1.0, 1.0, 0.0], [3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(participation_ratio(spectra), torch.tensor([3.0, 1.6, 0.0]))


def test_spread_does_not_depend_on_the_sum_of_weights():
    weight = torch.tensor([[[1.0, 1.0, 2.0, 0.0], [7.0, 7.0, 7.0, 7.0]]])
    torch.testing.assert_close(spread_over_positions(weight, torch.tensor(4.0)), torch.tensor([[2 / 3, 1.0]]))
