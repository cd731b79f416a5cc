"""Statistics of many layers: in one call each layer gets what it gets alone."""

from __future__ import annotations

import pytest
import torch
from drawn_layers import draw

from attnmonitor.functional import energy_spectrum, query_gram
from attnmonitor.functional.cores import joined_cores
from attnmonitor.functional.spectrum import core_spectrum
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import batch_statistics, head_cores, head_statistics


def measure(query, key, scale, **keywords):
    cores = head_cores(query_gram(query), key, scale=scale, metrics=DEFAULT_METRICS)
    return head_statistics([cores], **keywords)[0]


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_layers_of_different_sizes_keep_their_order(method):
    shapes = [(2, 4, 2, 30, 8), (2, 4, 4, 30, 16), (2, 2, 1, 30, 8)]
    drawn = [draw(shape, seed=index) for index, shape in enumerate(shapes)]
    cores = [head_cores(query_gram(query), key, scale=0.5, metrics=DEFAULT_METRICS) for query, key in drawn]
    found_all = head_statistics(cores, method=method, target_rank=[6, 12, 64])
    for layer, (query, key), columns in zip(found_all, drawn, (6, 12, 8), strict=True):
        alone = measure(query, key, scale=0.5, method=method, target_rank=columns)
        for name in DEFAULT_METRICS:
            torch.testing.assert_close(layer.values[name], alone.values[name], msg=name)
        assert torch.equal(layer.certified, alone.certified)


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_layers_in_one_batch_get_what_each_gets_alone(method):
    drawn = [
        draw(shape, seed=seed) for seed, shape in enumerate([(2, 4, 2, 48, 16), (1, 6, 3, 30, 16), (3, 2, 2, 20, 16)])
    ]
    layers = [head_cores(query_gram(query), key, scale=0.25, metrics=DEFAULT_METRICS) for query, key in drawn]
    spectrum = core_spectrum(joined_cores([layer.fields for layer in layers]), method=method, target_rank=12)
    for layer, found in zip(layers, batch_statistics(layers, spectrum), strict=True):
        [alone] = head_statistics([layer], method=method, target_rank=12)
        assert found.values.keys() == alone.values.keys()
        for name, values in alone.values.items():
            torch.testing.assert_close(found.values[name], values, msg=name)
        assert torch.equal(found.certified, alone.certified)
        torch.testing.assert_close(found.invariant_residual, alone.invariant_residual, rtol=0, atol=1e-6)


def test_default_target_rank_is_32():
    query, key = draw((1, 4, 4, 80, 48))
    cores = head_cores(query_gram(query), key, scale=0.25, metrics=["energy_effective_rank"])
    [found] = head_statistics([cores], method="randomized")
    expected = energy_spectrum(query, key, scale=0.25, method="randomized", target_rank=32)
    assert torch.equal(found.certified, expected.certified())
    torch.testing.assert_close(found.values["energy_effective_rank"].double(), expected.effective_rank())


def test_only_wanted_metrics_look_at_positions():
    query, key = draw((1, 2, 1, 20, 4))
    cores = head_cores(query_gram(query), key, scale=1.0, metrics=["energy_effective_rank", "key_leverage_max"])
    assert set(cores.values) == {"key_leverage_max"}


def test_target_ranks_must_fit_the_layers():
    with pytest.raises(ValueError, match="got 1 values for 0 layers"):
        head_statistics([], target_rank=[3])
