"""What can be read of a monitor beside its attributes; each is kept by one of its parts."""

from __future__ import annotations

from pathlib import Path

from attnmonitor.alerts.rule_set import Alerts
from attnmonitor.monitor.delivery import Delivery
from attnmonitor.monitor.failures import Failures
from attnmonitor.record.training_log import Curve, TrainingLog
from attnmonitor.sample import AlertEvent

__all__ = ["MonitorViews"]


class MonitorViews:
    """Properties of `AttentionMonitor`."""

    _alerts: Alerts
    _delivery: Delivery
    _failures: Failures
    _log: TrainingLog

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
        """Alerts that are firing now."""
        return self._alerts.firing

    @property
    def record_path(self) -> Path | None:
        """File of this run's record; None without one."""
        return self._delivery.record_path

    @property
    def record_path_from_here(self) -> Path | None:
        """`record_path`, relative if it was given so and the working directory is still the same."""
        return self._delivery.record_path_from_here
