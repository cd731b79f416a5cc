"""Ranks of W_Qᵀ W_K, through d×d products, against the singular values of the whole matrix."""

from __future__ import annotations

import pytest
import torch

from attnmonitor.functional import interaction_effective_rank, interaction_participation_ratio, spectral_gap
from attnmonitor.functional.interaction import interaction_spectrum, spectral_gap_of


def test_ranks_equal_those_of_the_whole_matrix():
    generator = torch.Generator().manual_seed(3)
    w_q, w_k = torch.randn(2, 5, 8, 30, generator=generator) * torch.logspace(0, -1, 8)[:, None]
    variances = torch.linalg.svdvals((w_q.mT @ w_k).double()) ** 2
    ratio = variances.sum(-1) ** 2 / (variances**2).sum(-1)
    ranks = (variances.cumsum(-1) < 0.9 * variances.sum(-1, keepdim=True)).sum(-1) + 1
    assert interaction_effective_rank(w_q, w_k).tolist() == ranks.tolist()
    torch.testing.assert_close(interaction_participation_ratio(w_q, w_k), ratio, rtol=1e-5, atol=0)


def test_spectral_gap_is_a_ratio():
    assert spectral_gap(torch.tensor([40.0]), torch.tensor([8.0])).item() == 5


def test_spectral_gap_without_energy_rank_is_nan():
    w_q, w_k = torch.ones(2, 5, 8, 30)
    assert spectral_gap_of(interaction_spectrum(w_q, w_k)).isnan().tolist() == [True] * 5


def test_key_projections_must_be_repeated():
    w_q, w_k = torch.ones(2, 5, 8, 30)
    for wrong in ((w_q, w_k[:1]), (w_q[0], w_k[0])):
        with pytest.raises(ValueError, match="repeat w_k"):
            interaction_effective_rank(*wrong)


def test_lost_rank_is_counted_and_broken_heads_are_nan():
    generator = torch.Generator().manual_seed(3)
    left, right = torch.linalg.qr(torch.randn(2, 6, 8, 2, generator=generator, dtype=torch.float64))[0].unbind()
    w_q = torch.randn(6, 8, 30, generator=generator, dtype=torch.float64)
    w_k = left @ right.mT @ w_q  # two directions; the other eigenvalues of its Gram matrix are rounding of either sign
    variances = torch.linalg.svdvals(w_q.mT @ w_k) ** 2
    w_q[4, 3, 2], w_k[5, 0, 0] = torch.nan, torch.inf
    ranks, ratio = interaction_effective_rank(w_q, w_k, fraction=0.999999), interaction_participation_ratio(w_q, w_k)
    assert ranks[:4].tolist() == [2, 2, 2, 2]
    torch.testing.assert_close(ratio[:4], (variances.sum(-1) ** 2 / variances.square().sum(-1))[:4])
    assert ranks.isnan().tolist() == ratio.isnan().tolist() == [False] * 4 + [True] * 2
