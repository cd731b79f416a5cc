"""How a record file is opened: by one writer under a lock, and by readers that cannot write."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from attnmonitor.record.schema import (
    APPLICATION_ID,
    BUSY_TIMEOUT_SECONDS,
    SCHEMA_VERSION,
    TABLES,
    RecordError,
    check_is_record,
    damaged_record,
)

__all__ = ["open_for_writing", "reading", "transaction"]

# Rows of a 1,024-head model take about 6 KB: two of SQLite's default pages of 4 KB each, a third of them unused.
_PAGE_SIZE_BYTES = 32768
_PAGES_BETWEEN_MERGES = 64

# What is written is not read again, but by default SQLite caches every page: some megabytes in a run.
_CACHE_KIB = 512


def open_for_writing(path: Path, held: contextlib.ExitStack) -> sqlite3.Connection:
    """Open a record as its only writer, until ``held`` is closed; an empty or missing file gets its tables.

    Raises:
        RecordError: Another process writes this record, or the file is not a record that can be continued.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _lock(path, held)
    db = held.enter_context(contextlib.closing(_connect(path)))
    _create_tables(db, path)
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")  # only now: creating the tables resets it to the default
    return db


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit at the end of the context, or roll back on an exception."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a record for queries only; SQLite's errors become a `RecordError` that says what to do."""
    if not path.is_file():
        # While a run is written, it is the log beside its file that grows.
        written = sorted(path.glob("*.sqlite*"), key=os.path.getmtime)
        newest = f"; the newest in it is {written[-1].with_suffix('.sqlite')}" if written else ""
        raise FileNotFoundError(f"{path}: no such run record{newest}")
    if not path.stat().st_size:
        raise RecordError(f"{path}: an empty file, not a run record")
    try:
        with contextlib.closing(_connect_to_read(path)) as db:
            check_is_record(db, path)
            yield db
    except sqlite3.DatabaseError as damaged:
        raise damaged_record(path, damaged) from damaged


def _connect_to_read(path: Path) -> sqlite3.Connection:
    # SQLite's own read-only mode would leave the files of the write-ahead log behind, so the queries are restricted
    # instead. Only where the medium forbids all writing is the file opened as one that cannot change.
    for mode in ("mode=rw", "mode=ro&immutable=1"):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_TIMEOUT_SECONDS)
        try:
            db.execute("PRAGMA query_only = 1")
            db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError as refused:
            db.close()
            reason = refused
        else:
            return db
    raise reason


def _lock(path: Path, held: contextlib.ExitStack) -> None:
    """Lock ``path`` against other writers until ``held`` is closed or the process ends."""
    # The lock is an open transaction on an empty SQLite file: the system releases it however the process ends, and
    # SQLite can lock on every platform.
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


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    # NORMAL cannot corrupt a write-ahead log; a power failure (not a kill) may lose the last samples.
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_BETWEEN_MERGES}")
    return db


def _create_tables(db: sqlite3.Connection, path: Path) -> None:
    """Create the tables of an empty file; check that any other file can be continued."""
    if path.stat().st_size:
        check_is_record(db, path)
        return
    db.execute(f"PRAGMA page_size = {_PAGE_SIZE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(
        f"BEGIN;{TABLES}PRAGMA application_id = {APPLICATION_ID};PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
    )
