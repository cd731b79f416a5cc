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
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from attnmonitor.messages import warn
from attnmonitor.record.connections import open_for_writing, transaction
from attnmonitor.record.rows import EncodedSample, encode, insert, utc_now
from attnmonitor.record.schema import RecordError, damaged_record
from attnmonitor.sample import Sample

__all__ = ["RecordWriter"]

IDENTITY_KEYS = ("model", "model_signature", "probe_fingerprint")

# As many as `History` keeps: about 90 MB for 1,024 heads.
_MAX_UNWRITTEN = 1000


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
        num_lost: Older unwritten samples that were dropped.
        failed_writes: Failed attempts to write so far.
    """

    def __init__(self, path: str | Path, run: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.unwritten: list[EncodedSample] = []
        self.num_lost = 0
        self.failed_writes = 0
        self._run = json.loads(json.dumps(dict(run), default=str))
        self._db: sqlite3.Connection | None = None
        self._segment_id = 0
        self._close_file: weakref.finalize[Any, Any] | None = None
        self._write_or_move()

    def append(self, sample: Sample) -> None:
        """Write a sample; if that fails, keep it in memory, with one warning for the whole run.

        Samples recorded earlier at this step or a later one (a resume from an older checkpoint) are superseded.
        """
        self.unwritten.append(encode(sample))
        self._write_or_move()
        excess = max(0, len(self.unwritten) - _MAX_UNWRITTEN)
        del self.unwritten[:excess]
        self.num_lost += excess

    def close(self) -> None:
        """Try once more to write what is unwritten, and unlock the file."""
        if self.unwritten:
            self._write_or_move()
        self._release()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _write_or_move(self) -> None:
        """Write all unwritten samples; where the file cannot be continued, to the first one beside it that can."""
        wanted, reason = self.path, None
        for number in itertools.count(2):
            try:
                self._write()
                break
            except RecordError as error:
                reason = reason or error
                self._release()
                self.path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        if reason is not None:
            warn(f"{reason}. This run is recorded in {self.path} instead.")

    def _write(self) -> None:
        """Write all unwritten samples; count a failure that a retry may cure, raise `RecordError` for any other."""
        try:
            if self._db is None or not self.path.exists():
                self._release()
                self._db = self._open()
            while self.unwritten:
                with transaction(self._db):
                    insert(self._db, self._segment_id, self.unwritten[0])
                del self.unwritten[0]
        except (sqlite3.OperationalError, OSError) as failure:
            self._release()
            self._count_failure(failure)
        except sqlite3.DatabaseError as damaged:
            raise damaged_record(self.path, damaged) from damaged

    def _open(self) -> sqlite3.Connection:
        """Open the file as its only writer, and find or begin the segment to write to."""
        with contextlib.ExitStack() as held:
            db = open_for_writing(self.path, held)
            with transaction(db):
                self._segment_id = _segment_for(db, self._run, self.path)
            # However the writer ends (closed, garbage collected, at exit), the file is merged and unlocked.
            self._close_file = weakref.finalize(self, _close_in_owner, held.pop_all(), os.getpid())
        return db

    def _count_failure(self, failure: Exception) -> None:
        self.failed_writes += 1
        if self.failed_writes == 1:
            warn(
                f"{self.path}: the run record cannot be written ({failure}). Training goes on; unwritten samples stay "
                f"in memory, the latest {_MAX_UNWRITTEN:,} of them, until a write succeeds. Samples that are unwritten "
                "when the run ends are lost."
            )

    def _release(self) -> None:
        self._db = None
        if self._close_file is not None:
            self._close_file()


def _close_in_owner(held: contextlib.ExitStack, owner_pid: int) -> None:
    if os.getpid() == owner_pid:  # a forked child that exits must not close the file its parent writes to
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
    new = db.execute("INSERT INTO segment VALUES (NULL, ?, ?, '[]')", (utc_now(), json.dumps(run)))
    return int(new.lastrowid or 0)
