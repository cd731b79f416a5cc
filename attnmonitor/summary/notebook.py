"""What a notebook shows of a monitor, a record and a sample: verdict, heatmap, and the way to the report.

Everything is in the HTML itself, escaped: no script, no style of the page, nothing to load. The heatmap is a PNG, made
here, because a table of a thousand cells is slow to show and large to keep in a notebook.
"""

from __future__ import annotations

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from attnmonitor.messages import error_text, printable, tail_of
from attnmonitor.metrics.catalog import is_log, metric_scope, metric_title
from attnmonitor.record import RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, RunState, Sample, heads_concerned, html_of
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.outliers import range_without_outliers
from attnmonitor.summary.png import png_of
from attnmonitor.summary.style import ALARM_COLOR, OTHER_HEADS_COLOR, PAPER_GRAY, STATE_COLORS, VIRIDIS
from attnmonitor.summary.timeline import run_timeline
from attnmonitor.summary.verdict import verdict

__all__ = ["heatmap_png", "report_hint", "run_html"]

Coverage = Mapping[str, LayerCoverage]

_CELL = 14  # pixels, and the height of a line of names
_MOST_NAMED_ROWS, _MAX_NAME = 48, 24
_METRIC = "energy_rms"


def run_html(
    line: str,
    state: RunState,
    *,
    values: Mapping[str, Mapping[str, ArrayLike]],
    firing: Sequence[AlertEvent],
    coverage: Coverage,
    step: int | None,
    bars: Sequence[str] = (),
    hint: str = "",
) -> str:
    """Return verdict, bars, heatmap and the way to the report as HTML.

    Args:
        line: The verdict.
        state: Of the run, for the color of the verdict.
        values: ``values[metric][layer]`` is ``(num_heads,)`` at the latest sample.
        firing: Alarms that fire, worst first: the heatmap is of the worst one's metric, and frames their heads.
        coverage: How each layer was captured, or why not.
        step: Optimizer steps at the latest sample; None before the first.
        bars: Lines of text, of `run_timeline`.
        hint: A command or a place to look at, with words before it.
    """
    shown = [*(event.metric for event in firing[:1]), _METRIC, *values]
    metric = next((name for name in shown if values.get(name)), None)
    parts = [f"<p style='margin: 0 0 .4em; font-weight: 600; color: {STATE_COLORS[state]}'>{_text(line)}</p>"]
    if bars:
        parts.append(f"<pre style='margin: 0 0 .6em; line-height: 1.2'>{escape(chr(10).join(bars))}</pre>")
    if metric is not None and step is not None:
        parts.append(_heatmap(values[metric], metric, firing, coverage, step))
    if hint:
        parts.append(f"<p style='margin: .4em 0 0'>{hint}</p>")
    return f"<div class='attnmonitor'>{''.join(parts)}</div>"


def heatmap_png(
    values: Mapping[str, ArrayLike], metric: str, firing: Sequence[AlertEvent], coverage: Coverage
) -> bytes:
    """Return a heatmap as a PNG: layers downwards, heads across, alarms framed, unmeasured heads hatched.

    Args:
        values: For each layer, in the order of the rows, ``(num_heads,)``; empty where it was not measured.
        metric: Name of the metric, for its scale.
        firing: Alarms whose heads are framed.
        coverage: How each layer was captured, for alarms about heads of the other scope.
    """
    rows = [np.asarray(heads, dtype=np.float64).ravel() for heads in values.values()]
    most = max(1, *(len(row) for row in rows))
    table = np.full((len(rows), most), np.nan)
    inside = np.zeros(table.shape, dtype=bool)
    for at, row in enumerate(rows):
        table[at, : len(row)] = row
        inside[at, : len(row) or most] = True
    pixels = _enlarged(_colors(table, metric))
    down, across = np.indices(pixels.shape[:2])
    pixels[_enlarged(np.isnan(table)) & ((down + across) % 5 == 0)] = _rgb(OTHER_HEADS_COLOR)
    pixels[(down % _CELL == _CELL - 1) | (across % _CELL == _CELL - 1) | ~_enlarged(inside)] = 255
    layers = list(values)
    for event in firing:
        for head in heads_concerned(event, metric_scope(metric), coverage) if event.layer in layers else ():
            top, left = layers.index(str(event.layer)) * _CELL, head * _CELL
            frame = pixels[top : top + _CELL - 1, left : left + _CELL - 1]
            for edge in (frame[:2], frame[-2:], frame[:, :2], frame[:, -2:]):
                edge[:] = _rgb(ALARM_COLOR)
    return png_of((row.tobytes() for row in pixels), pixels.shape[1])


@html_of.register
def _(record: RunRecord) -> str:
    try:
        counts = record.counts
        firing, coverage, steps = counts.firing, counts.coverage, record.steps
        wanted = {_METRIC, *(event.metric for event in firing[:1]), *record.metrics[:1]}
        trajectories = {name: record.trajectories(name) for name in record.metrics if name in wanted}
        return run_html(
            verdict(counts),
            counts.state,
            values={
                name: {layer: heads[-1] for layer, heads in shown.items() if len(heads)}
                for name, shown in trajectories.items()
            },
            firing=firing,
            coverage=coverage,
            step=int(steps[-1]) if len(steps) else None,
            bars=run_timeline(record.logged, firing, coverage, trajectories, steps),
            hint=report_hint(record.path),
        )
    except Exception as error:  # the file is gone, or another program's: the cell has the reason
        return f"<p>{_text(error_text(error))}</p>"


@html_of.register
def _(sample: Sample) -> str:
    failed = f"failed: {sample.failure}" if sample.failure is not None else ""
    return run_html(
        sample.verdict or failed or f"sample at step {sample.global_step:,}",
        sample.state,
        values=sample.values,
        firing=sample.firing,
        coverage=sample.coverage,
        step=sample.global_step,
        hint="All charts: <code>attnmonitor report RUN</code>, where RUN is <code>monitor.record_path</code>",
    )


def report_hint(path: Path) -> str:
    """Return the command that makes the report of a record, as HTML."""
    return f"All charts: <code>attnmonitor report {_text(shlex.quote(str(path)))}</code>"


def _heatmap(
    heads: Mapping[str, ArrayLike], metric: str, firing: Sequence[AlertEvent], coverage: Coverage, step: int
) -> str:
    rows = {name: heads.get(name, ()) for name in [*coverage, *(name for name in heads if name not in coverage)]}
    picture = base64.b64encode(heatmap_png(rows, metric, firing, coverage)).decode()
    number = sum(np.size(np.asarray(values)) for values in heads.values())
    caption = (
        f"{metric_title(metric)} at step {step:,}, {_range_text(heads, metric)}; framed: alarm; hatched: no number"
    )
    names = ""
    if len(rows) <= _MOST_NAMED_ROWS:
        named = "<br>".join(_text(tail_of(name, _MAX_NAME)) for name in short_layer_names(rows).values())
        style = f"font-size: 11px; line-height: {_CELL}px; text-align: right; white-space: nowrap"
        names = f"<div style='{style}'>{named}</div>"
    alt = f"heatmap of {metric_title(metric)}: {number:,} heads in {len(rows):,} layers"
    image = f"<img style='max-width: none; margin: 0' alt='{escape(alt)}' src='data:image/png;base64,{picture}'>"
    return (
        f"<div style='display: flex; gap: 6px; overflow-x: auto'>{names}{image}</div>"
        f"<p style='margin: .2em 0 0; font-size: 11px'>{escape(caption)}</p>"
    )


def _range_text(heads: Mapping[str, ArrayLike], metric: str) -> str:
    flat = np.concatenate([np.asarray(values, dtype=np.float64).ravel() for values in heads.values()])
    limits = range_without_outliers(flat, metric, (0.02, 0.98))
    return "no number" if limits is None else f"dark {limits[0]:.3g} to bright {limits[1]:.3g}"


def _colors(table: NDArray[np.float64], metric: str) -> NDArray[np.uint8]:
    """Return the colors of the cells, ``(num_layers, num_heads, 3)``."""
    low, high = range_without_outliers(table, metric, (0.02, 0.98)) or (1.0, 2.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.log(table) if is_log(metric) else table
    if is_log(metric):
        low, high = math.log(low), math.log(high)
    share = np.nan_to_num((scaled - low) / (high - low or 1.0), nan=0.0, posinf=1.0, neginf=0.0).clip(0, 1)
    anchors = np.array([_rgb(color) for color in VIRIDIS])
    places = np.linspace(0, 1, len(anchors))
    colors = np.stack([np.interp(share, places, channel) for channel in anchors.T], axis=-1).round().astype(np.uint8)
    colors[np.isnan(table)] = _rgb(PAPER_GRAY)
    return colors


def _enlarged(cells: NDArray[Any]) -> NDArray[Any]:
    """Return the cells of a table as squares of pixels."""
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)


def _rgb(color: str) -> tuple[int, int, int]:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return red, green, blue


def _text(text: str) -> str:
    return escape(printable(text, one_line=True))
