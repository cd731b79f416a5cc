"""The page's table of alarms, each with a link to its head's curves, and what their kinds usually mean."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from attnmonitor.alerts.firing import number_text
from attnmonitor.alerts.notifications import ADVICE
from attnmonitor.record import RunRecord
from attnmonitor.report.alarms import AlarmSpan, alarm_address, spans_worst_first
from attnmonitor.report.tables import Markup, table
from attnmonitor.sample import head_name
from attnmonitor.summary.names import count_text, fault_text, short_layer_names

__all__ = ["alarm_table"]

MOST_ALARM_ROWS = 200
_HEADER = ("where", "what", "since step", "until step", "metric", "at alarm", "now or at end", "worst", "latest event")


def alarm_table(record: RunRecord, run: int) -> str:
    """HTML of the alarms that fire, worst first, then of those that are over, the latest first.

    Args:
        record: The run.
        run: Its index on the page.
    """
    spans = spans_worst_first(record)
    if not spans:
        return "<p class='note'>No alarm has begun in this run.</p>"
    short, metrics = short_layer_names(record.coverage), record.metrics

    def row(span: AlarmSpan) -> tuple[str, ...]:
        event = span.event
        where = escape(head_name(event, short, record.coverage))
        address = escape(alarm_address(span, metrics, run))
        return (
            Markup(f"<a href='{address}'>{where}</a>"),
            fault_text(event.kind) + (" (critical)" if event.severity == "critical" else ""),
            f"{span.began:,}",
            "still firing" if span.ended is None else f"{span.ended:,}",
            event.metric,
            *("" if math.isnan(value) else number_text(value) for value in (event.value, event.now, event.worst)),
            event.message,
        )

    rows = [row(span) for span in spans[:MOST_ALARM_ROWS]]
    left_out = len(spans) - len(rows)
    note = f"<p class='note'>{left_out} earlier alarms are not listed.</p>" if left_out else ""
    opened = " open" if len(rows) <= 12 else ""
    summary = f"<summary>{count_text(len(rows), 'alarm')}</summary>"
    shown = f"<details class='alarms'{opened}>{summary}{table('Alarms', _HEADER, rows)}</details>"
    return f"{note}{shown}{_advice(span.event.kind for span in spans)}"


def _advice(kinds: Iterable[str]) -> str:
    """For each kind of fault, what it usually means and what to try."""
    known = [(kind, ADVICE[kind]) for kind in dict.fromkeys(kinds) if kind in ADVICE]
    entries = "".join(
        f"<dt>{escape(fault_text(kind))}</dt><dd>{escape(advice.meaning)} {escape(advice.remedy)}</dd>"
        for kind, advice in known
    )
    return f"<dl>{entries}</dl>" if entries else ""
