"""How well a detector did on runs in which the fault is known.

A detector is any function from a recording to alarms, so that the rules and other methods are counted alike. An alarm
is a set of units, ``(scope, layer, head)``, that are named at a step for the first time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from attnmonitor.alerts import DEFAULT_RULES, Rule, replay
from benchmarks.detection.recording import Recording

Unit = tuple[str, str | None, int | None]
GRACE = max(rule.grace for rule in DEFAULT_RULES)


@dataclass(frozen=True)
class Alarm:
    """The units that one rule names for the first time in one sample."""

    step: int
    rule: str
    kind: str
    units: frozenset[Unit]

    @property
    def is_about_heads(self) -> bool:
        """Whether it names heads rather than the run."""
        return all(layer is not None for _, layer, _ in self.units)


Detector = Callable[[Recording], list[Alarm]]


def rule_detector(rules: Iterable[Rule], stride: int = 1) -> Detector:
    """Return the detector that replays a rule set on every ``stride``-th sample."""
    rules = tuple(rules)

    def alarms(recording: Recording) -> list[Alarm]:
        named: dict[tuple[int, str, str], set[Unit]] = {}
        for event in replay(recording, rules, stride=stride):
            if event.state == "firing":
                named.setdefault((event.global_step, event.rule, event.kind), set()).add(
                    (event.scope, event.layer, event.head)
                )
        seen: set[tuple[str, Unit]] = set()
        found = []
        for (step, rule, kind), units in named.items():
            # An alarm that becomes critical is an event again; only its beginning counts.
            new = {unit for unit in units if (rule, unit) not in seen}
            seen |= {(rule, unit) for unit in units}
            if new:
                found.append(Alarm(step, rule, kind, frozenset(new)))
        return sorted(found, key=lambda alarm: alarm.step)

    return alarms


def cached(detector: Detector) -> Detector:
    """Return the same detector, computing each recording once."""
    known: dict[int, tuple[Recording, list[Alarm]]] = {}  # which keeps the recording: another could have its id later

    def alarms(recording: Recording) -> list[Alarm]:
        if id(recording) not in known:
            known[id(recording)] = recording, detector(recording)
        return known[id(recording)][1]

    return alarms


def heads_at_fault(recording: Recording) -> set[Unit]:
    """Return the heads that the fault affects: with a key head also the query heads that share it."""
    fault = recording.fault
    layers = list(recording.values["query_rms"])
    layer = layers[fault.layer]
    num_query_heads = recording.values["query_rms"][layer].shape[1]
    num_kv_heads = recording.values["key_rms"][layer].shape[1]
    group = num_query_heads // num_kv_heads
    if fault.kind.startswith("layer"):
        queries, keys = range(num_query_heads), range(num_kv_heads)
    elif fault.kind.startswith("key"):
        queries, keys = range(fault.head * group, (fault.head + 1) * group), range(fault.head, fault.head + 1)
    else:
        queries, keys = range(fault.head, fault.head + 1), range(0)
    return {("query_head", layer, head) for head in queries} | {("kv_head", layer, head) for head in keys}


def alarms_of_fault(recording: Recording, detector: Detector) -> list[Alarm]:
    """Return the alarms after onset that the same run without the fault does not have."""
    anyway = {(alarm.step, alarm.rule, unit) for alarm in detector(recording.without_fault) for unit in alarm.units}
    return [
        replace(alarm, units=units)
        for alarm in detector(recording)
        if alarm.step > recording.fault.onset
        and (units := frozenset(unit for unit in alarm.units if (alarm.step, alarm.rule, unit) not in anyway))
    ]


def samples_between(recording: Recording, begin: int, end: int) -> int:
    """Return how many samples were taken after step ``begin``, up to step ``end``."""
    return int(((recording.steps > begin) & (recording.steps <= end)).sum())


@dataclass(frozen=True)
class Score:
    """How one fault was found, and which healthy heads were named."""

    recording: Recording
    delay: int | None  # in samples; None: not found
    found_by: str
    is_first_true: bool  # the first head alarm after onset names faulty heads only
    healthy_named: int
    healthy_heads: int


def score(recording: Recording, detector: Detector) -> Score:
    """Compare the alarms after onset with the heads that are at fault."""
    faulty = heads_at_fault(recording)
    alarms = [alarm for alarm in alarms_of_fault(recording, detector) if alarm.is_about_heads]
    hits = [alarm for alarm in alarms if alarm.units & faulty]
    first = [alarm for alarm in alarms if alarm.step == alarms[0].step] if alarms else []
    everyone = {
        (scope, layer, head)
        for scope, metric in (("query_head", "query_rms"), ("kv_head", "key_rms"))
        for layer, rows in recording.values[metric].items()
        for head in range(rows.shape[1])
    }
    named = set().union(*(alarm.units for alarm in alarms)) - faulty
    return Score(
        recording,
        delay=samples_between(recording, recording.fault.onset, hits[0].step) if hits else None,
        found_by=hits[0].rule if hits else "",
        is_first_true=bool(first) and all(alarm.units <= faulty for alarm in first),
        healthy_named=len(named),
        healthy_heads=len(everyone - faulty),
    )


def median_delay(scores: Sequence[Score]) -> float:
    """Return the median delay of the faults that were found, in samples."""
    return statistics.median([each.delay for each in scores if each.delay is not None] or [float("nan")])


@dataclass
class FalseAlarms:
    """The alarms on runs without a fault."""

    head_samples: int = 0
    past_grace: int = 0  # of these, the ones after the grace of the head rules
    runs: int = 0
    runs_alarmed: int = 0
    head_alarms: list[tuple[Recording, Alarm, Unit]] = field(default_factory=list)
    run_alarms: list[tuple[Recording, Alarm]] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        """Head alarms per 1,000 head-samples."""
        return 1000 * len(self.head_alarms) / max(self.head_samples, 1)


def false_alarms(recordings: Sequence[Recording], detector: Detector, stride: int = 1) -> FalseAlarms:
    """Count the alarms on healthy runs."""
    counted = FalseAlarms()
    for recording in recordings:
        alarms = detector(recording)
        heads = [(recording, alarm, unit) for alarm in alarms if alarm.is_about_heads for unit in alarm.units]
        counted.head_alarms += heads
        counted.run_alarms += [(recording, alarm) for alarm in alarms if not alarm.is_about_heads]
        for rows in recording.values["query_rms"].values():
            counted.head_samples += rows[::stride].size
            counted.past_grace += rows[::stride][GRACE:].size
        counted.runs += 1
        counted.runs_alarmed += bool(heads)
    return counted


def first_run_alarm(recording: Recording, detector: Detector) -> int | None:
    """Return the samples from onset, or from the start, until the first alarm about the run; None for none."""
    alarms = detector(recording) if recording.fault is None else alarms_of_fault(recording, detector)
    onset = 0 if recording.fault is None else recording.fault.onset
    return min(
        (samples_between(recording, onset, alarm.step) for alarm in alarms if not alarm.is_about_heads), default=None
    )
