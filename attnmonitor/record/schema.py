"""The tables of a record file, and the check that a file is one."""

from __future__ import annotations

import sqlite3
from dataclasses import fields
from pathlib import Path

from attnmonitor.sample import AlertEvent

__all__ = [
    "ADDED",
    "ALARM_FIELDS",
    "APPLICATION_ID",
    "BUSY_TIMEOUT_SECONDS",
    "EVENT_COLUMNS",
    "EVIDENCE_TABLE",
    "LOG_TABLE",
    "OPTIONAL_TABLES",
    "SCHEMA_VERSION",
    "TABLES",
    "RecordError",
    "bring_to_present",
    "check_is_record",
    "check_pages",
    "columns_of",
    "damaged_record",
    "is_older",
]

SCHEMA_VERSION = 2
OLDEST_SCHEMA = 1  # that is read, and brought to this version when a run is continued in its file
APPLICATION_ID = 0x61746D6E  # "atmn": tells a record from any other SQLite file
EVENT_COLUMNS = tuple(column.name for column in fields(AlertEvent))
ALARM_FIELDS = ("rule", "layer", "scope", "head", "value", "now", "worst", "distance")  # in a segment's `firing`
BUSY_TIMEOUT_SECONDS = 5.0

ADDED = {
    "segment": {"firing": "TEXT NOT NULL DEFAULT '[]'"},
    "event": {"metric": "", "now": "", "worst": "", "distance": ""},
}
"""Columns that schema 1 did not have, and how they are declared, by table."""

TABLES = f"""
CREATE TABLE segment (id INTEGER PRIMARY KEY, started_at TEXT NOT NULL, run TEXT NOT NULL, coverage TEXT NOT NULL,
    firing TEXT NOT NULL DEFAULT '[]');
CREATE TABLE layout (id INTEGER PRIMARY KEY, layers TEXT NOT NULL UNIQUE);
CREATE TABLE sample (
    id INTEGER PRIMARY KEY, segment_id INTEGER NOT NULL REFERENCES segment, global_step INTEGER NOT NULL,
    recorded_at TEXT NOT NULL, seconds REAL, failures INTEGER NOT NULL, failure TEXT, diagnostics TEXT NOT NULL,
    superseded_by INTEGER REFERENCES sample);
CREATE INDEX sample_by_step ON sample (global_step) WHERE superseded_by IS NULL;
CREATE TABLE value (
    sample_id INTEGER NOT NULL REFERENCES sample, metric TEXT NOT NULL, layout_id INTEGER NOT NULL REFERENCES layout,
    mean_float32 BLOB NOT NULL, spread_bfloat16 BLOB);
CREATE INDEX value_by_metric ON value (metric, sample_id);
CREATE TABLE event (sample_id INTEGER NOT NULL REFERENCES sample, {", ".join(EVENT_COLUMNS)});
CREATE INDEX event_by_sample ON event (sample_id);
"""

# What training has logged. Records of earlier versions do not have this table; it is added when one is continued.
LOG_TABLE = """
CREATE TABLE IF NOT EXISTS logged (
    segment_id INTEGER NOT NULL REFERENCES segment, global_step INTEGER NOT NULL, name TEXT NOT NULL, value REAL);
"""

EVIDENCE_TABLE = """
CREATE TABLE IF NOT EXISTS evidence (
    sample_id INTEGER NOT NULL REFERENCES sample, rule TEXT NOT NULL, layer TEXT NOT NULL, scope TEXT NOT NULL,
    head INTEGER NOT NULL, content TEXT NOT NULL);
"""
"""Created with the first alarm: most records need none."""

OPTIONAL_TABLES = ("logged", "evidence")


class RecordError(ValueError):
    """A file that cannot be used as a run record, with the reason and the way out."""


def check_is_record(db: sqlite3.Connection, path: Path) -> None:
    """Raise `RecordError` unless ``db``, opened from ``path``, is a record of this schema version."""
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise RecordError(f"{path}: an SQLite file, but not a run record of attnmonitor")
    if not OLDEST_SCHEMA <= version <= SCHEMA_VERSION:
        age = "a newer" if version > SCHEMA_VERSION else "an older"
        raise RecordError(
            f"{path}: written by {age} attnmonitor (schema {version}; this one has schema {SCHEMA_VERSION});"
            " use it with the version that wrote it"
        )


def columns_of(db: sqlite3.Connection, table: str) -> tuple[str, ...]:
    """Return the columns of a table in order; none where there is no such table."""
    return tuple(name for (name,) in db.execute("SELECT name FROM pragma_table_info(?)", (table,)))


def is_older(db: sqlite3.Connection) -> bool:
    """Return whether a record is of an older schema."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return bool(version < SCHEMA_VERSION)


def bring_to_present(db: sqlite3.Connection) -> None:
    """Add to a record of an older schema what it lacks; what is in it stays as it is."""
    for table, columns in ADDED.items():
        for column, declared in columns.items():
            db.execute(f"ALTER TABLE {table} ADD COLUMN {column} {declared}")
    db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def check_pages(db: sqlite3.Connection) -> None:
    """Raise `sqlite3.DatabaseError` if SQLite finds a damaged page."""
    (found,) = db.execute("PRAGMA quick_check(1)").fetchone()
    if found != "ok":
        raise sqlite3.DatabaseError("malformed: " + " ".join(found.split()))


def damaged_record(path: Path, error: sqlite3.DatabaseError) -> RecordError:
    """Return the error for a file that SQLite cannot read, with what to do."""
    return RecordError(
        f"{path}: damaged, truncated or not a run record ({error});"
        " copy it again, or try what `sqlite3 FILE .recover` can save"
    )
