"""What can be read of a monitor beside its attributes; each is kept by one of its parts."""

from __future__ import annotations

from pathlib import Path

from attnmonitor.alerts.rule_set import Alerts
from attnmonitor.monitor.delivery import Delivery
from attnmonitor.monitor.failures import Failures
from attnmonitor.record.counts import RunState
from attnmonitor.record.history import History
from attnmonitor.record.training_log import Curve, TrainingLog
from attnmonitor.sample import AlertEvent, Sample
from attnmonitor.summary.notebook import report_hint, run_html
from attnmonitor.summary.run_summary import RunSummary
from attnmonitor.summary.timeline import run_timeline
from attnmonitor.summary.verdict import verdict

__all__ = ["MonitorViews"]


class MonitorViews:
    """Properties of `AttentionMonitor`."""

    _alerts: Alerts
    _delivery: Delivery
    _failures: Failures
    _log: TrainingLog
    history: History
    last_sample: Sample | None
    summary: RunSummary

    @property
    def logged(self) -> dict[str, Curve]:
        """What training logged: ``{"loss": [(step, value), …]}``; of a curve past 10,000 points every second one."""
        return self._log.curves

    @property
    def failures(self) -> int:
        """Number of failures so far: samples, layers that were measured at attach, alerts, record, loggers, actions."""
        return self._failures.count

    @property
    def paused(self) -> bool:
        """Whether `on_step` takes no samples: several measured nothing, or a process was missing. `sample` tries."""
        return self._failures.paused

    @property
    def firing(self) -> list[AlertEvent]:
        """Alarms that fire now, worst first, each with its ``value`` at alarm, ``now`` and at its ``worst``."""
        return self._alerts.firing

    @property
    def state(self) -> RunState:
        """``"alarm"``, ``"healthy"``, or ``"unknown"`` where something is missing to say so; the verdict says what."""
        return self.summary.state

    @property
    def record_path(self) -> Path | None:
        """File of this run's record; None without one."""
        return self._delivery.record_path

    def _repr_html_(self) -> str:
        sample, summary, history = self.last_sample, self.summary, self.history
        alarmed = {event.metric: history[event.metric] for event in self.firing[:1] if event.metric in history}
        path = self.record_path_from_here
        return run_html(
            verdict(summary),
            self.state,
            values={} if sample is None else sample.values,
            firing=self.firing,
            coverage=summary.coverage,
            step=None if sample is None else sample.global_step,
            bars=run_timeline(self.logged, self.firing, summary.coverage, alarmed, history.steps),
            hint="This monitor writes no record." if path is None else report_hint(path),
        )

    @property
    def record_path_from_here(self) -> Path | None:
        """`record_path`, relative if it was given so and the working directory is still the same."""
        return self._delivery.record_path_from_here
