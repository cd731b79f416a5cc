"""The arguments that the framework callbacks share: checked when given, used to attach when training begins."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import distributed, nn

from attnmonitor import AttentionMonitor
from attnmonitor.measurement.probe import ForwardFunction, default_forward
from attnmonitor.messages import warn
from attnmonitor.metrics.catalog import check_metric_names
from attnmonitor.monitor.schedules import Schedule, one_schedule
from attnmonitor.parallel.exchange import Exchange, MissingProcessError

__all__ = ["FrameworkCallback", "check_settings"]

T = TypeVar("T")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse unknown keywords and metrics at once, not only when training begins.

    Raises:
        TypeError: `AttentionMonitor` does not take a keyword; the message names the nearest that it takes.
        ValueError: A metric is unknown.
    """
    known = [*inspect.signature(AttentionMonitor).parameters, "every_n_steps"]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known[2:])}"
            raise TypeError(f"unexpected keyword argument {name!r}; {hint}")
    if isinstance(metrics := settings.get("metrics"), Sequence):
        check_metric_names(metrics)


class FrameworkCallback:
    """Constructor of the framework callbacks; each documents the arguments for its framework.

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
        check_settings(settings)
        self.monitor: AttentionMonitor | None = None
        self._exchange: Exchange | None = None
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
        """Make the monitor; by default its record is in the framework's own folder."""
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
        if distributed.is_initialized():
            self._exchange = Exchange(range(distributed.get_world_size()))
        return self.monitor

    def _from_first(self, own: T, otherwise: T) -> T:
        """Return the first process's object on all of them; from when one was missing in time, ``otherwise``."""
        if not distributed.is_initialized():
            return own
        if self._exchange is None:
            return otherwise
        try:
            shared: T = self._exchange.from_first(own)
        except MissingProcessError as error:
            self._exchange = None  # on all processes; each further one would make training wait again
            warn(f"attnmonitor: {error}: alerts can no longer ask this training to stop or to save a checkpoint")
            return otherwise
        return shared
