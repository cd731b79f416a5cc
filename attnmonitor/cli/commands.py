"""The command line: arguments in, one call of the library, text or a complete file out.

An error is one line on stderr and exit code 2. A file is written under another name and renamed when it is complete, so
a failed command leaves neither half a file nor destroys an older one.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnmonitor._version import __version__
from attnmonitor.messages import printable
from attnmonitor.parallel.process_state import first_import
from attnmonitor.scan.files import check_folder_of, whole_file

if TYPE_CHECKING:
    from attnmonitor.scan import Progress, Scan

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 where a layer was not measured, or 2 on an error."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except (ValueError, OSError, ModuleNotFoundError, sqlite3.Error) as error:
        is_bare = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        way_out = "; pip install 'attnmonitor[all]'" if is_bare else ""
        return _fail(arguments, f"{error}{way_out}")
    except _CONTENT_ERRORS as error:
        if arguments.command not in ("report", "watch", "replay"):
            raise
        return _fail(arguments, f"the record's content is not that of a record ({type(error).__name__}: {error})")
    except KeyboardInterrupt:
        return 130


def _fail(arguments: argparse.Namespace, reason: str) -> int:
    text = " ".join(reason.split())
    if getattr(arguments, "json", None) == "-":  # what reads the JSON gets JSON, also where there is no number
        print(json.dumps({"error": text}))
    print(printable(f"attnmonitor {arguments.command}: error: {text}", one_line=True), file=sys.stderr)
    return 2


# What a record with content that no monitor writes may cause behind the checks of its reader.
_CONTENT_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="attnmonitor", description="Monitor every attention head of a transformer.")
    parser.add_argument("--version", action="version", version=f"attnmonitor {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_scan(commands.add_parser("scan", help="audit every attention head of a checkpoint"))
    _add_report(
        commands.add_parser("report", help="write the HTML report of a recorded run, or serve it while it trains")
    )
    _add_watch(commands.add_parser("watch", help="show the state of a run in the terminal while it trains"))
    _add_replay(
        commands.add_parser("replay", help="show which alerts a set of rules would have raised in a recorded run")
    )
    _add_demo(commands.add_parser("demo", help="train a small GPT on this machine with every head monitored"))
    return parser


# scan


def _add_scan(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run some text through a checkpoint once and measure each of its attention heads. Several models or lengths, "
        "or a folder with the checkpoints of a run, give one row each; checkpoints of one run also give one line per "
        "metric that shows its course."
    )
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder, a Hugging Face id, a .gguf file, or a folder with checkpoints in it: all of them are measured",
    )
    add("--text", type=Path, metavar="FILE", help="text to run through the model (default: the help texts of Python)")
    add("--length", type=_lengths, default=[512], metavar="L[,L...]", help="tokens in a sequence (default: 512)")
    add("--batch", type=int, default=4, metavar="B", help="maximum number of sequences (default: %(default)s)")
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="(default: %(default)s)",
    )
    add("--device", help="device of the model (default: the first CUDA device, else the CPU)")
    add("--tokenizer", metavar="MODEL", help="folder, id or .gguf file of the tokenizer, if the model has none")
    add(
        "--metrics",
        nargs="+",
        metavar="NAME",
        help="metrics to measure (default: all but those that need rows of the L×L matrix)",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    add(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write JSON to a file, or to the terminal instead of the table",
    )
    add(
        "--csv",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write one line per head and metric, to a file or the terminal",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw the heads over the steps of several checkpoints (.png, .svg, .pdf)",
    )
    parser.set_defaults(run=_run_scan)


def _lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",")]


def _run_scan(arguments: argparse.Namespace) -> int:
    for target in (arguments.json, arguments.csv, arguments.plot):
        if target not in (None, "-"):
            check_folder_of(target)
    import torch

    from attnmonitor.scan import audit_all
    from attnmonitor.scan.checkpoint import checkpoints_in, silence_transformers
    from attnmonitor.scan.output import problem_lines

    silence_transformers()
    models = [path for model in arguments.models for path in (checkpoints_in(model) or [model])]
    if arguments.plot is not None and (len(models) < 2 or len(arguments.length) > 1):
        raise ValueError(f"--plot {arguments.plot}: draws several models, or a folder of checkpoints, at one --length")
    scans = audit_all(
        models,
        lengths=arguments.length,
        progress=_progress_bar,
        text=None if arguments.text is None else arguments.text.read_text(encoding="utf-8"),
        batch=arguments.batch,
        metrics=arguments.metrics,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        tokenizer=arguments.tokenizer,
        trust_remote_code=arguments.trust_remote_code,
    )
    _write_scans(scans, arguments)
    for line in (line for found in scans for line in problem_lines(found)):
        print(printable(f"attnmonitor scan: {line}", one_line=True), file=sys.stderr)
    return int(any(found.not_measured for found in scans))


def _write_scans(scans: Sequence[Scan], arguments: argparse.Namespace) -> None:
    from attnmonitor.scan.output import csv_text, json_text, plot_scans, scan_text, scans_text

    for target, text_of in ((arguments.json, json_text), (arguments.csv, csv_text)):
        if target == "-":
            sys.stdout.write(printable(text_of(scans)))
        elif target is not None:
            with whole_file(Path(target)) as unfinished:
                unfinished.write_text(text_of(scans), encoding="utf-8")
    if arguments.plot is not None:
        plot_scans(scans, arguments.plot)
    if "-" not in (arguments.json, arguments.csv):
        print(printable(scan_text(scans[0]) if len(scans) == 1 else scans_text(scans)))


# report, watch, replay, demo


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write one self-contained HTML file about a recorded run, or about up to four together."
    parser.add_argument("record", type=Path, metavar="RUN.sqlite", help="the run's record")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: beside the record, ending in .html)")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        action="extend",
        metavar="OTHER.sqlite",
        help="up to three other runs, on the same scales",
    )
    parser.add_argument(
        "--live",
        action="store_true",
        help="instead of a file: serve the page, on this machine only, with each new sample until Ctrl-C; the record "
        "need not be there yet, and may be a folder, for the newest record in it",
    )
    parser.add_argument("--port", type=int, metavar="N", help="port of --live (default: 8421, or one that is free)")
    parser.set_defaults(run=_run_report)


def _run_report(arguments: argparse.Namespace) -> int:
    if arguments.live:
        if arguments.out is not None or arguments.compare is not None:
            raise ValueError("--live serves the page of one run: leave out --out and --compare")
        from attnmonitor.cli.live import serve

        return serve(arguments.record, arguments.port)
    if arguments.port is not None:
        raise ValueError(f"--port {arguments.port} is for --live")
    from attnmonitor.report import write_report

    target = arguments.out or arguments.record.parent / f"{arguments.record.stem}.html"
    with whole_file(target) as unfinished:
        write_report(arguments.record, unfinished, arguments.compare)
    print(printable(str(target), one_line=True))
    return 0


def _add_watch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show the state of a run until Ctrl-C: before it begins, while it trains, past its end and into a resume. In a "
        "terminal as a screen, else in a line for each sample."
    )
    parser.add_argument(
        "record", type=Path, metavar="RUN.sqlite", help="the run's record, or a folder, for the newest record in it"
    )
    parser.set_defaults(run=_run_watch)


def _run_watch(arguments: argparse.Namespace) -> int:
    from attnmonitor.cli.live import watch

    return watch(arguments.record)


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the alerts that a set of rules would have raised in a recorded run."
    parser.add_argument("record", type=Path, metavar="RUN.sqlite", help="the run's record")
    parser.add_argument(
        "--rules", type=Path, metavar="FILE", help="rules as JSON (default: the default rules of a monitor)"
    )
    parser.set_defaults(run=_run_replay)


def _run_replay(arguments: argparse.Namespace) -> int:
    from attnmonitor.alerts import DEFAULT_RULES, load_rules, replay, replay_text
    from attnmonitor.record import RunRecord

    rules = DEFAULT_RULES if arguments.rules is None else load_rules(arguments.rules)
    print(replay_text(replay(RunRecord.open(arguments.record), rules)))
    return 0


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Train a small GPT on English for about a minute and a half, monitor its heads, write a report."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), metavar="FOLDER", help="output folder (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="optimizer steps (default: %(default)s)")
    parser.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    with first_import("attnmonitor.cli.demo"):
        from attnmonitor.cli.demo import main as demo

    demo(arguments.out, num_steps=arguments.steps)
    return 0


# progress of scan


@contextmanager
def _progress_bar(name: str) -> Iterator[Progress]:
    """Show progress on stderr if it is a terminal: a bar where ``rich`` is installed, else a line per activity."""
    if not sys.stderr.isatty():  # even a disabled bar may print an empty line at its end
        yield lambda activity, fraction: None
        return
    try:
        with first_import("rich.console", "rich.progress"):
            from rich.console import Console
            from rich.progress import Progress as Bar
    except ModuleNotFoundError:
        yield _progress_lines(name)
        return
    with Bar(console=Console(stderr=True), transient=True) as bar:
        name = printable(name, one_line=True)
        task = bar.add_task(name, total=1.0)
        yield lambda activity, fraction: bar.update(task, description=f"{activity} {name}", completed=fraction)


def _progress_lines(name: str) -> Progress:
    shown = set[str]()

    def show(activity: str, fraction: float) -> None:
        if activity not in shown:
            shown.add(activity)
            print(printable(f"{activity} {name} ...", one_line=True), file=sys.stderr)

    return show
