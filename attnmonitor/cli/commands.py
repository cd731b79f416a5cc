"""The command line: arguments in, one call of the library, text or a whole file out.

What goes wrong is told in one line, with exit code 2. Files are written beside their place and moved there when they
are complete, so that a failed command leaves neither half a file nor an older one destroyed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnmonitor._version import __version__
from attnmonitor.messages import needed

if TYPE_CHECKING:
    from attnmonitor.scan import Progress, Scan

__all__ = ["main"]

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 where something was left unmeasured, 2 on an error."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ModuleNotFoundError, sqlite3.Error) as error:
        is_bare = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        way_out = "; pip install 'attnmonitor[all]'" if is_bare else ""
        print(f"attnmonitor {arguments.command}: error: {error}{way_out}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnmonitor", description="What every attention head of a transformer does.")
    parser.add_argument("--version", action="version", version=f"attnmonitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_scan(commands.add_parser("scan", help="audit every attention head of a checkpoint"))
    _add_report(commands.add_parser("report", help="write the HTML report of a recorded run"))
    _add_replay(commands.add_parser("replay", help="see which alerts other rules would have raised in a recorded run"))
    _add_demo(commands.add_parser("demo", help="train a small GPT on this machine while every head is watched"))
    return parser


# scan


def _add_scan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run some text through a checkpoint once and say what each of its attention heads does. Of several models or "
        "lengths, or of a folder that holds the checkpoints of a run, one row each; of checkpoints also a line per "
        "metric that shows how it went."
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder, a Hugging Face id, a .gguf file, or a folder with checkpoints in it: all of them are measured",
    )
    add("--text", type=Path, metavar="FILE", help="what to run through it (default: the help texts of Python)")
    add("--length", type=_lengths, default=[512], metavar="L[,L...]", help="tokens in a sequence (default: 512)")
    add("--batch", type=int, default=4, metavar="B", help="sequences at most (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="(default: %(default)s)",
    )
    add("--device", help="where to run (default: the first CUDA device, else the CPU)")
    add("--tokenizer", metavar="MODEL", help="where the tokenizer is, if not with the model")
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="what to measure (default: all but what needs rows of the L×L matrix)",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to a file, or to the screen instead of the table",
    )
    add("--csv", nargs="?", const="-", metavar="FILE", help="write one line per head and metric, likewise")
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="of several checkpoints: draw the heads over the steps (.png, .svg, .pdf)",
    )
    parser.set_defaults(run=_run_scan)


def _lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",")]


def _run_scan(arguments: argparse.Namespace) -> int:
    for target in (arguments.json, arguments.csv, arguments.plot):
        if target not in (None, "-") and not Path(target).absolute().parent.is_dir():
            raise ValueError(f"{target}: there is no folder {Path(target).absolute().parent} to write it to")
    import torch

    from attnmonitor.scan import audit
    from attnmonitor.scan.checkpoint import Checkpoint, checkpoints_in

    _silence_transformers()
    text = None if arguments.text is None else arguments.text.read_text(encoding="utf-8")
    models = [path for model in arguments.models for path in (checkpoints_in(model) or [model])]
    if arguments.plot is not None and (len(models) < 2 or len(arguments.length) > 1):
        raise ValueError(f"--plot {arguments.plot}: draws several models, or a folder of checkpoints, at one --length")
    scans = []
    for model in models:
        checkpoint = Checkpoint(
            model,
            dtype=getattr(torch, arguments.dtype),
            device=arguments.device,
            tokenizer=arguments.tokenizer,
            trust_remote_code=arguments.trust_remote_code,
        )
        for length in arguments.length:
            settings = {"length": length, "batch": arguments.batch, "metrics": arguments.metrics}
            with _progress_bar(Path(model).name) as progress:
                scans.append(audit(checkpoint, text=text, progress=progress, **settings))
    _put_out(scans, arguments)
    for found in scans:
        for name, reason in found.not_measured.items():
            print(f"attnmonitor scan: {found.model}: {name} is not measured: {reason}", file=sys.stderr)
        for name, reason in found.without_projections.items():
            print(f"attnmonitor scan: {found.model}: {name} has no learned rank: {reason}", file=sys.stderr)
    return int(any(found.not_measured for found in scans))


def _put_out(scans: Sequence[Scan], arguments: argparse.Namespace) -> None:
    for target, text_of in ((arguments.json, _json_text), (arguments.csv, _csv_text)):
        if target == "-":
            sys.stdout.write(text_of(scans))
        elif target is not None:
            with _whole_file(Path(target)) as unfinished:
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
    from attnmonitor.summary.outliers import outstanding_heads, short_layer_names
    from attnmonitor.summary.verdict import layer_table

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
        heads = [head for head in outstanding_heads(found.values[metric], metric, 3) if abs(head.distance) >= _FAR]
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
    from matplotlib.figure import Figure

    from attnmonitor.plots import bands
    from attnmonitor.scan.checkpoint import steps_of

    metrics = _shown_metrics(scans[0])
    layers = list(scans[0].values[metrics[0]])
    if not _same_layers(scans):
        raise ValueError(f"--plot {target}: the models do not have the same layers; plot the checkpoints of one run")
    figure = Figure(figsize=(7, 2.6 * len(metrics)), layout="constrained")
    for metric, ax in zip(metrics, figure.subplots(len(metrics), squeeze=False)[:, 0], strict=True):
        heads = {layer: torch.stack([found.values[metric][layer] for found in scans]).numpy() for layer in layers}
        bands(heads, steps_of([found.model for found in scans]), metric=metric, ax=ax)
    with _whole_file(target) as unfinished:
        figure.savefig(unfinished, dpi=150)


# report, replay, demo


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write one self-contained HTML file about a recorded run, or about two side by side."
    parser.add_argument("record", type=Path, metavar="RUN.sqlite", help="the run's record")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: beside the record, ending in .html)")
    parser.add_argument("--compare", type=Path, metavar="OTHER.sqlite", help="a second run, beside the first")
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> int:
    from attnmonitor.report import write_report

    target = arguments.out or arguments.record.parent / f"{arguments.record.stem}.html"
    with _whole_file(target) as unfinished:
        write_report(arguments.record, unfinished, arguments.compare)
    print(target)
    return 0


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.description = "Say which alerts a set of rules would have raised in a recorded run."
    parser.add_argument("record", type=Path, metavar="RUN.sqlite", help="the run's record")
    parser.add_argument("--rules", type=Path, metavar="FILE", help="rules as JSON (default: those a monitor has)")
    parser.set_defaults(run=_run_replay)


def _run_replay(arguments: argparse.Namespace) -> int:
    from attnmonitor.alerts import DEFAULT_RULES, load_rules, replay, replay_text
    from attnmonitor.record import RunRecord

    rules = DEFAULT_RULES if arguments.rules is None else load_rules(arguments.rules)
    print(replay_text(replay(RunRecord.open(arguments.record), rules)))
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = "Train a small GPT on English for about a minute and a half, watch its heads, write a report."
    parser.add_argument("--out", default="demo_output", metavar="FOLDER", help="(default: %(default)s)")
    parser.add_argument("--steps", default="200", metavar="N", help="optimizer steps (default: %(default)s)")
    parser.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from attnmonitor.cli.demo import main as demo

    demo(["--out", arguments.out, "--steps", arguments.steps])
    return 0


# What the commands share


@contextmanager
def _whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it becomes ``target`` if all goes well and is removed if not."""
    # The suffix stays: some writers read their format from it.
    unfinished = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _progress_bar(what: str) -> Iterator[Progress]:
    """Show progress on stderr while it is a terminal: a bar where ``rich`` is installed, else a line per stage."""
    if not sys.stderr.isatty():  # even a disabled bar may end with an empty line there
        yield lambda doing, fraction: None
        return
    try:
        from rich.console import Console
        from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield _lines_of_progress(what)
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda doing, fraction: bar.update(task, description=f"{doing} {what}", completed=fraction)


def _lines_of_progress(what: str) -> Progress:
    told = set[str]()

    def tell(doing: str, fraction: float) -> None:
        if doing not in told:
            told.add(doing)
            print(f"{doing} {what} ...", file=sys.stderr)

    return tell


def _silence_transformers() -> None:
    """Keep the loader's own progress bars and advice off the screen; its errors arrive as exceptions."""
    with needed(by="scan", extra="transformers"):
        from transformers.utils import logging
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
