"""Draw the pictures of ``docs/reading-the-charts.md``: one small GPT trained twice, healthy and with one head broken.

``python -m benchmarks.chart_pictures`` (minutes on two cores) writes ``docs/images/chart-*.png``. In the broken run the
query weights of one head grow by 6 % per step from step 280 on, as a head's logits do when they run away.
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure

from attnmonitor import DEFAULT_METRICS, AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.catalog import WEIGHT_METRICS
from attnmonitor.examples.small_gpt import SmallGPT, english, next_token_loss, windows
from attnmonitor.functional import energy_spectrum
from attnmonitor.loggers.charts import LineChart, model_chart, rank_chart
from attnmonitor.plots import bands, heatmap, spectrum, trajectories

NUM_STEPS, BROKEN_FROM, EVERY = 400, 280, 5
LAYER, HEAD = 2, 1
IMAGES = Path("docs/images")


def trained(*, broken: bool) -> tuple[AttentionMonitor, list[Sample]]:
    """Train and return the monitor and its samples."""
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
        record=None,
        loggers=keep,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 60))
    for step in range(NUM_STEPS):
        loss = next_token_loss(model, examples[16 * (step + 1) : 16 * (step + 2)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        warm_up.step()
        if broken and step >= BROKEN_FROM:
            with torch.no_grad():
                width = 128 // 4
                model.blocks[LAYER].attention.qkv.weight[HEAD * width : (HEAD + 1) * width] *= 1.06
    monitor.close()
    print("broken: " if broken else "healthy:", samples[-1].verdict, f"(loss {loss.item():.2f})")
    return monitor, samples


def draw(name: str, monitor: AttentionMonitor, samples: list[Sample]) -> None:
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
            "tracker": drawn(model_chart(history, last, metric)),
        }
        for kind, figure in figures.items():
            if metric == "energy_rms" or kind == "tracker":
                figure.savefig(IMAGES / f"chart-{kind}-{metric.replace('_', '-')}-{name}.png", dpi=90)
    drawn(rank_chart(history)).savefig(IMAGES / f"chart-ranks-{name}.png", dpi=90)


def drawn(chart: LineChart) -> Figure:
    """Draw a tracker's chart: every line on linear axes, named in the legend; what is not one head in grey."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    ax = figure.add_subplot()
    dashes = iter(["-.", "--", "-", "--", "-.", ":"])
    for name, (steps, values) in chart.lines.items():
        one_head = " head " in name and "all heads" not in name
        style = {} if one_head or " rank, " in name else {"color": "#6a7078", "linestyle": next(dashes)}
        ax.plot(steps, values, label=name, linewidth=1.3, **style)
    ax.set(title=chart.title, xlabel="optimizer step")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def draw_spectrum() -> None:
    """A field with structure beside one of random numbers."""
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


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    draw("healthy", *trained(broken=False))
    draw("broken", *trained(broken=True))
    draw_spectrum()
