"""The writer of a run record: samples go into the file and a failing disk never disturbs training.

* **One transaction per sample.** The journal is a write-ahead log. So a process killed at any moment loses at most the
  sample it was writing, readers do not wait for the writer, and a training step does not wait for the disk: the log is
  synced and merged into the file once in a few dozen samples, and when the record is closed or next opened.
* **Nothing is deleted.** A run resumed from an older checkpoint takes some samples a second time. The first ones are
  marked as superseded: the reader sees one trajectory with increasing steps, the file still has both.
* **Segments.** Numbers of another probe or another model do not continue the same curve. Where the ``model``,
  ``model_signature`` or ``probe_fingerprint`` of the run configuration changes, a new segment begins.
* **Training comes first.** A full or read-only disk costs one warning, never an exception: the latest 1,000 samples are
  kept in memory and written when a write succeeds again. A file that cannot be continued (another process writes it,
  it is damaged, not a record, or of another schema) is left as it is, and the run is recorded in a file beside it.
  A file that is moved, deleted, replaced or cut while it is written is noticed at the next sample: one warning, and
  later samples go on, in a new file where needed. Samples that are in no file are counted in ``num_lost``.
* **Locks.** A file system that grants no locks cannot keep two writers apart, so nothing is written there: the samples
  stay in memory, and are lost when the run ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from attnmonitor.messages import warn
from attnmonitor.record.connections import open_for_writing, transaction
from attnmonitor.record.foreign import content_checked
from attnmonitor.record.open_files import OpenFiles
from attnmonitor.record.rows import EncodedSample, encode, insert, insert_logged, utc_now
from attnmonitor.record.schema import RecordError, check_pages, damaged_record
from attnmonitor.record.texts import plain
from attnmonitor.sample import Sample

__all__ = ["RecordWriter"]

IDENTITY_KEYS = ("model", "model_signature", "probe_fingerprint")

# As many as `History` keeps: about 90 MB for 1,024 heads.
_MAX_UNWRITTEN = 1000

_MAX_UNWRITTEN_POINTS = 100_000  # of what training logged

_MAX_FILES = 99  # the file asked for and those beside it
SLOW_SECONDS = 0.5  # after an attempt that took longer, the next one waits ten times as long

# What SQLite or Python says of one sample's values, not of the file.
_SAMPLE_ERRORS = (
    sqlite3.DataError,
    sqlite3.IntegrityError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    TypeError,
    ValueError,
)


class RecordWriter:
    """Appends samples to one file; a failing disk never raises into training.

    Args:
        path: The file; missing parent folders are made, an existing record is continued.
        run: Configuration of the run, anything JSON can hold (other values by their ``str``). ``model``,
            ``model_signature`` and ``probe_fingerprint`` decide whether an existing record continues in the same
            segment.

    Attributes:
        path: The file that is written: another one than asked for where that one cannot be continued.
        unwritten: Samples in memory that could not be written yet: the latest 1,000.
        failed_writes: Failures so far: attempts to write, samples that could not be encoded, files that were moved,
            deleted or cut under the writer.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = self._asked_path = Path(path).absolute()
        self.unwritten: list[EncodedSample] = []
        self.failed_writes = 0
        self._unwritten_points: list[tuple[int, str, float]] = []
        self._num_dropped = 0
        self._is_closed = False
        self._run = plain(dict(run))
        self._db: sqlite3.Connection | None = None
        self._files: OpenFiles | None = None
        self._segment_id = 0
        self._num_samples = _Counts()
        self._number = 1
        self._retry_at = 0.0
        self._warned: set[str] = set()
        self._close_file: weakref.finalize[Any, Any] | None = None
        self._owner_pid = os.getpid()
        self._of_parent: list[Any] = []
        self._write_or_move()

    @property
    def num_lost(self) -> int:
        """Samples that are in no file: dropped or not encoded, deleted with their file, unwritten when it closed."""
        return self._num_dropped + (len(self.unwritten) if self._is_closed else 0)

    def log(self, points: Iterable[tuple[int, str, float]]) -> None:
        """Write what training logged, (step, name, value) each, with the next sample or on `close`."""
        self._unwritten_points += points
        del self._unwritten_points[:-_MAX_UNWRITTEN_POINTS]

    def append(self, sample: Sample) -> None:
        """Write a sample; if that fails, keep it in memory, with one warning for the whole run.

        Samples recorded earlier at this step or a later one (a resume from an older checkpoint) are superseded.
        """
        self._is_closed = False
        self._leave_to_parent()
        try:
            self.unwritten.append(encode(sample))
        except Exception as error:
            self._drop_sample(error)
        if time.monotonic() >= self._retry_at:
            self._write_or_move()
        excess = max(0, len(self.unwritten) - _MAX_UNWRITTEN)
        del self.unwritten[:excess]
        self._num_dropped += excess

    def close(self) -> None:
        """Try once more to write what is unwritten, and unlock the file."""
        self._leave_to_parent()
        if self.unwritten or self._unwritten_points:
            self._write_or_move()
        elif self._db is not None and self._files is not None and self._files.is_elsewhere:
            with contextlib.suppress(OSError):
                self._leave_file(self._db, self._files)
        self._release()
        self._is_closed = True

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_or_move(self) -> None:
        """Write all unwritten samples; where the file cannot be continued, to the next one beside it that can."""
        reason, started = None, time.monotonic()
        while self._number <= _MAX_FILES:
            try:
                self._write()
                break
            except RecordError as error:
                reason = reason or error
                self._release()
                self._count_lost_file()
                self._next_file()
        if self._number > _MAX_FILES:
            self._count_failure(reason or OSError(f"none of {_MAX_FILES} files beside it can be written"))
        elif reason is not None:
            warn(f"{reason}. This run is recorded in {self.path} instead.")
        took = time.monotonic() - started
        self._retry_at = started + (took if took < SLOW_SECONDS else 10 * took)  # waiting must not slow training down

    def _write(self) -> None:
        """Write all unwritten samples; count a failure that a retry may cure, raise `RecordError` for any other."""
        try:
            if self._db is not None and self._files is not None:
                if self._files.is_elsewhere:
                    self._leave_file(self._db, self._files)
                elif self._files.has_shrunk:
                    self._release()
            if self._db is None:
                self._db = self._open()
            while self.unwritten:
                self._insert(self._db, self.unwritten[0])
                del self.unwritten[0]
            if self._unwritten_points:
                with transaction(self._db):
                    insert_logged(self._db, self._segment_id, self._unwritten_points)
                self._unwritten_points.clear()
            if self._files is not None:
                self._files.note()
        except (sqlite3.OperationalError, OSError) as failure:
            self._release()
            self._count_failure(failure)
        except sqlite3.DatabaseError as damaged:
            raise damaged_record(self.path, damaged) from damaged

    def _insert(self, db: sqlite3.Connection, sample: EncodedSample) -> None:
        try:
            with transaction(db):
                insert(db, self._segment_id, sample)
        except _SAMPLE_ERRORS as error:
            self._drop_sample(error)
        else:
            self._num_samples.in_file += 1
            self._num_samples.own += 1

    def _open(self) -> sqlite3.Connection:
        """Open the file as its only writer, and find or begin the segment to write to."""
        with contextlib.ExitStack() as held:
            db, self._files = open_for_writing(self.path, held)
            with content_checked(self.path), transaction(db):
                self._segment_id = _segment_for(db, self._run, self.path)
            self._compare_number(db)
            self._files.note()
            # However the writer ends (closed, garbage collected, at exit), the file is merged and unlocked.
            self._close_file = weakref.finalize(self, _close_in_owner, held.pop_all(), os.getpid())
        return db

    def _compare_number(self, db: sqlite3.Connection) -> None:
        """Count the samples that this writer wrote to the file and that are no longer there."""
        (found,) = db.execute("SELECT count(*) FROM sample").fetchone()
        missing = min(max(0, self._num_samples.in_file - found), self._num_samples.own)
        if missing:
            check_pages(db)
            self._num_dropped += missing
            self._note_change("cut", f"{self.path}: the run record was cut from outside: {missing} samples are lost")
        self._num_samples = _Counts(found, self._num_samples.own - missing)

    def _leave_file(self, db: sqlite3.Connection, files: OpenFiles) -> None:
        """Complete a file that was moved, deleted or replaced; choose the file to go on in."""
        with contextlib.suppress(sqlite3.Error):
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        is_deleted, before = files.is_deleted, self.path
        self._release()
        files.remove_stale_log()
        if self.path.exists():
            self._next_file()
            while self._number <= _MAX_FILES and self.path.exists():
                self._next_file()
        fate = f"was deleted, and {self._num_samples.own} samples with it" if is_deleted else "was moved"
        if is_deleted:
            self._count_lost_file()
        self._num_samples = _Counts()
        self._note_change("moved", f"{before}: the run record {fate}. Later samples are recorded in {self.path}.")
        if self._number > _MAX_FILES:
            raise OSError(f"none of {_MAX_FILES} files beside it is free")

    def _next_file(self) -> None:
        self._number += 1
        self.path = self._asked_path.with_name(f"{self._asked_path.stem}-{self._number}{self._asked_path.suffix}")

    def _count_lost_file(self) -> None:
        self._num_dropped += self._num_samples.own
        self._num_samples = _Counts()

    def _drop_sample(self, error: Exception) -> None:
        self._num_dropped += 1
        self._note_change("sample", f"{self.path}: a sample cannot be recorded ({error!r}); the others are")

    def _count_failure(self, failure: Exception) -> None:
        self._note_change(
            "failure",
            f"{self.path}: the run record cannot be written ({failure}). Training goes on; unwritten samples stay "
            f"in memory, the latest {_MAX_UNWRITTEN:,} of them, until a write succeeds. Samples that are unwritten "
            "when the run ends are lost.",
        )

    def _note_change(self, topic: str, message: str) -> None:
        """Count a failure, and warn about its kind once."""
        self.failed_writes += 1
        if topic not in self._warned:
            self._warned.add(topic)
            warn(message)

    def _leave_to_parent(self) -> None:
        """In a forked child: leave the file to the parent, whose lock makes the child write to one beside it."""
        if os.getpid() == self._owner_pid:
            return
        self._owner_pid = os.getpid()
        # Kept: to close SQLite's connections of another process may damage the file.
        self._of_parent += [self._db, self._files, self._close_file]
        self._db = self._files = self._close_file = None
        self.unwritten.clear()
        self._unwritten_points.clear()
        self._num_samples = _Counts()

    def _release(self) -> None:
        self._db = self._files = None
        if self._close_file is not None:
            self._close_file()


@dataclass
class _Counts:
    """Samples in the present file: all of them, and those of this writer."""

    in_file: int = 0
    own: int = 0


def _close_in_owner(held: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child that exits must not close the file its parent writes to
        with contextlib.suppress(sqlite3.Error, OSError):
            held.close()


def _segment_for(db: sqlite3.Connection, run: Mapping[str, Any], path: Path) -> int:
    """Return the id of the segment that a run with this configuration continues, or of a new one."""
    last = db.execute("SELECT id, run FROM segment ORDER BY id DESC LIMIT 1").fetchone()
    if last is not None:
        segment_id, before = int(last[0]), json.loads(last[1])
        changed = [key for key in IDENTITY_KEYS if before.get(key) != run.get(key)]
        if not changed:
            db.execute("UPDATE segment SET run = ? WHERE id = ?", (json.dumps(run), segment_id))
            return segment_id
        changes = ", ".join(f"{key} was {before.get(key)!r} and is {run.get(key)!r}" for key in changed)
        warn(f"{path}: {changes}. A new segment begins; its numbers do not continue the curves before it.")
    new = db.execute(
        "INSERT INTO segment (started_at, run, coverage) VALUES (?, ?, '[]')", (utc_now(), json.dumps(run))
    )
    return int(new.lastrowid or 0)
