"""Where a sample goes: history, record, log of alerts and loggers, in this order.

Each step is contained: an exception in one of them is counted and warned about once, and the others still get the
sample.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from attnmonitor.alerts import log_events
from attnmonitor.alerts.actions import action_name
from attnmonitor.loggers import SampleLogger, as_logger
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.monitor.failures import Failures
from attnmonitor.record.history import History
from attnmonitor.record.training_log import TrainingLog
from attnmonitor.record.writer import RecordWriter
from attnmonitor.sample import Sample

__all__ = ["Delivery"]


class Delivery:
    """Hands each sample to everything that keeps it or shows it.

    Args:
        failures: Counts what fails here, and warns.
        loggers: As in `AttentionMonitor`.
        record: As in `AttentionMonitor`.
        name: The monitor's, part of the record's file name.
        log: What training logs; the record takes it too.

    Nothing is written or logged before `begin`: only one of the processes that share a model does it.
    """

    def __init__(
        self,
        failures: Failures,
        *,
        loggers: Any,
        record: bool | str | Path | None,
        name: str | None,
        log: TrainingLog,
    ) -> None:
        self._failures = failures
        self._log = log
        self._given_loggers = loggers if isinstance(loggers, (list, tuple)) else [loggers]
        self._loggers: list[SampleLogger] = []
        self._given_path, self._is_new_path = _record_path(record, name)
        self._record_path: Path | None = None
        is_absolute = not isinstance(record, bool) and record is not None and Path(record).is_absolute()
        self._given_from = None if is_absolute else _working_directory()
        self._record: RecordWriter | None = None
        self._on_close = ExitStack()

    def begin(self) -> None:
        """Write and log from now on.

        Raises:
            ValueError: A logger can take neither samples nor metrics.
        """
        self._record_path = self._given_path
        self._loggers = [as_logger(logger) for logger in self._given_loggers]

    @property
    def record_path(self) -> Path | None:
        """File of the run's record; None without one."""
        return self._record.path if self._record is not None else self._record_path

    @property
    def record_path_from_here(self) -> Path | None:
        """As in `AttentionMonitor`."""
        path = self.record_path
        is_same = self._given_from is not None and self._given_from == _working_directory()
        if path is not None and is_same and path.is_relative_to(str(self._given_from)):
            return path.relative_to(str(self._given_from))
        return path

    def connect_loggers(self, history: History, run: Mapping[str, Any]) -> None:
        """Give each logger what it asks for beside samples: run settings, trajectories, a call of ``close()``."""
        for logger in self._loggers:
            if callable(log_run := getattr(logger, "log_run", None)):
                log_run(run)
            if callable(follow := getattr(logger, "follow", None)):
                follow(history)
            if callable(close := getattr(logger, "close", None)):
                self.on_close(close)

    def record_to_continue(self) -> str | None:
        """Return the path that a resumed run passes to `continue_record`."""
        return None if self.record_path is None else str(self.record_path)

    def continue_record(self, path: str | None) -> None:
        """Write to the record of a resumed run if it still exists, unless the user has named a file."""
        if path is None or self._record_path is None or not self._is_new_path:
            return
        # Beside the new one as well: the folder of a run may have been moved, or copied to another machine.
        for found in (Path(path).absolute(), self._record_path.with_name(Path(path).name)):
            if found.is_file():
                self._record_path = found
                return

    def deliver(self, sample: Sample, history: History, describe: Callable[[], Mapping[str, Any]]) -> None:
        """Hand out one sample; ``describe()`` gives the run's settings when the record is created."""
        with self._failures.contained("history"), default_torch_state():
            history.append(sample)
        with self._failures.contained("record"):
            self._write(sample, describe)
        with self._failures.contained("logging of alerts"):
            log_events(sample.events, sample.firing, sample.coverage, sample.evidence)
        for logger in self._loggers:
            with self._failures.contained(type(logger).__name__):
                logger.log_sample(sample)

    def on_close(self, action: Callable[[], object]) -> None:
        """Call ``action()`` once in `close`; what was added last is called first."""
        self._on_close.callback(self._close_one, action)

    def close(self) -> None:
        """Close loggers and record and run the other `on_close` actions; a second call does nothing."""
        self._on_close.close()
        self._record_path, self._record = self.record_path, None  # perhaps not the file that was asked for

    def _write(self, sample: Sample, describe: Callable[[], Mapping[str, Any]]) -> None:
        if self._record is None and self._record_path is not None:
            self._record = RecordWriter(self._record_path, run=describe())
            self.on_close(self._close_record)
            self._failures.count += self._record.failed_writes
        if self._record is not None:
            failed_before = self._record.failed_writes
            self._record.log(self._log.take_new())
            self._record.append(sample)
            self._failures.count += self._record.failed_writes - failed_before

    def _close_record(self) -> None:
        if self._record is not None:
            self._record.log(self._log.take_new())
            self._record.close()

    def _close_one(self, action: Callable[[], object]) -> None:
        with self._failures.contained(action_name(action)):
            action()


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it is gone
        return None


def _record_path(record: bool | str | Path | None, name: str | None) -> tuple[Path | None, bool]:
    """Return the absolute path of the record, and whether its file name was made here."""
    if record is None or record is False:
        return None, False
    path = Path("attnmonitor_runs" if record is True else record)
    with suppress(OSError):  # there is no working directory any more
        path = path.absolute()  # the working directory may change before the first sample
    if path.suffix:
        return path, False
    # Not from `random`: naming a file must not advance the user's generators.
    run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    return path / f"{run_id}{f'-{name}' if name else ''}.sqlite", True
