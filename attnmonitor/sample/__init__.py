"""The plain records of one sample: values, coverage, alert events, and the evidence of a head at its alarm."""

from attnmonitor.sample.alarms import (
    head_name,
    heads_concerned,
    scope_noun,
    scoped_head_name,
    severity_order,
    still_firing,
    worst_first,
)
from attnmonitor.sample.evidence import HeadEvidence, Position
from attnmonitor.sample.records import AlarmKey, AlertEvent, ByLayer, LayerCoverage, Sample, html_of
from attnmonitor.sample.scopes import AlarmScope, RunState, Scope

__all__ = [
    "AlarmKey",
    "AlarmScope",
    "AlertEvent",
    "ByLayer",
    "HeadEvidence",
    "LayerCoverage",
    "Position",
    "RunState",
    "Sample",
    "Scope",
    "head_name",
    "heads_concerned",
    "html_of",
    "scope_noun",
    "scoped_head_name",
    "severity_order",
    "still_firing",
    "worst_first",
]
