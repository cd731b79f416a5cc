"""How well a way of alarming did on runs whose truth is known.

An alarm is a set of units, ``(scope, layer, head)``, that begin to be named at a step; a way of alarming is any
function from a recording to alarms, so that the rules and what people use today are counted in one way.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from attnmonitor.alerts import DEFAULT_RULES, Rule, replay
from benchmarks.detection.runs import Recording

Unit = tuple[str, str | None, int | None]
GRACE = max(rule.grace for rule in DEFAULT_RULES)


@dataclass(frozen=True)
class Alarm:
    """What one sample newly names, by one rule."""

    step: int
    rule: str
    kind: str
    units: frozenset[Unit]

    @property
    def is_about_heads(self) -> bool:
        """Whether it names heads rather than the run."""
        return all(layer is not None for _, layer, _ in self.units)


Alarming = Callable[[Recording], list[Alarm]]


def by_rules(rules: Iterable[Rule], stride: int = 1) -> Alarming:
    """Return the way of alarming of a rule set, on every ``stride``-th sample."""
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
            # An alarm that grows critical is told twice; only its beginning counts.
            new = {unit for unit in units if (rule, unit) not in seen}
            seen |= {(rule, unit) for unit in units}
            if new:
                found.append(Alarm(step, rule, kind, frozenset(new)))
        return sorted(found, key=lambda alarm: alarm.step)

    return alarms


def heads_at_fault(recording: Recording) -> set[Unit]:
    """Return the heads that the fault concerns: with a key head also the query heads that share it."""
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


def alarms_of_fault(recording: Recording, alarming: Alarming) -> list[Alarm]:
    """Return the alarms after onset that the same run without the fault does not have."""
    anyway = {(alarm.step, alarm.rule, unit) for alarm in alarming(recording.trunk) for unit in alarm.units}
    return [
        replace(alarm, units=units)
        for alarm in alarming(recording)
        if alarm.step > recording.fault.onset
        and (units := frozenset(unit for unit in alarm.units if (alarm.step, alarm.rule, unit) not in anyway))
    ]


def samples_between(recording: Recording, begin: int, end: int) -> int:
    """Return how many samples were taken after step ``begin``, up to step ``end``."""
    return int(((recording.steps > begin) & (recording.steps <= end)).sum())


@dataclass(frozen=True)
class Verdict:
    """What became of one fault."""

    recording: Recording
    delay: int | None  # in samples; None: not found
    found_by: str
    found_kind: str
    is_first_true: bool  # the first head alarm after onset names true heads only
    innocents_named: int
    innocents: int


def judge(recording: Recording, alarming: Alarming) -> Verdict:
    """Judge the alarms after onset against the heads that are truly at fault."""
    guilty = heads_at_fault(recording)
    alarms = [alarm for alarm in alarms_of_fault(recording, alarming) if alarm.is_about_heads]
    hits = [alarm for alarm in alarms if alarm.units & guilty]
    first = [alarm for alarm in alarms if alarm.step == alarms[0].step] if alarms else []
    everyone = {
        (scope, layer, head)
        for scope, metric in (("query_head", "query_rms"), ("kv_head", "key_rms"))
        for layer, rows in recording.values[metric].items()
        for head in range(rows.shape[1])
    }
    named = set().union(*(alarm.units for alarm in alarms)) - guilty
    return Verdict(
        recording,
        delay=samples_between(recording, recording.fault.onset, hits[0].step) if hits else None,
        found_by=hits[0].rule if hits else "",
        found_kind=hits[0].kind if hits else "",
        is_first_true=bool(first) and all(alarm.units <= guilty for alarm in first),
        innocents_named=len(named),
        innocents=len(everyone - guilty),
    )


@dataclass
class Clean:
    """What was alarmed on runs where nothing was wrong."""

    head_samples: int = 0
    watched: int = 0  # of these, the ones after the grace of the head rules
    runs: int = 0
    runs_alarmed: int = 0
    head_alarms: list[tuple[Recording, Alarm, Unit]] = field(default_factory=list)
    run_alarms: list[tuple[Recording, Alarm]] = field(default_factory=list)

    @property
    def per_thousand(self) -> float:
        """Head alarms per 1,000 head-samples."""
        return 1000 * len(self.head_alarms) / max(self.head_samples, 1)


def count_clean(recordings: Sequence[Recording], alarming: Alarming, stride: int = 1) -> Clean:
    """Count alarms on healthy runs."""
    clean = Clean()
    for recording in recordings:
        alarms = alarming(recording)
        heads = [(recording, alarm, unit) for alarm in alarms if alarm.is_about_heads for unit in alarm.units]
        clean.head_alarms += heads
        clean.run_alarms += [(recording, alarm) for alarm in alarms if not alarm.is_about_heads]
        for rows in recording.values["query_rms"].values():
            clean.head_samples += rows[::stride].size
            clean.watched += rows[::stride][GRACE:].size
        clean.runs += 1
        clean.runs_alarmed += bool(heads)
    return clean


def first_run_alarm(recording: Recording, alarming: Alarming) -> int | None:
    """Return the samples from onset, or from the start, until the first alarm about the run; None for none."""
    alarms = alarming(recording) if recording.fault is None else alarms_of_fault(recording, alarming)
    onset = 0 if recording.fault is None else recording.fault.onset
    return min(
        (samples_between(recording, onset, alarm.step) for alarm in alarms if not alarm.is_about_heads), default=None
    )


# -- What people use today ---------------------------------------------------------------------------------------------


def _alarm_at(steps: Iterable[int], name: str) -> list[Alarm]:
    return [Alarm(int(step), name, name, frozenset({("run", None, None)})) for step in steps]


def _begins(is_high: np.ndarray) -> np.ndarray:
    return np.flatnonzero(is_high & ~np.concatenate([[False], is_high[:-1]]))


def spikes(curve: str, limit: float = 5.0, window: int = 100) -> Alarming:
    """Z-score of a per-step curve against its last ``window`` steps."""

    def alarms(recording: Recording) -> list[Alarm]:
        values = np.nan_to_num(getattr(recording, curve).astype(float), nan=1e9, posinf=1e9)
        z = np.zeros(len(values))
        for step in range(window, len(values)):
            past = values[step - window : step]
            z[step] = (values[step] - past.mean()) / (past.std() + 1e-3 * abs(past.mean()))
        return _alarm_at(_begins(z > limit) + 1, f"{curve} z > {limit:g}")

    return alarms


def level(metric: str, reduce: Callable[[np.ndarray], float], limit: float, name: str, *, above: bool) -> Alarming:
    """An absolute limit on one figure over all heads."""

    def alarms(recording: Recording) -> list[Alarm]:
        rows = np.concatenate(list(recording.values[metric].values()), axis=1)
        figures = np.array([reduce(row) for row in rows])
        beyond = figures > limit if above else figures < limit
        return _alarm_at(recording.steps[_begins(beyond)], name)

    return alarms


def deviation(metric: str, reduce: Callable[[np.ndarray], float], name: str, limit: float = 5.0) -> Alarming:
    """Robust z-score of one figure over all heads against its last 20 samples."""

    def alarms(recording: Recording) -> list[Alarm]:
        rows = np.concatenate(list(recording.values[metric].values()), axis=1)
        figures = np.array([reduce(row) for row in rows])
        z = np.zeros(len(figures))
        for index in range(20, len(figures)):
            past = figures[index - 20 : index]
            spread = 1.4826 * np.median(np.abs(past - np.median(past))) + 0.02
            z[index] = abs(figures[index] - np.median(past)) / spread
        return _alarm_at(recording.steps[_begins(z > limit)], name)

    return alarms


def median_delay(verdicts: Sequence[Verdict]) -> float:
    """Return the median delay of what was found, in samples."""
    return statistics.median([verdict.delay for verdict in verdicts if verdict.delay is not None] or [float("nan")])
