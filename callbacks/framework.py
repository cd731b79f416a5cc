"""What a callback of a training framework is told when it is made, and attaches with when training begins."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from attnmonitor import AttentionMonitor
from attnmonitor.probe import ForwardFunction, default_forward
from attnmonitor.schedules import Schedule, one_schedule

__all__ = ["FrameworkCallback"]


class FrameworkCallback:
    """The constructor of the callbacks, which say themselves what its arguments mean there.

    Attributes:
        monitor: The `AttentionMonitor`, once training has begun.
    """

    def __init__(
        self,
        probe: Any = None,
        *,
        every_n_steps: int | None = None,
        schedule: int | Schedule | Iterable[int] | None = None,
        loggers: Any = None,
        record: bool | str | Path | None = True,
        forward: ForwardFunction | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        self.monitor: AttentionMonitor | None = None
        self._probe = probe
        self._schedule = one_schedule(every_n_steps, schedule)
        self._loggers = loggers
        self._record = record
        self._forward = forward or default_forward
        self._name = name
        self._settings = settings

    def _attach(
        self, model: nn.Module, probe: Any, *, loggers: Any, folder: str | Path, forward: ForwardFunction
    ) -> AttentionMonitor:
        """Make the monitor; its record is in the framework's own folder unless another was asked for."""
        self.monitor = AttentionMonitor(
            model,
            probe,
            self._schedule,
            loggers=loggers,
            record=Path(folder) / "attnmonitor_runs" if self._record is True else self._record,
            forward=forward,
            name=self._name,
            **self._settings,
        )
        return self.monitor
