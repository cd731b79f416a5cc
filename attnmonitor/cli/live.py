"""``report --live`` and ``watch``: a run followed while it trains, in the browser and in the terminal.

Both read the record that training writes, and go on until Ctrl-C: before the run begins, past its end, into a resume.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from attnmonitor.messages import printable
from attnmonitor.parallel.process_state import first_import
from attnmonitor.record import RunRecord
from attnmonitor.record.follow import FollowedRecord
from attnmonitor.summary.style import STATE_COLORS
from attnmonitor.summary.tables import TABLE_METRICS, layers_to_look_at, rich_layer_table
from attnmonitor.summary.timeline import run_timeline
from attnmonitor.summary.verdict import verdict

__all__ = ["serve", "watch"]

_SECONDS_BETWEEN_LOOKS = 0.5
_REST = 4.0  # times the computing that one look took, before the next: training keeps its cores
_LINES_BESIDE_TABLE = 16  # verdict, bars, heading and progress


def serve(record_path: Path, port: int | None) -> int:
    """Serve the page of a run until Ctrl-C."""
    with first_import("attnmonitor.report"):
        from attnmonitor.report import LiveReport

    with LiveReport(record_path, port) as server:
        _yield_to_training()
        print(f"{server.url}\nserved on this machine only, until Ctrl-C", flush=True)
        _say(server.newest()["progress"])
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    print("\nstopped serving; the run goes on")
    return 0


def watch(record_path: Path) -> int:
    """Show the state of a run until Ctrl-C: as a screen, or without a terminal in lines."""
    followed = FollowedRecord(record_path)
    _yield_to_training()
    with suppress(KeyboardInterrupt, BrokenPipeError):
        if sys.stdout.isatty():
            with suppress(ModuleNotFoundError):
                _watch_on_screen(followed)
        _watch_in_lines(followed)
    return 0


def _watch_in_lines(followed: FollowedRecord) -> None:
    said = ""
    for record in _snapshots(followed):
        line = followed.obstacle or _line(record)
        if line != said:
            _say(line)
            said = line


def _line(record: RunRecord | None) -> str:
    if record is None or not record.samples:
        return "the run has begun, no sample yet"
    return f"step {record.samples[-1].global_step:,}: {verdict(record.counts)}"


def _watch_on_screen(followed: FollowedRecord) -> None:
    with first_import("rich.console", "rich.live", "rich.text"):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

    console, shown, size, parts = Console(), None, None, []
    with Live(console=console, auto_refresh=False) as screen:
        for record in _snapshots(followed):
            if record is not None and (record is not shown or console.size != size):
                shown, size = record, console.size
                parts = _screen_of(record, size.width, size.height)
            footer = f"{followed.progress}\n{followed.path}   Ctrl-C stops watching, not the run"
            screen.update(Group(*parts, Text(printable(footer), style="dim")), refresh=True)


def _screen_of(record: RunRecord, width: int, height: int) -> list[Any]:
    """Return what is shown above the progress: verdict, bars of loss and worst head, and the table of layers."""
    with first_import("rich.text"):
        from rich.text import Text
    counts = record.counts
    line = Text(verdict(counts), style=f"bold {STATE_COLORS[counts.state]}")
    firing, coverage = counts.firing, counts.coverage
    wanted = {*TABLE_METRICS, *(event.metric for event in firing[:1])}
    trajectories = {metric: record.trajectories(metric) for metric in record.metrics if metric in wanted}
    bars = Text("\n".join(run_timeline(record.logged, firing, coverage, trajectories, record.steps, width=width)))
    room = max(4, height - _LINES_BESIDE_TABLE)
    layers = layers_to_look_at(coverage, firing, room) or list(coverage)[:room]
    values = {
        metric: {name: heads[-1] for name, heads in shown.items() if name in layers and len(heads)}
        for metric, shown in trajectories.items()
    }
    covered = {name: coverage[name] for name in layers}
    table = [rich_layer_table(values, firing=firing, coverage=covered)] if layers and values else []
    return [line, Text(), *([bars] if bars.plain else []), *table]


def _snapshots(followed: FollowedRecord) -> Iterator[RunRecord | None]:
    """Yield the record again and again, as it is then; slowly where reading and showing it takes long."""
    while True:
        started = time.thread_time()
        yield followed.read()
        time.sleep(max(_SECONDS_BETWEEN_LOOKS, _REST * (time.thread_time() - started)))


def _yield_to_training() -> None:
    """Let a run on the same machine go first."""
    with suppress(OSError, AttributeError):  # not on Windows
        os.nice(5)


def _say(line: str) -> None:
    print(printable(line, one_line=True), flush=True)
