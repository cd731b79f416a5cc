"""What is printed at the end of a run: verdict, layers, cost of monitoring, and where the record is."""

from __future__ import annotations

import math
import shlex
import shutil
import sys
import textwrap
from collections import Counter

from attnmonitor.alerts.firing import most_severe_first
from attnmonitor.messages import printable, warn
from attnmonitor.monitor import AttentionMonitor, clock
from attnmonitor.sample import Sample
from attnmonitor.summary.names import fault_text
from attnmonitor.summary.tables import layers_to_look_at, print_layer_table
from attnmonitor.summary.timeline import run_timeline
from attnmonitor.summary.verdict import closing_lines

__all__ = ["print_final_report"]

_WIDTH = 80
_MAX_ROWS = 24  # of the layer table: it was not asked for


def print_final_report(monitor: AttentionMonitor) -> None:
    """Print verdict, number of faults of each kind, layer table, cost and path of the record.

    Of a deep model the table shows only the layers to look at. Nothing is printed on processes that only train, or if
    no sample was taken.
    """
    if monitor.last_sample is None:
        return
    try:
        _print(monitor, monitor.last_sample)
    except Exception as error:  # a closed pipe or a console without Unicode must not fail the run
        warn(f"attnmonitor: the final report could not be printed: {error}")


def _print(monitor: AttentionMonitor, sample: Sample) -> None:
    name = f" {monitor.name!r}" if monitor.name else ""
    print(f"\n{closing_lines(monitor.summary, f'attnmonitor{name}: ', _WIDTH)}")
    places = most_severe_first(monitor.summary.firing, monitor.summary.coverage)
    if len(places) > 1:
        kinds = Counter(fault_text(kind) for events in places for kind in {event.kind for event in events})
        faults = ", ".join(f"{kind}: {number}" for kind, number in kinds.most_common())
        print(printable(textwrap.fill(faults, _WIDTH, initial_indent="  ", subsequent_indent="  ")))
    for line in _timeline(monitor):
        print(f"  {line}")
    _print_layers(monitor, sample)
    share = clock.share(monitor.seconds, clock.passed(monitor.attached_at, clock.now()))
    of_run = "" if math.isnan(share) else f", {100 * share:.1f} % of the time since attach"
    print(f"  watching took {monitor.seconds:.1f} s{of_run}")
    if monitor.record_path is not None:
        command = "attnmonitor" if shutil.which("attnmonitor") else f"{sys.executable} -m attnmonitor"
        path = str(monitor.record_path_from_here)
        print(printable(f"  record: {path}\n  charts: {command} report {shlex.quote(path)}"))


def _timeline(monitor: AttentionMonitor) -> list[str]:
    history, summary = monitor.history, monitor.summary
    alarmed = {event.metric: history[event.metric] for event in summary.firing if event.metric in history}
    return run_timeline(monitor.logged, summary.firing, summary.coverage, alarmed, history.steps, width=_WIDTH - 2)


def _print_layers(monitor: AttentionMonitor, sample: Sample) -> None:
    coverage, firing = monitor.summary.coverage, monitor.summary.firing
    if layers := layers_to_look_at(coverage, firing, _MAX_ROWS):
        values = {
            metric: {name: heads[name] for name in layers if name in heads} for metric, heads in sample.values.items()
        }
        print_layer_table(values, firing=firing, coverage={name: coverage[name] for name in layers})
