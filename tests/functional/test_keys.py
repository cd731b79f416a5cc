"""Leverage, coherence and rank of keys: where rounding decides, and what holds for any keys."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from drawn_layers import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmonitor.functional import key_incoherence, key_rank, key_rms, leverage_scores


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 2, 1, 24, 6), (2, 2, 2, 9, 12), (1, 3, 3, 40, 8)]), st.booleans())
def test_leverage_sums_to_rank_and_bounds_coherence(seed, shape, wide):
    _, key = draw(shape, torch.float64 if wide else torch.float32, seed)
    torch.testing.assert_close(leverage_scores(key).sum(-1).double(), key_rank(key, energy=1.0), rtol=1e-4, atol=1e-4)
    incoherence, rank = key_incoherence(key), key_rank(key)
    assert ((incoherence >= 1 - 1e-5) & (incoherence <= shape[3] / rank * (1 + 1e-5))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_keys_have_rank_zero_and_no_coherence(dtype):
    _, key = draw((1, 2, 2, 33, 8), dtype)
    key[0, 1] = 0.1  # their mean is not exactly 0.1 in floating point
    assert key_rms(key)[0, 1] == key_rank(key)[0, 1] == 0
    assert key_incoherence(key)[0].isnan().tolist() == [False, True]
    assert key_rank(key)[0, 0] > 0


def test_leverage_of_collapsed_keys_leaves_noise_out():
    """Rank-4 keys in float32: a plain QR gives a leverage that sums to 32."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 512, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    assert torch.linalg.qr(key[0, 0] - key[0, 0].mean(0))[0].square().sum() > 31
    torch.testing.assert_close(leverage_scores(key).sum(), torch.tensor(4.0), rtol=1e-3, atol=0)
    expected, rank = reference.leverage(key[0, 0])
    assert rank == 4
    torch.testing.assert_close(leverage_scores(key)[0, 0].double(), expected, rtol=0, atol=1e-4)


def test_leverage_of_ill_conditioned_keys():
    generator = torch.Generator().manual_seed(0)
    for condition, tolerance in ((1e2, 2e-6), (1e4, 2e-4)):
        key = torch.randn(1, 1, 256, 16, generator=generator) * torch.logspace(0, -math.log10(condition), 16)
        expected, _ = reference.leverage(key[0, 0])
        assert (leverage_scores(key)[0, 0] - expected).abs().max() < tolerance


def test_noise_cut_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64))
    key = (left - left.mean(0)) * torch.tensor([1.0, 0.5, 0.1, 20 * torch.finfo(torch.float32).eps]).double()
    padded = torch.cat([key, torch.zeros(60, 4)])[None, None]
    mask = torch.arange(72)[None] < 12
    alone = leverage_scores(key[None, None])
    assert alone.sum().item() == pytest.approx(4)
    torch.testing.assert_close(leverage_scores(padded, mask=mask)[..., :12], alone)


def test_leverage_is_right_close_to_the_noise_cut():
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(1, 1, 64, 8, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(-2, keepdim=True)).Q
    cut = 64 * torch.finfo(torch.float32).eps
    sizes = torch.tensor([1.0, 0.5, 0.2, 0.1, 3 * cut, 2 * cut, 1.5 * cut, 1.2 * cut], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    key = ((left * sizes) @ turned).float()
    centered = (key - key.double().mean(-2, keepdim=True)).double()
    kept = torch.linalg.svd(centered, full_matrices=False)
    inside = cut * kept.S[..., :1] < kept.S
    expected = (kept.U.square() * inside[..., None, :]).sum(-1)
    torch.testing.assert_close(leverage_scores(key).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "head_dim"), [(64, 8), (9, 16), (16, 9)])
def test_noise_cut_is_longer_side_times_float32_eps(length, head_dim):
    """Float64 keys, so that what lies below the cut is exactly what was put there."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(length, 4, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0)).Q
    right = torch.linalg.qr(torch.randn(head_dim, 4, generator=generator, dtype=torch.float64)).Q
    cut = max(length, head_dim) * torch.finfo(torch.float32).eps
    key = left * torch.tensor([1.0, 1.05 * cut, 0.95 * cut, 0.6 * cut], dtype=torch.float64) @ right.T
    assert key_rank(key[None, None], energy=1.0).item() == 2
    torch.testing.assert_close(leverage_scores(key[None, None])[0, 0], left[:, :2].square().sum(-1), rtol=0, atol=1e-4)
