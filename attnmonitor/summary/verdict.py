"""One line for people: whether anything in a run needs a look, and where.

People open a monitor to learn whether they must act. The line says so; charts, table and report show why. Only alarms
decide what it says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from attnmonitor.alerts.firing import most_severe_first
from attnmonitor.messages import printable
from attnmonitor.sample import AlertEvent, head_name
from attnmonitor.summary.names import MAX_NAMED, fault_names, short_layer_names
from attnmonitor.summary.run_summary import RunSummary

__all__ = ["verdict"]


def verdict(summary: RunSummary) -> str:
    """Return one line: whether there is anything to look at, and where.

    Example:
        >>> from attnmonitor.sample import LayerCoverage
        >>> coverage = {"h.0.attn": LayerCoverage("h.0.attn", how="sdpa", num_query_heads=12)}
        >>> verdict(RunSummary(coverage, num_samples=50))
        '12 heads in 1 layer watched over 50 samples: healthy'
    """
    measured = [layer for layer in summary.coverage.values() if layer.measured]
    missed = [layer for layer in summary.coverage.values() if not layer.measured]
    if summary.num_samples == 0:
        return "no sample taken yet"
    if summary.num_failed == summary.num_samples:
        line = f"nothing measured: {_count(summary.num_samples, 'sample')} failed ({summary.failure})"
        return printable(line, one_line=True)
    if missed and not measured:
        line = f"nothing measured in {_count(len(missed), 'attention layer')} ({missed[0].layer}: {missed[0].reason})"
        return printable(line, one_line=True)
    if summary.firing:
        places = most_severe_first(summary.firing, summary.coverage)
        line = _alarms_text(places, short_layer_names(summary.coverage))
    else:
        heads = _count(sum(layer.num_query_heads for layer in measured), "head")
        over = f"in {_count(len(measured), 'layer')} watched over {_count(summary.num_samples, 'sample')}"
        line = f"{heads} {over}: {_no_alarm_text(summary)}"
    notes = []
    if summary.num_cleared:
        notes.append(f"{_count(summary.num_cleared, 'alarm')} came and went")
    if summary.num_failed:
        notes.append(f"{_count(summary.num_failed, 'sample')} failed")
    if missed:
        notes.append(f"{_count(len(missed), 'layer')} not measured")
    return printable("; ".join([line, *notes]), one_line=True)


def _no_alarm_text(summary: RunSummary) -> str:
    if not summary.has_rules:
        return "no alert rule was on"
    if summary.num_samples > summary.grace:
        return "healthy"
    return f"no alarm, but some rules first wait for {summary.grace} samples"


def _alarms_text(places: Sequence[Sequence[AlertEvent]], short: Mapping[str, str]) -> str:
    of_run = [events for events in places if events[0].layer is None]
    others = [events for events in places if events[0].layer is not None]
    nouns = {"layer" if events[0].head is None else "head" for events in others}
    number = _count(len(others), nouns.pop() if len(nouns) == 1 else "place")
    named = ", ".join(f"{head_name(events[0], short)} ({fault_names(events)})" for events in others[:MAX_NAMED])
    named += f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
    if of_run:
        line = f"the run needs a look ({fault_names(of_run[0])})"
        return f"{line}, and so {'does' if len(others) == 1 else 'do'} {number}: {named}" if others else line
    return f"{number} {'needs' if len(others) == 1 else 'need'} a look: {named}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
