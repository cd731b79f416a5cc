"""The null line of the charts: what a metric is on heads with random queries and keys."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import reference
import torch

from attnmonitor.functional import key_incoherence
from attnmonitor.metrics.null import NULL_METRICS, null_statistics


@pytest.mark.parametrize(("num_positions", "head_dim"), [(24, 8), (96, 16), (40, 64)])
def test_null_equals_other_random_heads_of_any_size(num_positions: int, head_dim: int) -> None:
    before = torch.get_rng_state()
    null = null_statistics(num_positions, head_dim)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 256, num_positions, head_dim, dtype=torch.float64, generator=generator)
    fields = [reference.field(q, k, scale=0.7) for q, k in zip(query[0], key[0], strict=True)]
    ranks = [reference.effective_rank(field) for field in fields]
    assert null["energy_effective_rank"] == pytest.approx(statistics.mean(ranks), abs=0.5)
    assert null["key_incoherence"] == pytest.approx(float(key_incoherence(0.1 * key).mean()), rel=0.1)


def test_exactly_scale_free_metrics_have_a_null() -> None:
    assert set(NULL_METRICS) == set(null_statistics(24, 8)) == {
        "energy_delocalization",
        "energy_effective_rank",
        "energy_participation_ratio",
        "energy_stable_rank",
        "head_similarity",
        "key_condition_number",
        "key_incoherence",
        "key_leverage_max",
        "key_norm_participation",
        "key_participation_ratio",
        "key_rank",
        "value_spread",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("num_positions", "head_dim", "num_heads"), [(20, 8, 16), (4096, 128, 8), (65536, 64, 1), (131072, 64, 1)]
)
def test_long_probe_takes_fewer_heads_but_at_least_one(
    num_positions: int, head_dim: int, num_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    null_statistics.cache_clear()
    whole, shapes = torch.randn, []

    def short(*shape: int, **keywords: Any) -> torch.Tensor:
        shapes.append(shape)
        return whole(*shape[:3], 64, 8, **keywords)  # what is asked for would take gigabytes

    monkeypatch.setattr(torch, "randn", short)
    null_statistics(num_positions, head_dim)
    assert shapes == [(2, 1, num_heads, num_positions, head_dim)]
    null_statistics(num_positions, head_dim)
    assert len(shapes) == 1, "the same line is not computed again for every chart"
    null_statistics.cache_clear()
