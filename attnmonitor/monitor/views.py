"""What can be read of a monitor beside its attributes; each is kept by one of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from attnmonitor._version import __version__
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.ranks import RankMeasurement
from attnmonitor.monitor.delivery import Delivery
from attnmonitor.monitor.failures import Failures
from attnmonitor.monitor.run_alerts import RunAlerts
from attnmonitor.record.history import History
from attnmonitor.record.training_log import Curve, TrainingLog
from attnmonitor.sample import AlertEvent, LayerCoverage, RunState, Sample
from attnmonitor.summary.notebook import report_hint, run_html
from attnmonitor.summary.run_summary import RunSummary
from attnmonitor.summary.tables import coverage_table
from attnmonitor.summary.timeline import run_timeline
from attnmonitor.summary.verdict import idle_text, verdict

__all__ = ["MonitorViews"]


class MonitorViews:
    """What `AttentionMonitor` shows of itself."""

    coverage: Mapping[str, LayerCoverage]
    history: History
    last_sample: Sample | None
    model: nn.Module
    name: str | None
    probe: Probe
    strict: bool
    summary: RunSummary
    _alerts: RunAlerts
    _delivery: Delivery
    _failures: Failures
    _identity: dict[str, str]
    _log: TrainingLog
    _measurement: RankMeasurement
    _metrics: tuple[str, ...]
    _processes: str
    _schedule_text: str
    _weights_every: int

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

    def describe(self) -> dict[str, Any]:
        """Return the run's settings as plain values, for the record and a tracker's configuration."""
        return {
            "attnmonitor_version": __version__,
            "model": type(self.model).__qualname__,
            **self._identity,
            "name": self.name,
            "probe": self.probe.describe(),
            "schedule": self._schedule_text,
            "metrics": list(self._metrics),
            "processes": self._processes,
            "weights_every": self._weights_every,
            "strict": self.strict,
            **self._alerts.describe(),
            "layers": [asdict(layer) for layer in self.coverage.values()],
            "after_last_attention": self._measurement.after_last_attention,
        }

    def __str__(self) -> str:
        """A table of the layers: how each is captured and verified, or why not; the way of computing; idle rules."""
        how = self._measurement.after_last_attention if self.coverage else ""
        lines = [
            coverage_table(self.coverage),
            str(self._measurement.route),
            how and f"after the last attention: {how}",
            idle_text(self._alerts.idle_rules),
        ]
        return "\n".join(filter(None, lines))

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
