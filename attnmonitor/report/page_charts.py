"""The figures of one run on the page: alarms over time, the heatmap, a metric's curves, and the cost.

They are complete but for numbers: `traces.named_numbers` names those that the page's script puts in, again for each
step and each head that a reader chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnmonitor.metrics.catalog import is_log, metric_title, metric_unit
from attnmonitor.record import RunRecord
from attnmonitor.report.alarms import AlarmSpan, alarm_spans, spans_worst_first
from attnmonitor.report.charts import alarm_lines, model_layout, model_traces
from attnmonitor.report.curves import HeadCurves, head_curves, plain_text
from attnmonitor.report.numbers import unpacked
from attnmonitor.report.page_layout import (
    Numbers,
    Scales,
    alarm_marks,
    chosen_lines,
    fixed_value_axis,
    step_layout,
)
from attnmonitor.report.traces import (
    QUANTILES,
    Chart,
    axis,
    line,
    log_axis_ticks,
    named_numbers,
    other_heads,
    points,
    upright_line,
)
from attnmonitor.report.training import with_training_panels
from attnmonitor.sample import head_name
from attnmonitor.summary.names import fault_text, short_layer_names
from attnmonitor.summary.style import (
    ALARM_COLOR,
    BAND_COLOR,
    CHOSEN_COLOR,
    FAINT_INK,
    OTHER_HEADS_COLOR,
    PAPER_GRAY,
    kind_color,
)

__all__ = ["page_charts"]

_MOST_CURVES = 160  # of other heads; with more, those of the chosen layer
_MOST_TIMELINE_ROWS = 40
_LEAST_BAR = 0.006  # of the axis: a shorter alarm could not be seen


def page_charts(record: RunRecord, run: Numbers, scales: Scales) -> dict[str, Any]:
    """All figures of one run.

    Returns:
        ``timeline`` and ``cost``, None where there is nothing to draw; ``metrics``: per metric ``heatmap``, ``curves``
        and the lines of the ``chosen`` head; ``training``: what was logged, where no metric has curves; ``marks`` of
        alarms; ``frames``: how cells of the heatmap are framed.
    """
    drawn = {name: metric for name, metric in run["metrics"].items() if metric["frames"]}
    logged_only = with_training_panels({"data": [], "layout": step_layout("", 0, scales, run["segments"])}, [run])
    return {
        "timeline": _timeline(record, run, scales) if run["alarms"] else None,
        "cost": _cost(run, scales),
        "metrics": {
            name: {
                "heatmap": _heatmap(name, run, scales),
                "curves": _curves(record, name, run, scales),
                "chosen": chosen_lines(name, metric, width=3),
            }
            for name, metric in drawn.items()
        },
        "training": logged_only if logged_only["data"] and not drawn else None,
        "marks": alarm_marks(9),
        "frames": {
            "alarm": [_frame(ALARM_COLOR, 3, 0.5)],
            "chosen": [_frame("#ffffff", 4, 0.36), _frame(CHOSEN_COLOR, 2, 0.36)],
        },
    }


def _timeline(record: RunRecord, run: Numbers, scales: Scales) -> Chart:
    """A bar for each alarm, in one row per head, layer or run, the worst on top."""
    short = short_layer_names(run["layers"])
    spans = spans_worst_first(record)
    wheres = [plain_text(head_name(span.event, short, record.coverage)) for span in spans]
    places = list(dict.fromkeys(wheres))
    shown = {where: row for row, where in enumerate(places[:_MOST_TIMELINE_ROWS])}
    lanes_of: dict[str, dict[str, int]] = {}  # in each row, one for each kind
    for span, where in zip(spans, wheres, strict=True):
        lanes = lanes_of.setdefault(where, {})
        lanes.setdefault(span.event.kind, len(lanes))
    index_of = {(span.event.key, span.began): at for at, span in enumerate(alarm_spans(record.events))}
    least = _LEAST_BAR * (scales.steps[1] - scales.steps[0])

    def bar(span: AlarmSpan, where: str) -> Chart:
        lanes, end = lanes_of[where], run["steps"][-1] if span.ended is None else span.ended
        height = 0.76 / len(lanes)
        return {
            "x": max(end - span.began, least),
            "base": span.began,
            "y": shown[where],
            "width": 0.94 * height,
            "offset": lanes[span.event.kind] * height - 0.38,
            "text": _bar_text(span, where),
            "customdata": index_of[span.event.key, span.began],
        }

    bars_of: dict[str, list[Chart]] = {span.event.kind: [] for span in spans}
    for span, where in zip(spans, wheres, strict=True):
        if where in shown:
            bars_of[span.event.kind].append(bar(span, where))
    traces = [_alarm_bars(kind, bars) for kind, bars in bars_of.items() if bars]
    num_hidden = len(places) - len(shown)
    title = f"{num_hidden} more places are in the table below" if num_hidden else ""
    layout = step_layout(title, 96 + 24 * len(shown), scales, run["segments"])
    ends = [len(shown) - 0.5, -0.5]
    layout["yaxis"] = axis(range=ends, tickvals=[*shown.values()], ticktext=[*shown], showgrid=False)
    layout |= {"margin": {"l": 10, "r": 20, "t": 36, "b": 44}, "showlegend": True, "barmode": "overlay"}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def _bar_text(span: AlarmSpan, where: str) -> str:
    until = ", still firing" if span.ended is None else f", until {span.ended:,}"
    more = f"<br>{plain_text(span.event.message)}" if span.event.message else ""
    return f"{where}: {plain_text(fault_text(span.event.kind))}<br>since step {span.began:,}{until}{more}"


def _alarm_bars(kind: str, bars: Sequence[Chart]) -> Chart:
    return {
        "type": "bar",
        "orientation": "h",
        "name": plain_text(fault_text(kind)),
        **{name: [bar[name] for bar in bars] for name in bars[0]},
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": kind_color(kind)},
        "showlegend": True,
    }


def _heatmap(name: str, run: Numbers, scales: Scales) -> Chart:
    """Layers downwards, heads across; the script puts in the values of a step, that step, and the frames."""
    rows = [(run["short"][layer], num_heads) for layer, num_heads in run["metrics"][name]["rows"]]
    most, log_scale = max(num_heads for _, num_heads in rows), is_log(name)
    low, high = scales.limits.get(name, (1.0, 2.0))
    ticks: list[float] = log_axis_ticks(low, high).get("tickvals", []) if log_scale else []
    if log_scale:
        low, high = math.log10(low), math.log10(high)
    # Noise between equal heads must not fill the whole scale.
    padding = max(0.0, 0.05 - (high - low)) / 2
    if log_scale and not ticks:
        ticks = [float(10**tick) for tick in np.linspace(low, high, 3)]
    tick_texts = {"tickvals": [math.log10(tick) for tick in ticks], "ticktext": [f"{tick:.3g}" for tick in ticks]}
    gap = 2 if len(rows) * most <= 400 else 0
    unit = {"text": metric_unit(name), "side": "right", "font": {"size": 11, "color": FAINT_INK}}
    trace = {
        "type": "heatmap",
        "meta": {"metric": name, "log": log_scale},
        "zmin": low - padding,
        "zmax": high + padding,
        "colorscale": "Viridis",
        "xgap": gap,
        "ygap": gap,
        "hoverongaps": False,
        "hovertemplate": "%{text}<br>%{customdata:.4g}<extra></extra>",
        "colorbar": {"thickness": 12, "outlinewidth": 0, "title": unit, **(tick_texts if log_scale else {})},
    }
    hatched = {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "fillpattern": {"shape": "/", "fgcolor": OTHER_HEADS_COLOR, "bgcolor": PAPER_GRAY, "size": 7},
        "line": {"width": 0},
        "hoveron": "fills",
        "hoverinfo": "text",
        "showlegend": False,
    }
    mark = {"size": 7 if most <= 40 else 4, "line": {"width": 0}}
    marks = {"type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False}
    above = {**marks, "marker": {**mark, "symbol": "triangle-up", "color": "#111111"}}
    below = {**marks, "marker": {**mark, "symbol": "triangle-down", "color": "#ffffff"}}
    named, numbered = range(0, len(rows), -(-len(rows) // 26)), range(0, most, -(-most // 16))
    layout = step_layout(f"{metric_title(name)} at step {{step}}", 110 + _row_height(len(rows)) * len(rows), scales)
    columns = {"range": [-0.5, most - 0.5], "tickvals": [*numbered]}
    layout["xaxis"] = axis(title={"text": run["metrics"][name]["noun"]}, showgrid=False, constrain="domain", **columns)
    row_names = [plain_text(rows[row][0]) for row in named]
    ends = [len(rows) - 0.5, -0.5]
    layout["yaxis"] = axis(range=ends, tickvals=[*named], ticktext=row_names, showgrid=False)
    return {"cells": trace, "hatched": hatched, "above": above, "below": below, "layout": layout}


def _row_height(num_rows: int) -> float:
    return max(min(30.0, 700 / num_rows), 130 / num_rows)


def _frame(color: str, width: int, half: float) -> Chart:
    """A frame around the cell in row 0 and column 0; the script moves it."""
    box = {"x0": -half, "x1": half, "y0": -half, "y1": half}
    return {"type": "rect", **box, "line": {"color": color, "width": width}}


def _curves(record: RunRecord, name: str, run: Numbers, scales: Scales) -> Chart:
    """The tracker's chart of the whole model, with the other heads and a line at the chosen step."""
    metric = run["metrics"][name]
    frames = metric["frames"]
    values = unpacked(metric["values"]).reshape(len(frames), -1)
    starts = np.cumsum([0, *(num_heads for _, num_heads in metric["rows"])])
    layers = {
        run["layers"][layer]: values[:, start : start + num_heads]
        for (layer, num_heads), start in zip(metric["rows"], starts, strict=False)
        if num_heads
    }
    spans = alarm_spans(record.events)
    alarms, coverage = [span.event for span in spans], record.coverage
    curves = head_curves(name, record.steps[frames], layers, alarms=alarms, coverage=coverage)
    band_numbers = [named_numbers(name, len(metric["band_samples"]), band=band) for band in range(len(QUANTILES))]
    traces = model_traces(
        curves,
        band_numbers,
        lambda column: named_numbers(name, len(frames), columns=[column]),
        coverage,
        others=_other_curves(curves),
    )
    still_firing = [span.event for span in spans if span.ended is None]
    layout = step_layout(model_layout(name, None)["title"]["text"], 500, scales, run["segments"])
    now = upright_line(0, OTHER_HEADS_COLOR, dash="solid")
    of_run = {
        step for span in spans if span.event.layer is None for step in (span.began, span.ended) if step is not None
    }
    edges = [upright_line(step, ALARM_COLOR, dash="dash") for step in sorted(of_run)]
    layout["shapes"] = [now, *layout["shapes"], *alarm_lines(still_firing), *edges]
    layout["yaxis"] = fixed_value_axis(name, scales)
    layout["xaxis"] = axis(tickformat=",d", range=scales.steps)
    layout["showlegend"] = True
    return with_training_panels({"data": traces, "layout": layout}, [run])


def _other_curves(curves: HeadCurves) -> list[Chart]:
    """The heads without a color: all in gray, or of many those of the chosen layer; then other alarms."""
    apart = sorted(curves.colors.keys() | curves.faults.keys())
    if len(curves.heads) <= _MOST_CURVES:
        which: Chart = {"columns": [at for at in range(len(curves.heads)) if at not in apart]}
    else:
        which = {"chosen_layer_without": apart}  # the script puts in its columns
    gray = named_numbers(curves.metric, len(curves.steps), **which)
    opacity = 0.8 if len(curves.heads) <= 40 else 0.45
    alarms = named_numbers(
        curves.metric, len(curves.steps), columns=[at for at in curves.faults if at not in curves.colors]
    )
    return [other_heads(gray, opacity=opacity), other_heads(alarms, color=ALARM_COLOR, width=1.2)]


def _cost(run: Numbers, scales: Scales) -> Chart | None:
    seconds = unpacked(run["seconds"]).astype(np.float64)
    if not np.isfinite(seconds).any():
        return None
    trace = line("seconds per sample", BAND_COLOR, points(np.array(run["steps"]), seconds), width=1.4)
    layout = step_layout("", 190, scales)
    layout["yaxis"] = axis(title={"text": "seconds per sample"}, rangemode="tozero")
    return {"data": [trace], "layout": layout}
