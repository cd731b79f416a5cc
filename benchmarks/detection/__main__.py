"""Evaluate the alerts on short runs in which the fault, its head and its step are known.

    python -m benchmarks.detection --set report --docs docs/alert-evaluation.md

records the runs of a set once into a cache (about twenty minutes on one core; later calls take less), replays the
default rules on them, does the same for the methods in common use, and writes the tables, one picture per kind of fault
and the rules that were scored into the document's folder. Thresholds were chosen with ``--set dev``; the document shows
``--set report``.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch

from attnmonitor.alerts import DEFAULT_RULES, save_rules
from benchmarks.detection.ablations import COLLECTED_BY_DEFAULT
from benchmarks.detection.document import command_line, publish
from benchmarks.detection.pictures import pictures
from benchmarks.detection.runs import SAMPLE_EVERY
from benchmarks.detection.score import cached, median_delay, rule_detector, score
from benchmarks.detection.sets import SETS, RecordedSet
from benchmarks.detection.tables import (
    ablation_table,
    comparison_table,
    false_alarm_table,
    fault_table,
    found_count,
    run_fault_table,
)


def measured_section(runs: RecordedSet, name: str, images: Path) -> str:
    """Return the section of the document that this command writes, and draw its pictures."""
    default, with_weights = cached(rule_detector(COLLECTED_BY_DEFAULT)), cached(rule_detector(DEFAULT_RULES))
    slow = [score(recording, default) for recording in runs.slow]
    parts = [
        f"Set `{name}`: {len(runs.clean)} clean runs, {len(runs.faults_of(1.0))} faults at full and "
        f"{len(runs.faults_of(0.5))} at half strength, {len(runs.broken)} runs broken from the start, "
        f"{len(runs.jumps)} learning-rate jumps, {len(runs.slow)} slow drifts. Delays are in samples of "
        f"{SAMPLE_EVERY} steps after onset; the ramp takes 6.",
        "### Compared with what is used today",
        comparison_table(runs, default),
        "### Faults at full strength",
        fault_table(runs, default, 1.0),
        "With `interaction_participation_ratio` collected as well:",
        fault_table(runs, with_weights, 1.0, only=("key rank 1", "**all**")),
        "### Faults at half strength",
        fault_table(runs, default, 0.5),
        "### Slow drift",
        f"A factor of 4 over 50 samples: found {found_count(slow)}, median delay {median_delay(slow):.0f} samples, "
        f"{sum(each.healthy_named for each in slow)} healthy heads named.",
        "### False alarms",
        false_alarm_table(runs, DEFAULT_RULES),
        "### Faults of the run",
        run_fault_table(runs, default),
        "### Ablations",
        ablation_table(runs),
        "### Pictures",
        "Red is what is at fault, gray every other head. Below, the loss of the same run.",
        *pictures(runs.faults_of(1.0), with_weights, images),
    ]
    return "\n\n".join(parts)


def main() -> None:
    arguments = command_line(__doc__, "", SETS).parse_args()
    torch.set_num_threads(1)
    mpl.use("Agg")
    images = (arguments.docs.parent if arguments.docs else arguments.cache) / "images"
    runs = RecordedSet.of(arguments.name, arguments.cache)
    publish(measured_section(runs, arguments.name, images), "measured", arguments.docs)
    if arguments.docs:
        save_rules(DEFAULT_RULES, arguments.docs.parent / "default_rules.json")  # those that were scored


if __name__ == "__main__":
    main()
