"""The last word of a run in the terminal: is there anything to look at, what did watching cost, where does it all lie.

People who have logged nothing and opened nothing still read the last lines of their training.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import Counter

from attnmonitor.messages import warn
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.sample import Sample
from attnmonitor.summary.tables import print_layer_table

__all__ = ["print_ending"]

_MOST_ROWS = 24  # of a table that nobody asked for


def print_ending(monitor: AttentionMonitor) -> None:
    """Print what a run comes to; nothing on processes that only train, or where no sample was taken.

    The verdict, how many places have which kind of fault, the layers as a table (of a deep model only those to look
    at), what the samples cost, where the record is and how to open it.
    """
    if monitor.last_sample is None:
        return
    try:
        _print(monitor, monitor.last_sample)
    except (OSError, ValueError) as error:  # a closed pipe, a console without Unicode: no reason to end a run badly
        warn(f"attnmonitor: what the run comes to could not be printed: {error}")


def _print(monitor: AttentionMonitor, sample: Sample) -> None:
    print(f"\nattnmonitor{f' {monitor.name!r}' if monitor.name else ''}: {sample.verdict}")
    places = {(event.kind, event.scope, event.layer, event.head) for event in sample.firing}
    if len(places) > 1:
        kinds = Counter(kind.replace("_", " ") for kind, *_ in places)
        print("  " + ", ".join(f"{kind} in {number}" for kind, number in kinds.most_common()))
    _print_layers(monitor, sample)
    elapsed = time.perf_counter() - monitor.attached_at
    print(f"  watching took {monitor.seconds:.1f} s, {monitor.seconds / elapsed:.1%} of the time since attach")
    if monitor.record_path is not None:
        command = "attnmonitor" if shutil.which("attnmonitor") else f"{sys.executable} -m attnmonitor"
        print(f"  record: {monitor.record_path}\n  charts: {command} report {monitor.record_path}")


def _print_layers(monitor: AttentionMonitor, sample: Sample) -> None:
    layers = list(sample.coverage)
    if len(layers) > _MOST_ROWS:
        alarmed = {event.layer for event in sample.firing}
        layers = [name for name in layers if name in alarmed or not sample.coverage[name].measured][:_MOST_ROWS]
    if layers:
        print_layer_table(
            {
                metric: {name: heads[name] for name in layers if name in heads}
                for metric, heads in sample.values.items()
            },
            firing=sample.firing,
            coverage={name: sample.coverage[name] for name in layers},
        )
