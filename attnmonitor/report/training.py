"""What training logged beside the heads, in panels below a metric's curves: one for losses, one for learning rates.

The panels share the axis of steps with the curves, so a reader sees which changed first, the loss or the heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnmonitor.report.curves import plain_text
from attnmonitor.report.traces import Chart, axis, heading, line
from attnmonitor.summary.logged import logged_title
from attnmonitor.summary.style import INK

__all__ = ["with_training_panels"]

_TITLES = ("loss", "learning rate", "logged")
_DASHES = ("solid", "dash", "dot", "dashdot")
_PANEL, _GAP, _LEGEND = 84, 40, 56  # pixels


def with_training_panels(
    figure: Chart, runs: Sequence[Mapping[str, Any]], colors: Sequence[str] = (INK,), first: int = 0
) -> Chart:
    """A figure of curves over steps, with a panel below for each kind of value that training logged.

    The figure's own plot keeps its height. Where it has no curves of its own, the panels are all there is.

    Args:
        figure: Traces on the first axes, or none.
        runs: What `run_numbers` returns, for each run in the figure.
        colors: Color of each run.
        first: Index of the first of these runs on the page.
    """
    panels = {
        title: [(at, name) for at, run in enumerate(runs) for name in run["logged"] if logged_title(name) == title]
        for title in _TITLES
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return figure
    layout, margin = dict(figure["layout"]), figure["layout"]["margin"]
    own = layout["height"] - margin["t"] - margin["b"] if figure["data"] else 0
    total = own + (_PANEL + _GAP) * len(panels)
    layout |= {"height": total + margin["t"] + margin["b"], "annotations": list(layout.get("annotations", []))}
    layout["legend"] = {**layout["legend"], "y": -_LEGEND / total}
    if own:
        layout["yaxis"] = {**layout["yaxis"], "domain": [1 - own / total, 1]}
    traces, top = list(figure["data"]), total - own
    for number, (title, curves) in enumerate(panels.items(), start=2):
        top -= _GAP
        domain = [max(0.0, (top - _PANEL) / total), top / total]
        layout[f"yaxis{number}"] = axis(domain=domain, anchor="x", tickformat="~g", nticks=4)
        layout["xaxis"] = {**layout["xaxis"], "anchor": f"y{number}"}
        layout["annotations"].append({**heading(title, size=12), "xref": "paper", "yref": "paper", "y": top / total})
        top -= _PANEL
        names = list(dict.fromkeys(name for _, name in curves))
        for at, name in curves:
            shown_name = plain_text(f"{name}, {runs[at]['name']}" if len(runs) > 1 else name)
            dash = _DASHES[names.index(name) % len(_DASHES)]
            numbers = {"mode": "lines", "meta": {"logged": name, "run": first + at}, "yaxis": f"y{number}"}
            in_legend = {"showlegend": len(runs) == 1 and len(names) > 1}
            traces.append(line(shown_name, colors[at % len(colors)], numbers, width=1.4, dash=dash, **in_legend))
    return {"data": traces, "layout": layout}
