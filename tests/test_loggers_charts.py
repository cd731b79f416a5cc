"""What the charts of a tracker hold: compared with the trajectories they are made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import SyntheticRun

from attnmonitor.catalog import WEIGHT_METRICS
from attnmonitor.functional import NULL_METRICS, key_incoherence, null_statistics
from attnmonitor.history import History
from attnmonitor.loggers.charts import LineChart, layer_chart, model_chart, rank_chart
from attnmonitor.sample import Sample

BANDS = [f"all heads: {name}" for name in ("greatest", "upper quartile", "median", "lower quartile", "least")]


def followed(run: SyntheticRun) -> tuple[History, Sample]:
    """The trajectories of a run, and its last sample with what fires then."""
    heads = {
        layer: {"query_head": count, "kv_head": count // run.group}
        for layer, count in zip(run.layers, run.heads, strict=True)
    }
    history, firing = History(heads, tuple(run.metrics)), []
    for sample in run.samples():
        history.append(sample)
        firing += [event for event in sample.events if event.state == "firing"]
    return history, dataclasses.replace(sample, firing=firing)


def test_a_chart_has_the_heads_that_fire_first_then_the_bands_then_random_heads() -> None:
    history, sample = followed(SyntheticRun(6, 8, 40, sick=(3, 5), group=2))
    lines = list(model_chart(history, sample, "energy_rms").lines)
    assert set(lines[:2]) == {"layers.3 head 4 ▲ key sink", "layers.3 head 5 ▲ key sink"}
    assert lines[10:] == BANDS
    lines = list(model_chart(history, sample, "key_incoherence").lines)
    assert lines[0] == "layers.3 KV head 2 ▲ key sink"
    assert lines[10:] == BANDS


def test_the_head_that_leaves_the_others_moved_most_though_all_heads_move_together() -> None:
    history, sample = followed(SyntheticRun(4, 4, 30))
    together = np.geomspace(1, 1e4, 30)
    for step, row in enumerate(history._rows["energy_rms"]):
        row.copy_(torch.full_like(row, together[step]))
        row[9] *= 1.02**step
    lines = list(model_chart(history, sample, "energy_rms").lines)
    assert lines[0] == "layers.2 head 1"


@settings(max_examples=12, deadline=None)
@given(num_samples=st.integers(1, 150), seed=st.integers(0, 5), num_missing=st.integers(0, 3))
def test_lines_are_subsets_of_the_trajectories_with_both_ends_and_few_points(
    num_samples: int, seed: int, num_missing: int
) -> None:
    history, sample = followed(SyntheticRun(2, 4, num_samples, seed=seed, metrics=("key_rank",)))
    for row in history._rows["key_rank"][: num_missing and num_missing + 1]:
        row[2] = torch.nan
    chart = model_chart(history, sample, "key_rank")
    steps = history.steps
    curves = {
        f"layers.{layer} KV head {head}": values[:, head].tolist()
        for layer, values in enumerate(history["key_rank"].values())
        for head in range(4)
    }
    for name, (xs, ys) in chart.lines.items():
        assert len(xs) == len(ys) <= 64
        assert np.isfinite(ys).all()
        if name in curves:
            known = [(x, y) for x, y in zip(steps, curves[name], strict=True) if np.isfinite(y)]
            assert (xs[0], xs[-1]) == (known[0][0], known[-1][0])
            assert ys == pytest.approx([dict(known)[x] for x in xs], rel=1e-5)


def test_bands_are_quantiles_over_all_heads() -> None:
    history, sample = followed(SyntheticRun(3, (2, 4, 3), 20))
    heads = torch.cat(list(history["energy_rms"].values()), dim=1).double()
    lines = model_chart(history, sample, "energy_rms").lines
    for name, share in zip(BANDS, (1, 0.75, 0.5, 0.25, 0), strict=True):
        assert lines[name][1] == pytest.approx(heads.quantile(share, dim=1).tolist(), rel=1e-5)


def test_a_layers_chart_has_each_of_its_heads_and_no_other() -> None:
    history, sample = followed(SyntheticRun(3, (2, 4, 3), 20))
    chart = layer_chart(history, sample, "energy_rms", "model.layers.1.self_attn")
    assert list(chart.lines) == [f"layers.1 head {head}" for head in range(4)]
    assert chart.title == "layers.1: energy rms [logit units]"


def test_learned_and_energy_rank_stand_in_one_chart_where_both_are_measured() -> None:
    metrics = ("energy_effective_rank", *WEIGHT_METRICS)
    history, _ = followed(SyntheticRun(3, 4, 20, metrics=metrics))
    for index, row in enumerate(history._rows["interaction_effective_rank"]):
        if index % 10:
            row.fill_(torch.nan)
    lines = rank_chart(history).lines
    assert [name.split(" rank")[0] for name in lines] == ["learned"] * 3 + ["energy"] * 3
    assert lines["learned rank, median"][0] == [0, 500]
    assert len(lines["energy rank, median"][0]) == 20
    assert rank_chart(followed(SyntheticRun(3, 4, 20))[0]).lines == {}


def test_the_null_line_is_what_random_heads_of_the_layers_shape_give() -> None:
    history, sample = followed(SyntheticRun(3, 4, 20))
    known = {name: dataclasses.replace(entry, num_keys=48, head_dim=16) for name, entry in sample.coverage.items()}
    sample = dataclasses.replace(sample, coverage=known)
    for metric in history:
        lines = model_chart(history, sample, metric).lines
        null = [line for name, line in lines.items() if name.startswith("random q and k (48 × 16)")]
        assert len(null) == (metric in NULL_METRICS)
        for steps, values in null:
            assert steps == [0, 950]
            assert values == pytest.approx([null_statistics(48, 16)[metric]] * 2, rel=1e-5)


@pytest.mark.parametrize(("num_positions", "head_dim"), [(24, 8), (96, 16), (40, 64)])
def test_null_statistics_are_those_of_other_random_heads_and_of_no_size(num_positions: int, head_dim: int) -> None:
    before = torch.get_rng_state()
    null = null_statistics(num_positions, head_dim)
    assert torch.equal(torch.get_rng_state(), before)
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 1, 256, num_positions, head_dim, dtype=torch.float64, generator=generator)
    ranks = torch.stack([rank_of(q, k) for q, k in zip(7 * query[0], 0.1 * key[0], strict=True)])
    assert null["energy_effective_rank"] == pytest.approx(float(ranks.mean()), abs=0.5)
    assert null["key_incoherence"] == pytest.approx(float(key_incoherence(0.1 * key).mean()), rel=0.1)


def rank_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Effective rank by the dense matrix."""
    field = query @ (key - key.mean(0)).T
    energy = torch.linalg.svdvals(field).square()
    return (energy.cumsum(0) < 0.9 * energy.sum()).sum() + 1.0


def test_nothing_to_draw_makes_no_line() -> None:
    chart = LineChart("empty")
    chart.add("nothing known", np.arange(3), np.full(3, np.nan), 10)
    assert chart.lines == {}
