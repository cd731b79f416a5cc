"""The page's figures: alarms over time, the heatmap, a metric's curves, all metrics in small charts, and the cost.

They are complete but for numbers: `traces.packed` names those that the page's script puts in, again for each step and
each head that a reader chooses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnmonitor.metrics.catalog import is_log, metric_title, metric_unit
from attnmonitor.record import RunRecord
from attnmonitor.report.charts import alarm_lines, model_layout, model_traces
from attnmonitor.report.curves import HeadCurves, head_curves, plain_text
from attnmonitor.report.numbers import alarm_spans, unpacked
from attnmonitor.report.traces import (
    QUANTILES,
    Chart,
    axis,
    bands,
    base_layout,
    heading,
    line,
    log_axis_ticks,
    other_heads,
    packed,
    points,
    small_charts,
    upright_line,
    value_axis,
)
from attnmonitor.summary.names import fault_text
from attnmonitor.summary.style import (
    ALARM_COLOR,
    ALARM_SHADES,
    BAND_COLOR,
    CHOSEN_COLOR,
    FAINT_INK,
    OTHER_HEADS_COLOR,
    PAPER_GRAY,
)

__all__ = ["Scales", "page_charts", "shared_scales"]

Numbers = Mapping[str, Any]  # what `run_numbers` returns

_MOST_CURVES = 256  # of other heads; with more, those of the chosen layer
_MOST_TIMELINE_ROWS = 40
_GRID_COLUMNS = ((880, 4), (420, 2), (0, 1))  # least width in pixels, small charts in a row


@dataclass(frozen=True)
class Scales:
    """Axes and color scales that all runs of a page share.

    Attributes:
        steps: Range of the axis of optimizer steps.
        ends: Least and greatest value drawn, by metric.
        limits: Ends of the color scale, by metric.
    """

    steps: tuple[float, float]
    ends: Mapping[str, tuple[float, float]]
    limits: Mapping[str, tuple[float, float]]


def shared_scales(runs: Sequence[Numbers]) -> Scales:
    """Scales on which every run of the page has room, so that two runs can be compared by eye."""
    steps = [step for run in runs for step in (run["steps"][:1] + run["steps"][-1:])] or [0, 1]
    margin = 0.015 * (max(steps) - min(steps)) or 1

    def widest(key: str) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for run in runs:
            for name, metric in run["metrics"].items():
                if metric[key] is not None:
                    low, high = found.get(name, metric[key])
                    found[name] = (min(low, metric[key][0]), max(high, metric[key][1]))
        return found

    return Scales((min(steps) - margin, max(steps) + margin), widest("ends"), widest("limits"))


def page_charts(record: RunRecord, run: Numbers, scales: Scales) -> dict[str, Any]:
    """All figures of one run.

    Returns:
        ``timeline`` and ``cost``, None where there is nothing to draw; ``metrics``: per metric ``heatmap``, ``curves``
        and the trace of the ``chosen`` head; ``grid``: the small charts of all metrics, with a layout for each width of
        the page; ``frames``: how cells of the heatmap are framed.
    """
    drawn = {name: metric for name, metric in run["metrics"].items() if metric["frames"]}
    return {
        "timeline": _timeline(run, scales) if run["alarms"] else None,
        "cost": _cost(run, scales),
        "metrics": {
            name: {
                "heatmap": _heatmap(name, run, scales),
                "curves": _curves(record, name, run, scales),
                "chosen": _chosen(name, metric, width=3),
            }
            for name, metric in drawn.items()
        },
        "grid": _grid(drawn, run, scales),
        "frames": {
            "alarm": [_frame(ALARM_COLOR, 3, 0.5)],
            "chosen": [_frame("#ffffff", 4, 0.36), _frame(CHOSEN_COLOR, 2, 0.36)],
        },
    }


def _timeline(run: Numbers, scales: Scales) -> Chart:
    """A bar for each alarm from its first step to its last, in one row per head, layer or run."""
    places = list(dict.fromkeys(plain_text(alarm["where"]) for alarm in run["alarms"]))
    shown = places[-_MOST_TIMELINE_ROWS:]
    kinds = list(dict.fromkeys(alarm["kind"] for alarm in run["alarms"]))
    traces = []
    for kind, color in zip(kinds, ALARM_SHADES * len(kinds), strict=False):
        bars = [a for a in run["alarms"] if a["kind"] == kind and plain_text(a["where"]) in shown]
        traces.append(_alarm_bars(plain_text(fault_text(kind)), bars, run["steps"][-1], color))
    num_hidden = len(places) - len(shown)
    title = f"{num_hidden} places with earlier alarms are left out" if num_hidden else ""
    layout = _layout(title, 96 + 22 * len(shown), scales, run["segments"])
    every_row = {"tickmode": "linear", "tick0": 0, "dtick": 1}
    layout["yaxis"] = axis(autorange="reversed", type="category", categoryarray=shown, **every_row)
    layout |= {"margin": {"l": 10, "r": 20, "t": 36, "b": 44}, "showlegend": True}
    layout["legend"] = {"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    return {"data": traces, "layout": layout}


def _alarm_bars(kind: str, alarms: Sequence[Mapping[str, Any]], last_step: int, color: str) -> Chart:
    bars: Chart = {"x": [], "y": [], "text": [], "customdata": [], "symbols": []}
    for alarm in alarms:
        where, ended = plain_text(alarm["where"]), alarm["ended"]
        until = ", still firing" if ended is None else f", until {ended:,}"
        message = f"<br>{plain_text(alarm['message'])}" if alarm["message"] else ""
        head = None
        if alarm["layer"] is not None:
            head = [alarm["layer"], alarm["head"] or 0, "kv_head" if alarm["scope"] == "kv_head" else "query_head"]
        bars["x"] += [alarm["began"], last_step if ended is None else ended, None]
        bars["y"] += [where, where, None]
        bars["text"] += 2 * [f"{where}: {kind}<br>since step {alarm['began']:,}{until}{message}"] + [""]
        bars["customdata"] += [head, head, None]
        bars["symbols"] += ["line-ns", "triangle-right" if ended is None else "line-ns", "circle"]
    symbols = bars.pop("symbols")
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": kind,
        **bars,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"width": 9, "color": color},
        "marker": {"size": 11, "symbol": symbols, "color": color},
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
    not_measured = {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "fillpattern": {"shape": "/", "fgcolor": OTHER_HEADS_COLOR, "bgcolor": PAPER_GRAY, "size": 7},
        "line": {"width": 0},
        "hoveron": "fills",
        "hoverinfo": "text",
        "showlegend": False,
    }
    named, numbered = range(0, len(rows), -(-len(rows) // 26)), range(0, most, -(-most // 16))
    layout = _layout(f"{metric_title(name)} at step {{step}}", 110 + _row_height(len(rows)) * len(rows), scales)
    layout["xaxis"] = axis(
        title={"text": run["metrics"][name]["noun"]}, showgrid=False, constrain="domain", tickvals=[*numbered]
    )
    row_names = [plain_text(rows[row][0]) for row in named]
    layout["yaxis"] = axis(autorange="reversed", tickvals=[*named], ticktext=row_names, showgrid=False)
    return {"data": [trace, not_measured], "layout": layout}


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
    band_numbers = [packed(name, len(metric["band_samples"]), band=band) for band in range(len(QUANTILES))]
    traces = model_traces(
        curves,
        band_numbers,
        lambda column: packed(name, len(frames), columns=[column]),
        coverage,
        others=_other_curves(curves, run),
    )
    still_firing = [span.event for span in spans if span.ended is None]
    layout = _layout(model_layout(name, None)["title"]["text"], 500, scales, run["segments"])
    now = upright_line(0, OTHER_HEADS_COLOR, yref="y domain", dash="solid")
    layout["shapes"] = [now, *layout["shapes"], *alarm_lines(still_firing)]
    layout["yaxis"] = _value_axis(name, scales)
    layout["xaxis"] = axis(tickformat=",d", range=scales.steps)
    layout["showlegend"] = True
    return {"data": traces, "layout": layout}


def _other_curves(curves: HeadCurves, run: Numbers) -> list[Chart]:
    """The heads without a color: all in gray, or those of the chosen layer; then other alarms."""

    def gray(columns: Sequence[int], **where: Any) -> Chart:
        opacity = 0.45 if len(columns) > 40 else 0.8
        return other_heads(packed(curves.metric, len(curves.steps), columns=columns, **where), opacity=opacity)

    plain = {
        layer: [at for at in columns if at not in curves.colors and at not in curves.faults]
        for layer, columns in curves.layers.items()
    }
    if len(curves.heads) <= _MOST_CURVES:
        traces = [gray([at for columns in plain.values() for at in columns])]
    else:
        traces = [gray(columns, layer=run["layers"].index(layer)) for layer, columns in plain.items()]
    more_alarms = [at for at in curves.faults if at not in curves.colors]
    numbers = packed(curves.metric, len(curves.steps), columns=more_alarms)
    return [*traces, other_heads(numbers, color=ALARM_COLOR, width=1.2)]


def _chosen(name: str, metric: Mapping[str, Any], *, width: float, **more: Any) -> Chart:
    """The line of the chosen head; the script puts in which it is."""
    return line("", CHOSEN_COLOR, packed(name, len(metric["frames"])), width=width, **more)


def _grid(metrics: Mapping[str, Mapping[str, Any]], run: Numbers, scales: Scales) -> Chart:
    """Bands of every metric in a small chart each, with room for the chosen head."""
    traces, chosen, shapes, axes, headings = [], [], [], [], []
    for index, (name, metric) in enumerate(metrics.items()):
        number = str(index + 1) if index else ""
        place = {"xaxis": f"x{number}", "yaxis": f"y{number}", "showlegend": False}
        numbers = [packed(name, len(metric["band_samples"]), band=band) for band in range(len(QUANTILES))]
        traces += [{**trace, **place} for trace in bands(numbers, BAND_COLOR)]
        chosen.append(_chosen(name, metric, width=2.2, **place))
        shapes += [_segment_line(step, f"x{number}", f"y{number} domain") for step in run["segments"]]
        axes.append(
            (
                axis(tickformat=",d", range=scales.steps, nticks=4),
                _value_axis(name, scales, automargin=False, nticks=4),
            )
        )
        headings.append(heading(metric_title(name), note=metric_unit(name), size=12))
    layouts = []
    for least_width, columns in _GRID_COLUMNS if metrics else ():
        rows = -(-len(axes) // columns)
        layout = _layout("", 60 + 190 * rows, scales) | {"margin": {"l": 46, "r": 20, "t": 30, "b": 40}}
        del layout["xaxis"]
        gaps = {"xgap": 0.16 if columns > 1 else 0, "ygap": 0.38}
        layout |= small_charts(headings, axes, columns, gaps) | {"shapes": shapes}
        layouts.append({"least_width": least_width, "layout": layout})
    return {"data": traces, "chosen": chosen, "layouts": layouts}


def _cost(run: Numbers, scales: Scales) -> Chart | None:
    seconds = unpacked(run["seconds"]).astype(np.float64)
    if not np.isfinite(seconds).any():
        return None
    trace = line("seconds per sample", BAND_COLOR, points(np.array(run["steps"]), seconds), width=1.4)
    layout = _layout("", 190, scales)
    layout["yaxis"] = axis(title={"text": "seconds per sample"}, rangemode="tozero")
    return {"data": [trace], "layout": layout}


def _layout(title: str, height: float, scales: Scales, segments: Sequence[int] = ()) -> Chart:
    """Layout of a figure of the page over optimizer steps, with a line at the first step of each segment."""
    layout = base_layout(title)
    layout["title"]["font"]["size"] = 13
    return {
        **layout,
        "height": height,
        "margin": {"l": 60, "r": 20, "t": 34 if title else 12, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"align": "left"},
        "xaxis": axis(tickformat=",d", range=scales.steps, title={"text": "optimizer step"}),
        "shapes": [_segment_line(step) for step in segments],
    }


def _segment_line(step: int, xref: str = "x", yref: str = "y domain") -> Chart:
    return upright_line(step, FAINT_INK, xref=xref, yref=yref)


def _value_axis(name: str, scales: Scales, **more: Any) -> Chart:
    """The axis of a metric, fixed on the range that all runs of the page share."""
    ends = scales.ends.get(name)
    if ends is None:
        return value_axis(name, None, **more)
    low, high = (math.log10(end) for end in ends) if is_log(name) else ends
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.1
    return value_axis(name, ends, range=[low - margin, high + margin], **more)
