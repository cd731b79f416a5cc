"""What the report of a long run of a large model costs the browser: ``python -m benchmarks.cost.report_page``.

Records 1,024 heads at 2,000 samples, writes the page and opens it in headless Chromium (selenium and chromedriver are
needed). Times are CPU times of the page's thread, which a busy machine does not change. Then the run goes on for five
samples under ``attnmonitor report --live``: how long after each was written the open page shows it. That a busy machine
does change.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS
from attnmonitor.record import RecordWriter
from attnmonitor.report import write_report
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample
from benchmarks.browser import chromium

LAYERS, HEADS, GROUP = 32, 32, 4
CHOOSE = """
    const [slot, head, done] = arguments;
    show({slot, head, scope: "query_head"});
    requestAnimationFrame(() => setTimeout(done, 0));
"""


def samples(count: int) -> Iterator[Sample]:
    """A run in which every head wanders, and every twentieth sample begins or ends an alarm."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    coverage = {name: LayerCoverage(name, "sdpa", "self", HEADS, HEADS // GROUP, 64, 0.125, 1e-7) for name in names}
    widths = {"query_head": HEADS, "kv_head": HEADS // GROUP}
    walks = {metric: torch.zeros(LAYERS, widths[METRICS[metric].scope]) for metric in DEFAULT_METRICS}
    for step in range(count):
        for walk in walks.values():
            walk += 0.02 * torch.randn(walk.shape, generator=generator)
        values = {metric: dict(zip(names, walk.exp(), strict=True)) for metric, walk in walks.items()}
        events = []
        if step % 20 == 0:
            number = step // 40
            state = "firing" if step % 40 == 0 else "cleared"
            where = (names[number % LAYERS], number % HEADS, 1.0, 0.5, 10 * step, state)
            events = [AlertEvent("energy_hot", "logit_blowup", "query_head", *where, since_step=10 * (step // 40) * 40)]
        yield Sample(10 * step, values, {}, coverage, events=events, seconds=0.2)


def measure(page: Path) -> dict[str, Any]:
    """Open the page, choose heads, and return times in seconds and what the console and the network said."""
    with chromium(1400, 1000) as browser:
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})

        def cpu_time() -> float:
            found = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            return float(next(each["value"] for each in found if each["name"] == "TaskDuration"))

        begun, cpu = time.perf_counter(), cpu_time()
        browser.get(page.as_uri())
        while not browser.execute_script("return document.body.dataset.ready === 'yes'"):
            time.sleep(0.05)
        elapsed = time.perf_counter() - begun
        time.sleep(1)
        loaded, choices = cpu_time() - cpu, []
        for slot, head in ((3, 5), (10, 2), (20, 0), (31, 9), (5, 3)):
            cpu = cpu_time()
            browser.execute_async_script(CHOOSE, slot, head)
            choices.append(cpu_time() - cpu)
        sent = [entry["message"] for entry in browser.get_log("performance")]
        asked = [message for message in sent if "Network.requestWillBeSent" in message and '"url":"http' in message]
        return {
            "load, CPU": loaded,
            "load, elapsed": elapsed,
            "first choice, CPU": choices[0],
            "choice, CPU (median)": float(np.median(choices)),
            "messages": len(browser.get_log("browser")),
            "requests": len(asked),
        }


def live_delays(path: Path, record: RecordWriter, more: Iterator[Sample]) -> list[float]:
    """Seconds after which an open live page shows each sample, one every five seconds."""
    command = [sys.executable, "-m", "attnmonitor", "report", str(path), "--live", "--port", "0"]
    server, delays = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), []
    try:
        with chromium(1400, 1000) as browser:
            browser.get(server.stdout.readline().strip() if server.stdout else "")
            for sample in more:
                time.sleep(5)
                record.append(sample)
                written = time.perf_counter()
                while browser.execute_script("return page?.runs[0]?.steps.at(-1)") != sample.global_step:
                    time.sleep(0.02)
                delays.append(time.perf_counter() - written)
    finally:
        server.terminate()
    return delays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    num_samples = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as folder:
        path, run = Path(folder) / "run.sqlite", samples(num_samples + 5)
        with RecordWriter(path, run={"model": "1,024 heads"}) as record:
            for sample in itertools.islice(run, num_samples):
                record.append(sample)
            begun = time.perf_counter()
            page = write_report(path)
            print(f"written in {time.perf_counter() - begun:.1f} s: {page.stat().st_size / 1e6:.1f} MB")
            for what, value in measure(page).items():
                print(f"{what}: {value:.3g}")
            delays = live_delays(path, record, run)
            print(f"live, seconds until a sample is shown: {', '.join(f'{delay:.1f}' for delay in delays)}")


if __name__ == "__main__":
    main()
