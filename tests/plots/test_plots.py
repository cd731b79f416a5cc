"""Plots show every head, mark alarms, stay readable at any size, and change no global state."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from synthetic_runs import SyntheticRun

from attnmonitor.alerts.firing import still_firing
from attnmonitor.plots import bands, heatmap, overview, spectrum, trajectories
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent
from attnmonitor.summary.style import ALARM_COLOR
from attnmonitor.summary.verdict import verdict

SIZES = {"12 heads": (2, 6, 1), "144 heads": (12, 12, 1), "1024 heads": (32, 32, 4), "uneven": (4, [4, 12, 8, 2], 1)}


@pytest.fixture(scope="module", params=list(SIZES))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    num_layers, num_heads, group = SIZES[request.param]
    synthetic = SyntheticRun(num_layers, num_heads, 30, group=group, faulty=(1, 5))
    path = tmp_path_factory.mktemp("plots") / "run.sqlite"
    with RecordWriter(path, run=synthetic.config) as record:
        for sample in synthetic.samples():
            record.append(sample)
    return RunRecord.open(path)


def last(run: RunRecord, metric: str) -> dict[str, np.ndarray]:
    return {layer: curves[-1] for layer, curves in run.trajectories(metric).items()}


def frames(figure: Figure) -> set[tuple[int, int]]:
    patches = [p for p in figure.axes[0].patches if isinstance(p, Rectangle) and not p.get_fill()]
    return {(int(p.get_y()), int(p.get_x())) for p in patches if to_hex(p.get_edgecolor()).upper() == ALARM_COLOR}


def overlaps(figure: Figure, texts: list[mpl.text.Text]) -> list[tuple[str, str]]:
    figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for i, (a, first) in enumerate(boxes) for b, second in boxes[:i] if first.overlaps(second)]


def test_heatmap_has_all_heads_and_frames_alarms(run: RunRecord) -> None:
    values = last(run, "energy_rms")
    figure = heatmap(
        values,
        metric="energy_rms",
        events=still_firing(run.events),
        coverage=run.coverage,
        global_step=int(run.steps[-1]),
    )
    (mesh,) = [artist for artist in figure.axes[0].collections if isinstance(artist, QuadMesh)]
    assert mesh.get_array().count() == sum(map(len, values.values()))
    group = list(run.coverage.values())[1].num_query_heads // list(run.coverage.values())[1].num_kv_heads
    assert frames(figure) == {(1, head) for head in range(5 // group * group, 5 // group * group + group)}
    assert figure.axes[0].get_title(loc="left") == f"energy rms at step {run.steps[-1]:,}"
    assert not overlaps(figure, [*figure.axes[0].get_xticklabels(), *figure.axes[0].get_yticklabels()])


def test_alarm_frames_heads_of_its_scope() -> None:
    values = {"a": np.ones(8), "b": np.ones(8)}
    sink = AlertEvent("key_sink", "key_sink", "kv_head", "b", 1, 9.0, 2.0, 10, "firing")
    assert frames(heatmap(values, metric="key_incoherence", events=[sink])) == {(1, 1)}
    assert frames(heatmap(values, metric="energy_rms", events=[sink])) == set()
    assert (
        frames(
            heatmap(values, metric="energy_rms", events=[AlertEvent("m", "mass", "run", None, None, 1, 1, 1, "firing")])
        )
        == set()
    )


@pytest.mark.parametrize("num_heads", [6, 12, 144])
@pytest.mark.parametrize("metric", ["energy_rms", "key_leverage_max", None])
def test_one_outlier_does_not_stretch_the_color_scale(metric: str | None, num_heads: int) -> None:
    heads = np.linspace(0.5, 0.9, num_heads)
    heads[2] = 1e6
    figure = heatmap({"a": heads[: num_heads // 2], "b": heads[num_heads // 2 :]}, metric=metric)
    norm = next(a for a in figure.axes[0].collections if isinstance(a, QuadMesh)).norm
    assert norm.vmax < 1.0
    assert norm(0.9) - norm(0.5) > 0.8
    assert figure.axes[1]._colorbar.extend in ("both", "max")


def test_two_groups_of_heads_have_different_shades() -> None:
    figure = heatmap({"a": np.array([1.0] * 8 + [100.0] * 4)}, metric="energy_rms")
    norm = next(a for a in figure.axes[0].collections if isinstance(a, QuadMesh)).norm
    assert norm(100.0) - norm(1.0) > 0.9


@pytest.mark.parametrize("metric", ["energy_rms", "energy_effective_rank"])
def test_heatmap_of_equal_or_invalid_values(metric: str) -> None:
    equal = heatmap({"a": 3.0 + 1e-6 * np.arange(4)}, metric=metric)
    mesh = next(a for a in equal.axes[0].collections if isinstance(a, QuadMesh))
    assert np.ptp(mesh.norm(mesh.get_array())) < 1e-3
    for heads in ([0.0, 0.0], [np.nan, np.nan], [1.0, np.nan, 0.0, np.inf], [-1.0, 2.0], []):
        figure = heatmap({"a": np.array(heads), "b": torch.tensor([1.0, 2.0])}, metric=metric)
        figure.canvas.draw()
        hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
        assert len(hatched) == np.isnan(heads).sum()


def test_trajectories_draw_all_heads_and_name_few(run: RunRecord) -> None:
    curves = run.trajectories("energy_rms")
    figure = trajectories(curves, run.steps, metric="energy_rms", events=run.events, coverage=run.coverage)
    ax = figure.axes[0]
    drawn = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert sum(len(c.get_segments()) for c in drawn) == sum(c.shape[1] for c in curves.values())
    names = [text for text in ax.texts if text.get_text()]
    assert len(names) == 5
    assert any(text.get_text().endswith("1 head 5") and text.get_color() == ALARM_COLOR for text in names)
    figure.canvas.draw()
    heights = sorted(ax.bbox.height * name.xyann[1] for name in names)
    assert np.diff(heights).min() > names[0].get_size() * figure.dpi / 72, "no name covers another"
    assert ax.get_xlabel() == "optimizer step"
    assert ax.get_ylabel() == "logit units"
    assert ax.get_yscale() == "log"
    assert ax.get_legend() is None


def test_log_axis_spans_all_curves() -> None:
    curves = np.array([[20.0, np.nan], [500.0, 40.0]])
    low, high = trajectories({"a": curves}, [0, 1], metric="energy_rms", num_named=0).axes[0].get_ylim()
    assert 10 < low < 20
    assert 500 < high < 1000


def test_names_stand_at_the_ends_of_their_curves() -> None:
    steps = np.arange(5)
    curves = {"a": np.stack([steps * 0.0, steps * 10.0, steps * 25.0], axis=1)}
    for metric in ("energy_effective_rank", None):
        figure = trajectories(curves, steps, metric=metric, num_named=3)
        figure.canvas.draw()
        ax = figure.axes[0]
        for text, value in zip(sorted(ax.texts, key=lambda t: t.xy[1]), (0.0, 40.0, 100.0), strict=True):
            assert text.xy[1] == pytest.approx(ax.transAxes.inverted().transform(ax.transData.transform((0, value)))[1])


def test_bands_are_quantiles_over_all_heads(run: RunRecord) -> None:
    curves = run.trajectories("key_incoherence")
    figure = bands(curves, run.steps, metric="key_incoherence", events=run.events, coverage=run.coverage)
    median = next(line for line in figure.axes[0].lines if line.get_label() == "median head")
    expected = np.median(np.concatenate(list(curves.values()), axis=1), axis=1)
    np.testing.assert_allclose(median.get_ydata(), expected, rtol=1e-6)
    np.testing.assert_array_equal(median.get_xdata(), run.steps)
    marks = [line for line in figure.axes[0].lines if line.get_marker() == "v"]
    assert [float(mark.get_xdata()[0]) for mark in marks] == [event.global_step for event in run.events]
    assert to_hex(marks[-1].get_markerfacecolor()) == "#ffffff", "an alarm that cleared is hollow"


def test_slower_schedule_leaves_no_gaps() -> None:
    curve = np.full((9, 2), np.nan)
    curve[::4] = [[1, 2], [3, 4], [5, 6]]
    figure = bands({"a": curve}, np.arange(9), metric="spectral_gap")
    median = next(line for line in figure.axes[0].lines if line.get_label() == "median head")
    assert median.get_xdata().tolist() == [0, 4, 8]
    assert median.get_ydata().tolist() == [1.5, 3.5, 5.5]


@pytest.mark.parametrize("draw", [trajectories, bands])
def test_no_values_make_an_empty_chart(draw: object) -> None:
    for curves, steps in (({}, []), ({"a": np.empty((0, 3))}, []), ({"a": np.full((2, 3), np.nan)}, [0, 10])):
        draw(curves, steps, metric="energy_rms").canvas.draw()


def test_spectrum_marks_effective_ranks() -> None:
    sigma = np.sqrt([[8.0, 1.0, 0.5, 0.5], [4.0, 3.0, 2.0, 1.0]])
    figure = spectrum(sigma, head_names=["layers.0 head 1", "layers.0 head 2"])
    dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [int(np.ravel(dot.get_xdata())[0]) for dot in dots] == [2, 3]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == [
        "layers.0 head 1",
        "layers.0 head 2",
    ]
    many = spectrum(np.tile(sigma, (72, 1)))
    assert len(many.axes[0].get_legend().get_texts()) == 1
    spectrum(np.zeros((2, 4))).canvas.draw()


def test_overview_title_is_the_verdict(run: RunRecord, tmp_path: Path) -> None:
    figure = overview(run)
    assert figure.get_suptitle().replace("\n", " ") == verdict(run.counts)
    assert len(figure.axes) == 4 * 3
    assert not overlaps(figure, figure.axes[0].get_yticklabels())
    figure.savefig(tmp_path / "overview.png", dpi=40)
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_overview_of_an_empty_record(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "run.sqlite", run={}).close()
    figure = overview(RunRecord.open(tmp_path / "run.sqlite"))
    assert figure.get_suptitle() == "unknown: no sample taken yet"
    figure.canvas.draw()


def test_plots_draw_into_given_axes() -> None:
    figure = Figure()
    axes = figure.subplots(2, 2)
    curves = {"a": np.random.default_rng(0).random((4, 3)) + 1}
    assert heatmap({"a": curves["a"][0]}, ax=axes[0, 0]) is figure
    assert trajectories(curves, range(4), ax=axes[0, 1]) is figure
    assert bands(curves, range(4), ax=axes[1, 0]) is figure
    assert spectrum(curves["a"], ax=axes[1, 1]) is figure


def test_global_matplotlib_state_is_unchanged() -> None:
    def open_figures() -> list[int]:
        pyplot = sys.modules.get("matplotlib.pyplot")
        return [] if pyplot is None else pyplot.get_fignums()

    before, were_open = dict(mpl.rcParams), open_figures()
    heatmap({"a": np.ones(3)}, metric="energy_rms")
    trajectories({"a": np.ones((2, 3))}, [0, 1], metric="energy_rms")
    assert dict(mpl.rcParams) == before
    assert open_figures() == were_open


def test_one_sample_is_shown_as_points_at_its_step(tmp_path: Path) -> None:
    synthetic, path = SyntheticRun(3, 4, 1), tmp_path / "run.sqlite"
    with RecordWriter(path, run=synthetic.config) as record:
        record.log([(0, "loss", 4.0)])
        record.append(next(synthetic.samples()))
    run = RunRecord.open(path)
    curves = run.trajectories("energy_rms")
    each = trajectories(curves, run.steps, metric="energy_rms")
    points = np.concatenate([line.get_ydata() for line in each.axes[0].lines if line.get_marker() not in ("", "None")])
    assert set(np.concatenate(list(curves.values()), axis=1)[0]) <= set(points)
    for figure in (each, overview(run)):
        figure.canvas.draw()
        for ax in figure.axes:
            assert all(line.get_marker() not in ("", "None") for line in ax.lines if line.get_linestyle() != ":")
            if ax.get_xlabel() == "optimizer step":
                low, high = ax.get_xlim()
                ticks = [text.get_text() for text in ax.get_xticklabels() if low <= text.get_position()[0] <= high]
                assert ticks == ["0"]


def test_alarm_that_is_farthest_out_has_its_name() -> None:
    """Of more alarms than names, the worst is named, also where it began last."""
    curves = {"layer": np.linspace(1.0, 2.0, 8)[None] ** np.arange(1, 5)[:, None]}
    events = [
        AlertEvent(
            "hot", "kind", "query_head", "layer", head, 1.0, 1.0, 10 + head, "firing", distance=1.0 + (head == 7)
        )
        for head in range(8)
    ]
    figure = trajectories(curves, range(4), metric="energy_rms", events=events, num_named=3)
    assert "layer head 7" in {text.get_text() for text in figure.axes[0].texts}
