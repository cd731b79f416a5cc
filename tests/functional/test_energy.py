"""The spectrum of the energy field against the dense field in float64, its properties, and heads that have none."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from drawn_layers import PADDINGS, draw, padding_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmonitor.functional import energy_delocalization, energy_effective_rank, energy_spectrum, key_rank, query_gram
from attnmonitor.functional.cores import field_cores
from attnmonitor.functional.key_basis import key_gram


def test_singular_values_equal_the_dense_field():
    query, key = draw((2, 4, 2, 40, 12), torch.float64)
    spectrum = energy_spectrum(query, key)
    for sequence in range(2):
        for head in range(4):
            field = reference.field(query[sequence, head], key[sequence, head // 2], 12**-0.5)
            expected = torch.linalg.svdvals(field)[:12]
            torch.testing.assert_close(spectrum.singular_values[sequence, head], expected, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(spectrum.energy[sequence, head], (field**2).sum())


def test_per_kv_head_stacks_the_queries_of_a_group():
    query, key = draw((2, 6, 2, 40, 12), torch.float64)
    stacked = query.unflatten(1, (2, 3)).flatten(2, 3)  # (B, Hkv, G·L, d)
    grouped = energy_spectrum(query, key, per="kv_head")
    expected = energy_spectrum(stacked, key)
    torch.testing.assert_close(grouped.singular_values, expected.singular_values)
    torch.testing.assert_close(grouped.energy_rms, expected.energy_rms)


def test_stacked_cores_are_sums_over_the_group():
    query, key = draw((2, 6, 2, 20, 8))
    keys = key_gram(key)
    fields = field_cores(query_gram(query), keys, keys.cholesky_root(), scale=1.0)
    stacked = fields.stacked_per_key_head(2)
    torch.testing.assert_close(stacked.size, query.double().square().sum((-2, -1)).view(2, 2, 3).sum(2) * keys.energy)
    whole, parts = (each.core * each.size[..., None, None] for each in (stacked, fields))
    torch.testing.assert_close(whole, parts.view(2, 2, 3, 8, 8).sum(2))
    assert (stacked.num_queries == 60).all()
    assert (stacked.num_keys == 20).all()


def test_cross_attention_needs_a_query_mask():
    query, _ = draw((2, 2, 2, 30, 8), torch.float64)
    _, key = draw((2, 2, 2, 50, 8), torch.float64, seed=1)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 33:] = False
    query_mask = torch.ones(2, 30, dtype=torch.bool)
    found = energy_spectrum(query, key, scale=0.3, mask=mask, query_mask=query_mask)
    expected = reference.layer_statistics(query, key, 0.3, query_mask, mask)
    torch.testing.assert_close(found.energy_rms, expected["energy_rms"])
    torch.testing.assert_close(found.effective_rank(), expected["energy_effective_rank"])
    with pytest.raises(ValueError, match="pass query_mask"):
        energy_spectrum(query, key, mask=mask)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", [(2, 4, 2, 48, 16), (1, 2, 2, 40, 40)])
def test_energy_is_off_by_no_more_than_its_error(shape, padding):
    query, key = draw(shape, torch.float64)
    _, num_heads, _, length, head_dim = shape
    mask = padding_mask(padding, shape[0], length)
    spectrum = energy_spectrum(query, key, scale=0.25, mask=mask)
    expected = reference.layer_statistics(query, key, 0.25, mask, mask)
    valid = torch.ones(shape[0], length, dtype=torch.bool) if mask is None else mask
    query, key = (
        torch.where(valid[:, None, :, None], x, 0) for x in (query, key.repeat_interleave(num_heads // shape[2], 1))
    )
    count = valid.sum(-1)[:, None]
    dense_energy = expected["energy_rms"].square() * count.square()
    assert ((spectrum.energy - dense_energy).abs() <= spectrum.error).all()
    centered = torch.where(valid[:, None, :, None], key - key.sum(-2, keepdim=True) / count[..., None, None], 0)
    query_energy, key_energy, centered_energy = (x.square().sum((-2, -1)) for x in (query, key, centered))
    bound = 2**-49 * (length + head_dim**2) * 0.25**2 * query_energy * (centered_energy * key_energy).sqrt()
    torch.testing.assert_close(spectrum.error, bound, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(40, 400), (400, 40)])
def test_error_grows_with_the_longer_side(num_queries, num_keys):
    query, key = (draw((1, 1, 1, length, 4), torch.float64)[0] for length in (num_queries, num_keys))
    centered = key - key.mean(-2, keepdim=True)
    size = query.square().sum() * (centered.square().sum() * key.square().sum()).sqrt()
    error = energy_spectrum(query, key, scale=1.0).error
    assert error.item() == pytest.approx(2**-49 * (400 + 4**2) * size.item(), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 2, 1, 24, 6), (2, 2, 2, 9, 12), (1, 3, 3, 40, 8)]), st.booleans())
def test_ranks_keep_their_order(seed, shape, wide):
    query, key = draw(shape, torch.float64 if wide else torch.float32, seed)
    spectrum = energy_spectrum(query, key)
    stable, smooth = spectrum.stable_rank, spectrum.participation_ratio
    highest = min(shape[4], shape[3] - 1)
    assert (stable >= 1 - 1e-9).all()
    assert (stable <= smooth * (1 + 1e-9)).all()
    assert (smooth <= highest * (1 + 1e-6)).all()
    assert ((spectrum.effective_rank() >= 1) & (spectrum.effective_rank() <= highest)).all()


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_spectrum_scales_with_its_keys(size):
    query, key = draw((1, 4, 2, 40, 8), torch.float64)
    found, expected = energy_spectrum(query, size * key), energy_spectrum(query, key)
    torch.testing.assert_close(found.singular_values, size * expected.singular_values, rtol=1e-9, atol=0)
    assert torch.equal(found.effective_rank(), expected.effective_rank())


def statistics(query, key, method):
    spectrum = energy_spectrum(query, key, method=method, target_rank=8)
    names = ("participation_ratio", "stable_rank", "energy_rms", "energy", "singular_values")
    return {"effective_rank": spectrum.effective_rank(), **{name: getattr(spectrum, name) for name in names}}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_broken_heads_leave_the_others_bit_identical(bad, method):
    query, key = draw((2, 4, 2, 40, 16))
    before = statistics(query, key, method)
    query[0, 1, 5, 3] = bad
    key[1, 1, 7, 2] = bad
    broken = torch.zeros(2, 4, dtype=torch.bool)
    broken[0, 1] = broken[1, 2:] = True
    for name, value in statistics(query, key, method).items():
        assert value[broken].isnan().all(), name
        assert torch.equal(value[~broken], before[name][~broken]), name
    assert not energy_spectrum(query, key, method=method, target_rank=8).certified()[broken].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_dead_heads_have_a_zero_spectrum(dtype, method):
    query, key = draw((1, 2, 2, 33, 8), dtype)
    query[0, 0] = 0
    key[0, 1] = 0.1  # all equal: their mean is not exactly 0.1 in floating point
    spectrum = energy_spectrum(query, key, method=method, target_rank=4)
    for value in (spectrum.effective_rank(), spectrum.energy, spectrum.participation_ratio, spectrum.stable_rank):
        assert value.tolist() == [[0, 0]]
    assert spectrum.energy_rms.tolist() == [[0, 0]]
    assert (spectrum.variances == 0).all()
    assert spectrum.certified().all()
    assert energy_delocalization(query, key).isnan().all()


def test_sequence_without_valid_keys_has_rank_zero():
    query, key = draw((2, 2, 2, 12, 4))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    assert energy_effective_rank(query, key, mask=mask)[1].tolist() == [0, 0]
    assert energy_effective_rank(query, key, mask=mask)[0].min() > 0
    assert key_rank(key, mask=mask)[0].min() > 0
