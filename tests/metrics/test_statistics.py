"""The two stages of a measurement: cores of each layer, then the values of many layers at once."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from drawn_layers import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FIELD_METRICS
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import DEFAULT_METRICS, METRICS
from attnmonitor.functional import energy_spectrum, query_gram
from attnmonitor.functional.summaries import FROM_ATTENTION
from attnmonitor.metrics.statistics import LayerHeads, head_statistics

OF_FIELD = [name for name, info in METRICS.items() if info.summary not in ("weights", *FROM_ATTENTION)]


def heads_of(query, key, scale=0.25):
    return LayerHeads(query_gram(query), key, scale)


def measure(query, key, scale=0.25, metrics=DEFAULT_METRICS, **keywords):
    return head_statistics([heads_of(query, key, scale)], metrics, **keywords)[0]


# One layer


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(1, 2, 1, 24, 6), (2, 2, 2, 9, 12), (1, 3, 3, 40, 8)]), st.booleans())
def test_residual_is_rounding_for_any_layer(seed, shape, wide):
    found = measure(*draw(shape, torch.float64 if wide else torch.float32, seed))
    assert set(found.values) == set(FIELD_METRICS)
    assert (found.invariant_residual < 1e-4).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_broken_heads_do_not_change_the_others(bad, method):
    query, key = draw((2, 4, 2, 40, 16))
    before = measure(query, key, method=method, target_rank=8)
    query[0, 1, 5, 3] = bad
    key[1, 1, 7, 2] = bad
    after = measure(query, key, method=method, target_rank=8)
    broken = {"query_head": torch.zeros(2, 4, dtype=torch.bool), "kv_head": torch.zeros(2, 2, dtype=torch.bool)}
    broken["query_head"][0, 1] = broken["query_head"][1, 2:] = broken["kv_head"][1, 1] = True
    for name, value in after.values.items():
        expected = broken[METRICS[name].scope].clone()
        if name == "query_rms":
            expected[1] = False
        assert value.isnan().tolist() == expected.tolist(), name
        assert torch.equal(value[~expected], before.values[name][~expected]), name
    assert not after.certified[broken["query_head"]].any()
    assert after.invariant_residual.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_dead_heads_are_zero_and_certified(dtype, method):
    query, key = draw((1, 2, 2, 33, 8), dtype)
    query[0, 0] = 0
    key[0, 1] = 0.1  # all equal: their mean is not exactly 0.1 in floating point
    found = measure(query, key, method=method, target_rank=4)
    for name in ("energy_effective_rank", "energy_participation_ratio", "energy_stable_rank", "energy_rms"):
        assert found.values[name].tolist() == [[0, 0]], name
    assert found.certified.all()
    assert (found.invariant_residual < 1e-4).all()
    assert found.values["energy_delocalization"].isnan().all()
    assert found.values["key_rank"][0, 1] == found.values["key_participation_ratio"][0, 1] == 0
    assert found.values["key_rms"][0, 1] == 0
    assert found.values["key_incoherence"][0, 1].isnan()
    assert found.values["key_rank"][0, 0] > 0


def test_default_target_rank_is_32():
    query, key = draw((1, 4, 4, 80, 48))
    found = measure(query, key, metrics=["energy_effective_rank"], method="randomized")
    expected = energy_spectrum(query, key, scale=0.25, method="randomized", target_rank=32)
    assert torch.equal(found.certified, expected.certified())
    torch.testing.assert_close(found.values["energy_effective_rank"].double(), expected.effective_rank())


def test_metrics_of_rows_and_weights_need_no_heads():
    assert head_statistics([LayerHeads(None, None)], ["sink_mass", "interaction_effective_rank"])[0].values == {}
    assert head_statistics([], ["key_rms"]) == []


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def operations(metrics):
    query, key = draw((1, 2, 1, 20, 4))
    with Operations() as seen:
        measure(query, key, metrics=metrics)
    return seen.counts


@pytest.mark.parametrize("metric", ["query_rms", "key_rms", "energy_rms", "energy_participation_ratio"])
def test_traces_solve_no_eigenproblem(metric):
    assert operations(["key_rank"])["_linalg_eigh"] == 1
    assert operations([metric])["_linalg_eigh"] == 0


@pytest.mark.parametrize("metric", [name for name in OF_FIELD if METRICS[name].opt_in])
def test_opt_in_metric_costs_nothing_unless_asked(metric):
    default, more = operations(DEFAULT_METRICS), operations([*DEFAULT_METRICS, metric])
    assert more.total() > default.total()
    assert operations([metric]).total() < default.total()


@pytest.mark.parametrize("metric", OF_FIELD)
def test_metric_alone_equals_metric_among_all(metric):
    query, key = draw((2, 4, 2, 48, 16))
    alone = measure(query, key, metrics=[metric])
    among = measure(query, key, metrics=OF_FIELD)
    assert set(alone.values) == {metric}
    assert set(among.values) == set(OF_FIELD)
    torch.testing.assert_close(alone.values[metric], among.values[metric], rtol=1e-5, atol=1e-6)


# Many layers


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_layers_of_different_sizes_keep_their_order(method):
    shapes = [(2, 4, 2, 30, 8), (2, 4, 4, 30, 16), (2, 2, 1, 30, 8)]
    drawn = [draw(shape, seed=index) for index, shape in enumerate(shapes)]
    layers = [heads_of(query, key, 0.5) for query, key in drawn]
    found = head_statistics(layers, DEFAULT_METRICS, method=method, target_rank=[6, 12, 64])
    for layer, (query, key), columns in zip(found, drawn, (6, 12, 8), strict=True):
        alone = measure(query, key, 0.5, method=method, target_rank=columns)
        for name in FIELD_METRICS:
            torch.testing.assert_close(layer.values[name], alone.values[name], msg=name)
        assert torch.equal(layer.certified, alone.certified)


@pytest.mark.parametrize("method", ["exact", "randomized"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 48, 16), (1, 6, 3, 30, 16), (3, 2, 2, 20, 16), (2, 8, 2, 12, 64)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_layers_in_one_batch_get_what_each_gets_alone(shape, method, padded):
    """The last shape is one of which a CPU takes some sequences at a time, from the end of one layer and the next."""
    mask = torch.arange(shape[3]) >= torch.arange(shape[0])[:, None] if padded else None
    drawn = [draw(shape, seed=seed) for seed in range(5)]
    layers = [LayerHeads(query_gram(query, mask), key, 0.25, mask) for query, key in drawn]
    together = head_statistics(layers, DEFAULT_METRICS, method=method, target_rank=12)
    for layer, found in zip(layers, together, strict=True):
        [alone] = head_statistics([layer], DEFAULT_METRICS, method=method, target_rank=12)
        assert found.values.keys() == alone.values.keys()
        for name, values in alone.values.items():
            torch.testing.assert_close(found.values[name], values, msg=name)
        assert torch.equal(found.certified, alone.certified)
        torch.testing.assert_close(found.invariant_residual, alone.invariant_residual, rtol=0, atol=1e-6)


def test_layers_with_different_scales_keep_theirs():
    query, key = draw((2, 4, 2, 48, 16))
    one, two = head_statistics([heads_of(query, key, 0.25), heads_of(query, key, 0.5)], ["energy_rms"])
    torch.testing.assert_close(two.values["energy_rms"], 2 * one.values["energy_rms"])


def test_target_ranks_must_fit_the_layers():
    with pytest.raises(ValueError, match="got 1 values for 0 layers"):
        head_statistics([], [], target_rank=[3])
