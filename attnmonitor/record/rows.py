"""A sample as rows of the tables, and back.

A metric's values of one sample are one float32 blob over all heads. Which layer owns which part of it is stored once,
as a *layout*, not per sample. Spreads matter to two digits only, so they are kept as bfloat16.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnmonitor.record.schema import EVENT_COLUMNS
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

__all__ = [
    "EncodedSample",
    "add_heads",
    "decode_coverage",
    "decode_event",
    "decode_values",
    "encode",
    "insert",
    "utc_now",
]


@dataclass(frozen=True)
class EncodedSample:
    """A sample as rows: encoded once, so that a failed write can be repeated as it is."""

    global_step: int
    row: tuple[Any, ...]
    values: list[tuple[str, str, bytes, bytes | None]]  # metric, layout, means, spreads
    events: list[tuple[Any, ...]]
    coverage: str


def encode(sample: Sample) -> EncodedSample:
    """Return a sample as rows, before it has an id."""
    diagnostics = json.dumps({name: float(value) for name, value in sample.diagnostics.items()})
    values = []
    for metric, means in sample.values.items():
        layout = json.dumps([[layer, mean.numel()] for layer, mean in means.items()])
        spread, spread_blob = sample.spread.get(metric), None
        if spread is not None:
            aligned = [spread[at] if at in spread else torch.full_like(mean, math.nan) for at, mean in means.items()]
            spread_blob = _blob(aligned, torch.bfloat16)
        values.append((metric, layout, _blob(means.values(), torch.float32), spread_blob))
    return EncodedSample(
        global_step=int(sample.global_step),
        row=(utc_now(), float(sample.seconds), int(sample.failures), sample.failure, diagnostics),
        values=values,
        events=[astuple(event) for event in sample.events],
        coverage=json.dumps([vars(entry) for entry in sample.coverage.values()]),
    )


def insert(db: sqlite3.Connection, segment_id: int, sample: EncodedSample) -> None:
    """Insert a sample; earlier samples of this or a later step are marked as superseded."""
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


def utc_now() -> str:
    """Return the present time in ISO format, to the millisecond."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def decode_coverage(text: str) -> dict[str, LayerCoverage]:
    """Return the coverage of each layer from its JSON text."""
    entries = [LayerCoverage(**{**entry, "outside": tuple(entry["outside"])}) for entry in json.loads(text)]
    return {entry.layer: entry for entry in entries}


def decode_event(row: Sequence[Any]) -> AlertEvent:
    """Return the event of a row of `EVENT_COLUMNS`."""
    named = dict(zip(EVENT_COLUMNS, row, strict=True))
    for number in ("value", "baseline"):  # SQLite has no NaN and stores NULL for it
        named[number] = math.nan if named[number] is None else named[number]
    return AlertEvent(**named)


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
    """Write the blobs of ``rows`` (sample index, blob), all of one layout, into the layers' arrays."""
    if not rows or not layout:
        return
    buffer = bytearray(b"".join(blob for _, blob in rows))
    values = torch.frombuffer(buffer, dtype=torch.bfloat16 if bfloat16 else torch.float32).float().numpy()
    table = values.reshape(len(rows), -1)
    at = np.array([index for index, _ in rows])
    start = 0
    for layer, num_heads in layout:
        trajectories[layer][at, :num_heads] = table[:, start : start + num_heads]
        start += num_heads
