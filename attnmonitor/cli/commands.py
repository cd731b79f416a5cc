"""The command line: arguments in, one call of the library, text or a whole file out.

What goes wrong is told in one line, with exit code 2. Files are written beside their place and moved there when they
are complete, so that a failed command leaves neither half a file nor an older one destroyed.
"""

from __future__ import annotations

import argparse
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attnmonitor._version import __version__
from attnmonitor.scan.output import whole_file, write_scans

if TYPE_CHECKING:
    from attnmonitor.scan import Progress

__all__ = ["main"]


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
    from attnmonitor.scan.checkpoint import Checkpoint, checkpoints_in, silence_transformers

    silence_transformers()
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
    write_scans(scans, arguments)
    for found in scans:
        for name, reason in found.not_measured.items():
            print(f"attnmonitor scan: {found.model}: {name} is not measured: {reason}", file=sys.stderr)
        for name, reason in found.without_projections.items():
            print(f"attnmonitor scan: {found.model}: {name} has no learned rank: {reason}", file=sys.stderr)
    return int(any(found.not_measured for found in scans))


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
    with whole_file(target) as unfinished:
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
