"""Scans as text for a terminal, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from attnmonitor.metrics.catalog import metric_scope
from attnmonitor.parallel.process_state import first_import
from attnmonitor.sample import scoped_head_name
from attnmonitor.scan.audit import Scan
from attnmonitor.scan.checkpoint import steps_of
from attnmonitor.scan.files import whole_file
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.outliers import outlier_heads
from attnmonitor.summary.tables import aligned, layer_table
from attnmonitor.summary.timeline import bars_text

__all__ = ["csv_text", "json_text", "plot_scans", "problem_lines", "scan_text", "scans_text"]

_TABLE_METRICS = ("energy_effective_rank", "interaction_effective_rank", "spectral_gap", "key_incoherence")

_OUTLIER_DISTANCE = 3.0  # robust standard deviations from which a head is listed as unlike the others

_PUBLISHED = {
    "energy_effective_rank": ("r90 of the energy field", "", "2–11"),
    "interaction_effective_rank": ("of W_QᵀW_K", "", "38–75"),
    "spectral_gap": ("gap", "×", "5–25×"),
}
_PUBLISHED_SIZES = (64, 128)  # of the heads that the published figures are of; a rank of 38 needs 38 dimensions


def scan_text(found: Scan) -> str:
    """Return one scan as text: a table with a row per layer, the heads unlike the others, published values."""
    measured = [layer for layer in found.coverage.values() if layer.measured]
    kinds = {layer.heads: sum(other.heads == layer.heads for other in measured) for layer in measured}
    shapes = ", ".join(
        f"{count} × {query} query / {kv} KV heads of size {size}" for (query, kv, size), count in kinds.items()
    )
    shown = _shown_metrics(found)
    lines = [
        f"{found.model}: {shapes}; {found.num_sequences} sequences of {found.length} tokens",
        layer_table(found.values, coverage=found.coverage, metrics=shown),
    ]
    short = short_layer_names(found.coverage)

    def name_of(layer: str, head: int, scope: str | None) -> str:
        return scoped_head_name(short[layer], head, scope, found.coverage[layer])

    for metric in shown:
        outliers = [
            f"{name_of(head.layer, head.head, metric_scope(metric))} ({head.value:.3g})"
            for head in outlier_heads(found.values[metric], metric, 3)
            if abs(head.distance) >= _OUTLIER_DISTANCE
        ]
        lines.append(f"unlike the other heads in {metric}: {', '.join(outliers) or 'none'}")
    return "\n".join([*lines, _published_text(found)])


def scans_text(scans: Sequence[Scan]) -> str:
    """Return several scans as text: a row each and, of checkpoints of one run, the course of each metric."""
    table = _table_of_models(scans)
    same_length = len({found.length for found in scans}) == 1
    return f"{table}\n{_courses(scans)}" if same_length and _have_same_layers(scans) else table


def problem_lines(found: Scan) -> list[str]:
    """Return one line for each note on the checkpoint and each layer that was not, or only partly, measured."""
    return [
        *(f"{found.model}: {note}" for note in found.notes),
        *(f"{found.model}: {name} is not measured: {reason}" for name, reason in found.not_measured.items()),
        *(f"{found.model}: {name} has no learned rank: {reason}" for name, reason in found.without_projections.items()),
        *(f"{found.model}: {name}: {note}" for name, note in found.weight_notes.items()),
    ]


def json_text(scans: Sequence[Scan]) -> str:
    """Return the scans as JSON: an object for one scan, a list of them for several."""
    plain = [found.to_json() for found in scans]
    return json.dumps(plain[0] if len(plain) == 1 else plain, indent=1, allow_nan=False) + "\n"


def csv_text(scans: Sequence[Scan]) -> str:
    """Return the scans as CSV: one line per head and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "length", "layer", "metric", "head", "value"])
    for found in scans:
        for layer in found.to_json()["layers"]:
            name = layer.pop("name")
            for metric, heads in layer.items():
                writer.writerows([found.model, found.length, name, metric, *cell] for cell in enumerate(heads))
    return out.getvalue()


def plot_scans(scans: Sequence[Scan], target: Path) -> None:
    """Draw the heads over the steps of several checkpoints.

    Raises:
        ValueError: The models do not have the same layers.
    """
    with first_import("attnmonitor.plots"):  # matplotlib is optional and slow to import
        from attnmonitor.plots import bands_over

    metrics = _shown_metrics(scans[0])
    layers = list(scans[0].values[metrics[0]])
    if not _have_same_layers(scans):
        raise ValueError(f"--plot {target}: the models do not have the same layers; plot the checkpoints of one run")
    heads = {
        metric: {layer: torch.stack([found.values[metric][layer] for found in scans]).numpy() for layer in layers}
        for metric in metrics
    }
    figure = bands_over(heads, steps_of([found.model for found in scans]))
    with whole_file(target) as unfinished:
        figure.savefig(unfinished, dpi=150)


def _published_text(found: Scan) -> str:
    """Return the range of each metric and, for heads of the papers' sizes, the range in the papers."""
    summary = found.summary()
    sizes = {layer.head_dim for layer in found.coverage.values() if layer.measured}
    compares = sizes <= set(_PUBLISHED_SIZES)
    parts = [
        f"{name} {summary[metric]['min']:.3g}–{summary[metric]['max']:.3g}{unit}, median "
        f"{summary[metric]['median']:.3g}{unit}" + (f" (published: {published})" if compares else "")
        for metric, (name, unit, published) in _PUBLISHED.items()
        if metric in summary
    ]
    text = "; ".join(parts)
    if not compares or not parts:
        return text
    # Its medians on SmolLM2 grow from 6 at 64 tokens to 11 at 1,024: docs/smollm2.md.
    return (
        f"{text}; published for an unnamed context length: the field's ranks grow with it, here {found.length} tokens"
    )


def _table_of_models(scans: Sequence[Scan]) -> str:
    """Return a table with a row per model: median over all heads with the smallest and the largest."""
    metrics = _shown_metrics(scans[0])
    rows = []
    for found in scans:
        summary = found.summary()
        known = [summary.get(metric) for metric in metrics]
        cells = ["–" if s is None else f"{s['median']:.3g} ({s['min']:.3g}–{s['max']:.3g})" for s in known]
        num_layers = len(found.coverage) - len(found.not_measured)
        rows.append([found.model, str(num_layers), str(found.length), *cells])
    return aligned([["model", "layers", "length", *metrics]], rows, rule=False)


def _have_same_layers(scans: Sequence[Scan]) -> bool:
    """Return whether the models can be checkpoints of one run."""
    shapes = [{name: layer.heads for name, layer in found.coverage.items() if layer.measured} for found in scans]
    return all(shape == shapes[0] for shape in shapes)


def _courses(scans: Sequence[Scan]) -> str:
    """Return the course of each metric over the checkpoints, as bars between its lowest and highest median."""
    lines = []
    for metric in _shown_metrics(scans[0]):
        medians = [found.summary().get(metric, {}).get("median", math.nan) for found in scans]
        lines.append(f"{metric}  {bars_text(medians)}  median {medians[0]:.3g} → {medians[-1]:.3g}")
    return "\n".join(lines)


def _shown_metrics(found: Scan) -> list[str]:
    return [metric for metric in _TABLE_METRICS if metric in found.values] or list(found.values)
