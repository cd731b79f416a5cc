"""The fast route against the dense field in float64, then its properties, then the edges."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnmonitor.functional import (
    attention_row_statistics,
    energy_delocalization,
    energy_effective_rank,
    energy_spectrum,
    head_cores,
    head_statistics,
    interaction_effective_rank,
    interaction_participation_ratio,
    key_incoherence,
    key_leverage_max,
    key_norm_participation,
    key_participation_ratio,
    key_rank,
    key_rms,
    leverage_scores,
    query_gram,
    query_rms,
    row_logits,
    spectral_gap,
    statistics,
)
from attnmonitor.functional.precision import position_blocks
from attnmonitor.functional.ranks import spread_over_positions
from attnmonitor.functional.spectrum import core_spectrum
from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS

SHAPES = {
    "one head": (1, 1, 1, 20, 8),
    "several heads and sequences": (2, 4, 4, 48, 16),
    "grouped queries": (2, 6, 2, 48, 16),
    "shorter than the head size": (2, 2, 1, 7, 16),
    "as long as the head size": (1, 2, 2, 16, 16),
    "several blocks of positions": (8, 8, 4, 300, 32),
}


def draw(shape, dtype=torch.float32, seed=0, key_offset=2.0):
    """Queries and keys with decaying directions and a mean that dominates, as trained ones have."""
    batch, num_query_heads, num_kv_heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    decay = torch.logspace(0, -1.5, head_dim)
    query = torch.randn(batch, num_query_heads, length, head_dim, generator=generator) * decay
    key = torch.randn(batch, num_kv_heads, length, head_dim, generator=generator) * decay + key_offset
    return query.to(dtype), key.to(dtype)


def measure(query, key, scale=0.25, mask=None, metrics=DEFAULT_METRICS, **keywords):
    cores = head_cores(query_gram(query, mask), key, scale=scale, key_mask=mask, metrics=metrics)
    return head_statistics([cores], **keywords)[0]


@pytest.fixture(params=["all valid", "right padded", "left padded"])
def padding(request):
    def mask_for(batch, length):
        if request.param == "all valid":
            return None
        mask = torch.ones(batch, length, dtype=torch.bool)
        cut = max(2, length // 4)
        mask[0, -cut:] = False
        return mask if request.param == "right padded" else mask.flip(1)

    return mask_for


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_default_metric_equals_the_dense_float64_reference(shape, dtype, padding):
    query, key = draw(shape, dtype)
    mask = padding(shape[0], shape[3])
    expected = reference.layer_statistics(query, key, 0.25, mask, mask)
    if mask is not None:  # what stands at padding must not matter, NaN included
        query = query.masked_fill(~mask[:, None, :, None], torch.nan)
        key = key.masked_fill(~mask[:, None, :, None], torch.inf)
    found = measure(query, key, mask=mask)
    assert set(found.values) == set(expected) == set(DEFAULT_METRICS)
    for name, value in expected.items():
        tolerance = {"rtol": 2e-3, "atol": 1e-5} if name in ("key_leverage_max", "key_incoherence") else {"rtol": 2e-5}
        torch.testing.assert_close(found.values[name].double(), value, **{"atol": 1e-6, **tolerance}, msg=name)
        assert found.values[name].dtype == torch.float32
    assert found.invariant_residual < 1e-4


def test_a_direction_near_the_cut_is_judged_alike_however_much_padding_stands_beside_it():
    generator = torch.Generator().manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64))
    key = (left - left.mean(0)) * torch.tensor([1.0, 0.5, 0.1, 20 * torch.finfo(torch.float32).eps]).double()
    padded = torch.cat([key, torch.zeros(60, 4)])[None, None]
    mask = torch.arange(72)[None] < 12
    alone = leverage_scores(key[None, None])
    assert alone.sum().item() == pytest.approx(4)
    torch.testing.assert_close(leverage_scores(padded, mask=mask)[..., :12], alone)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_each_public_function_agrees_with_the_route_over_cores(shape, padding):
    query, key = draw(shape)
    mask = padding(shape[0], shape[3])
    found = measure(query, key, mask=mask).values
    spectrum = energy_spectrum(query, key, scale=0.25, mask=mask)
    alone = {
        "energy_effective_rank": energy_effective_rank(query, key, mask=mask),
        "energy_participation_ratio": spectrum.participation_ratio,
        "energy_stable_rank": spectrum.stable_rank,
        "energy_rms": spectrum.energy_rms,
        "energy_delocalization": energy_delocalization(query, key, mask=mask),
        "key_incoherence": key_incoherence(key, mask=mask),
        "key_rank": key_rank(key, mask=mask),
        "key_leverage_max": key_leverage_max(key, mask=mask),
        "key_participation_ratio": key_participation_ratio(key, mask=mask),
        "key_norm_participation": key_norm_participation(key, mask=mask),
        "query_rms": query_rms(query, mask=mask),
        "key_rms": key_rms(key, mask=mask),
    }
    assert set(alone) == set(found)
    for name, value in alone.items():
        torch.testing.assert_close(value.float(), found[name], rtol=1e-5, atol=1e-6, msg=name)


def test_singular_values_and_energy_are_those_of_the_dense_field():
    query, key = draw((2, 4, 2, 40, 12), torch.float64)
    spectrum = energy_spectrum(query, key)
    for sequence in range(2):
        for head in range(4):
            field = reference.field(query[sequence, head], key[sequence, head // 2], 12**-0.5)
            expected = torch.linalg.svdvals(field)[:12]
            torch.testing.assert_close(spectrum.singular_values[sequence, head], expected, rtol=1e-7, atol=1e-10)
            torch.testing.assert_close(spectrum.energy[sequence, head], (field**2).sum())


def test_per_kv_head_is_the_field_of_the_stacked_queries():
    query, key = draw((2, 6, 2, 40, 12), torch.float64)
    stacked = query.unflatten(1, (2, 3)).flatten(2, 3)  # (B, Hkv, G·L, d)
    grouped = energy_spectrum(query, key, per="kv_head")
    expected = energy_spectrum(stacked, key)
    torch.testing.assert_close(grouped.singular_values, expected.singular_values)
    torch.testing.assert_close(grouped.energy_rms, expected.energy_rms)


def test_a_stacked_group_has_the_sizes_of_its_queries_together():
    query, key = draw((2, 6, 2, 20, 8))
    fields = head_cores(query_gram(query), key, scale=1.0, metrics=()).fields
    stacked = fields.stacked_per_key_head(2)
    torch.testing.assert_close(stacked.query_energy, query.double().square().sum((-2, -1)).view(2, 2, 3).sum(2))
    torch.testing.assert_close(stacked.core, fields.core.view(2, 2, 3, 8, 8).sum(2))
    assert (stacked.num_queries == 60).all()
    assert (stacked.num_keys == 20).all()


def test_cross_attention_takes_queries_of_another_length():
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


@pytest.mark.parametrize("fraction", [0.3, 0.9, 0.99, 1.0])
def test_effective_rank_at_any_fraction(fraction):
    query, key = draw((1, 3, 1, 60, 10), torch.float64)
    expected = [reference.effective_rank(reference.field(query[0, h], key[0, 0], 1.0), fraction) for h in range(3)]
    assert energy_effective_rank(query, key, fraction=fraction)[0].tolist() == expected


@pytest.mark.parametrize(("method", "target_rank"), [("exact", None), ("randomized", 5), ("randomized", 3)])
def test_a_field_of_three_directions_holds_its_whole_variance_in_three(method, target_rank):
    query, key = draw((1, 3, 1, 60, 10), torch.float64)
    query[..., 3:] = 0
    found = energy_effective_rank(query, key, fraction=1.0, method=method, target_rank=target_rank)
    assert found.tolist() == [[3, 3, 3]]


@pytest.mark.parametrize("shape", [(2, 4, 2, 48, 16), (1, 2, 2, 40, 40)])
def test_energies_are_those_of_the_dense_field_within_the_error_that_field_cores_states(shape, padding):
    query, key = draw(shape, torch.float64)
    _, num_heads, _, length, head_dim = shape
    mask = padding(shape[0], length)
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
def test_the_error_grows_with_the_longer_of_queries_and_keys(num_queries, num_keys):
    query, key = (draw((1, 1, 1, length, 4), torch.float64)[0] for length in (num_queries, num_keys))
    centered = key - key.mean(-2, keepdim=True)
    size = query.square().sum() * (centered.square().sum() * key.square().sum()).sqrt()
    error = energy_spectrum(query, key, scale=1.0).error
    assert error.item() == pytest.approx(2**-49 * (400 + 4**2) * size.item(), rel=1e-9)


def test_the_weights_rank_equals_the_svd_of_the_full_interaction_matrix():
    generator = torch.Generator().manual_seed(3)
    w_q, w_k = torch.randn(2, 5, 8, 30, generator=generator) * torch.logspace(0, -1, 8)[:, None]
    variances = torch.linalg.svdvals((w_q.mT @ w_k).double()) ** 2
    ratio = variances.sum(-1) ** 2 / (variances**2).sum(-1)
    ranks = (variances.cumsum(-1) < 0.9 * variances.sum(-1, keepdim=True)).sum(-1) + 1
    assert interaction_effective_rank(w_q, w_k).tolist() == ranks.tolist()
    torch.testing.assert_close(interaction_participation_ratio(w_q, w_k), ratio, rtol=1e-5, atol=0)
    assert spectral_gap(torch.tensor([40.0]), torch.tensor([8.0])).item() == 5
    for wrong in ((w_q, w_k[:1]), (w_q[0], w_k[0])):
        with pytest.raises(ValueError, match="repeat w_k"):
            interaction_effective_rank(*wrong)


def test_weights_that_lost_rank_are_counted_and_a_head_that_is_not_finite_is_nan_alone():
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


# ---- properties ---------------------------------------------------------------------------------------------------


layers = st.tuples(
    st.integers(0, 10_000), st.sampled_from([(1, 2, 1, 24, 6), (2, 2, 2, 9, 12), (1, 3, 3, 40, 8)]), st.booleans()
)


@settings(max_examples=25, deadline=None)
@given(layers)
def test_shares_stay_below_leverage_and_ranks_keep_their_order(case):
    seed, shape, wide = case
    query, key = draw(shape, torch.float64 if wide else torch.float32, seed)
    spectrum = energy_spectrum(query, key)
    stable, smooth = spectrum.stable_rank, spectrum.participation_ratio
    highest = min(shape[4], shape[3] - 1)
    assert (stable >= 1 - 1e-9).all()
    assert (stable <= smooth * (1 + 1e-9)).all()
    assert (smooth <= highest * (1 + 1e-6)).all()
    assert ((spectrum.effective_rank() >= 1) & (spectrum.effective_rank() <= highest)).all()
    leverage = leverage_scores(key)
    torch.testing.assert_close(leverage.sum(-1).double(), key_rank(key, energy=1.0), rtol=1e-4, atol=1e-4)
    incoherence, rank = key_incoherence(key), key_rank(key)
    assert ((incoherence >= 1 - 1e-5) & (incoherence <= shape[3] / rank * (1 + 1e-5))).all()
    found = measure(query, key)
    assert found.invariant_residual < 1e-4


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_nothing_but_size_changes_under_rotation_scaling_and_reordering(seed, factor):
    query, key = draw((1, 4, 2, 30, 8), torch.float64, seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))[0]
    order = torch.randperm(30, generator=generator)
    before = measure(query, key).values
    after = measure(factor * query[:, :, order] @ rotation, key[:, :, order] @ rotation).values
    for name in DEFAULT_METRICS:
        size = factor if name in ("energy_rms", "query_rms") else 1
        torch.testing.assert_close(after[name], before[name] * size, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_a_spectrum_is_as_large_as_its_keys_are(size):
    query, key = draw((1, 4, 2, 40, 8), torch.float64)
    found, expected = energy_spectrum(query, size * key), energy_spectrum(query, key)
    torch.testing.assert_close(found.singular_values, size * expected.singular_values, rtol=1e-9, atol=0)
    assert torch.equal(found.effective_rank(), expected.effective_rank())


def test_a_weight_is_spread_as_its_participation_ratio_says_whatever_its_sum():
    weight = torch.tensor([[[1.0, 1.0, 2.0, 0.0], [7.0, 7.0, 7.0, 7.0]]])
    torch.testing.assert_close(spread_over_positions(weight, torch.tensor(4.0)), torch.tensor([[2 / 3, 1.0]]))


def test_adding_one_vector_to_all_keys_changes_nothing():
    query, key = draw((1, 2, 2, 64, 8), torch.float64, key_offset=0.0)
    before, after = measure(query, key), measure(query, key + 1e6 * torch.randn(8, dtype=torch.float64))
    for name in DEFAULT_METRICS:
        torch.testing.assert_close(after.values[name], before.values[name], rtol=1e-3, atol=1e-6, msg=name)


# ---- edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_head_that_is_not_finite_is_nan_and_the_others_do_not_change_by_one_bit(bad, method):
    query, key = draw((2, 4, 2, 40, 16))
    before = measure(query, key, method=method, target_rank=8)
    broken_query, broken_key = query.clone(), key.clone()
    broken_query[0, 1, 5, 3] = bad
    broken_key[1, 1, 7, 2] = bad
    after = measure(broken_query, broken_key, method=method, target_rank=8)
    sick = {"query_head": torch.zeros(2, 4, dtype=torch.bool), "kv_head": torch.zeros(2, 2, dtype=torch.bool)}
    sick["query_head"][0, 1] = sick["query_head"][1, 2:] = sick["kv_head"][1, 1] = True
    for name, value in after.values.items():
        expect_nan = sick[METRICS[name].scope].clone()
        if name == "query_rms":
            expect_nan[1] = False
        assert value.isnan().tolist() == expect_nan.tolist(), name
        assert torch.equal(value[~expect_nan], before.values[name][~expect_nan]), name
    assert not after.certified[sick["query_head"]].any()
    assert after.invariant_residual.isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_a_dead_head_has_rank_and_energy_zero_and_no_incoherence(dtype, method):
    query, key = draw((1, 2, 2, 33, 8), dtype)
    query[0, 0] = 0
    key[0, 1] = 0.1  # all equal: their mean is not exactly 0.1 in floating point
    found = measure(query, key, method=method, target_rank=4)
    for name in ("energy_effective_rank", "energy_participation_ratio", "energy_stable_rank", "energy_rms"):
        assert found.values[name].tolist() == [[0, 0]], name
    assert found.certified.all()
    assert found.invariant_residual < 1e-4
    assert found.values["energy_delocalization"].isnan().all()
    assert found.values["key_rank"][0, 1] == found.values["key_participation_ratio"][0, 1] == 0
    assert found.values["key_rms"][0, 1] == key_rms(key)[0, 1] == 0
    assert found.values["key_incoherence"][0, 1].isnan()
    assert found.values["key_rank"][0, 0] > 0
    assert key_incoherence(key)[0].isnan().tolist() == [False, True]
    spectrum = energy_spectrum(query, key, method=method, target_rank=4)
    assert spectrum.effective_rank().tolist() == spectrum.energy.tolist() == [[0, 0]]
    assert (spectrum.variances == 0).all()


def test_a_layer_without_valid_keys_is_not_an_error():
    query, key = draw((2, 2, 2, 12, 4))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1] = False
    found = measure(query, key, mask=mask)
    assert found.values["energy_effective_rank"][1].tolist() == [0, 0]
    assert found.values["key_rank"][0].min() > 0


def test_half_precision_inputs_that_overflow_when_squared_are_measured():
    query, key = draw((1, 2, 2, 40, 8), torch.float64, key_offset=0.0)
    for dtype, size in ((torch.float16, 6e3), (torch.bfloat16, 1e30), (torch.float32, 1e18), (torch.float32, 1e-25)):
        large_query, large_key = (size * query).to(dtype), (size * key).to(dtype)
        found = measure(large_query, large_key).values
        expected = measure(large_query.double() / size, large_key.double() / size).values
        for name in set(DEFAULT_METRICS) - {"energy_rms", "query_rms", "key_rms"}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5, msg=f"{dtype} {size} {name}")


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize(
    "statistic", [key_incoherence, key_leverage_max, key_norm_participation, key_participation_ratio, key_rank]
)
def test_the_size_of_float32_keys_does_not_matter_however_far_it_is_from_one(statistic, size):
    _, key = draw((1, 2, 2, 40, 8))
    torch.testing.assert_close(statistic(size * key), statistic(key), rtol=1e-4, atol=0)


def test_leverage_of_collapsed_keys_counts_directions_not_noise():
    """Rank-4 keys in float32: a plain QR gives a leverage that sums to 32."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 512, 4, generator=generator) @ torch.randn(4, 32, generator=generator)
    assert torch.linalg.qr(key[0, 0] - key[0, 0].mean(0))[0].square().sum() > 31
    torch.testing.assert_close(leverage_scores(key).sum(), torch.tensor(4.0), rtol=1e-3, atol=0)
    expected, rank = reference.leverage(key[0, 0])
    assert rank == 4
    torch.testing.assert_close(leverage_scores(key)[0, 0].double(), expected, rtol=0, atol=1e-4)


def test_leverage_survives_ill_conditioned_keys():
    generator = torch.Generator().manual_seed(0)
    for condition, tolerance in ((1e2, 2e-6), (1e4, 2e-4)):
        key = torch.randn(1, 1, 256, 16, generator=generator) * torch.logspace(0, -math.log10(condition), 16)
        expected, _ = reference.leverage(key[0, 0])
        assert (leverage_scores(key)[0, 0] - expected).abs().max() < tolerance


def test_an_exact_tie_counts_as_reaching_the_mark():
    query = key = torch.eye(11, dtype=torch.float64)[None, None]  # the centred identity has ten equal singular values
    assert energy_effective_rank(query, key).item() == 9
    assert not energy_spectrum(query, key).certified().item(), "rounding could flip an exact tie"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: energy_effective_rank(q, k, fraction=0), "fraction=0: must be in"),
        (lambda q, k: energy_effective_rank(q, k, fraction=1.2), "fraction=1.2"),
        (lambda q, k: energy_spectrum(q, k).effective_rank(-1), "fraction=-1"),
        (lambda q, k: key_incoherence(k, energy=1.2), r"energy=1.2: must be in \(0, 1\]"),
        (lambda q, k: leverage_scores(k, energy=math.nan), "energy=nan"),
        (lambda q, k: energy_spectrum(q, k, method="randomized", target_rank=9), r"target_rank=9: must be in \[1, 8\]"),
        (lambda q, k: energy_spectrum(q, k, target_rank=0), "target_rank=0"),
        (lambda q, k: energy_spectrum(q, k, method="fast"), "method='fast'"),
        (lambda q, k: energy_spectrum(q, k, per="layer"), "per='layer'"),
        (lambda q, k: energy_spectrum(q[:, :3], k), "multiple of the key heads"),
        (lambda q, k: energy_spectrum(q, torch.cat([k, k])), "one number of sequences"),
        (lambda q, k: energy_spectrum(q[..., :4], k), "one head size"),
        (lambda q, k: energy_spectrum(q[0], k), "expected floating"),
        (lambda q, k: key_incoherence(k.long()), "got torch.int64"),
        (lambda q, k: key_incoherence(k, mask=torch.ones(1, 19, dtype=torch.bool)), r"expected bool \(1, 20\)"),
        (lambda q, k: key_incoherence(k, mask=torch.ones(1, 20)), "got torch.float32"),
        (lambda q, k: head_statistics([], target_rank=[3]), "got 1 values for 0 layers"),
        (lambda q, k: attention_row_statistics(lambda rows: rows, 5, num_rows=0), "num_rows=0"),
    ],
)
def test_errors_quote_the_argument_what_arrived_and_the_way_out(call, message):
    query, key = draw((1, 4, 2, 20, 8))
    with pytest.raises(ValueError, match=message):
        call(query, key)


# ---- reading in blocks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "blocks"), [((2, 3, 50, 8), 1), ((1, 8, 4097, 32), 5), ((8, 64, 130, 64), 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_every_position_once_in_order_in_float64_and_of_one_size(shape, blocks, masked):
    """A block holds 2^18 numbers, or 64 positions where those are more."""
    heads = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    valid = torch.rand(shape[0], shape[2]) < 0.8 if masked else None
    expected = heads.double()
    if valid is not None:
        expected = torch.where(valid[:, None, :, None], expected, 0)
        heads = torch.where(valid[:, None, :, None], heads, torch.nan)
    read = [(positions, block.clone()) for positions, block in position_blocks(heads, valid)]
    assert torch.equal(torch.cat([block for _, block in read], 2), expected)
    assert [position for where, _ in read for position in range(shape[2])[where]] == list(range(shape[2]))
    lengths = [block.shape[2] for _, block in read]
    assert len(lengths) == blocks
    assert max(lengths) - min(lengths) < blocks


# ---- many layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_layers_of_different_sizes_come_back_in_order(method):
    shapes = [(2, 4, 2, 30, 8), (2, 4, 4, 30, 16), (2, 2, 1, 30, 8)]
    drawn = [draw(shape, seed=index) for index, shape in enumerate(shapes)]
    cores = [head_cores(query_gram(query), key, scale=0.5, metrics=DEFAULT_METRICS) for query, key in drawn]
    together = head_statistics(cores, method=method, target_rank=[6, 12, 64])
    for layer, (query, key), columns in zip(together, drawn, (6, 12, 8), strict=True):
        alone = measure(query, key, scale=0.5, method=method, target_rank=columns)
        for name in DEFAULT_METRICS:
            torch.testing.assert_close(layer.values[name], alone.values[name], msg=name)
        assert torch.equal(layer.certified, alone.certified)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_layers_in_one_batch_as_on_a_gpu_get_what_each_gets_alone(method):
    drawn = [
        draw(shape, seed=seed) for seed, shape in enumerate([(2, 4, 2, 48, 16), (1, 6, 3, 30, 16), (3, 2, 2, 20, 16)])
    ]
    layers = [head_cores(query_gram(query), key, scale=0.25, metrics=DEFAULT_METRICS) for query, key in drawn]
    spectrum = core_spectrum(statistics._batched(layers), method=method, target_rank=12)
    for layer, found in zip(layers, statistics._statistics(layers, spectrum), strict=True):
        [alone] = head_statistics([layer], method=method, target_rank=12)
        assert found.values.keys() == alone.values.keys()
        for name, values in alone.values.items():
            torch.testing.assert_close(found.values[name], values, msg=name)
        assert torch.equal(found.certified, alone.certified)
        torch.testing.assert_close(found.invariant_residual, alone.invariant_residual, rtol=0, atol=1e-6)


def test_a_layer_without_a_target_rank_is_sketched_with_the_default_one():
    query, key = draw((1, 4, 4, 80, 48))
    cores = head_cores(query_gram(query), key, scale=0.25, metrics=())
    [found] = head_statistics([cores], method="randomized")
    expected = energy_spectrum(query, key, scale=0.25, method="randomized", target_rank=32)
    assert torch.equal(found.certified, expected.certified())
    torch.testing.assert_close(found.values["energy_effective_rank"].double(), expected.effective_rank())


def test_only_the_metrics_asked_for_look_at_positions():
    query, key = draw((1, 2, 1, 20, 4))
    cores = head_cores(query_gram(query), key, scale=1.0, metrics=["energy_effective_rank", "key_leverage_max"])
    assert set(cores.per_position) == {"key_leverage_max"}


# ---- attention rows -----------------------------------------------------------------------------------------------


def dense_attention_rows(query, key, scale, mask):
    """Every row of causal attention in float64: entropy, largest logit and mass on the first valid position."""
    logits = scale * query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -torch.inf)
    logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    found = {"attention_entropy": [], "max_logit": [], "sink_mass": []}
    for sequence, valid in enumerate(mask):
        rows = logits[sequence][:, valid][:, :, valid]
        probability = rows.softmax(-1)
        found["attention_entropy"].append(-(probability * probability.clamp_min(1e-300).log()).sum(-1).mean(-1))
        found["max_logit"].append(rows.amax((-2, -1)))
        found["sink_mass"].append(probability[..., 0].mean(-1))
    return {name: torch.stack(values).float() for name, values in found.items()}


def test_leverage_is_right_in_directions_close_to_the_cut():
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
def test_directions_count_from_the_longer_side_times_float32s_resolution_on(length, head_dim):
    """Float64 keys, so that what lies below the cut is exactly what was put there."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(length, 4, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(left - left.mean(0)).Q
    right = torch.linalg.qr(torch.randn(head_dim, 4, generator=generator, dtype=torch.float64)).Q
    cut = max(length, head_dim) * torch.finfo(torch.float32).eps
    key = left * torch.tensor([1.0, 1.05 * cut, 0.95 * cut, 0.6 * cut], dtype=torch.float64) @ right.T
    assert key_rank(key[None, None], energy=1.0).item() == 2
    torch.testing.assert_close(leverage_scores(key[None, None])[0, 0], left[:, :2].square().sum(-1), rtol=0, atol=1e-4)


def test_attention_rows_equal_dense_attention_when_every_row_is_looked_at(padding):
    query, key = draw((2, 4, 2, 50, 8), key_offset=0.0)
    mask = padding(2, 50)
    logits, query_mask = row_logits(query, key, mask=mask)
    found = attention_row_statistics(logits, 50, query_mask=query_mask, key_mask=mask)
    expected = dense_attention_rows(query, key, 8**-0.5, torch.ones(2, 50).bool() if mask is None else mask)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_subset_of_rows_stands_for_the_rest():
    query, key = draw((1, 4, 4, 512, 16), key_offset=0.0)
    logits, _ = row_logits(query, key)
    every = attention_row_statistics(logits, 512, num_rows=512)
    few = attention_row_statistics(logits, 512)
    torch.testing.assert_close(few["attention_entropy"], every["attention_entropy"], rtol=0.03, atol=0)
    assert (few["max_logit"] <= every["max_logit"]).all()
    asked = []
    attention_row_statistics(lambda rows: asked.append(rows) or logits(rows), 512)
    assert len(torch.cat(asked).unique()) == 64
    assert torch.cat(asked).max() == 511
    assert torch.cat(asked).diff().unique().tolist() == [8], "evenly spaced"
    assert max(map(len, asked)) <= 16
    last = attention_row_statistics(logits, 512, num_rows=1)
    torch.testing.assert_close(last["max_logit"], logits(torch.tensor([511])).amax((-2, -1)))


def test_the_last_queries_see_the_keys_that_came_before_them():
    query, key = draw((1, 4, 2, 30, 8), key_offset=0.0)
    whole, _ = row_logits(query, key)
    last, _ = row_logits(query[:, :, 25:], key)
    torch.testing.assert_close(last(torch.arange(5)), whole(torch.arange(25, 30)))


def test_a_sequence_of_padding_alone_has_no_row_statistics_and_the_other_does():
    query, key = draw((2, 3, 3, 20, 4))
    mask = torch.tensor([[True] * 20, [False] * 20])
    for of_queries in (None, torch.ones(2, 20, dtype=torch.bool)):  # rows that see no key count for nothing either
        logits, query_mask = row_logits(query, key, mask=mask, query_mask=of_queries)
        for value in attention_row_statistics(logits, 20, query_mask=query_mask, key_mask=mask).values():
            assert value.isnan().tolist() == [[False] * 3, [True] * 3]


def test_a_head_that_is_not_finite_has_no_row_statistics_and_the_others_do():
    query, key = draw((1, 3, 3, 20, 4))
    query[0, 1, 12] = torch.nan
    logits, _ = row_logits(query, key, causal=False)
    for value in attention_row_statistics(logits, 20).values():
        assert value.isnan().tolist() == [[False, True, False]]
