"""What a run comes to, in words: one line first, then a table of the layers.

People open a monitor to learn whether they must do something. The line says it; everything else (charts, table, report)
is there for whoever wants to know why. Only alarms decide the line.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from attnmonitor.record import RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage
from attnmonitor.summary.outliers import by_concern, head_name, short_layer_names, still_firing

__all__ = [
    "coverage_table",
    "layer_table",
    "print_layer_table",
    "verdict",
    "verdict_of_record",
]

TABLE_METRICS = ("energy_effective_rank", "energy_rms", "key_incoherence")
_MOST_NAMED = 3  # of heads in a line


def verdict(
    coverage: Mapping[str, LayerCoverage],
    *,
    num_samples: int,
    firing: Sequence[AlertEvent],
    num_cleared: int = 0,
    num_failed: int = 0,
    failure: str | None = None,
    watched: bool = True,
    grace: int = 0,
) -> str:
    """One line for people: whether there is anything to look at, and where.

    Args:
        coverage: How each layer was captured, or why it was not.
        num_samples: Samples taken, failed ones included.
        firing: Alarms that have begun and not cleared.
        num_cleared: Alarms that came and went.
        num_failed: Samples without values.
        failure: Why the last failed sample failed.
        watched: Whether any alert rule was on; without one nobody can say "healthy".
        grace: Samples that the slowest rule waits for before it may fire; before that nobody can say it either.

    Example:
        >>> coverage = {"h.0.attn": LayerCoverage("h.0.attn", how="sdpa", num_query_heads=12)}
        >>> verdict(coverage, num_samples=50, firing=[])
        '12 heads in 1 layer watched over 50 samples: healthy'
    """
    measured = [entry for entry in coverage.values() if entry.measured]
    missed = [entry for entry in coverage.values() if not entry.measured]
    if num_samples == 0:
        return "no sample taken yet"
    if num_failed == num_samples:
        return f"nothing measured: {_count(num_samples, 'sample')} failed ({failure})"
    if missed and not measured:
        return f"nothing measured in {_count(len(missed), 'attention layer')} ({missed[0].layer}: {missed[0].reason})"
    if firing:
        line = _complaint(by_concern(firing, coverage), short_layer_names(coverage))
    else:
        heads = _count(sum(entry.num_query_heads for entry in measured), "head")
        over = f"in {_count(len(measured), 'layer')} watched over {_count(num_samples, 'sample')}"
        line = f"{heads} {over}: {_nothing_firing(num_samples, watched, grace)}"
    notes = []
    if num_cleared:
        notes.append(f"{_count(num_cleared, 'alarm')} came and went")
    if num_failed:
        notes.append(f"{_count(num_failed, 'sample')} failed")
    if missed:
        notes.append(f"{_count(len(missed), 'layer')} not measured")
    return "; ".join([line, *notes])


def _nothing_firing(num_samples: int, watched: bool, grace: int) -> str:
    if not watched:
        return "no alert rule was on"
    return "healthy" if num_samples > grace else f"no alarm, but some rules first wait for {grace} samples"


def verdict_of_record(record: RunRecord) -> str:
    """The line for a run record."""
    firing = still_firing(record.events)
    failed = [sample for sample in record.samples if sample.failure is not None]
    return verdict(
        record.coverage,
        num_samples=len(record.samples),
        firing=firing,
        num_cleared=sum(event.state == "cleared" for event in record.events),
        num_failed=len(failed),
        failure=failed[-1].failure if failed else None,
        watched=bool(record.config.get("alerts", True)),
        grace=record.config.get("alerts_grace", 0),
    )


def layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> str:
    """A text table, one row per layer: the median over its heads with the least and the greatest, and its alarms.

    Args:
        values: ``values[metric][layer]`` is ``(num_heads,)``, as `Sample.values` has it.
        firing: Alarms to show beside their layer.
        coverage: Adds a row for each layer that was not measured, with the reason.
        metrics: Columns; those without values are left out.
    """
    header, rows = _table(values, firing, coverage or {}, metrics)
    upper, lower = zip(*(["", *name.split("\n")][-2:] for name in header), strict=True)
    return _aligned([upper, lower], rows)


def coverage_table(coverage: Mapping[str, LayerCoverage]) -> str:
    """A text table, one row per layer: how it was captured and verified, or why it was not measured.

    Example:
        >>> print(coverage_table({"h.0": LayerCoverage("h.0", "sdpa", "self", 12, 4, 64, 0.125, 3e-7, ("window",))}))
        layer  heads (query/KV)  head size  scale  captured   error    outside the field
        ─────  ────────────────  ─────────  ─────  ─────────  ───────  ─────────────────
        h.0    12/4              64         0.125  self sdpa  3.0e-07  window
    """
    header = ("layer", "heads (query/KV)", "head size", "scale", "captured", "error", "outside the field")
    rows = [
        (
            layer.layer,
            f"{layer.num_query_heads}/{layer.num_kv_heads}",
            str(layer.head_dim),
            f"{layer.scale:.4g}",
            f"{layer.kind} {layer.how}",
            "not comparable" if layer.error is None else f"{layer.error:.1e}",
            ", ".join(layer.outside),
        )
        if layer.measured
        else (layer.layer, "", "", "", "NOT MEASURED", "", layer.reason)
        for layer in coverage.values()
    ]
    return _aligned([header], rows)


def _aligned(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*header, *rows, strict=True)]
    rule = ["─" * width for width in widths]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (*header, rule, *rows)]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def print_layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> None:
    """Print `layer_table`, with lines and colour where ``rich`` is installed."""
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(layer_table(values, firing=firing, coverage=coverage, metrics=metrics))
        return
    header, rows = _table(values, firing, coverage or {}, metrics)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(header[0], overflow="fold")
    for name in header[1:-1]:
        table.add_column(name, no_wrap=True)
    table.add_column(header[-1], min_width=12, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[-1] else None)
    Console().print(table)


def _table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    firing: Sequence[AlertEvent],
    coverage: Mapping[str, LayerCoverage],
    metrics: Sequence[str],
) -> tuple[list[str], list[list[str]]]:
    shown = [name for name in metrics if values.get(name)]
    layers = list(dict.fromkeys(itertools.chain(coverage, *(values[name] for name in shown))))
    short = short_layer_names(layers)
    rows = []
    for layer in layers:
        cells = [_range_text(values[name].get(layer)) for name in shown]
        alarms = [
            f"{head_name(events[0], {layer: ''})}: {_kinds_text(events)}".removeprefix(": ").strip()
            for events in by_concern((event for event in firing if event.layer == layer), coverage)
        ]
        if layer in coverage and not coverage[layer].measured:
            alarms.append(f"not measured: {coverage[layer].reason}")
        more = [f"and {len(alarms) - _MOST_NAMED} more"] if len(alarms) > _MOST_NAMED else []
        rows.append([short[layer], *cells, "; ".join(alarms[:_MOST_NAMED] + more)])
    headings = [name.replace("_", "\n", 1).replace("_", " ") for name in shown]
    return ["layer", *headings, "look at"], rows


def _range_text(heads: ArrayLike | None) -> str:
    known = np.asarray([] if heads is None else heads, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    if not known.size:
        return "–"
    least, middle, most = (f"{x:.0f}" if abs(x) >= 10 else f"{x:.2g}" for x in np.quantile(known, [0, 0.5, 1]))
    return f"{middle} ({least}–{most})"


def _complaint(groups: Sequence[Sequence[AlertEvent]], short: Mapping[str, str]) -> str:
    of_run = [events for events in groups if events[0].layer is None]
    others = [events for events in groups if events[0].layer is not None]
    nouns = {"layer" if events[0].head is None else "head" for events in others}
    number = _count(len(others), nouns.pop() if len(nouns) == 1 else "place")
    named = ", ".join(f"{head_name(events[0], short)} ({_kinds_text(events)})" for events in others[:_MOST_NAMED])
    named += f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    if of_run:
        line = f"the run needs a look ({_kinds_text(of_run[0])})"
        return f"{line}, and so {'does' if len(others) == 1 else 'do'} {number}: {named}" if others else line
    return f"{number} {'needs' if len(others) == 1 else 'need'} a look: {named}"


def _kinds_text(events: Iterable[AlertEvent]) -> str:
    """Each kind of fault once, since its first alarm: several rules may see the same fault."""
    since: dict[str, int] = {}
    for event in events:
        step = event.began
        since[event.kind] = min(step, since.get(event.kind, step))
    return ", ".join(f"{kind.replace('_', ' ')} since step {step:,}" for kind, step in since.items())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
