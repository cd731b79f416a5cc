"""Figures of several runs: every metric in a small chart, and the chosen head of all runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnmonitor.metrics.catalog import metric_title, metric_unit
from attnmonitor.report.charts import model_layout
from attnmonitor.report.curves import plain_text
from attnmonitor.report.page_layout import (
    Numbers,
    Scales,
    chosen_lines,
    fixed_value_axis,
    segment_line,
    step_layout,
)
from attnmonitor.report.traces import (
    QUANTILES,
    Chart,
    axis,
    bands,
    heading,
    line,
    named_numbers,
    small_charts,
    upright_line,
)
from attnmonitor.report.training import with_training_panels
from attnmonitor.summary.style import BAND_COLOR, OTHER_HEADS_COLOR, RUN_COLORS

__all__ = ["compared_curves", "metric_grid"]

_GRID_COLUMNS = ((880, 4), (420, 2), (0, 1))  # least width in pixels, small charts in a row
_MEDIAN = 2  # index of the median in `QUANTILES`


def metric_grid(runs: Sequence[Numbers], scales: Scales) -> Chart:
    """Every metric in a small chart, with room for the chosen head of each run.

    Returns:
        ``data``: the bands over all heads of one run, or the median of each of several; ``chosen``: lines of the chosen
        head, each with the index of its ``run``; ``layouts``: one for each width of the page.
    """
    names = list(dict.fromkeys(name for run in runs for name, metric in run["metrics"].items() if metric["frames"]))
    traces: list[Chart] = []
    chosen: list[Chart] = []
    shapes, axes, headings = [], [], []
    for index, name in enumerate(names):
        number = str(index + 1) if index else ""
        place = {"xaxis": f"x{number}", "yaxis": f"y{number}", "showlegend": False}
        for at, run in enumerate(runs):
            metric = run["metrics"].get(name)
            if metric is not None and metric["frames"]:
                traces += [{**trace, **place} for trace in _all_heads(runs, at, name, metric)]
                chosen.append({"run": at, **_chosen(runs, at, name, metric, 2.2, **place)})
        of_runs = {step for run in runs for step in run["segments"]} if len(runs) == 1 else set()
        shapes += [segment_line(step, f"x{number}", f"y{number} domain") for step in sorted(of_runs)]
        value = fixed_value_axis(name, scales, automargin=False, nticks=4)
        axes.append((axis(tickformat=",d", range=scales.steps, nticks=4), value))
        headings.append(heading(metric_title(name), note=metric_unit(name), size=12))
    layouts = []
    for least_width, columns in _GRID_COLUMNS if names else ():
        rows = -(-len(axes) // columns)
        layout = step_layout("", 60 + 190 * rows, scales) | {"margin": {"l": 46, "r": 20, "t": 30, "b": 40}}
        del layout["xaxis"]
        gaps = {"xgap": 0.16 if columns > 1 else 0, "ygap": 0.38}
        layout |= small_charts(headings, axes, columns, gaps) | {"shapes": shapes}
        layouts.append({"least_width": least_width, "layout": layout})
    return {"data": traces, "chosen": chosen, "layouts": layouts}


def compared_curves(runs: Sequence[Numbers], scales: Scales) -> dict[str, Chart]:
    """For each metric, the median and the chosen head of every run in one chart, with what training logged below."""
    names = dict.fromkeys(name for run in runs for name, metric in run["metrics"].items() if metric["frames"])
    figures = {}
    for name in names:
        shown = [(at, run["metrics"][name]) for at, run in enumerate(runs) if name in run["metrics"]]
        shown = [(at, metric) for at, metric in shown if metric["frames"]]
        traces = [trace for at, metric in shown for trace in _all_heads(runs, at, name, metric)]
        layout = step_layout(model_layout(name, None)["title"]["text"], 420, scales)
        layout["shapes"] = [upright_line(0, OTHER_HEADS_COLOR, dash="solid")]
        layout["yaxis"] = fixed_value_axis(name, scales)
        layout["xaxis"] = axis(tickformat=",d", range=scales.steps)
        layout["showlegend"] = True
        figure = with_training_panels({"data": traces, "layout": layout}, runs, RUN_COLORS)
        chosen = [{"run": at, **_chosen(runs, at, name, metric, 3)} for at, metric in shown]
        figures[name] = {**figure, "chosen": chosen}
    return figures


def _all_heads(runs: Sequence[Numbers], at: int, name: str, metric: Mapping[str, Any]) -> list[Chart]:
    """Bands over the heads of the only run, or the median of one of several."""

    def numbers(band: int) -> Chart:
        return named_numbers(name, len(metric["band_samples"]), band=band, run=at)

    if len(runs) == 1:
        return bands([numbers(band) for band in range(len(QUANTILES))], BAND_COLOR)
    title = f"median head, {plain_text(runs[at]['name'])}"
    return [line(title, RUN_COLORS[at], numbers(_MEDIAN), width=1.2, dash="dot")]


def _chosen(runs: Sequence[Numbers], at: int, name: str, metric: Mapping[str, Any], width: float, **more: Any) -> Chart:
    """The lines of the chosen head: in the color of its run where there are several."""
    lines = chosen_lines(name, metric, width=width, **more)
    if len(runs) == 1:
        return lines
    return {kind: {**each, "line": {**each["line"], "color": RUN_COLORS[at]}} for kind, each in lines.items()}
