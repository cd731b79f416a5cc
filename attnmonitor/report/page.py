"""The page around the charts: text and tables, escaped, and everything the page needs in one file."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from attnmonitor.messages import needed
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record import RunRecord
from attnmonitor.report.alarm_table import alarm_table
from attnmonitor.report.compared_charts import compared_curves, metric_grid
from attnmonitor.report.evidence import evidence_section
from attnmonitor.report.numbers import MOST_VALUES, run_numbers, segment_starts
from attnmonitor.report.page_charts import page_charts
from attnmonitor.report.page_layout import Numbers, shared_scales
from attnmonitor.report.pairs import paired_layers
from attnmonitor.report.tables import table
from attnmonitor.summary.structure import (
    COVERAGE_COLUMNS,
    coverage_notes,
    coverage_row,
    structure_lines,
    structure_notes,
)
from attnmonitor.summary.style import BAND_COLOR, DARK_COLORS, FAINT_INK, INK, RUN_COLORS
from attnmonitor.summary.verdict import verdict

__all__ = ["PageParts", "check_plotly", "live_page", "page_parts", "page_text", "write_report"]

MOST_RUNS = 4
_SCRIPTS = ("page_numbers.js", "page_charts.js", "page.js")
_SIGNS = {"alarm": "▲ alarm", "healthy": "✓ healthy", "unknown": "? unknown"}


@dataclass(frozen=True)
class PageParts:
    """What of a page changes while its runs go on.

    Attributes:
        main: HTML of all that is shown below the controls.
        numbers: What the page's script draws from; ready for JSON.
    """

    main: str
    numbers: Mapping[str, Any]


def write_report(
    record_path: str | Path, out: str | Path | None = None, compare: str | Path | Sequence[str | Path] | None = None
) -> Path:
    """Write one self-contained HTML file about a run, or about up to four beside each other.

    Args:
        record_path: The run record.
        out: The file to write; by default beside the record, with the suffix ``.html``.
        compare: One other run record or up to three, shown on the same scales.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: There is no such record.
        RecordError: A file is not a record that this version reads.
        ValueError: More than four runs.
        ModuleNotFoundError: plotly is not installed.
    """
    others = [] if compare is None else [compare] if isinstance(compare, (str, Path)) else list(compare)
    paths = [Path(path) for path in (record_path, *others)]
    if len(paths) > MOST_RUNS:
        raise ValueError(f"compare={[*map(str, others)]} are {len(others)} runs; compare with {MOST_RUNS - 1} at most")
    check_plotly("write_report")
    page = page_text(
        page_parts([RunRecord.open(path) for path in paths]),
        f"{' and '.join(path.stem for path in paths)} · attnmonitor",
    )
    target = paths[0].with_suffix(".html") if out is None else Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    return target


def check_plotly(by: str) -> None:
    """Raise ModuleNotFoundError where plotly is missing, before a record is read: without it there is no page."""
    with needed(by=by, extra="report"), first_import("plotly.offline"):
        import plotly.offline  # noqa: F401


def page_parts(records: Sequence[RunRecord]) -> PageParts:
    """Make the parts of the page of one record, or of several.

    A page that is open takes newer parts of the same runs, with the reader's choice kept: its script has
    ``refreshPage({main, numbers})`` for it.
    """
    runs = [run_numbers(record, most_values=MOST_VALUES // len(records)) for record in records]
    scales = shared_scales(runs)
    slots, pairing = paired_layers(runs)
    numbers = {
        "runs": [
            {**run, "slots": of_run, "charts": page_charts(record, run, scales)}
            for record, run, of_run in zip(records, runs, slots, strict=True)
        ],
        "grid": metric_grid(runs, scales),
        "compared": compared_curves(runs, scales) if len(runs) > 1 else None,
        "dark": {light.lower(): dark for light, dark in DARK_COLORS.items()},
    }
    shown = list(enumerate(zip(records, runs, strict=True)))
    if len(runs) == 1:
        main = _run_section(records[0], 0, runs[0], _headline(records[0], runs[0]), _grid_section(runs))
    else:
        swatches = [f"<span class='swatch' style='background: {color}'></span>" for color in RUN_COLORS]
        headlines = "".join(_headline(record, run, swatches[at]) for at, (record, run) in shown)
        columns = "".join(
            _run_section(record, at, run, f"<p class='name'>{swatches[at]}{escape(run['name'])}</p>")
            for at, (record, run) in shown
        )
        main = f"{_compared_section(runs, headlines, pairing)}<div class='runs'>{columns}</div>"
    return PageParts(main, numbers)


def page_text(parts: PageParts, title: str, more_script: str = "") -> str:
    """The whole page, in one file.

    Args:
        parts: What is shown.
        title: Title of the page.
        more_script: JavaScript that runs after that of the page, and may ask the page's own server.
    """
    with first_import("plotly.offline"):
        from plotly.offline import get_plotlyjs
    return Template(_source("page.html")).substitute(
        title=escape(title),
        connect="'self'" if more_script else "'none'",
        main=parts.main,
        palette=f"--ink: {INK}; --faint: {FAINT_INK}; --band: {BAND_COLOR};",
        style=_source("page.css"),
        numbers=_json_in_html(parts.numbers),
        plotly=get_plotlyjs(),
        script="\n".join(map(_source, _SCRIPTS)) + more_script,
    )


def live_page(parts: Mapping[str, Any]) -> str:
    """The page that follows a run: ``parts`` are what `attnmonitor.report.live.LiveReport.parts` returns."""
    follow = f"{_source('live.js')}\nfollowRun({_json_in_html(parts['version'])});"
    icon = '<link rel="icon" href="data:,">'  # else a browser asks for one
    return page_text(PageParts(icon + parts["main"], parts["numbers"]), parts["title"], follow)


def _source(name: str) -> str:
    return files("attnmonitor.report").joinpath(name).read_text(encoding="utf-8")


def _json_in_html(numbers: Any) -> str:
    """JSON that cannot close the script element around it, whatever the names of layers contain."""
    return json.dumps(numbers, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _headline(record: RunRecord, numbers: Numbers, swatch: str = "") -> str:
    """The run's name, its state and its verdict."""
    counts = record.counts
    model = str(record.config.get("model", "")).rpartition("<locals>.")[2]  # of a class that a function defines
    return f"""<div>
    <p class="name">{swatch}{escape(" · ".join(filter(None, (record.path.name, model))))}</p>
    <p class="state {counts.state}">{_SIGNS[counts.state]}</p>
    <h1 class="{counts.state}" data-state="{counts.state}">{escape(verdict(counts))}</h1>
    {"".join(f"<p class='note'>Seen at attach: {escape(line)}</p>" for line in structure_lines(record.coverage))}
    {_segment_note(record)}{_thinned_note(record, numbers)}
  </div>"""


def _run_section(record: RunRecord, index: int, numbers: Numbers, heading: str, grid: str = "") -> str:
    configuration = escape(json.dumps(dict(record.config), indent=2))
    has_times = any(map(math.isfinite, record.seconds))
    return f"""
<section class="run" id="run-{index}" aria-label="{escape(record.path.name)}">
  {heading}
  <div>
    <h2>Alarms</h2>
    {_chart("timeline", index, "Alarms over optimizer steps") if numbers["alarms"] else ""}
    {alarm_table(record, index)}
  </div>
  {_heads(index, numbers, evidence_section(record))}
  {grid}
  <div>
    <h2>Coverage</h2>
    {_coverage_table(record)}
  </div>
  <div>
    <h2>Cost</h2>
    {_cost(record)}
    {_chart("cost", index, "Seconds per sample over optimizer steps") if has_times else ""}
    <details class="configuration"><summary>Configuration of the run</summary>
    <pre tabindex="0">{configuration}</pre></details>
  </div>
</section>"""


def _heads(index: int, numbers: Numbers, evidence: str) -> str:
    """The heatmap and the curves; of a run without numbers only what training logged, if it did."""
    curves = _chart("curves", index, "Curves of the chosen metric, and what training logged, over optimizer steps")
    if not _has_numbers(numbers):
        logged = f"<h2>Logged by training</h2>{curves}" if numbers["logged"] else ""
        return f"<div><h2>Heads</h2><p class='note'>No head has a number in this run.</p>{logged}</div>"
    heatmap = _chart("heatmap", index, "Heatmap of all heads: arrow keys choose a head", 'tabindex="0"')
    return f"""<div class="heads">
    <h2>Heads <small class="metric-name"></small></h2>
    <p class="note metric-meaning"></p>
    <div class="pair"><div>{heatmap}
      <p class="note">Frame: alarm (vermilion), chosen head (black). ▲ above the color scale, ▼ below it.
      Hatched: not measured, or no number at this step.</p></div><div>{curves}</div></div>
    {evidence}
  </div>"""


def _has_numbers(numbers: Numbers) -> bool:
    return any(metric["frames"] for metric in numbers["metrics"].values())


def _grid_section(runs: Sequence[Numbers]) -> str:
    if not any(map(_has_numbers, runs)):
        return ""
    note = (
        "Band: range and quartiles of all heads; dark line: median." if len(runs) == 1 else "Dotted: median of a run."
    )
    grid = _chart("grid", 0, "Every metric over optimizer steps: all heads and the chosen one")
    return f"""<div>
    <h2>Every metric <small class="head-name"></small></h2>
    <p class="note">{note}</p>
    {grid}
  </div>"""


def _compared_section(runs: Sequence[Numbers], headlines: str, pairing: Sequence[str]) -> str:
    notes = "".join(f"<p class='note pairing'>{escape(note)}</p>" for note in pairing)
    curves = ""
    if any(map(_has_numbers, runs)):
        chart = _chart("compared", 0, "The chosen head in all runs over optimizer steps")
        curves = f"<h2>The chosen head in all runs <small class='head-name'></small></h2>{chart}"
    return f"""
<section class="compared" aria-label="All runs">
  <div class="headlines">{headlines}</div>
  {notes}{curves}{_grid_section(runs)}
</section>"""


def _chart(name: str, index: int, label: str, more: str = "") -> str:
    """Room for a figure, with buttons that save it."""
    saved = "".join(
        f"<button type='button' data-save='{kind}' data-chart='{name}-{index}' "
        f"aria-label='Save as {kind.upper()}: {escape(label)}'>{kind.upper()}</button>"
        for kind in ("png", "svg")
    )
    figure = f'<div class="chart" id="{name}-{index}" role="group" aria-label="{escape(label)}" {more}></div>'
    return f'<figure>{figure}<div class="save">{saved}</div></figure>'


def _segment_note(record: RunRecord) -> str:
    if len(record.segments) < 2:
        return ""
    at = ", ".join(f"{step:,}" for step in segment_starts(record))
    note = f"The probe or the model changed at step {at}: numbers do not continue across the dotted line."
    return f"<p class='note'>{note}</p>"


def _thinned_note(record: RunRecord, numbers: Numbers) -> str:
    fewest = min((len(metric["frames"]) for metric in numbers["metrics"].values() if metric["thinned"]), default=None)
    if fewest is None:
        return ""
    note = f"To keep this page light, heatmaps and curves show {fewest} of {len(record.steps):,} samples."
    return f"<p class='note'>{note} The record has them all.</p>"


def _coverage_table(record: RunRecord) -> str:
    if not record.coverage:
        return "<p class='note'>The record has no coverage.</p>"
    notes = coverage_notes(record.coverage)
    rows = [(*coverage_row(layer), "; ".join(notes.get(name, ()))) for name, layer in record.coverage.items()]
    measured = sum(layer.measured for layer in record.coverage.values())
    opened = " open" if measured < len(rows) or structure_notes(record.coverage) else ""
    summary = f"{measured} of {len(rows)} attention layers measured"
    content = table("Coverage", (*COVERAGE_COLUMNS, "remarks"), rows)
    return f"<details class='coverage'{opened}><summary>{summary}</summary>{content}</details>"


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
    return f"<p>{'; '.join(notes) or 'The record has no times.'}</p>"
