"""The evidence of alarms in a record: a JSON text each, in a table that the first one creates."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from attnmonitor.record.schema import EVIDENCE_TABLE
from attnmonitor.record.texts import decode_json, json_of, storable, typed
from attnmonitor.sample import HeadEvidence, Position, Scope

__all__ = ["EncodedEvidence", "decode_evidence", "encode_evidence", "evidence_rows", "insert_evidence"]

_MOST_BYTES = 2**15  # of one alarm
_MOST_ROWS = 200  # alarms that are read
_MOST_NUMBERS = 64  # in a list, as a record that was not damaged has them

EncodedEvidence = tuple[str, str, str, int, str]
"""Rule, layer, scope, head, and the rest as JSON."""


def encode_evidence(evidence: HeadEvidence) -> EncodedEvidence:
    """Return the evidence of an alarm as a row; what is too long for it loses the healthy sample."""
    content = _content(evidence)
    if evidence.healthy is not None:
        content["healthy"] = _content(evidence.healthy)
    text = json_of(content)
    if len(text) > _MOST_BYTES:
        text = json_of(_content(evidence))
    return storable(evidence.rule or ""), storable(evidence.layer), evidence.scope, evidence.head, text


def insert_evidence(db: sqlite3.Connection, sample_id: int | None, rows: Iterable[EncodedEvidence]) -> None:
    """Insert the evidence of a sample's alarms."""
    if rows := list(rows):
        db.execute(EVIDENCE_TABLE)
        db.executemany("INSERT INTO evidence VALUES (?, ?, ?, ?, ?, ?)", [(sample_id, *row) for row in rows])


def evidence_rows(db: sqlite3.Connection) -> list[tuple[Any, ...]]:
    """Return the rows of all alarms whose sample was not superseded, oldest first; none in a record without them."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'evidence'").fetchone():
        return []
    return db.execute(
        "SELECT rule, layer, scope, head, content FROM evidence JOIN sample ON sample.id = sample_id"
        " WHERE superseded_by IS NULL ORDER BY global_step, evidence.rowid LIMIT ?",
        (_MOST_ROWS,),
    ).fetchall()


def decode_evidence(row: Sequence[Any]) -> HeadEvidence:
    """Return the evidence of a row.

    Raises:
        TypeError, ValueError, KeyError: It is not that of an alarm.
    """
    rule, layer, scope, head, text = (typed(value, kind) for value, kind in zip(row, _COLUMNS, strict=True))
    if scope not in ("query_head", "kv_head") or head < 0 or len(text) > 2 * _MOST_BYTES:
        raise ValueError(f"evidence of {scope!r:.20} {head} in {len(text)} characters")
    content = typed(decode_json(text), dict)

    def of(part: Any) -> HeadEvidence:
        return _decoded(typed(part, dict), layer, head, scope, rule or None)

    evidence = of(content)
    healthy = content.get("healthy")
    return evidence if healthy is None else replace(evidence, healthy=replace(of(healthy), rule=None))


_COLUMNS = (str, str, str, int, str)


def _content(evidence: HeadEvidence) -> dict[str, Any]:
    return {
        "step": evidence.global_step,
        "positions": [
            [sequence, position, _digits(leverage, 7), _digits(share, 7), token]
            for sequence, position, leverage, share, token in evidence.positions
        ],
        "attention": [[_digits(probability, 4) for probability in row] for row in evidence.attention.tolist()],
        "singular_values": [_digits(value, 7) for value in evidence.singular_values.tolist()],
        "rows": [list(row) for row in evidence.rows],
        "columns": evidence.attention.shape[1],
        "num_keys": evidence.num_keys,
        "sequence": evidence.sequence,
        "group": evidence.group,
    }


def _digits(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}")


def _decoded(content: dict[str, Any], layer: str, head: int, scope: Scope, rule: str | None) -> HeadEvidence:
    def counts(values: Any) -> list[int]:
        return [typed(value, int) for value in _some(values)]

    def numbers(values: Any) -> list[float]:
        return [float(typed(value, float, int)) for value in _some(values)]

    positions: list[Position] = []
    for sequence, position, leverage, share, token in map(_some, _some(content["positions"])):
        place, weights = counts([sequence, position]), numbers([leverage, share])
        positions.append((place[0], place[1], weights[0], weights[1], typed(token, str, type(None))))
    columns = typed(content["columns"], int)
    rows = [numbers(row) for row in _some(content["attention"])]
    at = [counts(row) for row in _some(content["rows"])]
    if not 0 <= columns <= _MOST_NUMBERS or any(len(row) != columns for row in rows) or len(at) != len(rows):
        raise ValueError(f"attention of {len(rows)} rows at {len(at)} positions, in {columns} columns")
    return HeadEvidence(
        layer=layer,
        head=head,
        scope=scope,
        global_step=typed(content["step"], int),
        rule=rule,
        positions=positions,
        attention=torch.tensor(rows, dtype=torch.float32).reshape(len(rows), columns),
        singular_values=torch.tensor(numbers(content["singular_values"]), dtype=torch.float32),
        rows=[(sequence, position) for sequence, position in at],
        num_keys=typed(content["num_keys"], int),
        sequence=typed(content["sequence"], int),
        group=typed(content["group"], int),
    )


def _some(values: Any) -> list[Any]:
    """Return a list, if it is not longer than one of a record is."""
    if len(typed(values, list)) > _MOST_NUMBERS:
        raise ValueError(f"a list of {len(values)} in the evidence of an alarm")
    return list(values)
