"""The page as a tool: an address for every choice, alarms that lead to curves, the loss below them, runs compared."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
from pages import choice, click_cell, narrow_screen, open_at, overlapping_texts, text_of, wait_for
from synthetic_runs import SyntheticRun, written

from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.report import write_report
from attnmonitor.report.page import page_parts
from attnmonitor.report.pairs import paired_layers
from attnmonitor.sample import LayerCoverage
from attnmonitor.summary.style import ALARM_COLOR, CHOSEN_COLOR, RUN_COLORS

pytest.importorskip("plotly")

Show = Callable[[Path], Any]
ODD = "a b/{}&head=9#%+é"
LOSS = [(step, 5.0 / (1 + step / 200)) for step in range(0, 2000, 7)]


def recorded(path: Path, run: SyntheticRun, *, missed: tuple[int, ...] = (), logged: bool = True) -> Path:
    """A run with what training logged; some of its layers not measured."""
    names = [run.layers[at] for at in missed]
    reasons = {name: LayerCoverage(name, reason="its softmax was not found") for name in names}
    with RecordWriter(path, run=run.config) as record:
        for sample in run.samples():
            values = {
                metric: {layer: heads for layer, heads in layers.items() if layer not in names}
                for metric, layers in sample.values.items()
            }
            record.append(replace(sample, values=values, spread={}, coverage={**sample.coverage, **reasons}))
        if logged:
            record.log([(step, "train_loss", loss) for step, loss in LOSS])
            record.log([(step, "lr-AdamW", 1e-3) for step, _ in LOSS])
    return path


@pytest.fixture(scope="module")
def odd_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with odd names, a head with two alarms of which one ended, a layer without numbers, a loss."""
    folder = tmp_path_factory.mktemp("tool")
    run = SyntheticRun(4, 4, 40, faulty=(2, 1), layer_name=ODD)
    return write_report(recorded(folder / "run.sqlite", run, missed=(1,)))


def drawn(browser: Any, chart: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Traces and layout of a figure, as they are drawn."""
    script = "const {data, layout} = document.getElementById(arguments[0]); return JSON.stringify([data, layout])"
    data, layout = json.loads(browser.execute_script(script, chart))
    return data, layout


def settle(browser: Any) -> None:
    """Wait for what the browser does after an event: it tells of a change of colors when it paints, and then draws."""
    browser.execute_async_script(
        "const done = arguments[0];requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))"
    )


def go_to(browser: Any, address: str) -> None:
    browser.execute_script("location.hash = arguments[0]", address)
    settle(browser)


def test_the_address_keeps_the_choice(odd_page: Path, browser: Any, show: Show) -> None:
    show(odd_page)
    opened = browser.execute_script("return location.hash")
    assert opened == "", "nothing was chosen by the reader yet"
    click_cell(browser, "heatmap-0", head=3, row=0)
    chosen, address = choice(browser), browser.execute_script("return location.hash")
    assert chosen == ("a b/0&head=9#%+é head 3", "key_incoherence", "1,950")
    layer = ODD.format(0)
    for name in (quote(layer, safe=""), quote_plus(layer)):
        open_at(browser, odd_page, f"#layer={name}&head=3&metric=key_incoherence&step=1950")
        assert choice(browser) == chosen
        assert text_of(browser, "word") == ""
    open_at(browser, odd_page, address)
    assert choice(browser) == chosen
    go_to(browser, f"#layer={quote(ODD.format(2), safe='')}&head=0&metric=energy_rms&step=100")
    assert choice(browser) == ("a b/2&head=9#%+é head 0", "energy_rms", "100")


def test_wrong_values_are_ignored_with_a_word(odd_page: Path, browser: Any, show: Show) -> None:
    show(odd_page)
    before, layer = choice(browser), quote(ODD.format(0), safe="")
    for address, word in {
        "#layer=h.99&head=1": "layer=h.99 is no layer",
        "#layer=%E0%A4%A&head=%": "layer=%E0%A4%A is no layer",
        "#metric=loss": "metric=loss is no metric",
        "#step=never": "step=never is no step",
        "#step=": "step= is no step",
        "#step=99999999": "step=99999999 is no step",
        "#head=1e9&nothing": "",
        "#metric=<img src=x onerror=alert(1)>": "is no metric",
    }.items():
        go_to(browser, address)
        assert choice(browser) == before, address
        assert word in text_of(browser, "word"), address
    for head in ("77", "-1", "1.5", "x"):
        go_to(browser, f"#layer={layer}&head={head}")
        assert text_of(browser, "chosen") == ODD.format(0), "the layer alone"
        assert f"head={head} is no head" in text_of(browser, "word")
    assert browser.find_elements("css selector", "nav img") == []


def test_rows_bars_and_buttons_lead_to_the_alarm(odd_page: Path, browser: Any, show: Show) -> None:
    show(odd_page)
    sick = f"{ODD.format(2)} head 1"
    sink, hot = (sick, "key_incoherence", "1,300"), (sick, "energy_rms", "1,150")
    rows = browser.find_elements("css selector", ".alarms tbody tr")
    rows[1].find_element("tag name", "a").click()
    settle(browser)
    assert choice(browser) == hot
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", rows[0])
    rows[0].find_elements("tag name", "td")[1].click()
    settle(browser)
    assert choice(browser) == sink
    click_cell(browser, "timeline-0", head=1250, row=0.2)  # the middle of the lower bar
    assert choice(browser) == hot
    browser.find_element("id", "next-alarm").click()
    assert choice(browser) == sink
    assert text_of(browser, "word") == f"Alarm 2 of 2: {sick}, key sink"
    browser.find_element("id", "previous-alarm").click()
    assert choice(browser) == hot
    assert "Click a cell" in text_of(browser, "hint"), "still there"


def test_alarms_are_marked_in_every_curve(odd_page: Path, browser: Any, show: Show) -> None:
    from selenium.webdriver.support.ui import Select

    show(odd_page)
    record = RunRecord.open(odd_page.with_suffix(".sqlite"))
    for metric in record.metrics[:3]:
        Select(browser.find_element("id", "metric")).select_by_value(metric)
        data, layout = drawn(browser, "curves-0")
        marks = {trace["name"]: trace for trace in data if trace.get("mode") == "markers"}
        assert sorted(marks["alarm began"]["x"]) == [1150, 1300]
        assert marks["alarm ended"]["x"] == [1800]
        of_head = record.trajectories(metric)[ODD.format(2)][:, 1]
        at = [record.steps.tolist().index(step) for step in marks["alarm began"]["x"]]
        assert marks["alarm began"]["y"] == pytest.approx(of_head[at].tolist(), rel=1e-5)
        assert [(shape["x0"], shape["x1"]) for shape in layout["shapes"] if shape["type"] == "rect"] == [(1150, 1950)]
        name = ODD.format(2).replace("&", "&amp;") + " head 1"
        [chosen] = [trace for trace in data if trace.get("name", "").startswith(name)]
        assert chosen["line"]["color"] == ALARM_COLOR, "in the color of its alarm"
        assert chosen["name"].endswith("▲ key sink")
    grid, _ = drawn(browser, "grid-0")
    assert sum(trace.get("name") == "alarm began" for trace in grid) == len(record.metrics)
    assert sum(trace["line"]["color"] == ALARM_COLOR for trace in grid if "line" in trace) == len(record.metrics)


def test_keys_do_what_a_pointer_does(odd_page: Path, browser: Any, show: Show) -> None:
    from selenium.webdriver.common.keys import Keys

    show(odd_page)
    heatmap, layer, head = (browser.find_element("id", name) for name in ("heatmap-0", "layer", "head"))
    heatmap.send_keys(Keys.ARROW_RIGHT)
    assert text_of(browser, "chosen") == f"{ODD.format(2)} head 2"
    heatmap.send_keys(Keys.ARROW_UP)
    assert text_of(browser, "chosen") == f"{ODD.format(1)}: not measured (its softmax was not found)"
    heatmap.send_keys(Keys.ARROW_UP, Keys.ARROW_LEFT)
    assert text_of(browser, "chosen") == f"{ODD.format(0)} head 1"
    layer.clear()
    layer.send_keys("B/3", Keys.ENTER)
    assert text_of(browser, "chosen") == f"{ODD.format(3)} head 1"
    head.clear()
    head.send_keys("2", Keys.ENTER)
    assert text_of(browser, "chosen") == f"{ODD.format(3)} head 2"
    layer.clear()
    layer.send_keys("nowhere", Keys.ENTER)
    assert text_of(browser, "word") == "No layer is called nowhere."
    reached = {"metric"}
    browser.execute_script("document.getElementById('metric').focus()")
    for _ in range(14):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert {"metric", "layer", "head", "step", "next-alarm", "previous-alarm", "A"} <= reached


def test_loss_stands_on_the_steps_of_the_curves(odd_page: Path, browser: Any, show: Show) -> None:
    show(odd_page)
    data, layout = drawn(browser, "curves-0")
    panels = {trace["name"]: trace for trace in data if trace.get("yaxis") in ("y2", "y3")}
    assert set(panels) == {"train_loss", "lr-AdamW"}
    assert panels["train_loss"]["x"] == [step for step, _ in LOSS]
    assert panels["train_loss"]["y"] == pytest.approx([loss for _, loss in LOSS], rel=1e-6)
    assert all("xaxis" not in trace for trace in panels.values()), "one axis of steps"
    assert layout["yaxis"]["domain"][0] > layout["yaxis2"]["domain"][1] > layout["yaxis3"]["domain"][1]
    assert {note["text"] for note in layout["annotations"]} == {"loss", "learning rate"}


def test_cells_beyond_the_scale_and_gaps_are_marked(odd_page: Path, browser: Any, show: Show) -> None:
    show(odd_page)
    data, _ = drawn(browser, "heatmap-0")
    cells, *others = data
    shades = np.array(cells["z"], dtype=float)
    marked = {
        trace["marker"]["symbol"]: set(zip(trace["y"], trace["x"], strict=True))
        for trace in others
        if "marker" in trace
    }
    expected = {
        "triangle-up": {(int(y), int(x)) for y, x in np.argwhere(shades > cells["zmax"])},
        "triangle-down": {(int(y), int(x)) for y, x in np.argwhere(shades < cells["zmin"])},
    }
    assert marked == expected
    assert (2, 1) in marked["triangle-up"], "the head with the fault"
    [gap] = [trace for trace in others if "fillpattern" in trace]
    assert gap["text"].endswith("not measured: its softmax was not found")
    assert {round(y) for y in gap["y"] if y is not None} == {1}, "the layer keeps its row"


def test_charts_are_saved_and_follow_dark_and_print(odd_page: Path, browser: Any, show: Show, tmp_path: Path) -> None:
    show(odd_page)
    light = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    with emulated(browser, "screen", "dark"):
        settle(browser)
        _, layout = drawn(browser, "curves-0")
        assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != light
        assert layout["paper_bgcolor"] != "white"
        for button in browser.find_elements("css selector", "[data-chart=curves-0], [data-chart=heatmap-0]"):
            browser.execute_script("arguments[0].click()", button)
        wait_for(browser, lambda: len(saved(tmp_path)) == 2)
        browser.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        _, layout = drawn(browser, "curves-0")
        assert layout["paper_bgcolor"] == "white", "paper is white"
        assert browser.execute_script("return document.querySelector('main').clientWidth") == 700
        browser.execute_script("window.dispatchEvent(new Event('afterprint'))")
    with emulated(browser, "print", "light"):
        assert not browser.find_element("id", "controls").is_displayed()
        assert browser.find_element("tag name", "h1").is_displayed()
    pictures = saved(tmp_path)
    assert pictures[".png"].startswith(b"\x89PNG")
    assert b"<svg" in pictures[".svg"][:200]


def saved(folder: Path) -> dict[str, bytes]:
    """What the browser has saved, by the ends of the names; a file that it still writes has another end or is empty."""
    return {path.suffix: content for path in folder.glob("*.[ps][nv]g") if (content := path.read_bytes())}


@contextmanager
def emulated(browser: Any, media: str, scheme: str) -> Any:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})


def test_a_refreshed_page_keeps_the_choice(tmp_path: Path, browser: Any, show: Show) -> None:
    run = SyntheticRun(3, 4, 30, faulty=(2, 1))
    samples = list(run.samples())
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in samples[:20]:
            record.append(sample)
        show(write_report(tmp_path / "run.sqlite"))
        click_cell(browser, "heatmap-0", head=3, row=0)
        before = choice(browser)
        browser.execute_script("document.querySelectorAll('details').forEach(details => { details.open = true })")
        for sample in samples[20:]:
            record.append(sample)
    parts = page_parts([RunRecord.open(tmp_path / "run.sqlite")])
    browser.execute_script("refreshPage(arguments[0])", {"main": parts.main, "numbers": parts.numbers})
    assert before[0] == "layers.0 head 3"
    assert choice(browser) == (*before[:2], "1,450"), "and the new last step"
    [shown] = [trace for trace in drawn(browser, "curves-0")[0] if trace.get("line", {}).get("color") == CHOSEN_COLOR]
    assert len(shown["y"]) == 30
    assert browser.execute_script("return [...document.querySelectorAll('details')].every(details => details.open)")
    assert len(browser.find_elements("css selector", ".alarms tbody tr")) == 2
    click_cell(browser, "heatmap-0", head=2, row=1)
    assert text_of(browser, "chosen") == "layers.1 head 2"


def test_nothing_measured_draws_no_axes(tmp_path: Path, browser: Any, show: Show) -> None:
    run = SyntheticRun(3, 4, 5)
    show(write_report(recorded(tmp_path / "loss.sqlite", run, missed=(0, 1, 2))))
    assert browser.find_elements("css selector", "#heatmap-0, #grid-0, #timeline-0") == []
    assert not browser.find_element("id", "controls").is_displayed()
    assert {trace["name"] for trace in drawn(browser, "curves-0")[0]} == {"train_loss", "lr-AdamW"}
    axes = "return Object.keys(document.getElementById('curves-0')._fullLayout._plots)"
    assert browser.execute_script(axes) == ["xy2", "xy3"], "none for curves that are not there"
    with narrow_screen(browser):
        open_at(browser, tmp_path / "loss.html")
        assert browser.execute_script(axes) == ["xy2", "xy3"]
    show(write_report(recorded(tmp_path / "none.sqlite", run, missed=(0, 1, 2), logged=False)))
    assert browser.find_elements("css selector", "#curves-0") == []
    assert "No head has a number" in browser.find_element("tag name", "main").text


def test_four_runs_are_overlaid_and_paired(tmp_path: Path, browser: Any, show: Show) -> None:
    names = {"a": "h.{}.attn", "b": "h.{}.attn", "c": "model.layers.{}.self_attn", "d": "blocks.{}"}
    paths = []
    for at, (name, layer) in enumerate(names.items()):
        run = SyntheticRun(3, 4, 20, faulty=(2, 1), seed=at, layer_name=layer)
        paths.append(recorded(tmp_path / f"{name}.sqlite", run, missed=(1,) if name == "d" else ()))
    show(write_report(paths[0], tmp_path / "all.html", compare=paths[1:]))
    notes = [note.text for note in browser.find_elements("css selector", ".pairing")]
    assert notes[0] == "Layers of b.sqlite and a.sqlite are paired by name."
    assert "paired by position: no measured layer has the same name" in notes[1]
    click_cell(browser, "heatmap-0", head=0, row=1)
    data, _ = drawn(browser, "compared-0")
    chosen = [trace for trace in data if trace.get("line", {}).get("width") == 3]
    assert [trace["line"]["color"] for trace in chosen] == list(RUN_COLORS)
    metric = choice(browser)[1]
    layers = ("h.1.attn", "h.1.attn", "model.layers.1.self_attn", "blocks.2")  # the second that is measured
    for trace, path, layer in zip(chosen, paths, layers, strict=True):
        assert trace["y"] == pytest.approx(RunRecord.open(path).trajectories(metric)[layer][:, 0].tolist(), rel=1e-5)
    colors = [{bar["name"]: bar["marker"]["color"] for bar in drawn(browser, f"timeline-{run}")[0]} for run in range(4)]
    assert all(each == colors[0] for each in colors)
    browser.find_elements("css selector", "#run-3 .alarms a")[0].click()
    settle(browser)
    assert "run=3" in browser.execute_script("return location.hash")
    assert "blocks.2 head 1" in text_of(browser, "chosen")
    with narrow_screen(browser):
        open_at(browser, tmp_path / "all.html")
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    with pytest.raises(ValueError, match="are 4 runs; compare with 3 at most"):
        write_report(paths[0], compare=paths)


def runs_of(**layers: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "layers": list(reasons), "reasons": list(reasons.values())} for name, reasons in layers.items()
    ]


@pytest.mark.parametrize(
    ("runs", "slots", "note"),
    [
        (runs_of(a={"x": "", "y": ""}, b={"y": "", "x": "", "z": ""}), [1, 0, 2], "by name; 1 layer of it without a"),
        (runs_of(a={"x": "", "y": ""}, b={"x2": "", "y2": "", "z2": ""}), [0, 1, 2], "by position: no measured layer"),
        (runs_of(a={"x": "", "p": "why", "y": ""}, b={"u": "", "v": ""}), [0, 2], "by position"),
        (runs_of(a={"x": "", "y": ""}, b={"x": "why", "v": ""}), [2, 0], "by position"),
        (runs_of(a={"x": "why"}, b={"x": "why"}), [0], "by name"),
        (runs_of(a={}, b={"x": ""}), [0], "by name"),
    ],
)
def test_layers_are_paired(runs: list[dict[str, Any]], slots: list[int], note: str) -> None:
    paired, notes = paired_layers(runs)
    assert paired[1] == slots
    assert note in notes[0]


@pytest.mark.parametrize("width", [1280, 390])
def test_no_texts_overlap(odd_page: Path, browser: Any, show: Show, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        show(odd_page)
        assert overlapping_texts(browser) == []
        sizes = "const {scrollWidth, clientWidth} = document.documentElement; return [scrollWidth, clientWidth]"
        page_width, room = browser.execute_script(sizes)
        assert page_width == room
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


AXE = "const done = arguments[0]; axe.run().then(found => done([found.violations, found.passes.length]))"


@pytest.mark.soak
def test_axe_finds_nothing_serious(odd_page: Path, browser: Any, show: Show, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or subprocess.run([npm, "pack", "axe-core@4"], cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("axe-core could not be fetched from npm")
    [archive] = tmp_path.glob("axe-core-*.tgz")
    with tarfile.open(archive) as packed:
        axe = packed.extractfile("package/axe.min.js").read().decode()
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            with emulated(browser, "screen", scheme):
                show(odd_page)
                settle(browser)
                browser.execute_script(axe)
                violations, num_passes = browser.execute_async_script(AXE)
            assert num_passes > 15
            assert [
                (each["id"], each["impact"], [node["html"][:120] for node in each["nodes"][:3]])
                for each in violations
                if each["impact"] in ("serious", "critical")
            ] == [], (scheme, width)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_page_of_a_run_without_a_log_says_nothing_of_it(tmp_path: Path) -> None:
    page = page_parts([RunRecord.open(written(tmp_path / "run.sqlite", SyntheticRun(2, 2, 4)))])
    assert page.numbers["runs"][0]["logged"] == {}
    assert "loss" not in page.main
