"""A sample as rows of the tables, and back.

A metric's values of one sample are one float32 blob over all heads. Which layer owns which part of it is stored once,
as a *layout*, not per sample. Spreads matter to two digits only, so they are kept as bfloat16.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from datetime import datetime, timezone
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnmonitor.record.evidence import EncodedEvidence, encode_evidence, insert_evidence
from attnmonitor.record.schema import ALARM_FIELDS, EVENT_COLUMNS
from attnmonitor.record.texts import decode_json, json_of, plain, storable, typed
from attnmonitor.sample import AlarmKey, AlertEvent, LayerCoverage, Sample

__all__ = [
    "EncodedSample",
    "add_heads",
    "decode_coverage",
    "decode_event",
    "decode_firing",
    "decode_layout",
    "decode_values",
    "encode",
    "insert",
    "insert_logged",
    "utc_now",
]


_MAX_COUNT = 10_000_000  # heads or positions: beyond it a number cannot be that of a model

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "None": (type(None),),
}

_NUMBERS = tuple(part.name for part in fields(AlertEvent) if part.type == "float")
_LATER = ("metric",)  # NULL in the events that an older version wrote to the file

_Entry = TypeVar("_Entry", AlertEvent, LayerCoverage)


@dataclass(frozen=True)
class EncodedSample:
    """A sample as rows: encoded once, so that a failed write can be repeated as it is."""

    global_step: int
    row: tuple[Any, ...]
    values: list[tuple[str, str, bytes, bytes | None]]  # metric, layout, means, spreads
    events: list[tuple[Any, ...]]
    firing: str
    coverage: str
    evidence: list[EncodedEvidence]


def encode(sample: Sample) -> EncodedSample:
    """Return a sample as rows, before it has an id.

    Raises:
        Exception: Any, for values of other types than `Sample` has; texts of any kind are stored.
    """
    numbers = {name: value for name, value in sample.diagnostics.items() if not isinstance(value, str)}
    diagnostics = json_of({name: float(value) for name, value in numbers.items()})
    values = []
    for metric, means in sample.values.items():
        layout = json_of([[layer, mean.numel()] for layer, mean in means.items()])
        spread, spread_blob = sample.spread.get(metric), None
        if spread is not None:
            aligned = [spread[at] if at in spread else torch.full_like(mean, math.nan) for at, mean in means.items()]
            spread_blob = _blob(aligned, torch.bfloat16)
        values.append((storable(metric), layout, _blob(means.values(), torch.float32), spread_blob))
    return EncodedSample(
        global_step=_stored_int(sample.global_step),
        row=(utc_now(), float(sample.seconds), _stored_int(sample.failures), plain(sample.failure), diagnostics),
        values=values,
        events=[tuple(map(_stored, astuple(event))) for event in sample.events],
        firing=json_of([[getattr(alarm, name) for name in ALARM_FIELDS] for alarm in sample.firing]),
        coverage=json_of([vars(entry) for entry in sample.coverage.values()]),
        evidence=[encode_evidence(evidence) for evidence in sample.evidence],
    )


def insert(db: sqlite3.Connection, segment_id: int, sample: EncodedSample) -> None:
    """Insert a sample; earlier samples of this or a later step are marked as superseded."""
    sample_id = db.execute(
        "INSERT INTO sample VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, NULL)", (segment_id, sample.global_step, *sample.row)
    ).lastrowid
    db.execute(
        "UPDATE sample SET superseded_by = ? WHERE superseded_by IS NULL AND global_step >= ? AND id <> ?",
        (sample_id, sample.global_step, sample_id),
    )
    for metric, layout, means, spreads in sample.values:
        db.execute("INSERT OR IGNORE INTO layout VALUES (NULL, ?)", (layout,))
        (layout_id,) = db.execute("SELECT id FROM layout WHERE layers = ?", (layout,)).fetchone()
        db.execute("INSERT INTO value VALUES (?, ?, ?, ?, ?)", (sample_id, metric, layout_id, means, spreads))
    # By name: a file that was brought to this schema has its columns in another order.
    names, slots = ", ".join(EVENT_COLUMNS), ", ".join("?" * len(EVENT_COLUMNS))
    events = [(sample_id, *event) for event in sample.events]
    db.executemany(f"INSERT INTO event (sample_id, {names}) VALUES (?, {slots})", events)
    insert_evidence(db, sample_id, sample.evidence)
    db.execute("UPDATE segment SET firing = ? WHERE id = ? AND firing <> ?", (sample.firing, segment_id, sample.firing))
    if sample.coverage != "[]":
        changed = (sample.coverage, segment_id, sample.coverage)
        db.execute("UPDATE segment SET coverage = ? WHERE id = ? AND coverage <> ?", changed)


def insert_logged(db: sqlite3.Connection, segment_id: int, points: Iterable[tuple[int, str, float]]) -> None:
    """Insert what training logged: (step, name, value)."""
    db.executemany("INSERT INTO logged VALUES (?, ?, ?, ?)", [(segment_id, *point) for point in points])


def _stored_int(value: float) -> int:
    number = int(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{number:#x} does not fit into 64 bits")
    return number


def _stored(value: Any) -> Any:
    return _stored_int(value) if isinstance(value, int) else plain(value)


def _blob(tensors: Iterable[Tensor], dtype: torch.dtype) -> bytes:
    heads = list(tensors)  # (num_heads,) each
    return torch.cat(heads).detach().to("cpu", dtype).view(torch.uint8).numpy().tobytes() if heads else b""


def utc_now() -> str:
    """Return the present time in ISO format, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def decode_coverage(text: Any) -> dict[str, LayerCoverage]:
    """Return the coverage of each layer from its JSON text.

    Raises:
        TypeError, ValueError: It is not the coverage of a model.
    """
    layers = {}
    for entry in typed(decode_json(text), list):
        layer = _checked(
            LayerCoverage(**{**entry, "outside": tuple(entry["outside"]), "remarks": tuple(entry.get("remarks", ()))})
        )
        counts = (layer.num_query_heads, layer.num_kv_heads, layer.head_dim, layer.num_keys)
        if not all(0 <= count <= _MAX_COUNT for count in counts) or bool(counts[0]) != bool(counts[1]):
            raise ValueError(f"a layer of {counts[0]} query heads and {counts[1]} KV heads")
        layers[layer.layer] = layer
    return layers


def decode_event(columns: Sequence[str], row: Sequence[Any]) -> AlertEvent:
    """Return the event of a row.

    Args:
        columns: Names of the row's columns, `EVENT_COLUMNS` or those of an older schema.
        row: Their values.

    Raises:
        TypeError: It has values of other types than an event.
    """
    named = {name: value for name, value in zip(columns, row, strict=True) if name not in _LATER or value is not None}
    numbers = {name: _number(named[name]) for name in _NUMBERS if name in named}
    return _checked(AlertEvent(**{**named, **numbers}))


def decode_firing(text: Any) -> dict[AlarmKey, dict[str, Any]]:
    """Return the values of each alarm that fires, from the JSON text of a segment.

    Raises:
        TypeError, ValueError: It is not that of a segment.
    """
    courses = {}
    for alarm in typed(decode_json(text), list):
        rule, layer, scope, head, *values = typed(alarm, list)
        key = (typed(rule, str), typed(layer, str, type(None)), typed(scope, str), typed(head, int, type(None)))
        courses[key] = {
            name: float(typed(value, float, int)) for name, value in zip(ALARM_FIELDS[4:], values, strict=True)
        }
    return courses


def _number(value: Any) -> Any:
    return math.nan if value is None else value  # SQLite has no NaN and stores NULL for it


def decode_layout(text: Any) -> list[tuple[str, int]]:
    """Return the layers of a layout with their numbers of heads.

    Raises:
        TypeError, ValueError: It is not a layout.
    """
    layout = [(typed(layer, str), typed(num_heads, int)) for layer, num_heads in typed(decode_json(text), list)]
    if any(num_heads < 0 for _, num_heads in layout) or sum(num_heads for _, num_heads in layout) > _MAX_COUNT:
        raise ValueError(f"a layout of {sum(num_heads for _, num_heads in layout)} heads")
    return layout


def _checked(entry: _Entry) -> _Entry:
    for part in fields(entry):
        value = getattr(entry, part.name)
        if part.type == "tuple[str, ...]":
            for item in value:
                typed(item, str)
        else:
            names = str(part.type).split(" | ")
            typed(value, *(kind for name in names for kind in _TYPES.get(name, (str,))))  # a Literal is a str
    return entry


def add_heads(trajectories: dict[str, NDArray[np.float32]], layer: str, num_samples: int, num_heads: int) -> None:
    """Give ``layer`` an array for ``num_heads`` heads, if it has none or a smaller one of another segment."""
    before = trajectories.get(layer)
    if before is None or before.shape[1] < num_heads:
        wider = np.full((num_samples, num_heads), np.nan, dtype=np.float32)
        if before is not None:
            wider[:, : before.shape[1]] = before
        trajectories[layer] = wider


def decode_values(
    trajectories: dict[str, NDArray[np.float32]],
    layout: Sequence[tuple[str, int]],
    rows: Sequence[tuple[int, bytes]],
    *,
    bfloat16: bool,
) -> None:
    """Write the blobs of ``rows`` (sample index, blob), all of one layout, into the layers' arrays.

    Raises:
        TypeError, ValueError: A blob does not have one number for each head.
    """
    if not rows or not layout:
        return
    num_bytes = (2 if bfloat16 else 4) * sum(num_heads for _, num_heads in layout)
    if any(len(typed(blob, bytes)) != num_bytes for _, blob in rows):
        raise ValueError(f"values of a sample that are not the {num_bytes} bytes of its heads")
    if not num_bytes:
        return
    buffer = bytearray(b"".join(blob for _, blob in rows))
    values = torch.frombuffer(buffer, dtype=torch.bfloat16 if bfloat16 else torch.float32).float().numpy()
    table = values.reshape(len(rows), -1)
    at = np.array([index for index, _ in rows])
    start = 0
    for layer, num_heads in layout:
        trajectories[layer][at, :num_heads] = table[:, start : start + num_heads]
        start += num_heads
