"""Draw the pictures of two pages of these docs: a small GPT trained twice, healthy and with one faulty head.

``python -m benchmarks.pages.chart_pictures`` (minutes on two cores) writes ``docs/images/chart-*.png`` and
``docs/images/report.png``. In the broken
run the query weights of one head grow by 6 % per step from step 280 on, which makes its logits grow without bound. The
charts for W&B are drawn by Plotly in Chromium, as W&B's page does; that needs chromium and chromedriver.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from plotly.offline import get_plotlyjs
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from attnmonitor import DEFAULT_METRICS, AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows
from attnmonitor.functional import energy_spectrum
from attnmonitor.metrics.catalog import WEIGHT_METRICS
from attnmonitor.plots import bands, heatmap, spectrum, trajectories
from attnmonitor.report import write_report
from attnmonitor.report.charts import Chart, layers_chart, model_chart, rank_chart
from benchmarks.browser import chromium

NUM_STEPS, BROKEN_FROM, EVERY = 400, 280, 5
LAYER, HEAD = 2, 1
IMAGES = Path("docs/images")


def trained(*, broken: bool, record: Path | None = None) -> tuple[AttentionMonitor, list[Sample]]:
    """Train, and return the monitor and its samples; ``record`` is the run's file."""
    torch.manual_seed(0)
    text, vocabulary = english()
    examples = windows(text, 64)
    model = SmallGPT(vocabulary, width=128, num_layers=4, num_heads=4, max_length=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    samples: list[Sample] = []
    keep = type("Keep", (), {"log_sample": lambda self, sample: samples.append(sample)})()
    monitor = attach(
        model,
        optimizer,
        examples[:8],
        every_n_steps=EVERY,
        metrics=[*DEFAULT_METRICS, *WEIGHT_METRICS],
        record=record,
        loggers=keep,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 60))
    for step in range(NUM_STEPS):
        loss = next_token_loss(model, examples[16 * (step + 1) : 16 * (step + 2)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.log(loss=loss, lr=warm_up.get_last_lr()[0])
        warm_up.step()
        if broken and step >= BROKEN_FROM:
            with torch.no_grad():
                width = 128 // 4
                model.blocks[LAYER].attention.qkv.weight[HEAD * width : (HEAD + 1) * width] *= 1.06
    monitor.close()
    print("broken: " if broken else "healthy:", samples[-1].verdict, f"(loss {loss.item():.2f})")
    return monitor, samples


def draw(name: str, monitor: AttentionMonitor, samples: list[Sample], browser: webdriver.Chrome) -> None:
    """Write every chart of one run."""
    history, last = monitor.history, samples[-1]
    events = [event for sample in samples for event in sample.events]
    common = {"events": events, "coverage": last.coverage}
    for metric in ("energy_rms", "key_incoherence"):
        values = {layer: heads.numpy() for layer, heads in history[metric].items()}
        figures = {
            "heatmap": heatmap(
                last.values[metric],
                metric=metric,
                events=last.firing,
                coverage=last.coverage,
                global_step=last.global_step,
            ),
            "trajectories": trajectories(values, history.steps, metric=metric, **common),
            "bands": bands(values, history.steps, metric=metric, num_named=2, **common),
        }
        stem = f"{metric.replace('_', '-')}-{name}.png"
        for kind, figure in figures.items():
            if metric == "energy_rms":
                figure.savefig(IMAGES / f"chart-{kind}-{stem}", dpi=90)
        photograph(model_chart(history, last, metric), IMAGES / f"chart-tracker-{stem}", browser)
    photograph(layers_chart(history, last, "energy_rms"), IMAGES / f"chart-layers-energy-rms-{name}.png", browser)
    photograph(rank_chart(history), IMAGES / f"chart-ranks-{name}.png", browser)


def photograph(chart: Chart, path: Path, browser: webdriver.Chrome) -> None:
    """Draw a chart in a browser and save its picture, in the size of a panel."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as page:
        page.write(
            "<meta charset=utf-8><div id=chart style='width:720px;height:420px'></div>"
            f"<script>{get_plotlyjs()}</script><script>const chart = {json.dumps(chart)};"
            "window.drawn = Plotly.newPlot('chart', chart.data, chart.layout, {displayModeBar: false})</script>"
        )
        page.flush()
        browser.get(Path(page.name).as_uri())
        browser.execute_async_script("window.drawn.then(arguments[arguments.length - 1])")
        browser.find_element("id", "chart").screenshot(str(path))


def photograph_report(record: Path, path: Path, browser: webdriver.Chrome) -> None:
    """Save a picture of the upper part of a run's page."""
    browser.set_window_size(1280, 1500)
    browser.get(write_report(record).as_uri())
    WebDriverWait(browser, 60).until(lambda page: page.execute_script("return document.body.dataset.ready === 'yes'"))
    browser.save_screenshot(str(path))


def draw_spectrum() -> None:
    """Draw the spectrum of a field with structure beside that of random numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 128, 32, generator=generator)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for ax, (name, decay) in zip(
        figure.subplots(1, 2), {"few components": 0.6, "random q and k": 1.0}.items(), strict=True
    ):
        shape = decay ** torch.arange(32)
        spectrum(energy_spectrum(query * shape, key), ax=ax)
        ax.set_title(f"{name}", loc="right", fontsize=9)
    figure.savefig(IMAGES / "chart-spectrum.png", dpi=90)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with chromium(800, 600) as browser:
        draw("healthy", *trained(broken=False), browser)
        with tempfile.TemporaryDirectory() as folder:
            record = Path(folder) / "run.sqlite"
            draw("broken", *trained(broken=True, record=record), browser)
            photograph_report(record, IMAGES / "report.png", browser)
    draw_spectrum()


if __name__ == "__main__":
    main()
