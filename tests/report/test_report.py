"""The report has the numbers of the record and works in a real browser, without network requests or errors."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import click_cell, narrow_screen
from synthetic_runs import SyntheticRun, followed, written

from attnmonitor import METRICS
from attnmonitor.record import RecordError, RecordWriter, RunRecord
from attnmonitor.report import write_report
from attnmonitor.report.alarms import alarm_spans
from attnmonitor.report.charts import model_chart
from attnmonitor.report.numbers import run_numbers
from attnmonitor.report.page_charts import page_charts
from attnmonitor.report.page_layout import shared_scales
from attnmonitor.sample import AlertEvent, LayerCoverage
from attnmonitor.summary.structure import coverage_row
from attnmonitor.summary.style import ALARM_COLOR, CHOSEN_COLOR

pytest.importorskip("plotly")

HOSTILE = "</script><img src=x onerror=alert(1)>&amp;{}"


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def event(step: int, state: str, **changes: Any) -> AlertEvent:
    return replace(AlertEvent("hot", "logit_blowup", "query_head", "a", 0, 9.0, 1.0, step, state), **changes)


def test_alarm_span_ends_when_the_alarm_clears() -> None:
    events = [
        event(10, "firing", since_step=8),
        event(30, "firing", severity="critical", since_step=8),
        event(20, "firing", head=1),
        event(40, "cleared", since_step=8),
        event(60, "firing"),
    ]
    spans = [(span.event.head, span.event.severity, span.began, span.ended) for span in alarm_spans(events)]
    assert spans == [(0, "critical", 8, 40), (1, "warning", 20, None), (0, "warning", 60, None)]


def test_numbers_are_those_of_the_record(tmp_path: Path) -> None:
    run = SyntheticRun(3, [4, 8, 6], 20, group=2, faulty=(1, 5))
    record = RunRecord.open(written(tmp_path / "run.sqlite", run))
    numbers = run_numbers(record)
    assert numbers["steps"] == record.steps.tolist()
    for name, metric in numbers["metrics"].items():
        curves = np.concatenate(list(record.trajectories(name).values()), axis=1)
        assert metric["frames"] == list(range(20))
        np.testing.assert_array_equal(unpacked(metric["values"]).reshape(20, -1), curves)
        bands = np.quantile(curves, [0, 0.25, 0.5, 0.75, 1], axis=1)
        np.testing.assert_allclose(unpacked(metric["bands"]).reshape(5, 20), bands, rtol=1e-6)
    assert [(alarm["began"], alarm["ended"]) for alarm in numbers["alarms"]] == [(600, 900), (650, None)]
    assert numbers["alarms"][1]["heads"] == {"query_head": (4, 5), "kv_head": (2,)}


def test_thinning_is_even_and_keeps_ends_and_alarms(tmp_path: Path) -> None:
    run = SyntheticRun(2, 4, 150, faulty=(1, 3), metrics=("energy_rms", "key_incoherence"))
    path = written(tmp_path / "run.sqlite", run)
    record = RunRecord.open(path)
    numbers = run_numbers(record, most_values=2 * 8 * 30)
    for metric in numbers["metrics"].values():
        frames = metric["frames"]
        assert 30 <= len(frames) <= 30 + 3
        assert {0, 149} <= set(frames)
        assert {event.global_step // run.every for event in record.events} <= set(frames)
        assert np.diff(frames).max() <= 6
        assert len(unpacked(metric["values"])) == 8 * len(frames)
        assert metric["thinned"]
        assert len(metric["band_samples"]) == 150
    assert "To keep this page light" not in write_report(path).read_text()


def test_page_says_how_much_was_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnmonitor.report.page.MOST_VALUES", 2000)
    page = write_report(written(tmp_path / "run.sqlite", SyntheticRun(2, 4, 60))).read_text()
    assert re.search(r"heatmaps and curves show \d+ of 60 samples. The record has them all", page.replace(",", ""))


def test_page_of_144_heads_is_under_15_megabytes(tmp_path: Path) -> None:
    run = SyntheticRun(12, 12, 1)
    sample = next(run.samples())
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for step in range(500):
            record.append(replace(sample, global_step=step))
    page = write_report(tmp_path / "run.sqlite")
    assert page == tmp_path / "run.html"
    assert page.stat().st_size < 15e6
    numbers = json.loads(re.search(r'type="application/json">(.*?)</script>', page.read_text()).group(1))
    assert len(numbers["runs"][0]["metrics"]["key_rms"]["frames"]) == 500, "all of it is there"


def test_page_has_verdict_alarms_coverage_and_cost(tmp_path: Path) -> None:
    run = SyntheticRun(2, 4, 30, faulty=(1, 2))
    path = tmp_path / "run.sqlite"
    with RecordWriter(path, run={**run.config, "model": "build.<locals>.SyntheticLM"}) as record:
        for sample in run.samples():
            missed = {"pooler": LayerCoverage("pooler", reason="a kernel nobody can see into")}
            record.append(replace(sample, coverage={**sample.coverage, **missed}))
    page = write_report(path, tmp_path / "out" / "page.html").read_text()
    assert "1 head needs a look: model.layers.1.self_attn head 2 (key sink since step 950)" in page
    for layer in (*sample.coverage.values(), missed["pooler"]):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in coverage_row(layer))
        assert f"<tr>{cells}<td>" in page, "as in the terminal"
    assert "2 of 3 attention layers measured" in page
    assert "0.21 s per sample (median), 6.3 s in 30 samples" in page
    assert "certified fraction 0.97" in page
    assert "run.sqlite · SyntheticLM<" in page
    assert "5e1f0c" in page
    assert "still firing" in page
    assert "A few key positions carry the key subspace" in page


def test_likely_mistakes_stand_below_the_verdict(tmp_path: Path) -> None:
    run = SyntheticRun(4, 4, 2)
    sample = next(run.samples())
    odd = {
        name: replace(layer, scale=1.0) if name == run.layers[2] else layer for name, layer in sample.coverage.items()
    }
    for coverage, number in ((odd, 1), (sample.coverage, 0)):
        path = tmp_path / f"{number}.sqlite"
        with RecordWriter(path, run=run.config) as record:
            record.append(replace(sample, coverage=coverage))
        page = write_report(path).read_text(encoding="utf-8")
        heading = page.partition("<h1")[2].partition("<h2")[0]
        assert heading.count("Seen at attach: ") == heading.count(f"{run.layers[2]}: odd: its scale is ") == number


def test_records_without_values_make_a_page(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "empty.sqlite", run={}).close()
    assert "no sample taken yet" in write_report(tmp_path / "empty.sqlite").read_text()
    sample = next(SyntheticRun(1, 1, 1).samples())
    with RecordWriter(tmp_path / "failed.sqlite", run={}) as record:
        record.append(replace(sample, values={}, spread={}, failure="RuntimeError: <boom>", failures=1))
    page = write_report(tmp_path / "failed.sqlite").read_text()
    assert "unknown: nothing measured: 1 sample failed (RuntimeError: &lt;boom&gt;)" in page


def test_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.sqlite").write_text("not a database, " * 100)
    with pytest.raises(RecordError, match=r"notes\.sqlite"):
        write_report(tmp_path / "notes.sqlite")
    with pytest.raises(FileNotFoundError, match=r"none\.sqlite"):
        write_report(tmp_path / "none.sqlite")


def test_page_opens_on_the_metric_of_the_worst_alarm(tmp_path: Path) -> None:
    run = SyntheticRun(2, 3, 30, faulty=(1, 2))
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in run.samples():
            events = [replace(event, message="+2.9 in ln energy_rms, limit +0.6") for event in sample.events]
            record.append(replace(sample, events=events))
    assert run_numbers(RunRecord.open(tmp_path / "run.sqlite"))["first_look"] == {
        "layer": 1,
        "head": 2,
        "scope": "kv_head",
        "metric": "energy_rms",
    }


def test_page_and_tracker_draw_the_same_lines(tmp_path: Path) -> None:
    run, same_run = (SyntheticRun(4, 8, 40, group=2, faulty=(1, 5)) for _ in range(2))
    record = RunRecord.open(written(tmp_path / "run.sqlite", run))
    numbers = run_numbers(record)
    charts = page_charts(record, numbers, shared_scales([numbers]))
    history, last = followed(same_run)
    look = ("name", "line", "fill", "fillcolor", "hovertemplate")
    for metric in history:
        tracker = model_chart(history, last, metric)
        page = [trace for trace in charts["metrics"][metric]["curves"]["data"] if "name" in trace]
        assert [[trace.get(key) for key in look] for trace in page] == [
            [trace.get(key) for key in look] for trace in tracker["data"]
        ]
        title = tracker["layout"]["title"]["text"].partition("<br>")[0]
        assert charts["metrics"][metric]["curves"]["layout"]["title"]["text"] == f"{title} over optimizer steps"


def test_page_loads_nothing_external(tmp_path: Path) -> None:
    page = write_report(written(tmp_path / "run.sqlite", SyntheticRun(1, 2, 3))).read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)\s*=", page.split("<script>")[0])


# ---- in a real browser ----------------------------------------------------------------------------------------------


def curve(browser: Any, chart: str, color: str) -> list[list[float]]:
    """y of the traces in a color, as the browser has them."""
    script = """
        const traces = document.getElementById(arguments[0]).data;
        return traces.filter(trace => trace.line?.color === arguments[1]).map(trace => Array.from(trace.y));
    """
    return browser.execute_script(script, chart, color)


def heatmap_values(browser: Any, chart: str) -> np.ndarray:
    return np.array(
        browser.execute_script("return document.getElementById(arguments[0]).data[0].customdata", chart), float
    )


def set_slider(browser: Any, position: int) -> None:
    from selenium.webdriver.common.keys import Keys

    slider = browser.find_element("id", "step")
    slider.send_keys(Keys.HOME)
    for _ in range(position):
        slider.send_keys(Keys.ARROW_RIGHT)


CHOSEN, ALARM = CHOSEN_COLOR, ALARM_COLOR


@pytest.fixture(scope="module", params=["12 heads", "1024 heads"])
def sized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    layers, heads, group = {"12 heads": (2, 6, 1), "1024 heads": (32, 32, 4)}[request.param]
    path = tmp_path_factory.mktemp("report") / "run.sqlite"
    return written(path, SyntheticRun(layers, heads, 25, group=group, faulty=(1, 5)))


@pytest.fixture(scope="module")
def run144(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("report") / "run.sqlite", SyntheticRun(12, 12, 25, faulty=(1, 5)))


def test_click_on_a_cell_shows_that_heads_curves(sized: Path, show: Callable[[Path], Any]) -> None:
    record, browser = RunRecord.open(sized), show(write_report(sized))
    layers = list(record.coverage)
    click_cell(browser, "heatmap-0", head=1, row=0)
    known = record.coverage[layers[0]]
    noun = "head" if known.num_query_heads == known.num_kv_heads else "KV head"
    assert browser.find_element("id", "chosen").text == f"layers.0 {noun} 1"
    expected = record.trajectories("key_incoherence")[layers[0]][:, 1]
    (shown,) = curve(browser, "curves-0", CHOSEN)
    np.testing.assert_allclose(shown, expected, rtol=1e-6)
    group = record.coverage[layers[0]].num_query_heads // record.coverage[layers[0]].num_kv_heads
    in_every_metric = curve(browser, "grid-0", CHOSEN)
    num_key_metrics = sum(METRICS[metric].scope == "kv_head" for metric in record.metrics)
    assert len(in_every_metric) == num_key_metrics + (len(record.metrics) - num_key_metrics) * group
    np.testing.assert_allclose(
        in_every_metric[0], record.trajectories(record.metrics[0])[layers[0]][:, group], rtol=1e-6
    )
    assert curve(browser, "curves-0", ALARM), "the head with an alarm is still shown"


def test_slider_moves_the_heatmap_through_the_run(run144: Path, show: Callable[[Path], Any]) -> None:
    record, browser = RunRecord.open(run144), show(write_report(run144))
    expected = np.stack(list(record.trajectories("key_incoherence").values()), axis=1)  # (samples, layers, heads)
    np.testing.assert_allclose(heatmap_values(browser, "heatmap-0"), expected[-1], rtol=1e-6)
    for position in (0, 7):
        set_slider(browser, position)
        assert browser.find_element("id", "step-shown").text == f"{record.steps[position]:,}"
        np.testing.assert_allclose(heatmap_values(browser, "heatmap-0"), expected[position], rtol=1e-6)
    frames = (
        "return document.getElementById('heatmap-0').layout.shapes.filter(s => s.line.color === arguments[0]).length"
    )
    assert browser.execute_script(frames, ALARM) == 0, "no alarm had begun by then"
    set_slider(browser, 24)
    assert browser.execute_script(frames, ALARM) == 1


def test_another_metric_can_be_chosen(run144: Path, show: Callable[[Path], Any]) -> None:
    from selenium.webdriver.support.ui import Select

    record, browser = RunRecord.open(run144), show(write_report(run144))
    Select(browser.find_element("id", "metric")).select_by_value("energy_rms")
    expected = np.stack(list(record.trajectories("energy_rms").values()), axis=1)[-1]
    np.testing.assert_allclose(heatmap_values(browser, "heatmap-0"), expected, rtol=1e-6)
    assert "how sharply softmax can discriminate" in browser.find_element("css selector", ".metric-meaning").text


def test_hostile_names_are_shown_as_text(tmp_path: Path, show: Callable[[Path], Any]) -> None:
    run = SyntheticRun(2, 3, 12, faulty=(1, 2), layer_name=HOSTILE)
    hostile = {**run.config, "model": HOSTILE, "alerts": [HOSTILE]}
    path = written(tmp_path / "run.sqlite", run, hostile)
    browser = show(write_report(path))
    click_cell(browser, "heatmap-0", head=0, row=0)
    assert HOSTILE.format(0) in browser.find_element("id", "chosen").text
    assert browser.find_elements("css selector", "main img, #chosen img, .js-plotly-plot img") == []
    labels = "return [...document.querySelectorAll('#heatmap-0 .ytick text')].map(t => t.textContent)"
    assert browser.execute_script(labels) == [HOSTILE.format(0), HOSTILE.format(1)]


def test_two_runs_share_their_scales(tmp_path: Path, show: Callable[[Path], Any]) -> None:
    first = written(tmp_path / "healthy.sqlite", SyntheticRun(3, 4, 20, seed=1))
    second = written(tmp_path / "sick.sqlite", SyntheticRun(3, 4, 30, seed=2, faulty=(2, 1)))
    browser = show(write_report(first, tmp_path / "both.html", compare=second))
    headings = [heading.text for heading in browser.find_elements("tag name", "h1")]
    assert headings == [
        "12 heads in 3 layers watched over 20 samples: healthy",
        "1 head needs a look: layers.2 head 1 (key sink since step 950); 1 alarm came and went",
    ]
    left, right = (browser.find_element("id", f"heatmap-{run}").rect for run in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    scale = "const h = document.getElementById(arguments[0]).data[0]; return [h.zmin, h.zmax]"
    assert browser.execute_script(scale, "heatmap-0") == browser.execute_script(scale, "heatmap-1")
    click_cell(browser, "heatmap-1", head=3, row=0)
    for run, path in enumerate((first, second)):
        expected = next(iter(RunRecord.open(path).trajectories("key_incoherence").values()))[:, 3]
        np.testing.assert_allclose(curve(browser, f"curves-{run}", CHOSEN)[0], expected, rtol=1e-6)


def test_page_fits_a_narrow_screen(run144: Path, browser: Any, show: Callable[[Path], Any]) -> None:
    with narrow_screen(browser):
        show(write_report(run144))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
        columns = "return document.getElementById('grid-0').layout.grid.columns"
        assert browser.execute_script(columns) == 1


def test_many_alarms_have_room_on_a_narrow_screen(tmp_path: Path, browser: Any, show: Callable[[Path], Any]) -> None:
    run, path = SyntheticRun(3, 4, 20), tmp_path / "run.sqlite"
    kinds = ("logit_blowup", "dead_head", "key_sink", "rank_collapse", "non_finite")
    with RecordWriter(path, run=run.config) as record:
        for at, sample in enumerate(run.samples()):
            layer, head = run.layers[at % 3], at // 3 % 4
            begun = event(sample.global_step, "firing", layer=layer, head=head, kind=kinds[at % 5])
            record.append(replace(sample, events=[begun] if at < 12 else []))
    height = "return document.querySelector(arguments[0]).getBoundingClientRect().height"
    with narrow_screen(browser):
        show(write_report(path))
        rows = browser.find_elements("css selector", "#timeline-0 .yaxislayer-above text")
        assert {row.text for row in rows} == {f"layers.{layer} head {head}" for layer in range(3) for head in range(4)}
        assert browser.execute_script(height, "#timeline-0 .nsewdrag") > 12 * 15, "rows do not touch"
        assert browser.execute_script(height, "#curves-0 .nsewdrag") > 250, "the legend leaves room for the plot"


def test_pages_without_values_open(tmp_path: Path, show: Callable[[Path], Any]) -> None:
    RecordWriter(tmp_path / "empty.sqlite", run={}).close()
    show(write_report(tmp_path / "empty.sqlite"))
    written(tmp_path / "single.sqlite", SyntheticRun(1, 1, 1))
    show(write_report(tmp_path / "single.sqlite"))
