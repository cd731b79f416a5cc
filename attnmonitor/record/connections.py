"""How a record file is opened: by one writer under a lock, and by readers that cannot write."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import uuid
from collections.abc import Iterator
from pathlib import Path

from attnmonitor.record.foreign import check_tables, check_undamaged, content_checked, restrict, time_limit
from attnmonitor.record.open_files import OpenFiles, opened_beside
from attnmonitor.record.schema import (
    APPLICATION_ID,
    BUSY_TIMEOUT_SECONDS,
    LOG_TABLE,
    SCHEMA_VERSION,
    TABLES,
    RecordError,
    bring_to_present,
    check_is_record,
    damaged_record,
    is_older,
)

__all__ = ["lock_file", "open_for_writing", "reading", "transaction"]

# Rows of a 1,024-head model take about 6 KB: two of SQLite's default pages of 4 KB each, a third of them unused.
_PAGE_SIZE_BYTES = 32768
_PAGES_BETWEEN_MERGES = 64

# What is written is not read again, but by default SQLite caches every page: some megabytes in a run.
_CACHE_KIB = 512


def open_for_writing(path: Path, held: contextlib.ExitStack) -> tuple[sqlite3.Connection, OpenFiles]:
    """Open a record as its only writer, until ``held`` is closed; an empty or missing file gets its tables.

    Raises:
        RecordError: Another process writes this record, or the file is not a record that can be continued.
        OSError, sqlite3.OperationalError: The file cannot be written now.
    """
    if path.exists() and not path.is_file():
        raise RecordError(f"{path}: not a regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    _lock(path, held)
    files = OpenFiles(path, held.enter_context(opened_beside(path)))
    db = held.enter_context(contextlib.closing(_connect(path)))
    _create_tables(db, path)
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")  # only now: creating the tables resets it to the default
    return db, files


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Commit at the end of the context, or roll back on an exception."""
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def reading(path: Path, *, search_damage: bool = False) -> Iterator[sqlite3.Connection]:
    """Open a record for queries only; errors over it become a `RecordError` that says what to do.

    Args:
        path: The record.
        search_damage: Search all pages for damage first, for a few seconds at most.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: The file is damaged, not a run record, or of another schema version.
    """
    if path.is_dir() or not path.exists():
        # While a run is written, it is the log beside its file that grows.
        written = sorted(path.glob("*.sqlite*"), key=os.path.getmtime)
        newest = f"; the newest in it is {written[-1].with_suffix('.sqlite')}" if written else ""
        raise FileNotFoundError(f"{path}: no such run record{newest}")
    if not path.is_file():  # opening a pipe would wait for ever
        raise RecordError(f"{path}: not a regular file")
    if not path.stat().st_size:
        raise RecordError(f"{path}: an empty file, not a run record")
    try:
        with content_checked(path), contextlib.closing(_connect_to_read(path)) as db:
            with time_limit(db, path):
                check_is_record(db, path)
                check_tables(db, path)
            if search_damage:
                check_undamaged(db, path)
            with time_limit(db, path):
                yield db
    except sqlite3.DatabaseError as damaged:
        raise damaged_record(path, damaged) from damaged


def _connect_to_read(path: Path) -> sqlite3.Connection:
    # SQLite's own read-only mode would leave the files of the write-ahead log behind, so the queries are restricted
    # instead. Only where the medium forbids all writing is the file opened as one that cannot change.
    for mode in ("mode=rw", "mode=ro&immutable=1"):
        db = sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True, timeout=BUSY_TIMEOUT_SECONDS)
        try:
            restrict(db)
            db.execute("PRAGMA schema_version").fetchone()
        except sqlite3.DatabaseError as refused:
            db.close()
            reason = refused
        else:
            return db
    raise reason


def lock_file(path: Path) -> Path:
    """Return the file that is there while a record is open for writing, and stays where its writer was killed."""
    return path.with_name(f"{path.name}-lock")


def _lock(path: Path, held: contextlib.ExitStack) -> None:
    """Lock ``path`` against other writers until ``held`` is closed or the process ends."""
    lock_path = lock_file(path)
    try:
        lock = _locked(lock_path)
    except sqlite3.OperationalError as busy:
        if "locked" not in str(busy):
            raise
        # SQLite says the same where another process holds the lock and where the file system refuses all locks.
        if _grants_locks(path.parent):
            raise RecordError(f"{path}: another run is writing this record") from busy
        _remove(lock_path)
        raise OSError(
            errno.ENOLCK, "the file system of this folder grants no locks; name a folder on another one: record=..."
        ) from busy
    held.callback(_remove, lock_path)
    held.callback(lock.close)


def _locked(lock_path: Path) -> sqlite3.Connection:
    # The lock is an open transaction on an empty SQLite file: the system releases it however the process ends, and
    # SQLite can lock on every platform.
    lock = sqlite3.connect(lock_path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        lock.execute("BEGIN EXCLUSIVE")
    except BaseException:
        lock.close()
        raise
    return lock


def _grants_locks(folder: Path) -> bool:
    """Return whether a file that nobody else knows can be locked in ``folder``."""
    own = folder / f".{uuid.uuid4().hex}-lock"
    try:
        _locked(own).close()
    except sqlite3.OperationalError as refused:
        return "locked" not in str(refused)
    finally:
        _remove(own)
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None, check_same_thread=False)
    try:  # what is no database is found out here
        db.execute("PRAGMA trusted_schema = OFF")
        # NORMAL cannot corrupt a write-ahead log; a power failure (not a kill) may lose the last samples.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {_PAGES_BETWEEN_MERGES}")
    except BaseException:
        db.close()
        raise
    return db


def _create_tables(db: sqlite3.Connection, path: Path) -> None:
    """Create the tables of an empty file; check that any other file can be continued, and complete an older one."""
    if path.stat().st_size:
        check_is_record(db, path)
        check_tables(db, path)  # a trigger would run on every insert
        db.execute(LOG_TABLE)
        if is_older(db):
            with transaction(db):
                bring_to_present(db)
        return
    db.execute(f"PRAGMA page_size = {_PAGE_SIZE_BYTES}")
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript(
        f"BEGIN;{TABLES}{LOG_TABLE}"
        f"PRAGMA application_id = {APPLICATION_ID};PRAGMA user_version = {SCHEMA_VERSION};COMMIT;"
    )
