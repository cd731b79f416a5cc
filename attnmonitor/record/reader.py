"""The reader of a run record: trajectories of every head, events, coverage and cost.

Each `RunRecord` is a snapshot of the moment it was opened, also while training writes the file, so all of its arrays
have the same number of samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record.connections import reading
from attnmonitor.record.rows import add_heads, decode_coverage, decode_event, decode_values
from attnmonitor.record.schema import EVENT_COLUMNS
from attnmonitor.sample import AlertEvent, LayerCoverage

if TYPE_CHECKING:
    import pandas

__all__ = ["RecordedSample", "RunRecord", "Segment"]


@dataclass(frozen=True)
class Segment:
    """A part of a run with one model and one probe, so that its numbers are comparable.

    Attributes:
        index: 0 for the first segment of the file.
        started_at: UTC time in ISO format.
        config: Configuration of the run.
        coverage: How each layer was captured, by layer name.
    """

    index: int
    started_at: str
    config: Mapping[str, Any]
    coverage: Mapping[str, LayerCoverage]


@dataclass(frozen=True)
class RecordedSample:
    """One sample without its values; the attributes are those of `Sample`."""

    global_step: int
    segment: int
    recorded_at: str
    seconds: float
    failures: int
    failure: str | None
    diagnostics: Mapping[str, float]


class RunRecord:
    """A recorded run as it was when it was opened; open it again to see later samples.

    Attributes:
        path: The file.
        samples: The samples without their values, in order of ``global_step``.
        segments: Parts of the run with one model and one probe, oldest first.

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
        with reading(self.path) as db:
            self.segments = [
                Segment(index, started_at, json.loads(run), decode_coverage(coverage))
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
        """Configuration of the run, the latest one."""
        return self.segments[-1].config if self.segments else {}

    @property
    def coverage(self) -> Mapping[str, LayerCoverage]:
        """How each layer of the last segment was captured, or why it was not."""
        return self.segments[-1].coverage if self.segments else {}

    @property
    def diagnostics(self) -> dict[str, NDArray[np.float64]]:
        """Numbers about the measurement itself by name, ``(num_samples,)`` each; NaN where a sample has none."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.diagnostics)
        return {name: np.array([s.diagnostics.get(name, math.nan) for s in self.samples], float) for name in names}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that were recorded, in the order of the catalog."""
        with reading(self.path) as db:
            found = {name for (name,) in db.execute("SELECT DISTINCT metric FROM value")}
        return tuple(name for name in METRICS if name in found) + tuple(sorted(found - METRICS.keys()))

    @property
    def events(self) -> list[AlertEvent]:
        """Alerts that began or cleared, in order of time."""
        with reading(self.path) as db:
            rows = db.execute(f"SELECT sample_id, {', '.join(EVENT_COLUMNS)} FROM event ORDER BY rowid").fetchall()
        shown = [row for row in rows if row[0] in self._row_of_sample]
        shown.sort(key=lambda row: self._row_of_sample[row[0]])
        return [decode_event(row[1:]) for row in shown]

    def trajectories(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """Return the values of ``metric`` over the whole run.

        Args:
            metric: One of `metrics`.

        Returns:
            For each layer, ``(num_samples, num_heads)``, means over the probe's sequences. NaN where a sample, a layer
            or a head was not measured. Curves span all segments; `RecordedSample.segment` is the one of a sample.

        Raises:
            ValueError: The record has no such metric.
        """
        return self._read_values(metric, "mean_float32")

    def spreads(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """Return the standard deviation over the probe's sequences, as `trajectories`; kept to two digits."""
        return self._read_values(metric, "spread_bfloat16")

    def to_dataframe(self) -> pandas.DataFrame:
        """Return a table with one row per sample, metric, layer and head (needs pandas).

        Returns:
            Columns ``global_step``, ``metric``, ``layer``, ``head``, ``value``, ``spread``.
        """
        with first_import("pandas"):
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
        with reading(self.path) as db:
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
                add_heads(trajectories, layer, len(self.samples), num_heads)
            decode_values(
                trajectories, layouts[layout_id], rows_of_layout.get(layout_id, []), bfloat16="bfloat16" in column
            )
        return trajectories
