"""Protection from a file that somebody else made: what SQLite may do, and which tables it may read.

SQLite advises these settings for files of unknown origin (https://www.sqlite.org/security.html, section 1.1.1): a view,
trigger or generated column in the place of a table can run for ever or call functions; a length in a damaged file can
claim gigabytes. Only ordinary tables with the columns of a record are read, under limits of size and time.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attnmonitor.record.schema import (
    ADDED,
    EVIDENCE_TABLE,
    LOG_TABLE,
    OPTIONAL_TABLES,
    TABLES,
    RecordError,
    check_pages,
    is_older,
)

__all__ = ["check_tables", "check_undamaged", "content_checked", "restrict", "time_limit"]

_MAX_BYTES = 64 * 2**20  # of one text or blob; the values of a model with 100,000 heads are 400 KB
_MAX_SECONDS = 30.0  # of one read
_MAX_CHECK_SECONDS = 5.0  # of the search for damaged pages, which reads the whole file
_STEPS_BETWEEN_CHECKS = 20_000  # of SQLite's machine: well under a millisecond


def restrict(db: sqlite3.Connection) -> None:
    """Forbid a connection everything that reading a record does not need."""
    for setting in ("query_only = 1", "trusted_schema = OFF", "cell_size_check = ON", "mmap_size = 0"):
        db.execute(f"PRAGMA {setting}")
    db.text_factory = lambda text: text.decode("utf-8", "replace")
    if hasattr(db, "setlimit"):  # Python 3.11
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _MAX_BYTES)
        db.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000)
        db.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 100)
        db.setlimit(sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 50)
        db.setlimit(sqlite3.SQLITE_LIMIT_COMPOUND_SELECT, 3)
        db.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)


@contextmanager
def time_limit(db: sqlite3.Connection, path: Path, seconds: float = _MAX_SECONDS) -> Iterator[None]:
    """Stop SQLite after some seconds, and at once on Ctrl-C, which it does not notice by itself.

    Raises:
        RecordError: The time is over.
        KeyboardInterrupt: The user has interrupted.
    """
    ends, stopped_by = time.monotonic() + seconds, list[str]()

    def stop() -> bool:
        try:
            if time.monotonic() > ends:
                stopped_by.append("time")
        except KeyboardInterrupt:  # sqlite3 would drop it
            stopped_by.append("user")
        return bool(stopped_by)

    db.set_progress_handler(stop, _STEPS_BETWEEN_CHECKS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise
        if stopped_by != ["time"]:
            raise KeyboardInterrupt from error
        raise RecordError(f"{path}: reading takes longer than {seconds:g} s; it is damaged or not a record") from error
    finally:
        db.set_progress_handler(None, 0)


def check_tables(db: sqlite3.Connection, path: Path) -> None:
    """Raise `RecordError` unless every table of a record is there, as an ordinary table with its columns.

    Views, triggers and virtual tables are refused, also under other names: reading or writing could run them.
    """
    for kind, name, statement in db.execute("SELECT type, name, sql FROM sqlite_master"):
        is_virtual = kind == "table" and str(statement).upper().lstrip().startswith("CREATE VIRTUAL")
        if kind not in ("table", "index") or is_virtual:
            raise RecordError(f"{path}: not a record: it has a {'virtual table' if is_virtual else kind}, {name!r}")
    found = _columns(db)
    lacks = ADDED if is_older(db) else {}
    for table, columns in _EXPECTED_COLUMNS.items():
        present = columns - set(lacks.get(table, ()))
        if found.get(table, present if table in OPTIONAL_TABLES else None) != present:
            raise RecordError(
                f"{path}: not a record: its table {table!r} is missing or has other columns than a record has"
            )


def check_undamaged(db: sqlite3.Connection, path: Path) -> None:
    """Raise an error if a page of the file is damaged; the search ends after a few seconds."""
    try:
        with time_limit(db, path, _MAX_CHECK_SECONDS):
            check_pages(db)
    except RecordError:
        pass  # reading finds damage where it is


@contextmanager
def content_checked(path: Path) -> Iterator[None]:
    """Turn errors over the content of a record into a `RecordError`: wrong types, texts that are not JSON, sizes.

    Raises:
        RecordError: There was one.
    """
    try:
        yield
    except RecordError:
        raise
    except _CONTENT_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise RecordError(f"{path}: its content is not that of a record ({reason})") from error


_CONTENT_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


def _columns(db: sqlite3.Connection) -> dict[str, set[str]]:
    """Return the columns of each table; generated and hidden ones are marked."""
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return {
        table: {
            f"{name}{' (hidden)' * bool(hidden)}"
            for name, hidden in db.execute("SELECT name, hidden FROM pragma_table_xinfo(?)", (table,))
        }
        for table in tables
    }


def _columns_of_a_record() -> dict[str, set[str]]:
    db = sqlite3.connect(":memory:")
    try:
        db.executescript(TABLES + LOG_TABLE + EVIDENCE_TABLE)
        return _columns(db)
    finally:
        db.close()


_EXPECTED_COLUMNS = _columns_of_a_record()
