"""The tables of the evaluation, as Markdown."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence

from attnmonitor.alerts import Rule
from benchmarks.detection.ablations import ABLATIONS
from benchmarks.detection.baselines import BASELINES
from benchmarks.detection.document import share, table
from benchmarks.detection.recording import Recording
from benchmarks.detection.runs import SAMPLE_EVERY
from benchmarks.detection.score import (
    Detector,
    Score,
    alarms_of_fault,
    cached,
    false_alarms,
    first_run_alarm,
    median_delay,
    rule_detector,
    score,
)
from benchmarks.detection.sets import RecordedSet

WITHIN_SAMPLES = 16  # a fault counts as found when it is named while its branch lasts
BROKEN_WITHIN_SAMPLES = 10

Row = tuple[object, ...]


def found_count(scores: Sequence[Score]) -> str:
    """Return how many faults were found, of how many."""
    return share(sum(each.delay is not None for each in scores), len(scores))


def has_alarm_after_onset(recording: Recording, detector: Detector) -> bool:
    """Return whether the fault raises any alarm in time."""
    until = recording.fault.onset + WITHIN_SAMPLES * SAMPLE_EVERY
    return any(alarm.step <= until for alarm in alarms_of_fault(recording, detector))


def finite_faults(runs: RecordedSet, strength: float) -> list[Recording]:
    """Return the branches of that strength whose values stay finite."""
    return [recording for recording in runs.faults_of(strength) if recording.fault.kind != "non_finite"]


def comparison_table(runs: RecordedSet, default: Detector) -> str:
    """Compare the rules with the baselines; any alarm that the run without the fault does not have counts."""
    early = BROKEN_WITHIN_SAMPLES * SAMPLE_EVERY
    rows: list[Row] = []
    for name, detector in {"**default rules**": default, **BASELINES}.items():
        full, half, jumps = (
            share(sum(has_alarm_after_onset(recording, detector) for recording in faults), len(faults))
            for faults in (finite_faults(runs, 1.0), finite_faults(runs, 0.5), runs.jumps)
        )
        broken = sum(any(alarm.step <= early for alarm in detector(recording)) for recording in runs.broken)
        noisy = sum(bool(detector(recording)) for recording in runs.clean)
        rows.append((name, full, half, share(broken, len(runs.broken)), jumps, share(noisy, len(runs.clean))))
    header = ("", "full strength", "half strength", "broken from the start", "learning-rate jump", "clean runs alarmed")
    return table(header, rows)


def fault_table(runs: RecordedSet, detector: Detector, strength: float, only: Sequence[str] = ()) -> str:
    """Return one row per kind of fault and one for all; ``only`` names the rows to keep."""
    by_kind: dict[str, list[Score]] = defaultdict(list)
    for recording in runs.faults_of(strength):
        by_kind[recording.fault.kind.replace("_", " ")].append(score(recording, detector))
    by_kind["**all**"] = [each for scores in by_kind.values() for each in scores]
    header = ("fault", "found", "delay, median / worst", "first alarm true", "healthy heads named", "found by")
    return table(header, [(kind, *fault_cells(each)) for kind, each in by_kind.items() if not only or kind in only])


def fault_cells(scores: Sequence[Score]) -> tuple[str, ...]:
    """Return the cells of one row of the table of faults."""
    found = [each for each in scores if each.delay is not None]
    named, healthy = sum(each.healthy_named for each in scores), sum(each.healthy_heads for each in scores)
    rules = ", ".join(f"{rule} {count}" for rule, count in Counter(each.found_by for each in found).most_common())
    return (
        share(len(found), len(scores)),
        f"{median_delay(found):.0f} / {max(each.delay for each in found)}" if found else "",
        share(sum(each.is_first_true for each in found), len(found)),
        share(named, healthy),
        rules,
    )


def false_alarm_table(runs: RecordedSet, rules: Sequence[Rule]) -> str:
    """Return the false alarms on clean runs, also when fewer of the samples are taken."""
    rows: list[Row] = []
    for stride in (1, 2, 3, 5):
        counted = false_alarms(runs.clean, rule_detector(rules, stride), stride)
        by_rule = Counter(alarm.rule for _, alarm, _ in counted.head_alarms)
        rows.append(
            (
                f"every {stride * SAMPLE_EVERY} steps",
                f"{len(counted.head_alarms)} in {counted.head_samples:,}",
                f"{counted.per_thousand:.2f}",
                f"{counted.past_grace:,}",
                share(counted.runs_alarmed, counted.runs),
                len(counted.run_alarms),
                ", ".join(f"{rule} {count}" for rule, count in by_rule.most_common()) or "none",
            )
        )
    header = (
        "sampling",
        "head alarms in head-samples",
        "per 1,000",
        "of these past the grace",
        "runs with a head alarm",
        "run alarms",
        "by rule",
    )
    return table(header, rows)


def run_fault_table(runs: RecordedSet, detector: Detector) -> str:
    """Return how soon faults of the whole run are named."""
    rows: list[Row] = []
    for title, group in (("broken from the start", runs.broken), ("learning-rate jump", runs.jumps)):
        delays = [first_run_alarm(recording, detector) for recording in group]
        found = [delay for delay in delays if delay is not None]
        in_time = sum(delay <= BROKEN_WITHIN_SAMPLES for delay in found)
        delay = f"{statistics.median(found):.0f} / {max(found):.0f}" if found else ""
        rows.append((title, share(in_time, len(delays)), delay))
    return table(("fault of the run", f"named within {BROKEN_WITHIN_SAMPLES} samples", "delay, median / worst"), rows)


def ablation_table(runs: RecordedSet) -> str:
    """Return what each changed part of the rules costs."""
    rows: list[Row] = []
    for name, rules in ABLATIONS.items():
        detector = cached(rule_detector(rules))
        full, half = ([score(each, detector) for each in finite_faults(runs, strength)] for strength in (1.0, 0.5))
        counted = false_alarms(runs.clean, detector)
        named, healthy = (
            sum(getattr(each, count) for each in [*full, *half]) for count in ("healthy_named", "healthy_heads")
        )
        rows.append(
            (
                name,
                found_count(full),
                found_count(half),
                f"{median_delay(full):.0f}",
                share(named, healthy),
                f"{counted.per_thousand:.2f}",
                share(counted.runs_alarmed, counted.runs),
            )
        )
    header = ("", "full", "half", "median delay", "healthy heads named", "false alarms per 1,000", "clean runs alarmed")
    return table(header, rows)
