"""Any rule set applied to a recorded run: what would have fired, and when.

No model and no logger is needed, so thresholds can be tuned on old runs. A replay reads the steps and trajectories of a
record and feeds them to `Alerts` as the monitor did.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnmonitor.alerts.defaults import DEFAULT_RULES
from attnmonitor.alerts.firing import course_text
from attnmonitor.alerts.judged import judged_values
from attnmonitor.alerts.rule_set import Alerts
from attnmonitor.alerts.rules import Rule
from attnmonitor.messages import printable
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import AlertEvent, LayerCoverage, head_name

__all__ = ["Recorded", "Replayed", "replay", "replay_text"]


class RecordedSample(Protocol):
    """One sample of a record."""

    @property
    def failure(self) -> str | None:
        """Why it has no values; None when it has."""


class Recorded(Protocol):
    """What a replay reads of a record, for example of an `attnmonitor.record.RunRecord`."""

    @property
    def samples(self) -> Sequence[RecordedSample]:
        """In order of steps."""

    @property
    def steps(self) -> NDArray[np.int64]:
        """``(num_samples,)``."""

    @property
    def metrics(self) -> Sequence[str]:
        """Names of the recorded metrics."""

    def trajectories(self, metric: str) -> Mapping[str, NDArray[np.float32]]:
        """``(num_samples, num_heads)`` per layer."""


class Replayed(list[AlertEvent]):
    """The events of a replay.

    Attributes:
        firing: The alarms that fire at its end, worst first.
        coverage: How each layer was captured, where the record has it.
    """

    firing: Sequence[AlertEvent] = ()
    coverage: Mapping[str, LayerCoverage] | None = None


def replay(record: Recorded, rules: Iterable[Rule] = DEFAULT_RULES, *, stride: int = 1) -> Replayed:
    """Return the events that a rule set gives for a recorded run, and the alarms that fire at its end.

    A record writes NaN both for what is not finite and for what was not measured. Here a layer counts as measured from
    its first finite value on, and a metric that is NaN in all heads while another one is not counts as not measured.

    Args:
        record: The run.
        rules: The rules.
        stride: Use every ``stride``-th sample only, to see what less frequent sampling would have found.

    Raises:
        ValueError: A rule that is not optional needs a metric that was not recorded.

    Example:
        >>> from types import SimpleNamespace
        >>> from attnmonitor.alerts import Rule, Threshold, replay
        >>> heads = {"layers.0": np.array([[1.0, 1.0], [1.0, 0.01], [1.0, 0.01]], dtype=np.float32)}
        >>> sample = SimpleNamespace(failure=None)
        >>> run = SimpleNamespace(
        ...     samples=[sample] * 3, steps=[0, 10, 20], metrics=["key_rms"], trajectories=lambda metric: heads
        ... )
        >>> faint = Threshold("key_rms", "value", fire_below=-3.0, clear_above=-2.0)
        >>> events = replay(run, [Rule("faint", "dead_head", "kv_head", faint, grace=0)])
        >>> [(event.head, event.global_step) for event in events]
        [(1, 20)]
    """
    alerts = Alerts(rules)
    if missing := alerts.required_metrics - set(record.metrics):
        affected = sorted(rule.name for rule in alerts.rules if rule.metrics & missing and not rule.optional)
        raise ValueError(f"rules {', '.join(affected)}: the run did not record {', '.join(sorted(missing))}")
    needed = {metric for rule in alerts.rules for metric in rule.metrics} & set(record.metrics)
    trajectories = {metric: record.trajectories(metric) for metric in METRICS if metric in needed}
    first_finite = {
        (metric, layer): np.isfinite(rows).any(axis=1).argmax() if np.isfinite(rows).any() else len(rows)
        for metric, layers in trajectories.items()
        for layer, rows in layers.items()
    }
    events = Replayed()
    coverage = getattr(record, "coverage", None)
    for index in range(0, len(record.steps), stride):
        if record.samples[index].failure is not None:
            continue
        sample = {
            metric: {
                layer: torch.from_numpy(rows[index])
                for layer, rows in layers.items()
                if first_finite[metric, layer] <= index
            }
            for metric, layers in trajectories.items()
        }
        events += alerts.observe(judged_values(_measured(sample), coverage or {}), int(record.steps[index]))
    events.firing, events.coverage = alerts.firing, coverage
    return events


def _measured(sample: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Mapping[str, Tensor]]:
    """Return the metrics that have a value, or all of them where none has."""
    with_values = {
        metric: layers
        for metric, layers in sample.items()
        if any(bool(row.isfinite().any()) for row in layers.values())
    }
    return with_values or sample


def replay_text(events: Sequence[AlertEvent]) -> str:
    """Return one line per event, or a line that says that nothing fired.

    The latest line of an alarm that fires at the end has its value at alarm, at the end and at its worst.
    """
    if not events:
        return "nothing would have fired"
    coverage = getattr(events, "coverage", None)
    courses = {alarm.key: course_text(alarm) for alarm in getattr(events, "firing", ())}
    latest = {event.key: at for at, event in enumerate(events)}
    lines = []
    for at, event in enumerate(events):
        course = courses.get(event.key, "") if latest[event.key] == at else ""
        lines.append(
            f"step {event.global_step:>8}  {event.state:<8} {event.severity:<8} {event.rule:<16} "
            f"{head_name(event, coverage=coverage)}{'' if math.isnan(event.value) else f'  {event.message}'}"
            f"{f'; {course}' if course else ''}"
        )
    return "\n".join(printable(line, one_line=True) for line in lines)
