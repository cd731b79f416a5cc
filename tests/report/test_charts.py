"""The charts sent to trackers hold the trajectories they are made of."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import SyntheticRun, followed

from attnmonitor.metrics.catalog import WEIGHT_METRICS
from attnmonitor.metrics.null import NULL_METRICS, null_statistics
from attnmonitor.report.charts import layers_chart, model_chart, rank_chart
from attnmonitor.summary.style import ALARM_COLOR, HEAD_COLORS

BANDS = ["least of all heads", "all heads", "lower quartile", "half of the heads", "median head"]


def lines(chart: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {trace["name"]: trace for trace in chart["data"] if "name" in trace}


def test_bands_then_moved_heads_then_alarmed_heads() -> None:
    history, sample = followed(SyntheticRun(6, 8, 40, faulty=(3, 5), group=2))
    chart = model_chart(history, sample, "energy_rms")
    drawn = lines(chart)
    assert list(drawn)[:5] == BANDS
    assert set(list(drawn)[-2:]) == {"layers.3 head 4 ▲ key sink", "layers.3 head 5 ▲ key sink"}
    colors = [drawn[name]["line"]["color"] for name in list(drawn)[5:]]
    assert sorted(colors[:-2]) == sorted(HEAD_COLORS), "no two healthy heads in one color"
    assert colors[-2:] == [ALARM_COLOR, ALARM_COLOR]
    assert {shape["x0"] for shape in chart["layout"]["shapes"]} == {event.since_step for event in sample.firing}
    assert list(lines(model_chart(history, sample, "key_incoherence")))[-1] == "layers.3 KV head 2 ▲ key sink"


def test_a_head_keeps_its_color_in_all_charts() -> None:
    history, sample = followed(SyntheticRun(6, 8, 40, group=2))
    colors: dict[str, set[str]] = {}
    for metric in history:
        for chart in (model_chart(history, sample, metric), layers_chart(history, sample, metric)):
            for name, line in lines(chart).items():
                if name.startswith("layers."):
                    colors.setdefault(name, set()).add(line["line"]["color"])
    assert len(colors) > len(HEAD_COLORS)
    assert {len(used) for used in colors.values()} == {1}


def test_both_charts_color_the_same_heads() -> None:
    history, sample = followed(SyntheticRun(4, 4, 81, faulty=(2, 1)))

    def colored(chart: dict[str, Any]) -> dict[str, str]:
        return {name: line["line"]["color"] for name, line in lines(chart).items() if name.startswith("layers.")}

    for metric in history:
        of_model, of_layers = (draw(history, sample, metric) for draw in (model_chart, layers_chart))
        assert colored(of_model) == colored(of_layers), metric
        assert max(len(line["x"]) for line in lines(of_layers).values()) <= 32


@pytest.mark.parametrize(("layers", "heads"), [(2, 6), (12, 12), (32, 32), (80, 64)])
def test_charts_stay_small_for_models_of_any_size(layers: int, heads: int) -> None:
    history, sample = followed(
        SyntheticRun(layers, heads, 70, faulty=(1, 5), metrics=("energy_rms", "key_incoherence"))
    )
    chart = model_chart(history, sample, "energy_rms")
    assert len(chart["data"]) <= 5 + 10 + 1
    assert len(json.dumps(chart)) < 25_000
    of_layers = layers_chart(history, sample, "energy_rms")
    assert len(json.dumps(of_layers)) < 350_000
    headings = [note["text"] for note in of_layers["layout"]["annotations"]]
    assert len(headings) == min(layers, 48)
    assert "layers.1" in headings, "the layer whose head fires"
    assert ("48 of 80 layers" in of_layers["layout"]["title"]["text"]) == (layers == 80)


def test_common_movement_is_not_counted() -> None:
    common = np.geomspace(1, 1e4, 30)

    def change(index: int, values: Any) -> None:
        for heads in values["energy_rms"].values():
            heads.fill_(common[index])
        values["energy_rms"]["model.layers.2.self_attn"][1] *= 1.02**index

    history, sample = followed(SyntheticRun(4, 4, 30), change)
    assert list(lines(model_chart(history, sample, "energy_rms")))[5] == "layers.2 head 1"


@settings(max_examples=12, deadline=None)
@given(num_samples=st.integers(1, 150), seed=st.integers(0, 5), num_missing=st.integers(0, 3))
def test_lines_are_thinned_trajectories_with_both_ends(num_samples: int, seed: int, num_missing: int) -> None:
    def change(index: int, values: Any) -> None:
        if num_missing and index <= num_missing:
            values["key_rank"]["model.layers.0.self_attn"][2] = torch.nan

    history, sample = followed(SyntheticRun(2, 4, num_samples, seed=seed, metrics=("key_rank",)), change)
    drawn = lines(model_chart(history, sample, "key_rank"))
    steps = history.steps
    curves = {
        f"layers.{layer} head {head}": values[:, head].tolist()
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


def points_of_layer(chart: dict[str, Any], number: int) -> dict[str, list[tuple[int, float]]]:
    """The points of every head in one of the small charts."""
    points: dict[str, list[tuple[int, float]]] = {}
    for trace in chart["data"]:
        if trace["xaxis"] == f"x{number}":
            names = trace["text"] if "text" in trace else [trace["name"]] * len(trace["x"])
            for name, x, y in zip(names, trace["x"], trace["y"], strict=True):
                if x is not None:
                    points.setdefault(name, []).append((x, y))
    return points


def test_each_small_chart_shows_the_heads_of_its_layer() -> None:
    history, sample = followed(SyntheticRun(3, (2, 4, 3), 20))
    chart = layers_chart(history, sample, "energy_rms")
    for number, (layer, values) in enumerate(history["energy_rms"].items(), 1):
        points = points_of_layer(chart, number)
        assert set(points) == {f"layers.{number - 1} head {head}" for head in range(values.shape[1])}, layer
        for name, drawn in points.items():
            curve = values[:, int(name.split()[-1])].tolist()
            expected = list(zip(history.steps, curve, strict=True))
            assert drawn == [(x, pytest.approx(y, rel=1e-4)) for x, y in expected]


def test_missing_values_leave_gaps() -> None:
    def change(index: int, values: Any) -> None:
        _, second, third = values["energy_rms"].values()
        second.fill_(torch.nan)
        third[0] = 0.0
        third[1] = torch.nan if index < 5 else torch.inf if index == 7 else third[1]

    history, sample = followed(SyntheticRun(3, 4, 20, metrics=("energy_rms",)), change)
    for chart in (model_chart(history, sample, "energy_rms"), layers_chart(history, sample, "energy_rms")):
        json.dumps(chart, allow_nan=False)
    assert len(points_of_layer(layers_chart(history, sample, "energy_rms"), 3)) == 4


def test_layer_names_are_escaped() -> None:
    history, sample = followed(SyntheticRun(2, 3, 12, faulty=(1, 2), layer_name="<b>{}</b>&x"))
    for chart in (model_chart(history, sample, "energy_rms"), layers_chart(history, sample, "energy_rms")):
        assert "<b>" not in json.dumps(chart)
        assert "&lt;b>" in json.dumps(chart)


def test_rank_chart_needs_both_ranks() -> None:
    metrics = ("energy_effective_rank", *WEIGHT_METRICS)

    def change(index: int, values: Any) -> None:
        for heads in values["interaction_effective_rank"].values() if index % 10 else ():
            heads.fill_(torch.nan)

    history, _ = followed(SyntheticRun(3, 4, 20, metrics=metrics), change)
    drawn = lines(rank_chart(history))
    assert drawn["learned rank, median"]["x"] == [0, 500]
    assert len(drawn["energy rank, median"]["x"]) == 20
    assert rank_chart(followed(SyntheticRun(3, 4, 20))[0]) == {}


def test_null_line_is_the_value_of_random_heads() -> None:
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


def test_no_values_make_no_chart() -> None:
    def change(index: int, values: Any) -> None:
        for heads in values["energy_rms"].values():
            heads.fill_(torch.nan)

    history, sample = followed(SyntheticRun(2, 4, 5, metrics=("energy_rms",)), change)
    assert model_chart(history, sample, "energy_rms") == layers_chart(history, sample, "energy_rms") == {}


TEXT_BOXES = """
    const [data, layout] = arguments, panel = document.body.appendChild(document.createElement("div"));
    Object.assign(panel.style, { width: "420px", height: "300px" });
    return Plotly.newPlot(panel, data, layout).then(() => {
      const { left, top } = panel.getBoundingClientRect();
      const texts = [...panel.querySelectorAll(".annotation-text, .gtitle")].filter(text => text.textContent);
      const boxes = texts.map(text => text.getBoundingClientRect());
      const plot = panel.querySelector(".nsewdrag").getBoundingClientRect();
      panel.remove();
      const placed = boxes.map(box => [box.left - left, box.top - top, box.right - left, box.bottom - top]);
      return [plot.width * plot.height / 420 / 300, placed];
    });
"""


def test_names_at_line_ends_fit_a_panel_of_a_tracker(tmp_path: Path, browser: Any) -> None:
    """At 420 × 300 pixels: every name inside, none on another one, and most of the panel is the plot."""
    from plotly.offline import get_plotlyjs

    (tmp_path / "empty.html").write_text(f"<meta charset='utf-8'><body><script>{get_plotlyjs()}</script>")
    browser.get((tmp_path / "empty.html").as_uri())
    long_name = "base_model.model.decoder.block.{}.layer.0.SelfAttention"
    metrics = ("energy_effective_rank", "energy_rms", "key_incoherence", *WEIGHT_METRICS)
    for run in (
        SyntheticRun(12, 12, 40, faulty=(3, 5), layer_name=long_name, metrics=metrics),
        SyntheticRun(1, 4, 40, metrics=metrics),
        SyntheticRun(32, 32, 40, group=4, faulty=(1, 5), metrics=metrics),
    ):
        history, sample = followed(run)
        for chart in (*(model_chart(history, sample, metric) for metric in metrics[:3]), rank_chart(history)):
            if not chart:
                continue
            share, boxes = browser.execute_script(TEXT_BOXES, chart["data"], chart["layout"])
            assert share > 0.4
            assert len(boxes) >= 3
            for left, top, right, bottom in boxes:
                assert 0 <= left < right <= 420
                assert 0 <= top < bottom <= 300
            for at, (left, top, right, bottom) in enumerate(boxes):
                for other_left, other_top, other_right, other_bottom in boxes[:at]:
                    width = min(right, other_right) - max(left, other_left)
                    assert width < 1 or min(bottom, other_bottom) - max(top, other_top) < 2
