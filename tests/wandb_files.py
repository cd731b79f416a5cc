"""Reads the files that the W&B client wrote for an offline run.

The file is a log of protobuf records in blocks of 32 KiB. A record is cut into chunks where a block ends, each with a
header of checksum, length and kind (whole, first, middle, last); room for less than a header stays empty.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_FILE_HEADER, _BLOCK = 7, 32 * 1024
_CHUNK = struct.Struct("<IHB")
_WHOLE, _FIRST, _LAST = 1, 2, 4


def _records(content: bytes) -> Iterator[Record]:
    at, pending = _FILE_HEADER, bytearray()
    while at + _CHUNK.size <= len(content):
        left_in_block = _BLOCK - at % _BLOCK
        if left_in_block < _CHUNK.size:
            at += left_in_block
            continue
        checksum, length, kind = _CHUNK.unpack_from(content, at)
        end = at + _CHUNK.size + length
        if zlib.crc32(content[at + _CHUNK.size - 1 : end]) != checksum:  # covers kind and contents
            return  # the client is still writing, or was killed while it did
        if kind in (_WHOLE, _FIRST):
            pending.clear()
        pending += content[at + _CHUNK.size : end]
        at = end
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(bytes(pending))


def _finished(path: Path) -> list[Record]:
    """Return all records, once the last is written: `finish` returns shortly before the file is complete."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        records = list(_records(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.02)
    raise TimeoutError(f"{path} has no exit record: was the run finished?")


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def offline_run(folder: Path, *, killed: bool = False) -> dict[str, Any]:
    """Return history, metric definitions ``{name: (x-axis, hidden)}``, configuration, summary and alerts of the run.

    Of a killed process, only the records that the client had written by then.
    """
    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    run: dict[str, Any] = {"history": [], "metrics": {}, "config": {}, "summary": {}, "alerts": []}
    for record in _records(path.read_bytes()) if killed else _finished(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "metric":
            run["metrics"][record.metric.name] = (record.metric.step_metric, record.metric.options.hidden)
        elif kind in ("config", "run"):
            run["config"] |= _items(record.config.update if kind == "config" else record.run.config.update)
        elif kind == "summary":
            run["summary"] |= _items(record.summary.update)
        elif kind == "alert":
            run["alerts"].append((record.alert.title, record.alert.text, record.alert.level))
    return run


def curve(run: dict[str, Any], key: str, x: str = "attention/global_step") -> dict[int, float]:
    """Return the values under a key by their x."""
    return {row[x]: row[key] for row in run["history"] if key in row}


def charts(run: dict[str, Any], folder: Path, x: str = "attention/global_step") -> dict[str, dict[int, dict[str, Any]]]:
    """Return every Plotly figure by its key and its x."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in run["history"]:
        for key in (name.removesuffix("._type") for name, kind in row.items() if kind == "plotly-file"):
            [file] = folder.glob(f"wandb/offline-run-*/files/{row[f'{key}.path']}")
            found.setdefault(key, {})[row[x]] = json.loads(file.read_text())
    return found
