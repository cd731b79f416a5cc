"""Outlier heads are found whatever the unit, and do not hide themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.summary.outliers import outlier_heads

positive_heads = st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=40)


@given(positive_heads, st.floats(0.01, 100))
def test_distance_of_ratio_metrics_is_unit_free(heads: list[float], unit: float) -> None:
    found = outlier_heads({"a": heads}, "energy_rms", 3)
    scaled = outlier_heads({"a": [unit * head for head in heads]}, "energy_rms", 3)
    np.testing.assert_allclose([h.distance for h in found], [h.distance for h in scaled], atol=1e-6)


@given(positive_heads, st.integers(0, 50))
def test_largest_distance_first_and_at_most_k(heads: list[float], k: int) -> None:
    values = {"a": heads[:3], "b": heads[3:]}
    found = outlier_heads(values, "key_incoherence", k)
    assert len(found) == min(k, len(heads))
    sizes = [abs(head.distance) for head in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(values[head.layer][head.head] == head.value for head in found)


@pytest.mark.parametrize("metric", ["energy_rms", "energy_effective_rank", "key_leverage_max"])
def test_outlier_does_not_hide_itself(metric: str) -> None:
    heads = torch.linspace(0.9, 1.1, 32).reshape(4, 8)
    heads[2, 5] = 40.0
    found = outlier_heads({f"layers.{i}": heads[i] for i in range(4)}, metric, 2)
    assert (found[0].layer, found[0].head) == ("layers.2", 5)
    assert found[0].distance > 20 * abs(found[1].distance)


def test_dead_head_is_farthest_and_nan_is_ignored() -> None:
    found = outlier_heads({"a": torch.tensor([1.0, 2.0, 0.0, math.nan, 1.5])}, "energy_rms", 5)
    assert found[0].head == 2
    assert found[0].distance == -math.inf
    assert 3 not in [head.head for head in found]
    assert outlier_heads({"a": [math.nan]}, "energy_rms", 3) == []
    assert outlier_heads({}, "energy_rms", 3) == []


def test_small_differences_are_no_outliers() -> None:
    found = outlier_heads({"a": [8.0] * 20 + [8.01]}, "energy_effective_rank", 1)
    assert abs(found[0].distance) < 0.1
