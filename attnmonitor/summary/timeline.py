"""Loss, learning rate and the worst head as bars of text over the same steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from attnmonitor.alerts.firing import most_severe_first, number_text
from attnmonitor.messages import printable, tail_of
from attnmonitor.metrics.catalog import is_log
from attnmonitor.record.training_log import Curve
from attnmonitor.sample import AlertEvent, LayerCoverage, head_name
from attnmonitor.summary.logged import loss_and_rate
from attnmonitor.summary.names import short_layer_names

__all__ = ["bars_text", "run_timeline", "timeline"]

_BARS = "▁▂▃▄▅▆▇█"
_MAX_LABEL, _MAX_ENDS = 24, 22  # characters


def run_timeline(
    logged: Mapping[str, Curve],
    firing: Sequence[AlertEvent],
    coverage: Mapping[str, LayerCoverage],
    trajectories: Mapping[str, Mapping[str, ArrayLike]],
    steps: ArrayLike,
    *,
    width: int = 80,
) -> list[str]:
    """Return `timeline` of loss, learning rate and the head that is worst now; nothing where no loss was logged.

    Args:
        logged: What training logged.
        firing: Alarms that fire.
        coverage: How each layer was captured.
        trajectories: For each metric that is asked for and each layer ``(num_samples, num_heads)``.
        steps: Optimizer steps of the samples, ``(num_samples,)``.
        width: Characters of a line.
    """
    curves, mark, log_scale = loss_and_rate(logged), None, frozenset[str]()
    for alarm, *_ in most_severe_first(firing, coverage) if curves else ():
        if alarm.layer is not None and alarm.head is not None and alarm.metric in trajectories:
            heads = np.asarray(trajectories[alarm.metric][alarm.layer], dtype=np.float64)
            name = head_name(alarm, short_layer_names(coverage), coverage)
            curves[name] = list(zip(np.asarray(steps).tolist(), heads[:, alarm.head].tolist(), strict=True))
            log_scale = frozenset({name} if is_log(alarm.metric) else ())
            mark = (alarm.began, f"{alarm.metric}: alarm since step {alarm.began:,}")
            break
    return timeline(curves, mark=mark, log_scale=log_scale, width=width)


def timeline(
    curves: Mapping[str, Curve],
    *,
    mark: tuple[int, str] | None = None,
    log_scale: Collection[str] = (),
    width: int = 80,
) -> list[str]:
    r"""Return a line of bars for each curve, all over the same steps, and a line with these steps.

    Args:
        curves: Pairs of step and value by name.
        mark: A step to point at, and what to write there.
        log_scale: Curves whose bars have the height of the logarithm.
        width: Characters of a line.

    Example:
        >>> loss, head = [(0, 4.0), (10, 3.0), (20, 2.0), (30, 1.0)], [(0, 1.0), (30, 9.0)]
        >>> print("\n".join(timeline({"loss": loss, "h.0 head 1": head}, mark=(20, "alarm"), width=50)))
        loss        ████▆▆▆▆▆▃▃▃▃▁  4 → 1
        h.0 head 1  ▁▁▁▁▁▁▁▁▁▁▁▁▁█  1 → 9
        steps 0–30           ▲ alarm
    """
    known = {name: [point for point in curve if math.isfinite(point[1])] for name, curve in curves.items()}
    known = {name: curve for name, curve in known.items() if curve}
    steps = [step for curve in known.values() for step, _ in curve]
    if not steps:
        return []
    first, last = min(steps), max(steps)
    axis = f"steps {first:,}–{last:,}"
    label = max(len(axis), *(min(len(name), _MAX_LABEL) for name in known))
    room = max(8, width - label - _MAX_ENDS - 4)
    lines = []
    for name, curve in known.items():
        heights = _binned(curve, first, last, room)
        bars = (
            bars_text(math.log(x) if x > 0 else math.nan for x in heights) if name in log_scale else bars_text(heights)
        )
        ends = f"{number_text(curve[0][1])} → {number_text(curve[-1][1])}"
        lines.append(f"{tail_of(name, _MAX_LABEL):{label}}  {bars}  {ends}")
    pointer = ""
    if mark is not None and first <= mark[0] <= last:
        at, note = _bin(mark[0], first, last, room), mark[1]
        is_right = at + len(note) + 2 <= room + _MAX_ENDS
        pointer = f"{' ' * at}▲ {note}" if is_right else f"{note} ▲".rjust(at + 1)
    return [printable(line.rstrip(), one_line=True) for line in [*lines, f"{axis:{label}}  {pointer}"]]


def bars_text(values: Iterable[float]) -> str:
    """Return a bar for each value between the least and the greatest; a dot where there is no number.

    Example:
        >>> bars_text([1.0, 2.0, math.nan, 8.0])
        '▁▂·█'
    """
    values = list(values)
    known = [value for value in values if math.isfinite(value)]
    low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    return "".join(
        _BARS[round((value - low) / (span or 1.0) * (len(_BARS) - 1))] if math.isfinite(value) else "·"
        for value in values
    )


def _bin(step: int, first: int, last: int, room: int) -> int:
    return round((step - first) / max(1, last - first) * (room - 1))


def _binned(curve: Sequence[tuple[int, float]], first: int, last: int, room: int) -> list[float]:
    """Return the curve as one value per character, each until the next one; NaN before the first."""
    bins = [math.nan] * room
    for step, value in curve:
        bins[_bin(step, first, last, room)] = value
    for at in range(1, _bin(curve[-1][0], first, last, room)):
        if math.isnan(bins[at]):
            bins[at] = bins[at - 1]
    return bins
