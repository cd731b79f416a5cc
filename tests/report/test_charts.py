"""What the charts of a tracker hold: compared with the trajectories they are made of."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import SyntheticRun

from attnmonitor.metrics.catalog import WEIGHT_METRICS
from attnmonitor.metrics.null import NULL_METRICS, null_statistics
from attnmonitor.record.history import History
from attnmonitor.report.charts import layers_chart, model_chart, rank_chart
from attnmonitor.sample import Sample
from attnmonitor.summary.style import ALARM_COLOR, HEAD_COLORS

BANDS = ["least of all heads", "all heads", "lower quartile", "half of the heads", "median head"]


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


def lines(chart: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in chart["data"] if "name" in trace}


def test_a_chart_has_the_bands_then_the_heads_that_moved_and_on_top_those_that_fire() -> None:
    history, sample = followed(SyntheticRun(6, 8, 40, sick=(3, 5), group=2))
    chart = model_chart(history, sample, "energy_rms")
    drawn = lines(chart)
    assert list(drawn)[:5] == BANDS
    assert set(list(drawn)[-2:]) == {"layers.3 head 4 ▲ key sink", "layers.3 head 5 ▲ key sink"}
    colours = [drawn[name]["line"]["color"] for name in list(drawn)[5:]]
    assert colours == [*HEAD_COLORS, ALARM_COLOR, ALARM_COLOR], "no two healthy heads in one colour"
    assert {shape["x0"] for shape in chart["layout"]["shapes"]} == {event.since_step for event in sample.firing}
    assert list(lines(model_chart(history, sample, "key_incoherence")))[-1] == "layers.3 KV head 2 ▲ key sink"


@pytest.mark.parametrize(("layers", "heads"), [(2, 6), (12, 12), (32, 32), (80, 64)])
def test_few_lines_are_named_and_few_points_sent_however_many_heads_there_are(layers: int, heads: int) -> None:
    history, sample = followed(SyntheticRun(layers, heads, 70, sick=(1, 5), metrics=("energy_rms", "key_incoherence")))
    chart = model_chart(history, sample, "energy_rms")
    assert len(chart["data"]) <= 5 + 10 + 1
    assert len(json.dumps(chart)) < 25_000
    of_layers = layers_chart(history, sample, "energy_rms")
    assert len(json.dumps(of_layers)) < 350_000
    headings = [note["text"] for note in of_layers["layout"]["annotations"]]
    assert len(headings) == min(layers, 48)
    assert "layers.1" in headings, "the layer whose head fires"
    assert ("48 of 80 layers" in of_layers["layout"]["title"]["text"]) == (layers == 80)


def test_the_head_that_leaves_the_others_moved_most_though_all_heads_move_together() -> None:
    history, sample = followed(SyntheticRun(4, 4, 30))
    together = np.geomspace(1, 1e4, 30)
    for step, row in enumerate(history._rows["energy_rms"]):
        row.copy_(torch.full_like(row, together[step]))
        row[9] *= 1.02**step
    assert list(lines(model_chart(history, sample, "energy_rms")))[5] == "layers.2 head 1"


@settings(max_examples=12, deadline=None)
@given(num_samples=st.integers(1, 150), seed=st.integers(0, 5), num_missing=st.integers(0, 3))
def test_lines_are_subsets_of_the_trajectories_with_both_ends_and_few_points(
    num_samples: int, seed: int, num_missing: int
) -> None:
    history, sample = followed(SyntheticRun(2, 4, num_samples, seed=seed, metrics=("key_rank",)))
    for row in history._rows["key_rank"][: num_missing and num_missing + 1]:
        row[2] = torch.nan
    drawn = lines(model_chart(history, sample, "key_rank"))
    steps = history.steps
    curves = {
        f"layers.{layer} KV head {head}": values[:, head].tolist()
        for layer, values in enumerate(history["key_rank"].values())
        for head in range(4)
    }
    thinned = drawn["median head"]["x"]
    assert thinned[0] == steps[0]
    assert thinned[-1] == steps[-1]
    for name, line in drawn.items():
        xs, ys = line["x"], line["y"]
        assert len(xs) == len(ys) <= 64
        assert np.isfinite(ys).all()
        if name in curves:
            known = {x: y for x, y in zip(steps, curves[name], strict=True) if np.isfinite(y)}
            assert xs == [x for x in thinned if x in known]
            assert ys == pytest.approx([known[x] for x in xs], rel=1e-4)


def test_bands_are_quantiles_over_all_heads() -> None:
    history, sample = followed(SyntheticRun(3, (2, 4, 3), 20))
    heads = torch.cat(list(history["energy_rms"].values()), dim=1).double()
    drawn = lines(model_chart(history, sample, "energy_rms"))
    for name, share in zip(BANDS, (0, 1, 0.25, 0.75, 0.5), strict=True):
        assert drawn[name]["y"] == pytest.approx(heads.quantile(share, dim=1).tolist(), rel=1e-4)


def of_one_layer(chart: dict[str, Any], number: int) -> dict[str, list[tuple[int, float]]]:
    """The points of every head in one of the small charts."""
    points: dict[str, list[tuple[int, float]]] = {}
    for trace in chart["data"]:
        if trace["xaxis"] == f"x{number}":
            names = trace.get("text") or [trace["name"]] * len(trace["x"])
            for name, x, y in zip(names, trace["x"], trace["y"], strict=True):
                if x is not None:
                    points.setdefault(name, []).append((x, y))
    return points


def test_each_layer_has_a_small_chart_of_its_heads_and_no_others() -> None:
    history, sample = followed(SyntheticRun(3, (2, 4, 3), 20))
    chart = layers_chart(history, sample, "energy_rms")
    for number, (layer, values) in enumerate(history["energy_rms"].items(), 1):
        points = of_one_layer(chart, number)
        assert set(points) == {f"layers.{number - 1} head {head}" for head in range(values.shape[1])}, layer
        for name, drawn in points.items():
            curve = values[:, int(name.split()[-1])].tolist()
            expected = list(zip(history.steps, curve, strict=True))
            assert drawn == [(x, pytest.approx(y, rel=1e-4)) for x, y in expected]


def test_a_head_or_a_layer_without_numbers_leaves_a_gap_and_a_dead_head_no_error() -> None:
    history, sample = followed(SyntheticRun(3, 4, 20, metrics=("energy_rms",)))
    for index, row in enumerate(history._rows["energy_rms"]):
        row[4:8] = torch.nan
        row[8] = 0.0
        row[9] = torch.nan if index < 5 else torch.inf if index == 7 else row[9]
    for chart in (model_chart(history, sample, "energy_rms"), layers_chart(history, sample, "energy_rms")):
        json.dumps(chart, allow_nan=False)
    assert len(of_one_layer(layers_chart(history, sample, "energy_rms"), 3)) == 4


def test_names_of_layers_are_text_and_no_markup() -> None:
    history, sample = followed(SyntheticRun(2, 3, 12, sick=(1, 2), layer_name="<b>{}</b>&x"))
    for chart in (model_chart(history, sample, "energy_rms"), layers_chart(history, sample, "energy_rms")):
        assert "<b>" not in json.dumps(chart)
        assert "&lt;b>" in json.dumps(chart)


def test_learned_and_energy_rank_stand_in_one_chart_where_both_are_measured() -> None:
    metrics = ("energy_effective_rank", *WEIGHT_METRICS)
    history, _ = followed(SyntheticRun(3, 4, 20, metrics=metrics))
    for index, row in enumerate(history._rows["interaction_effective_rank"]):
        if index % 10:
            row.fill_(torch.nan)
    drawn = lines(rank_chart(history))
    assert drawn["learned rank, median"]["x"] == [0, 500]
    assert len(drawn["energy rank, median"]["x"]) == 20
    assert rank_chart(followed(SyntheticRun(3, 4, 20))[0]) == {}


def test_the_null_line_is_what_random_heads_of_the_layers_shape_give() -> None:
    history, sample = followed(SyntheticRun(3, 4, 20))
    known = {name: dataclasses.replace(entry, num_keys=48, head_dim=16) for name, entry in sample.coverage.items()}
    sample = dataclasses.replace(sample, coverage=known)
    for metric in history:
        drawn = lines(model_chart(history, sample, metric))
        null = [line for name, line in drawn.items() if name.startswith("random q and k (48 × 16)")]
        assert len(null) == (metric in NULL_METRICS)
        for line in null:
            assert line["x"] == [0, 950]
            assert line["y"] == pytest.approx([null_statistics(48, 16)[metric]] * 2, rel=1e-4)


def test_nothing_to_draw_makes_no_chart() -> None:
    history, sample = followed(SyntheticRun(2, 4, 5, metrics=("energy_rms",)))
    for row in history._rows["energy_rms"]:
        row.fill_(torch.nan)
    assert model_chart(history, sample, "energy_rms") == layers_chart(history, sample, "energy_rms") == {}
