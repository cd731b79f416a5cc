"""The reader of a run record: trajectories of every head, events, coverage and cost.

Each `RunRecord` is a snapshot of the moment it was opened, also while training writes the file, so all of its arrays
have the same number of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnmonitor.messages import printable
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record.connections import reading
from attnmonitor.record.counts import RunCounts
from attnmonitor.record.evidence import decode_evidence, evidence_rows
from attnmonitor.record.foreign import content_checked
from attnmonitor.record.rows import (
    add_heads,
    decode_coverage,
    decode_event,
    decode_firing,
    decode_layout,
    decode_values,
)
from attnmonitor.record.schema import columns_of
from attnmonitor.record.texts import decode_json, typed
from attnmonitor.record.training_log import Curve, curves_of
from attnmonitor.sample import (
    AlertEvent,
    HeadEvidence,
    LayerCoverage,
    RunState,
    head_name,
    html_of,
    still_firing,
    worst_first,
)

if TYPE_CHECKING:
    import pandas

__all__ = ["RecordedSample", "RunRecord", "Segment"]

_MAX_VALUES = 2**32  # of one metric: 16 GiB of arrays
_MAX_LOGGED = 5_000_000  # points that training logged


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

    def __init__(self, path: str | Path, *, search_damage: bool = True) -> None:
        self.path = Path(path)
        with reading(self.path, search_damage=search_damage) as db:
            firing = "firing" if "firing" in columns_of(db, "segment") else "'[]'"
            segments = db.execute(f"SELECT id, started_at, run, coverage, {firing} FROM segment ORDER BY id").fetchall()
            rows = db.execute(
                "SELECT id, segment_id, global_step, recorded_at, seconds, failures, failure, diagnostics"
                " FROM sample WHERE superseded_by IS NULL ORDER BY global_step"
            ).fetchall()
            self.segments = [
                Segment(index, typed(started_at, str), typed(decode_json(run), dict), decode_coverage(coverage))
                for index, (_, started_at, run, coverage, _) in enumerate(segments)
            ]
            self._courses = decode_firing(segments[-1][-1]) if segments else {}
            segment_index = {row[0]: index for index, row in enumerate(segments)}
            self._row_of_sample = {row[0]: index for index, row in enumerate(rows)}
            self.samples = [_decode_sample(row[1:], segment_index) for row in rows]

    @classmethod
    def open(cls, path: str | Path) -> RunRecord:
        """Read a record, finished or still being written.

        Raises:
            FileNotFoundError: There is no such file.
            RecordError: The file is damaged, not a run record, or of another schema version.
        """
        return cls(path)

    def __repr__(self) -> str:
        """One line: which file, of what, how far, and in what state."""
        counts, steps = self.counts, self.steps
        reach = f" at steps {steps[0]:,} to {steps[-1]:,}" if len(steps) else ""
        what = (
            f"{self.config.get('model', 'no run yet')}, {counts.num_heads['query_head']:,} heads in "
            f"{len(counts.measured):,} of {len(counts.coverage):,} layers, {len(steps):,} samples{reach}"
        )
        worst = f", worst {head_name(self.firing[0], coverage=self.coverage)}" if counts.firing else ""
        return printable(f"<RunRecord {self.path}: {what}; {counts.state}{worst}>", one_line=True)

    def _repr_html_(self) -> str | None:
        return html_of(self)

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
            found = {typed(name, str) for (name,) in db.execute("SELECT DISTINCT metric FROM value")}
        return tuple(name for name in METRICS if name in found) + tuple(sorted(found - METRICS.keys()))

    @property
    def events(self) -> list[AlertEvent]:
        """Alerts that began or cleared, in order of time."""
        with reading(self.path) as db:
            _, *columns = columns_of(db, "event")
            rows = db.execute(f"SELECT sample_id, {', '.join(columns)} FROM event ORDER BY rowid").fetchall()
            shown = [row for row in rows if row[0] in self._row_of_sample]
            shown.sort(key=lambda row: self._row_of_sample[row[0]])
            return [decode_event(columns, row[1:]) for row in shown]

    @property
    def firing(self) -> list[AlertEvent]:
        """Alarms that fire at the latest sample, worst first, with their values at alarm, now and at their worst.

        A record of version 0.1 does not have the values now and at the worst: there they are NaN.
        """
        return self._firing(self.events)

    def _firing(self, events: list[AlertEvent]) -> list[AlertEvent]:
        return worst_first(replace(alarm, **self._courses.get(alarm.key, {})) for alarm in still_firing(events))

    @property
    def evidence(self) -> list[HeadEvidence]:
        """What the heads did whose alarms began, in order of time: the first 200; empty in records without it."""
        with reading(self.path) as db:
            return [decode_evidence(row) for row in evidence_rows(db)]

    @property
    def counts(self) -> RunCounts:
        """Samples, alarms and coverage of the run in numbers."""
        config, events, failures = self.config, self.events, [sample.failure for sample in self.samples]
        return RunCounts(
            coverage=self.coverage,
            firing=self._firing(events),
            num_samples=len(self.samples),
            num_cleared=sum(event.state == "cleared" for event in events),
            num_failed=sum(failure is not None for failure in failures),
            failure=next((failure for failure in reversed(failures) if failure is not None), None),
            last_failed=bool(failures) and failures[-1] is not None,
            has_rules=bool(config.get("alerts", True)),
            grace=config.get("alerts_grace", 0),
            least_heads=config.get("alerts_least_heads", {}),
            idle_rules=config.get("alerts_idle", {}),
        )

    @property
    def state(self) -> RunState:
        """``"alarm"``, ``"healthy"``, or ``"unknown"`` where something is missing to say so."""
        return self.counts.state

    @property
    def logged(self) -> dict[str, Curve]:
        """What training logged, such as its loss: ``{"loss": [(step, value), …]}``; empty in records without it."""
        with reading(self.path) as db:
            if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'logged'").fetchone():
                return {}
            rows = db.execute("SELECT global_step, name, value FROM logged ORDER BY rowid LIMIT ?", (_MAX_LOGGED,))
            return curves_of(
                (typed(step, int), typed(name, str), math.nan if value is None else float(typed(value, float, int)))
                for step, name, value in rows
            )

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
            texts = dict(db.execute("SELECT id, layers FROM layout ORDER BY id"))
        if not rows:
            raise ValueError(f"{self.path}: no metric {metric!r} in this record; recorded: {', '.join(self.metrics)}")
        with content_checked(self.path):
            return self._arrays(rows, texts, bfloat16="bfloat16" in column)

    def _arrays(
        self, rows: list[tuple[int, int, Any]], texts: Mapping[int, Any], *, bfloat16: bool
    ) -> dict[str, NDArray[np.float32]]:
        layouts = {layout_id: decode_layout(texts[layout_id]) for layout_id in sorted({row[1] for row in rows})}
        num_heads = sum(count for layout in layouts.values() for _, count in layout)
        if num_heads * len(self.samples) > _MAX_VALUES:
            raise ValueError(f"{len(self.samples)} samples of {num_heads} heads")
        rows_of_layout: dict[int, list[tuple[int, Any]]] = {}
        for sample_id, layout_id, blob in rows:
            if sample_id in self._row_of_sample and blob is not None:
                rows_of_layout.setdefault(layout_id, []).append((self._row_of_sample[sample_id], blob))
        trajectories: dict[str, NDArray[np.float32]] = {}
        for layout_id, layout in layouts.items():
            for layer, count in layout:
                add_heads(trajectories, layer, len(self.samples), count)
            decode_values(trajectories, layout, rows_of_layout.get(layout_id, []), bfloat16=bfloat16)
        return trajectories


def _decode_sample(row: Sequence[Any], segment_index: Mapping[int, int]) -> RecordedSample:
    segment, step, recorded_at, seconds, failures, failure, diagnostics = row
    return RecordedSample(
        global_step=typed(step, int),
        segment=segment_index[segment],
        recorded_at=typed(recorded_at, str),
        seconds=math.nan if seconds is None else typed(seconds, float, int),
        failures=typed(failures, int),
        failure=typed(failure, str, type(None)),
        diagnostics={name: typed(value, float, int) for name, value in typed(decode_json(diagnostics), dict).items()},
    )
