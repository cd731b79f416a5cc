"""A record that another process writes, read again whenever something was added to it.

Whether it has changed is seen by the times of its files and a query of the newest rows, so a follower may ask every
second. Nothing is written, and no lock is held between two questions: the run does not notice that it is followed.
"""

from __future__ import annotations

import os
import sqlite3
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attnmonitor.record.connections import lock_file, reading
from attnmonitor.record.reader import RunRecord
from attnmonitor.record.schema import RecordError
from attnmonitor.record.texts import typed

__all__ = ["FollowedRecord"]

_UNREADABLE = (OSError, RecordError, sqlite3.Error)
_COARSEST_TIME_NS = 2 * 10**9  # between two times of a file, on any file system


class FollowedRecord:
    """A record that may not have begun, that grows, ends, and is continued by a resumed run.

    Args:
        path: The record; or a folder, for the newest record in it, once there is one.

    Attributes:
        path: As given; of a folder, its newest record once one was found.
        record: The latest snapshot; None before the run has begun.
        obstacle: Why nothing newer can be read now; ``""`` where it can.

    Raises:
        RecordError, OSError: There is a file, and it is not a record that can be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.record: RunRecord | None = None
        self.obstacle = ""
        self._files: tuple[Any, ...] = ()  # as they were when the newest rows were asked for
        self._newest: tuple[Any, ...] = ()  # last row of each table
        self._read: tuple[Any, ...] = ()  # the same, of the latest snapshot
        self._latest: tuple[int, str] | None = None  # step of the newest sample, and when it was written
        self._num_changes = 0
        self._choose_in_folder()
        if self.path.is_file() and self.path.stat().st_size:
            self.record = RunRecord(self.path)

    @property
    def version(self) -> str:
        """Another text after each change: a sample, the run's first or last one, a file that is gone."""
        self._look()
        return f"{os.getpid()}-{self._num_changes}"

    def read(self) -> RunRecord | None:
        """Return a new snapshot where there is anything new, else the one before; None before the run has begun."""
        self._look()
        if not self.obstacle and self._read != self._newest:
            newest = self._newest
            try:
                # Searching all pages for damage takes as long as reading them, so it is done once.
                self.record = RunRecord(self.path, search_damage=self.record is None)
            except _UNREADABLE as error:
                self._note(str(error))
            else:
                self._read = newest
        return self.record

    @property
    def progress(self) -> str:
        """Step of the newest sample, how long ago it was written, and whether the run has ended; or the obstacle."""
        self._look()
        if self.obstacle:
            return self.obstacle
        is_open = lock_file(self.path).exists()
        if self._latest is None:
            return "the run has begun, no sample yet" if is_open else "the run has ended without a sample"
        step, written_at = self._latest
        ended = "" if is_open else "; the run has ended; if it is resumed, this goes on"
        return f"step {step:,}, written {_ago(written_at)}{ended}"

    def _look(self) -> None:
        """See whether the files have changed, and what the newest rows are."""
        self._choose_in_folder()
        files = (_state_of(self.path), _state_of(self.path.with_name(f"{self.path.name}-wal")))
        if self.path.is_dir() or files[0] is None or not files[0][1]:
            self._note(f"{self.path} is {'not there yet' if self.record is None else 'gone'}: waiting for the run")
        elif files != self._files:
            try:
                newest, self._latest = _newest_rows(self.path)
            except _UNREADABLE as error:
                self._note(str(error))
            else:
                # The times of files are coarse: one that has just changed may change again without showing it.
                newly = time.time_ns() - max(state[2] for state in files if state is not None)
                self._files = files if newly > _COARSEST_TIME_NS else ()
                self._num_changes += self._newest != newest or bool(self.obstacle)
                self._newest, self.obstacle = newest, ""

    def _note(self, obstacle: str) -> None:
        self._num_changes += self.obstacle != obstacle
        self.obstacle, self._files = obstacle, ()

    def _choose_in_folder(self) -> None:
        if self.path.is_dir():
            self.path = max(self.path.glob("*.sqlite"), key=os.path.getmtime, default=self.path)


def _state_of(file: Path) -> tuple[int, int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _newest_rows(path: Path) -> tuple[tuple[Any, ...], tuple[int, str] | None]:
    """Return the last row of each table, and step and time of the newest sample."""
    with reading(path) as db:
        tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        rows = tuple(db.execute(f'SELECT max(rowid) FROM "{name}"').fetchone() for name in tables)
        sample = db.execute("SELECT global_step, recorded_at FROM sample ORDER BY id DESC LIMIT 1").fetchone()
        return rows, None if sample is None else (typed(sample[0], int), typed(sample[1], str))


def _ago(written_at: str) -> str:
    """Return how long ago a UTC time in ISO format was, roughly."""
    try:
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(written_at)).total_seconds()
    except (TypeError, ValueError):  # a record that no monitor has written
        return "at an unknown time"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"
