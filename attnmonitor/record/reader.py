"""One SQLite file per run, read back: trajectories of every head, events, coverage and cost, without any service.

A record is read as it stood when it was opened, also while training writes it: each `RunRecord` is a snapshot whose
arrays all have the same number of samples. How the file is laid out and kept whole is the subject of
`attnmonitor.record.writer`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.record.schema import BUSY_TIMEOUT_SECONDS, EVENT_COLUMNS, RecordError, check_is_record, damaged_record
from attnmonitor.sample import AlertEvent, LayerCoverage

if TYPE_CHECKING:
    import pandas

__all__ = ["RecordError", "RecordedSample", "RunRecord", "Segment"]


@dataclass(frozen=True)
class Segment:
    """A stretch of a run over which the numbers are comparable: one model, one probe.

    Attributes:
        index: 0 for the first segment of the file.
        started_at: UTC time in ISO format.
        config: The configuration of the run as it was given.
        coverage: How each layer was captured, by layer name.
    """

    index: int
    started_at: str
    config: Mapping[str, Any]
    coverage: Mapping[str, LayerCoverage]


@dataclass(frozen=True)
class RecordedSample:
    """What is known about one sample besides its values; the attributes are those of `Sample`."""

    global_step: int
    segment: int
    recorded_at: str
    seconds: float
    failures: int
    failure: str | None
    diagnostics: Mapping[str, float]


class RunRecord:
    """A run as it stood when the record was opened: open it again to see what training has added since.

    Attributes:
        path: The file.
        samples: What is known about each sample besides its values, in order of ``global_step``.
        segments: Stretches with one model and one probe, oldest first.

    Example:
        >>> import tempfile, torch
        >>> from attnmonitor.record import RecordWriter, RunRecord
        >>> from attnmonitor.sample import Sample
        >>> path = Path(tempfile.mkdtemp()) / "run.sqlite"
        >>> with RecordWriter(path, run={"model": "GPT2", "probe_fingerprint": "1f"}) as record:
        ...     for step in (0, 100):
        ...         record.append(Sample(step, {"key_incoherence": {"h.0.attn": torch.tensor([1.5, 2.5])}}))
        >>> run = RunRecord.open(path)
        >>> run.steps.tolist()
        [0, 100]
        >>> run.trajectories("key_incoherence")["h.0.attn"].shape  # (num_samples, num_heads)
        (2, 2)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with _reading(self.path) as db:
            self.segments = [
                Segment(index, started_at, json.loads(run), _coverage_from_json(coverage))
                for index, (started_at, run, coverage) in enumerate(
                    db.execute("SELECT started_at, run, coverage FROM segment ORDER BY id")
                )
            ]
            segment_index = {row[0]: i for i, row in enumerate(db.execute("SELECT id FROM segment ORDER BY id"))}
            rows = db.execute(
                "SELECT id, segment_id, global_step, recorded_at, seconds, failures, failure, diagnostics"
                " FROM sample WHERE superseded_by IS NULL ORDER BY global_step"
            ).fetchall()
        self._row_of_sample = {row[0]: index for index, row in enumerate(rows)}
        self.samples = [
            RecordedSample(
                global_step=step,
                segment=segment_index[segment],
                recorded_at=recorded_at,
                seconds=math.nan if seconds is None else seconds,
                failures=failures,
                failure=failure,
                diagnostics=json.loads(diagnostics),
            )
            for _, segment, step, recorded_at, seconds, failures, failure, diagnostics in rows
        ]

    @classmethod
    def open(cls, path: str | Path) -> RunRecord:
        """Read a record, finished or still being written.

        Raises:
            FileNotFoundError: There is no such file.
            RecordError: The file is damaged, not a run record, or of another schema version.
        """
        return cls(path)

    @property
    def steps(self) -> NDArray[np.int64]:
        """``global_step`` of each sample, increasing: ``(num_samples,)``."""
        return np.array([sample.global_step for sample in self.samples], dtype=np.int64)

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Cost of each sample in seconds: ``(num_samples,)``."""
        return np.array([sample.seconds for sample in self.samples], dtype=np.float64)

    @property
    def config(self) -> Mapping[str, Any]:
        """Configuration of the run as it was last given."""
        return self.segments[-1].config if self.segments else {}

    @property
    def coverage(self) -> Mapping[str, LayerCoverage]:
        """How each layer of the last segment was captured, or why it was not."""
        return self.segments[-1].coverage if self.segments else {}

    @property
    def diagnostics(self) -> dict[str, NDArray[np.float64]]:
        """The monitor's own figures by name, ``(num_samples,)`` each; NaN where a sample has none."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.diagnostics)
        return {name: np.array([s.diagnostics.get(name, math.nan) for s in self.samples], float) for name in names}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that were recorded, in the order of the catalog."""
        with _reading(self.path) as db:
            found = {name for (name,) in db.execute("SELECT DISTINCT metric FROM value")}
        return tuple(name for name in METRICS if name in found) + tuple(sorted(found - METRICS.keys()))

    @property
    def events(self) -> list[AlertEvent]:
        """Alerts that began or cleared, in order of time."""
        with _reading(self.path) as db:
            rows = db.execute(f"SELECT sample_id, {', '.join(EVENT_COLUMNS)} FROM event ORDER BY rowid").fetchall()
        shown = [row for row in rows if row[0] in self._row_of_sample]
        shown.sort(key=lambda row: self._row_of_sample[row[0]])
        return [_event_from_row(row[1:]) for row in shown]

    def trajectories(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """Values of ``metric`` over the whole run.

        Args:
            metric: One of `metrics`.

        Returns:
            For each layer, ``(num_samples, num_heads)``, means over the probe's sequences. NaN where a sample, a layer
            or a head was not measured. Curves run through all segments: `RecordedSample.segment` says which.

        Raises:
            ValueError: The record has no such metric.
        """
        return self._read_values(metric, "mean_float32")

    def spreads(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """Standard deviation over the probe's sequences, as `trajectories`; kept to two digits."""
        return self._read_values(metric, "spread_bfloat16")

    def to_dataframe(self) -> pandas.DataFrame:
        """One row per sample, metric, layer and head (needs pandas).

        Returns:
            Columns ``global_step``, ``metric``, ``layer``, ``head``, ``value``, ``spread``.
        """
        import pandas

        steps, frames = self.steps, []
        for metric in self.metrics:
            spreads = self.spreads(metric)
            for layer, values in self.trajectories(metric).items():
                num_samples, num_heads = values.shape
                frames.append(
                    pandas.DataFrame(
                        {
                            "global_step": np.repeat(steps, num_heads),
                            "metric": metric,
                            "layer": layer,
                            "head": np.tile(np.arange(num_heads), num_samples),
                            "value": values.ravel(),
                            "spread": spreads[layer].ravel(),
                        }
                    )
                )
        columns = ["global_step", "metric", "layer", "head", "value", "spread"]
        return pandas.concat(frames, ignore_index=True) if frames else pandas.DataFrame(columns=columns)

    def _read_values(self, metric: str, column: str) -> dict[str, NDArray[np.float32]]:
        with _reading(self.path) as db:
            rows = db.execute(
                f"SELECT sample_id, layout_id, {column} FROM value WHERE metric = ? ORDER BY sample_id", (metric,)
            ).fetchall()
            layouts = {i: json.loads(layers) for i, layers in db.execute("SELECT id, layers FROM layout ORDER BY id")}
        if not rows:
            raise ValueError(f"{self.path}: no metric {metric!r} in this record; recorded: {', '.join(self.metrics)}")
        rows_of_layout: dict[int, list[tuple[int, bytes]]] = {}
        for sample_id, layout_id, blob in rows:
            if sample_id in self._row_of_sample and blob is not None:
                rows_of_layout.setdefault(layout_id, []).append((self._row_of_sample[sample_id], blob))
        trajectories: dict[str, NDArray[np.float32]] = {}
        for layout_id in sorted({layout_id for _, layout_id, _ in rows}):
            for layer, num_heads in layouts[layout_id]:
                _widen(trajectories, layer, len(self.samples), num_heads)
            _fill(trajectories, layouts[layout_id], rows_of_layout.get(layout_id, []), bfloat16="bfloat16" in column)
        return trajectories


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that cannot write, with SQLite's complaints in words a user can act on."""
    if not path.is_file():
        # A run that is being written grows the log beside its file.
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
    """Open for queries only.

    SQLite's own read-only mode would leave the files of the write-ahead log behind, so it is the queries that are
    restricted. Only where the medium forbids writing altogether is the file opened as one that cannot change.
    """
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


def _widen(trajectories: dict[str, NDArray[np.float32]], layer: str, num_samples: int, num_heads: int) -> None:
    """Make room for ``num_heads`` heads of ``layer``: another segment's model may have had fewer."""
    before = trajectories.get(layer)
    if before is None or before.shape[1] < num_heads:
        wider = np.full((num_samples, num_heads), np.nan, dtype=np.float32)
        if before is not None:
            wider[:, : before.shape[1]] = before
        trajectories[layer] = wider


def _fill(
    trajectories: dict[str, NDArray[np.float32]],
    layout: Sequence[tuple[str, int]],
    rows: Sequence[tuple[int, bytes]],
    *,
    bfloat16: bool,
) -> None:
    """Cut the blobs of ``rows`` (sample index, blob), all of one layout, into the layers' arrays."""
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


def _coverage_from_json(text: str) -> dict[str, LayerCoverage]:
    entries = [LayerCoverage(**{**entry, "outside": tuple(entry["outside"])}) for entry in json.loads(text)]
    return {entry.layer: entry for entry in entries}


def _event_from_row(row: Sequence[Any]) -> AlertEvent:
    """SQLite has no NaN and stores NULL for it."""
    named = dict(zip(EVENT_COLUMNS, row, strict=True))
    for number in ("value", "baseline"):
        named[number] = math.nan if named[number] is None else named[number]
    return AlertEvent(**named)
