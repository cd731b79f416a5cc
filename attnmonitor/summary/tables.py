"""Text tables with one row per layer: values and alarms, or how the layer is captured."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attnmonitor.alerts.firing import most_severe_first
from attnmonitor.messages import printable, tail_of
from attnmonitor.parallel.process_state import first_import
from attnmonitor.sample import AlertEvent, LayerCoverage, head_name
from attnmonitor.summary.names import fault_names, short_layer_names
from attnmonitor.summary.structure import COVERAGE_COLUMNS, coverage_notes, coverage_row, grouped_lines

__all__ = [
    "TABLE_METRICS",
    "aligned",
    "coverage_table",
    "layer_table",
    "layers_to_look_at",
    "print_layer_table",
    "rich_layer_table",
]

_MAX_LAYER = 24  # characters
_MAX_ALARMS = 3

TABLE_METRICS = ("energy_effective_rank", "energy_rms", "key_incoherence")
"""Columns of a layer table where none are asked for."""


def layers_to_look_at(coverage: Mapping[str, LayerCoverage], firing: Sequence[AlertEvent], most: int) -> list[str]:
    """Return all layers where a table has room for them, else the first with an alarm or without numbers.

    Args:
        coverage: How each layer was captured.
        firing: Alarms that fire.
        most: Rows of the table.
    """
    if len(coverage) <= most:
        return list(coverage)
    alarmed = {event.layer for event in firing}
    return [name for name, layer in coverage.items() if name in alarmed or not layer.measured][:most]


def layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> str:
    """Return a text table, one row per layer: median (least–greatest) over its heads, and its alarms.

    Args:
        values: ``values[metric][layer]`` is ``(num_heads,)``, as `Sample.values` has it.
        firing: Alarms to show beside their layer.
        coverage: Adds a row for each layer that was not measured, with the reason.
        metrics: Columns; those without values are left out.
    """
    header, rows = _table(values, firing, coverage or {}, metrics)
    upper, lower = zip(*(["", *name.split("\n")][-2:] for name in header), strict=True)
    return aligned([upper, lower], rows)


def coverage_table(coverage: Mapping[str, LayerCoverage]) -> str:
    """Return a text table, one row per layer: how it was captured and verified, or why it was not measured.

    Below it what may be a mistake in the model, and what could not be read or was left out of the weights, values and
    outputs; layers of which the same is said share a line.

    Example:
        >>> layer = LayerCoverage("h.0", "sdpa", "self", 12, 4, 64, 0.125, 3e-7, ("bias",), sees="causal")
        >>> print(coverage_table({"h.0": layer}))
        layer  heads (query/KV)  head size  scale         sees    captured   error    outside the field
        ─────  ────────────────  ─────────  ────────────  ──────  ─────────  ───────  ─────────────────
        h.0    12/4              64         0.125 = 1/√d  causal  self sdpa  3.0e-07  bias
    """
    rows = [[printable(cell, one_line=True) for cell in coverage_row(layer)] for layer in coverage.values()]
    return "\n".join([aligned([COVERAGE_COLUMNS], rows), *grouped_lines(coverage_notes(coverage))])


def aligned(header: Sequence[Sequence[str]], rows: Sequence[Sequence[str]], *, rule: bool = True) -> str:
    """Return a text table whose columns are two spaces apart.

    Args:
        header: Lines of headings.
        rows: Lines below them.
        rule: Whether a line is drawn between the two.
    """
    widths = [max(map(len, column)) for column in zip(*header, *rows, strict=True)]
    lines = [*header, *([["─" * width for width in widths]] if rule else []), *rows]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def print_layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> None:
    """Print `layer_table`, with lines and color where ``rich`` is installed."""
    try:
        with first_import("rich.console"):
            from rich.console import Console
        table = rich_layer_table(values, firing=firing, coverage=coverage, metrics=metrics)
    except ImportError:
        print(layer_table(values, firing=firing, coverage=coverage, metrics=metrics))
        return
    Console().print(table)


def rich_layer_table(
    values: Mapping[str, Mapping[str, ArrayLike]],
    *,
    firing: Sequence[AlertEvent] = (),
    coverage: Mapping[str, LayerCoverage] | None = None,
    metrics: Sequence[str] = TABLE_METRICS,
) -> Any:
    """`layer_table` as a ``rich.table.Table``.

    Raises:
        ModuleNotFoundError: ``rich`` is not installed.
    """
    with first_import("rich.box", "rich.table", "rich.text"):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text
    header, rows = _table(values, firing, coverage or {}, metrics)
    table = Table(box=SIMPLE_HEAD)
    table.add_column(header[0], overflow="fold")
    for name in header[1:-1]:
        table.add_column(name, no_wrap=True)
    # With nothing to show it leaves its room to the names of layers.
    table.add_column(header[-1], min_width=12 if any(row[-1] for row in rows) else None, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold red" if row[-1] else None)
    return table


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
        places = most_severe_first((event for event in firing if event.layer == layer), coverage)
        alarms = [_alarm_text(events, layer, coverage) for events in places]
        if layer in coverage and not coverage[layer].measured:
            alarms.append(f"not measured: {coverage[layer].reason}")
        more = [f"and {len(alarms) - _MAX_ALARMS} more"] if len(alarms) > _MAX_ALARMS else []
        row = [tail_of(short[layer], _MAX_LAYER), *cells, "; ".join(alarms[:_MAX_ALARMS] + more)]
        rows.append([printable(cell, one_line=True) for cell in row])
    headings = [name.replace("_", "\n", 1).replace("_", " ") for name in shown]
    return ["layer", *headings, "look at"], rows


def _alarm_text(events: Sequence[AlertEvent], layer: str, coverage: Mapping[str, LayerCoverage]) -> str:
    """Return the faults of a head, ``head 7: key sink since step 400``, or those of the layer alone."""
    head, faults = head_name(events[0], {layer: ""}, coverage).strip(), fault_names(events, courses=False)
    return f"{head}: {faults}" if head else faults


def _range_text(heads: ArrayLike | None) -> str:
    known = np.asarray([] if heads is None else heads, dtype=np.float64).ravel()
    known = known[~np.isnan(known)]
    if not known.size:
        return "–"
    least, middle, most = (f"{x:.0f}" if abs(x) >= 10 else f"{x:.2g}" for x in np.quantile(known, [0, 0.5, 1]))
    return f"{middle} ({least}–{most})"
