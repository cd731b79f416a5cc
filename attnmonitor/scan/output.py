"""Scans as tables, JSON, CSV and pictures."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnmonitor.scan import Scan


_TABLE_METRICS = (
    "energy_effective_rank",
    "interaction_effective_rank",
    "spectral_gap",
    "key_incoherence",
)


_BARS = "▁▂▃▄▅▆▇█"


_FAR = 3.0  # robust standard deviations from which a head is named as unlike the others


_PUBLISHED = {
    "energy_effective_rank": ("r90 of the energy field", "", "2–11"),
    "interaction_effective_rank": ("of W_QᵀW_K", "", "38–75"),
    "spectral_gap": ("gap", "×", "5–25×"),
}


def write_scans(scans: Sequence[Scan], arguments: argparse.Namespace) -> None:
    """Write the scans where the command line asks for them: JSON, CSV, a picture, the terminal."""
    for target, text_of in ((arguments.json, _json_text), (arguments.csv, _csv_text)):
        if target == "-":
            sys.stdout.write(text_of(scans))
        elif target is not None:
            with whole_file(Path(target)) as unfinished:
                unfinished.write_text(text_of(scans), encoding="utf-8")
    if arguments.plot is not None:
        _plot(scans, arguments.plot)
    if "-" in (arguments.json, arguments.csv):
        return
    if len(scans) == 1:
        _print_scan(scans[0])
    else:
        print(_rows_of_models(scans))
        if len(arguments.length) == 1 and _same_layers(scans):
            print(_courses(scans))


def _print_scan(found: Scan) -> None:
    from attnmonitor.summary.names import short_layer_names
    from attnmonitor.summary.outliers import outlier_heads
    from attnmonitor.summary.tables import layer_table

    measured = [layer for layer in found.coverage.values() if layer.measured]
    kinds = {layer.heads: sum(other.heads == layer.heads for other in measured) for layer in measured}
    shapes = ", ".join(
        f"{count} × {query} query / {kv} KV heads of size {size}" for (query, kv, size), count in kinds.items()
    )
    print(f"{found.model}: {shapes}; {found.num_sequences} sequences of {found.length} tokens")
    shown = _shown_metrics(found)
    print(layer_table(found.values, coverage=found.coverage, metrics=shown))
    short = short_layer_names(found.coverage)
    for metric in shown:
        heads = [head for head in outlier_heads(found.values[metric], metric, 3) if abs(head.distance) >= _FAR]
        listed = ", ".join(f"{short[head.layer]} head {head.head} ({head.value:.3g})" for head in heads)
        print(f"unlike the other heads in {metric}: {listed or 'none'}")
    print(_beside_the_published(found))


def _beside_the_published(found: Scan) -> str:
    """Return the line to put beside the figures the papers give."""
    summary = found.summary()
    return "; ".join(
        f"{name} {summary[metric]['min']:.3g}–{summary[metric]['max']:.3g}{unit}, median "
        f"{summary[metric]['median']:.3g}{unit} (published: {published})"
        for metric, (name, unit, published) in _PUBLISHED.items()
        if metric in summary
    )


def _rows_of_models(scans: Sequence[Scan]) -> str:
    """Return a table with a row per model: median over all heads with the least and the greatest."""
    metrics = _shown_metrics(scans[0])
    rows = [["model", "layers", "length", *metrics]]
    for found in scans:
        summary = found.summary()
        known = [summary.get(metric) for metric in metrics]
        cells = ["–" if s is None else f"{s['median']:.3g} ({s['min']:.3g}–{s['max']:.3g})" for s in known]
        num_layers = len(found.coverage) - len(found.not_measured)
        rows.append([found.model, str(num_layers), str(found.length), *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _same_layers(scans: Sequence[Scan]) -> bool:
    """Whether the models can be checkpoints of one run."""
    shapes = [{name: layer.heads for name, layer in found.coverage.items() if layer.measured} for found in scans]
    return all(shape == shapes[0] for shape in shapes)


def _courses(scans: Sequence[Scan]) -> str:
    """Return the course of each metric over the checkpoints, as bars between its lowest and highest median."""
    lines = []
    for metric in _shown_metrics(scans[0]):
        medians = [found.summary().get(metric, {}).get("median", math.nan) for found in scans]
        known = [value for value in medians if not math.isnan(value)]
        low, span = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
        bars = ["·" if math.isnan(x) else _BARS[round((x - low) / (span or 1.0) * (len(_BARS) - 1))] for x in medians]
        lines.append(f"{metric}  {''.join(bars)}  median {medians[0]:.3g} → {medians[-1]:.3g}")
    return "\n".join(lines)


def _shown_metrics(found: Scan) -> list[str]:
    return [metric for metric in _TABLE_METRICS if metric in found.values] or list(found.values)


def _json_text(scans: Sequence[Scan]) -> str:
    plain = [found.to_json() for found in scans]
    return json.dumps(plain[0] if len(plain) == 1 else plain, indent=1, allow_nan=False) + "\n"


def _csv_text(scans: Sequence[Scan]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "length", "layer", "metric", "head", "value"])
    for found in scans:
        for layer in found.to_json()["layers"]:
            name = layer.pop("name")
            for metric, heads in layer.items():
                writer.writerows([found.model, found.length, name, metric, *cell] for cell in enumerate(heads))
    return out.getvalue()


def _plot(scans: Sequence[Scan], target: Path) -> None:
    import torch

    from attnmonitor.plots import bands_over
    from attnmonitor.scan.checkpoint import steps_of

    metrics = _shown_metrics(scans[0])
    layers = list(scans[0].values[metrics[0]])
    if not _same_layers(scans):
        raise ValueError(f"--plot {target}: the models do not have the same layers; plot the checkpoints of one run")
    heads = {
        metric: {layer: torch.stack([found.values[metric][layer] for found in scans]).numpy() for layer in layers}
        for metric in metrics
    }
    figure = bands_over(heads, steps_of([found.model for found in scans]))
    with whole_file(target) as unfinished:
        figure.savefig(unfinished, dpi=150)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it becomes ``target`` if all goes well and is removed if not."""
    # The suffix stays: some writers read their format from it.
    unfinished = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
