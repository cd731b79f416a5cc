"""The writing side of a run record: what the file looks like, and how samples get into it without troubling training.

* **One transaction per sample.** The journal is a write-ahead log, so a process killed at any moment loses at most the
  sample it was writing, readers never wait for the writer, and a training step does not wait for the disk: the log is
  synced and merged into the file once in a few dozen samples and when the record is closed or next opened.
* **Compact.** A metric's values of one sample are one float32 blob over all heads; which layer owns which stretch of
  it is stored once (a *layout*), not per sample. Spreads are read to two digits, so they are kept as bfloat16.
* **Nothing is deleted.** A run resumed from an older checkpoint takes some samples a second time. The first ones are
  marked as superseded: the reader sees one trajectory with increasing steps, the file still has both.
* **Segments.** Numbers from another probe or another model do not continue the same curve. Where the ``model``,
  ``model_signature`` or ``probe_fingerprint`` of the run configuration changes, a new segment begins.
* **Training comes first.** A full or read-only disk costs one warning, never an exception: samples wait in memory, the
  latest 1,000 of them, and are written with the next one that succeeds. A file that cannot be continued (another
  process writes it, it is damaged, not a record, or of another schema) is left as it is, and the run is recorded in a
  file beside it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from attnmonitor.messages import warn
from attnmonitor.record.schema import (
    _SCHEMA,
    APPLICATION_ID,
    BUSY_TIMEOUT_SECONDS,
    EVENT_COLUMNS,
    SCHEMA_VERSION,
    RecordError,
    check_is_record,
    damaged_record,
)
from attnmonitor.sample import Sample

__all__ = ["RecordWriter"]

IDENTITY_KEYS = ("model", "model_signature", "probe_fingerprint")

# Rows of a 1,024-head model are about 6 KB. On SQLite's default pages of 4 KB each would own two, a third of it air.
_PAGE_SIZE_BYTES = 32768
_PAGES_BETWEEN_MERGES = 64

# What is written is not read again: on its default SQLite keeps every page, some megabytes in a run.
_CACHE_KIB = 512

# As many as `History` keeps: about 90 MB where 1,024 heads are watched.
_MAX_WAITING = 1000


class RecordWriter:
    """Appends samples to one file; a failing disk never raises into training.

    Args:
        path: The file; missing parent folders are made, an existing record is continued.
        run: Configuration of the run, anything JSON can hold (other values by their ``str``). ``model``,
            ``model_signature`` and ``probe_fingerprint`` decide whether an existing record continues in the same
            segment.

    Attributes:
        path: Where the samples go: another name than asked for where that file cannot be continued.
        unwritten: Samples that wait in memory because the disk did not take them: the latest 1,000.
        num_lost: Earlier ones, which were given up for them.
        failed_writes: Attempts to write that failed so far.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.unwritten: list[_Encoded] = []
        self.num_lost = 0
        self.failed_writes = 0
        self._run = json.loads(json.dumps(dict(run), default=str))
        self._db: sqlite3.Connection | None = None
        self._segment_id = 0
        self._let_go: weakref.finalize[Any, Any] | None = None
        self._write_or_move()

    def append(self, sample: Sample) -> None:
        """Keep a sample. What the disk does not take waits in memory, with one warning for the whole run.

        Samples recorded before at this step or a later one (a resume from an older checkpoint) are superseded.
        """
        self.unwritten.append(_encode(sample))
        self._write_or_move()
        excess = max(0, len(self.unwritten) - _MAX_WAITING)
        del self.unwritten[:excess]
        self.num_lost += excess

    def close(self) -> None:
        """Try once more to write what waits in memory, and let another run continue the file."""
        if self.unwritten:
            self._write_or_move()
        self._release()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_or_move(self) -> None:
        """Write all that waits; where the file cannot be continued, to the first one beside it that can."""
        wanted, obstacle = self.path, None
        for number in itertools.count(2):
            try:
                self._write()
                break
            except RecordError as refused:
                obstacle = obstacle or refused
                self._release()
                self.path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        if obstacle is not None:
            warn(f"{obstacle}. This run is recorded in {self.path} instead.")

    def _write(self) -> None:
        """Write all that waits. What a retry may cure is counted; what it cannot is a `RecordError`."""
        try:
            if self._db is None or not self.path.exists():
                self._release()
                self._db = self._seize()
            while self.unwritten:
                with _transaction(self._db):
                    _insert(self._db, self._segment_id, self.unwritten[0])
                del self.unwritten[0]
        except (sqlite3.OperationalError, OSError) as failure:
            self._release()
            self._note(failure)
        except sqlite3.DatabaseError as damaged:
            raise damaged_record(self.path, damaged) from damaged

    def _seize(self) -> sqlite3.Connection:
        """Become the one writer of the file, and find or begin the segment to write to."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            _lock(self.path, held)
            db = held.enter_context(contextlib.closing(_connect(self.path)))
            _lay_out(db, self.path)
            db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")  # now: laying out begins anew with the default
            with _transaction(db):
                self._segment_id = _segment_for(db, self._run, self.path)
            # However the writer ends (closed, forgotten, at exit), the file is merged and the lock is gone.
            self._let_go = weakref.finalize(self, _close_in_owner, held.pop_all(), os.getpid())
        return db

    def _note(self, failure: Exception) -> None:
        self.failed_writes += 1
        if self.failed_writes == 1:
            warn(
                f"{self.path}: the run record cannot be written ({failure}). Training goes on; samples wait in memory "
                f"for the disk to take them again, the latest {_MAX_WAITING:,} of them. What is unwritten when the run "
                "ends is lost."
            )

    def _release(self) -> None:
        self._db = None
        if self._let_go is not None:
            self._let_go()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _lock(path: Path, held: contextlib.ExitStack) -> None:
    """Keep other writers from ``path`` until ``held`` is closed or the process ends.

    The lock is an open transaction on an empty SQLite file: the system releases it however the process ends, and
    SQLite knows how to lock on every platform.
    """
    lock_path = path.with_name(f"{path.name}-lock")
    lock = sqlite3.connect(lock_path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as busy:
        lock.close()
        if "locked" in str(busy):
            raise RecordError(f"{path}: another run is writing this record") from busy
        raise
    held.callback(lock_path.unlink, missing_ok=True)
    held.callback(lock.close)


def _close_in_owner(held: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child that exits must not close what its parent writes to
        held.close()


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    # NORMAL cannot corrupt a write-ahead log; a power cut (not a kill) may cost the last samples.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_BETWEEN_MERGES}")
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def _lay_out(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables of an empty file; check that a file with content can be continued."""
    if path.stat().st_size:
        check_is_record(db, path)
        return
    db.execute(f"PRAGMA page_size = {_PAGE_SIZE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(
        f"BEGIN;{_SCHEMA}PRAGMA application_id = {APPLICATION_ID};PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
    )


def _segment_for(db: sqlite3.Connection, run: Mapping[str, Any], path: Path) -> int:
    """The segment that a run with this configuration continues, or a new one."""
    last = db.execute("SELECT id, run FROM segment ORDER BY id DESC LIMIT 1").fetchone()
    if last is not None:
        segment_id, before = int(last[0]), json.loads(last[1])
        changed = [key for key in IDENTITY_KEYS if before.get(key) != run.get(key)]
        if not changed:
            db.execute("UPDATE segment SET run = ? WHERE id = ?", (json.dumps(run), segment_id))
            return segment_id
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {run.get(key)!r}" for key in changed)
        warn(f"{path}: {changes}. A new segment begins; its numbers do not continue the curves before it.")
    new = db.execute("INSERT INTO segment VALUES (NULL, ?, ?, '[]')", (_now(), json.dumps(run)))
    return int(new.lastrowid or 0)


@dataclass(frozen=True)
class _Encoded:
    """A sample as the tables take it: encoded once, so that a write which fails can be repeated as it is."""

    global_step: int
    row: tuple[Any, ...]
    values: list[tuple[str, str, bytes, bytes | None]]  # metric, layout, means, spreads
    events: list[tuple[Any, ...]]
    coverage: str


def _encode(sample: Sample) -> _Encoded:
    diagnostics = json.dumps({name: float(value) for name, value in sample.diagnostics.items()})
    values = []
    for metric, means in sample.values.items():
        layout = json.dumps([[layer, mean.numel()] for layer, mean in means.items()])
        spread, spread_blob = sample.spread.get(metric), None
        if spread is not None:
            aligned = [spread[at] if at in spread else torch.full_like(mean, math.nan) for at, mean in means.items()]
            spread_blob = _blob(aligned, torch.bfloat16)
        values.append((metric, layout, _blob(means.values(), torch.float32), spread_blob))
    return _Encoded(
        global_step=int(sample.global_step),
        row=(_now(), float(sample.seconds), int(sample.failures), sample.failure, diagnostics),
        values=values,
        events=[astuple(event) for event in sample.events],
        coverage=json.dumps([vars(entry) for entry in sample.coverage.values()]),
    )


def _insert(db: sqlite3.Connection, segment_id: int, sample: _Encoded) -> None:
    sample_id = db.execute(
        "INSERT INTO sample VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, NULL)", (segment_id, sample.global_step, *sample.row)
    ).lastrowid
    db.execute(
        "UPDATE sample SET superseded_by = ?1 WHERE superseded_by IS NULL AND global_step >= ?2 AND id <> ?1",
        (sample_id, sample.global_step),
    )
    for metric, layout, means, spreads in sample.values:
        db.execute("INSERT OR IGNORE INTO layout VALUES (NULL, ?)", (layout,))
        (layout_id,) = db.execute("SELECT id FROM layout WHERE layers = ?", (layout,)).fetchone()
        db.execute("INSERT INTO value VALUES (?, ?, ?, ?, ?)", (sample_id, metric, layout_id, means, spreads))
    slots = ", ".join("?" * (1 + len(EVENT_COLUMNS)))
    db.executemany(f"INSERT INTO event VALUES ({slots})", [(sample_id, *event) for event in sample.events])
    if sample.coverage != "[]":
        db.execute("UPDATE segment SET coverage = ?1 WHERE id = ?2 AND coverage <> ?1", (sample.coverage, segment_id))


def _blob(tensors: Iterable[Tensor], dtype: torch.dtype) -> bytes:
    heads = list(tensors)  # (num_heads,) each
    return torch.cat(heads).detach().to("cpu", dtype).view(torch.uint8).numpy().tobytes() if heads else b""
