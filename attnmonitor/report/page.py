"""The page around the charts: text and tables, escaped, and everything the page needs in one file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from attnmonitor.alerts.firing import number_text
from attnmonitor.alerts.notifications import ADVICE
from attnmonitor.messages import needed
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record import RunRecord
from attnmonitor.report.numbers import alarm_spans, run_numbers, segment_starts
from attnmonitor.report.page_charts import page_charts, shared_scales
from attnmonitor.sample import head_name
from attnmonitor.summary.names import count_text, fault_text, short_layer_names
from attnmonitor.summary.run_summary import RunSummary
from attnmonitor.summary.structure import scale_text, sees_text, structure_notes
from attnmonitor.summary.style import BAND_COLOR, FAINT_INK, INK
from attnmonitor.summary.verdict import verdict

__all__ = ["write_report"]

MOST_ALARM_ROWS = 200


def write_report(record_path: str | Path, out: str | Path | None = None, compare: str | Path | None = None) -> Path:
    """Write one self-contained HTML file about a run, or about two side by side.

    Args:
        record_path: The run record.
        out: The file to write; by default beside the record, with the suffix ``.html``.
        compare: A second run record, shown to the right of the first on the same scales.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: There is no such record.
        RecordError: A file is not a record that this version reads.
        ModuleNotFoundError: plotly is not installed.
    """
    with needed(by="write_report", extra="report"), first_import("plotly.offline"):
        from plotly.offline import get_plotlyjs
    paths = [Path(record_path)] if compare is None else [Path(record_path), Path(compare)]
    records = [RunRecord.open(path) for path in paths]
    numbers = [run_numbers(record) for record in records]
    scales = shared_scales(numbers)
    runs = [{**run, "charts": page_charts(record, run, scales)} for record, run in zip(records, numbers, strict=True)]
    page = Template(_source("page.html")).substitute(
        title=escape(" and ".join(path.stem for path in paths)),
        runs="".join(
            _run_section(record, at, run) for at, (record, run) in enumerate(zip(records, numbers, strict=True))
        ),
        layout="two" if compare is not None else "one",
        palette=f"--ink: {INK}; --faint: {FAINT_INK}; --band: {BAND_COLOR};",
        style=_source("page.css"),
        numbers=_json_in_html({"runs": runs}),
        plotly=get_plotlyjs(),
        script=_source("page.js"),
    )
    target = paths[0].with_suffix(".html") if out is None else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def _source(name: str) -> str:
    return files("attnmonitor.report").joinpath(name).read_text(encoding="utf-8")


def _json_in_html(numbers: Any) -> str:
    """JSON that cannot close the script element around it, whatever the names of layers contain."""
    return json.dumps(numbers, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _run_section(record: RunRecord, index: int, numbers: dict[str, Any]) -> str:
    summary = RunSummary.of_record(record)
    configuration = escape(json.dumps(dict(record.config), indent=2))
    model = str(record.config.get("model", "")).rpartition("<locals>.")[2]  # of a class that a function defines
    return f"""
<section class="run" id="run-{index}">
  <div>
    <p class="name">{escape(record.path.name)} · {escape(model)}</p>
    <h1 class="{summary.state}" data-state="{summary.state}">{escape(verdict(summary))}</h1>
    {_segment_note(record)}{_thinned_note(record, numbers)}
  </div>
  <div>
    <h2>Alarms</h2>
    <div class="chart" id="timeline-{index}"></div>
    {_alarm_table(record)}
  </div>
  <div>
    <h2>Heads <small class="metric-name"></small></h2>
    <p class="note metric-meaning"></p>
    <div class="pair"><div class="chart" id="heatmap-{index}"></div><div class="chart" id="curves-{index}"></div></div>
  </div>
  <div>
    <h2>Every metric <small class="head-name"></small></h2>
    <p class="note">Band: range and quartiles of all heads; dark line: median.</p>
    <div class="chart" id="grid-{index}"></div>
  </div>
  <div>
    <h2>Coverage</h2>
    {_coverage_table(record)}
  </div>
  <div>
    <h2>Cost</h2>
    {_cost(record)}
    <div class="chart" id="cost-{index}"></div>
    <details><summary>Configuration of the run</summary><pre>{configuration}</pre></details>
  </div>
</section>"""


def _segment_note(record: RunRecord) -> str:
    if len(record.segments) < 2:
        return ""
    at = ", ".join(f"{step:,}" for step in segment_starts(record))
    note = f"The probe or the model changed at step {at}: numbers do not continue across the dotted line."
    return f"<p class='note'>{note}</p>"


def _thinned_note(record: RunRecord, numbers: dict[str, Any]) -> str:
    fewest = min((len(metric["frames"]) for metric in numbers["metrics"].values() if metric["thinned"]), default=None)
    if fewest is None:
        return ""
    note = f"To keep this page light, heatmaps and curves show {fewest} of {len(record.steps):,} samples."
    return f"<p class='note'>{note} The record has them all.</p>"


def _alarm_table(record: RunRecord) -> str:
    """The alarms that fire, worst first, then those that are over, the latest first."""
    spans = {(span.event.key, span.ended): span for span in alarm_spans(record.events)}
    if not spans:
        return "<p class='note'>No alarm has begun in this run.</p>"
    firing = [replace(spans.pop((alarm.key, None)), event=alarm) for alarm in record.firing]
    ordered = [*firing, *sorted(spans.values(), key=lambda span: -(span.ended or 0))]
    short = short_layer_names(record.coverage)
    rows = []
    for span in ordered[:MOST_ALARM_ROWS]:
        event = span.event
        rows.append(
            (
                head_name(event, short, record.coverage),
                fault_text(event.kind) + (" (critical)" if event.severity == "critical" else ""),
                f"{span.began:,}",
                "still firing" if span.ended is None else f"{span.ended:,}",
                event.metric,
                *("" if math.isnan(value) else number_text(value) for value in (event.value, event.now, event.worst)),
                event.message,
            )
        )
    header = ("where", "what", "since step", "until step", "metric", "at alarm", "now or at end", "worst", "message")
    left_out = len(ordered) - len(rows)
    note = f"<p class='note'>{left_out} earlier alarms are not listed.</p>" if left_out else ""
    opened = " open" if len(rows) <= 12 else ""
    table = f"<details{opened}><summary>{count_text(len(rows), 'alarm')}</summary>{_table(header, rows)}</details>"
    return f"{note}{table}{_advice(span.event.kind for span in ordered)}"


def _advice(kinds: Iterable[str]) -> str:
    """For each kind of fault, what it usually means and what to try."""
    known = [(kind, ADVICE[kind]) for kind in dict.fromkeys(kinds) if kind in ADVICE]
    entries = "".join(
        f"<dt>{escape(fault_text(kind))}</dt><dd>{escape(advice.meaning)} {escape(advice.remedy)}</dd>"
        for kind, advice in known
    )
    return f"<dl>{entries}</dl>" if entries else ""


def _coverage_table(record: RunRecord) -> str:
    if not record.coverage:
        return "<p class='note'>The record has no coverage.</p>"
    notes = structure_notes(record.coverage)
    rows = [
        (
            entry.layer,
            f"{entry.num_query_heads}"
            + (f" / {entry.num_kv_heads}" if entry.num_kv_heads != entry.num_query_heads else ""),
            _number(entry.head_dim),
            f"{entry.kind}, {entry.how}" if entry.measured else "",
            scale_text(entry),
            sees_text(entry),
            "not compared" if entry.error is None else f"{entry.error:.1e}",
            "; ".join((", ".join(entry.outside), *notes.get(entry.layer, ()))).removeprefix("; ")
            if entry.measured
            else f"not measured: {entry.reason}",
        )
        for entry in record.coverage.values()
    ]
    measured = sum(entry.measured for entry in record.coverage.values())
    header = (
        "layer",
        "heads / KV heads",
        "head size",
        "captured as",
        "scale",
        "sees",
        "reconstruction error",
        "remarks",
    )
    opened = " open" if measured < len(rows) or notes else ""
    summary = f"{measured} of {len(rows)} attention layers measured"
    return f"<details{opened}><summary>{summary}</summary>{_table(header, rows)}</details>"


def _cost(record: RunRecord) -> str:
    seconds = [sample.seconds for sample in record.samples if math.isfinite(sample.seconds)]
    failed = [sample for sample in record.samples if sample.failure is not None]
    notes = []
    if seconds:
        notes.append(
            f"{statistics.median(seconds):.3g} s per sample (median), {sum(seconds):.3g} s in {len(seconds):,} samples"
        )
    for name, values in record.diagnostics.items():
        known = [value for value in values.tolist() if math.isfinite(value)]
        if known:
            number = f"{100 * known[-1]:.1f} % of the time" if name == "overhead" else f"{known[-1]:.3g}"
            notes.append(f"{escape(name.replace('_', ' '))} {number}")
    if failed:
        notes.append(f"{len(failed)} samples failed, last: {escape(failed[-1].failure or '')}")
    return f"<p>{'; '.join(notes) or 'No sample yet.'}</p>"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"
