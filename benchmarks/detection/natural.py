"""Failures that training brings about by itself, or that a model is born with, each beside a run without it.

    python -m benchmarks.detection.natural --set report --docs docs/alert-evaluation.md

records each failure in every family it applies to, at three seeds, and replays the default rules: which rule names it,
at which step, whether the name is right, and how far before or after the loss and the gradient norm tell. The runs
beside them, and runs in which training changes without a fault, say how often the rules are wrong. Recordings are kept
in a cache: only the first call takes long (about half an hour on one core).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.detection.ablations import COLLECTED_BY_DEFAULT
from benchmarks.detection.baselines import spikes
from benchmarks.detection.changes import CHANGES
from benchmarks.detection.document import command_line, publish, share, share_and_interval, table
from benchmarks.detection.faults import Fault
from benchmarks.detection.models import FAMILIES, Shape
from benchmarks.detection.recording import Recording, Setting
from benchmarks.detection.runs import healthy_recordings, recordings
from benchmarks.detection.score import Alarm, Detector, cached, heads_at_fault, rule_detector, samples_between


@dataclass(frozen=True)
class Extent:
    """Seeds and sizes of one set, in optimizer steps."""

    seeds: tuple[int, ...]
    control_seeds: tuple[int, ...]  # taken in turn
    shape: Shape
    healthy: int  # of the runs that faults branch from
    at_birth: int
    late: int  # after onset
    deep: tuple[int, int]  # of 12 layers without skips, and with them
    broken: int  # of a start at too high a rate
    control: int
    change_at: int


SETS = {
    "dev": Extent((11, 12, 13), (11,), Shape(4, 4, 16, length=96), 400, 150, 100, (200, 200), 200, 500, 300),
    "dev2": Extent(
        (5011, 5012, 5013), (5011, 5012, 5013), Shape(3, 6, 8, length=64), 300, 60, 40, (60, 120), 100, 350, 200
    ),
    "report": Extent(
        (7101, 7102, 7103), (7101, 7102, 7103), Shape(3, 4, 12, length=80), 300, 60, 40, (60, 120), 100, 350, 200
    ),
    "confirm": Extent(
        (8301, 8302, 8303), (8301, 8302, 8303), Shape(3, 6, 12, length=64), 300, 60, 40, (60, 120), 100, 350, 200
    ),
}
"""A set is used for reporting only once: ``dev2`` was the reporting set of earlier rules, and the misses of ``report``
changed the rules on silent heads, which ``confirm`` is for."""
SAMPLE_EVERY = 5
LATE = 250
BROKEN_WITHIN = 10  # samples, for what is wrong from the first step
NAMED_WITHIN = 5


@dataclass(frozen=True)
class Failure:
    """A run that fails, what its right name is, and the same run without the failure."""

    title: str
    kinds: tuple[str, ...]  # of alarms that name it rightly
    setting: Setting
    fault: Fault | None  # of one head; None when the run or its layers are at fault
    healthy: Setting
    within: int | None = NAMED_WITHIN  # samples from onset; None: at any time


def failures(name: str) -> Iterator[Failure]:
    """Yield every failure of a set."""
    for seed in SETS[name].seeds:
        for family in (*FAMILIES, "vit"):
            yield from _failures_of(family, seed, SETS[name])


def _failures_of(family: str, seed: int, extent: Extent) -> Iterator[Failure]:
    shape = extent.shape
    if family == "vit":
        shape = replace(shape, length=64, vocabulary=8)
    healthy = Setting(family, seed, 2e-3, shape, num_steps=extent.healthy, sample_every=SAMPLE_EVERY)
    layer, head = seed % shape.num_layers, (seed // 7) % shape.num_heads
    for title, kind, kinds in (
        ("queries and keys of a head zero from the start", "dead", ("dead_head",)),
        ("a head is a copy of another", "twin", ("twin_heads",)),
        ("values of a head at 4 %", "value", ("silent_head",)),
        ("output of a head at 4 %", "output", ("silent_head",)),
    ):
        at_birth = Fault(kind, layer, head, 1.0, onset=0, num_steps=extent.at_birth)
        if kind == "dead" or kind == "twin":
            yield Failure(title, kinds, healthy, at_birth, healthy)
        if kind != "dead":
            late = replace(at_birth, onset=LATE, num_steps=extent.late)
            yield Failure(f"{title}, from step {LATE} on", kinds, healthy, late, healthy)
    rolled = Fault("rolled_keys", layer, head, 1.0, onset=LATE, num_steps=extent.late)
    yield Failure("keys of a layer rolled by one head", ("mass", "layer_changed"), healthy, rolled, healthy, None)
    untamed = replace(healthy, warmup_steps=0, num_steps=200)
    if family in ("gpt2", "llama"):
        grown = replace(healthy, learning_rate=3e-2, num_steps=450)
        yield Failure("logits grow at a high rate", ("logit_blowup",), grown, None, healthy, None)
        no_norm = replace(untamed, layout="no_norm", learning_rate=1e-2 if family == "gpt2" else 3e-2)
        yield Failure("no norms", ("logit_blowup", "broken_start"), no_norm, None, healthy, None)
    if family != "vit":
        without_skips, with_skips = extent.deep
        deep = replace(untamed, shape=replace(shape, num_layers=12), layout="no_skips", learning_rate=1e-3)
        deep = replace(deep, num_steps=without_skips)
        sound = replace(deep, layout="pre_norm", num_steps=with_skips, warmup_steps=60)
        yield Failure("12 layers without skips", ("rank_collapse",), deep, None, sound, BROKEN_WITHIN)
    if family != "qknorm":
        post = replace(untamed, layout="post_norm", learning_rate=2e-2, num_steps=extent.broken)
        yield Failure("post-norm, high rate, no warm-up", ("broken_start",), post, None, healthy, BROKEN_WITHIN)
    if family == "vit":
        fast = replace(untamed, learning_rate=3e-2, num_steps=extent.broken)
        yield Failure("high rate, no warm-up", ("broken_start", "logit_blowup"), fast, None, healthy, BROKEN_WITHIN)


def controls(name: str) -> Iterator[tuple[str, Setting]]:
    """Yield runs without a fault, each with what is unusual about it."""
    extent = SETS[name]
    shape, seeds = extent.shape, extent.control_seeds
    for number, family in enumerate(FAMILIES):
        usual = Setting(family, 0, 2e-3, shape, num_steps=extent.control, sample_every=SAMPLE_EVERY)
        unusual = {change: replace(usual, change=change, change_at=extent.change_at) for change in CHANGES}
        unusual |= {
            "fast learning": replace(usual, learning_rate=8e-3),
            "slow learning": replace(usual, learning_rate=7e-4),
            "other text": replace(usual, new_text_at=extent.change_at),
            "long": replace(usual, num_steps=1500),
            "more heads": replace(usual, shape=replace(shape, num_layers=3, num_heads=8)),
            "larger heads": replace(usual, shape=replace(shape, num_layers=3, head_dim=2 * shape.head_dim)),
            "longer sequences": replace(usual, shape=replace(shape, num_layers=2, length=2 * shape.length)),
            "heads of size 2": replace(usual, shape=Shape(2, 4, 2, length=20), num_steps=300),
            "12 tokens": replace(usual, shape=Shape(2, 4, 16, length=12), num_steps=300),
            "noise": replace(usual, data="noise", shape=Shape(3, 4, 4, length=24), num_steps=300),
        }
        if family == "llama":
            unusual["2,000 samples"] = replace(usual, num_steps=2000, sample_every=1)
        for place, (title, setting) in enumerate(unusual.items()):
            yield title, replace(setting, seed=seeds[place % len(seeds)] + 100 * (number + 1))


def loss_alarm(recording: Recording) -> int | None:
    """Return the step at which the smoothed loss stays 3 standard deviations above its best for 3 samples."""
    smooth, spread, best, run = None, 0.0, np.inf, 0
    every = recording.setting.sample_every
    for step, loss in enumerate(recording.loss.astype(float), start=1):
        if not np.isfinite(loss):
            return step
        if smooth is None:
            smooth = loss
        spread = 0.98 * spread + 0.02 * (loss - smooth) ** 2
        smooth = 0.95 * smooth + 0.05 * loss
        if step % every:
            continue
        run = run + 1 if smooth > best + 3 * spread**0.5 else 0
        if run == 3:
            return step
        best = min(best, smooth)
    return None


def gradient_alarm(recording: Recording) -> int | None:
    """Return the step of the first alarm on the gradient norm."""
    alarms = spikes("gradient_norm")(recording)
    return alarms[0].step if alarms else None


@dataclass(frozen=True)
class Told:
    """What the rules said of one failure."""

    failure: Failure
    rule: str  # that named it rightly; "" for none
    step: int | None
    delay: int | None  # in samples
    wrong: tuple[str, ...]  # rules that gave it another name or named a healthy head first
    innocents: int
    loss_step: int | None
    gradient_step: int | None


def told(failure: Failure, recording: Recording, twin: Recording, detector: Detector) -> Told:
    """Compare the alarms of a failing run with the truth."""
    onset = failure.fault.onset if failure.fault else 0
    anyway = {(alarm.step, alarm.rule, unit) for alarm in detector(twin) for unit in alarm.units} if onset else set()
    alarms = [
        alarm
        for alarm in detector(recording)
        if alarm.step >= onset and any((alarm.step, alarm.rule, unit) not in anyway for unit in alarm.units)
    ]
    faulty = _faulty_units(failure, recording)
    right = [alarm for alarm in alarms if _is_right(alarm, failure, faulty, recording)]
    named = right[0] if right else None
    innocents = set().union(*(alarm.units for alarm in alarms if alarm.is_about_heads)) - faulty
    before = [alarm for alarm in alarms if named is None or alarm.step < named.step]
    return Told(
        failure,
        named.rule if named else "",
        named.step if named else None,
        samples_between(recording, onset, named.step) if named else None,
        tuple(dict.fromkeys(f"{alarm.rule} {alarm.step}" for alarm in before)),
        len(innocents) if failure.fault else 0,
        _after(loss_alarm(recording), onset),
        _after(gradient_alarm(recording), onset),
    )


def _after(step: int | None, onset: int) -> int | None:
    return step if step is not None and step > onset else None


def _faulty_units(failure: Failure, recording: Recording) -> set[tuple[str, str | None, int | None]]:
    fault = failure.fault
    if fault is None:
        return set()
    if fault.kind == "rolled_keys":
        fault = replace(fault, kind="layer")
    units = heads_at_fault(replace(recording, fault=fault))
    layer = list(recording.values["query_rms"])[fault.layer]
    group = recording.values["query_rms"][layer].shape[1] // recording.values["key_rms"][layer].shape[1]
    first = fault.head // group
    units |= {("kv_head", layer, first), ("layer", layer, None)}
    if fault.kind == "twin":
        units |= {("query_head", layer, fault.head ^ 1), ("kv_head", layer, (fault.head ^ 1) // group)}
    elif group > 1 and fault.kind in ("dead", "value"):  # keys and values are shared
        units |= {("query_head", layer, first * group + each) for each in range(group)}
    return units


def _is_right(alarm: Alarm, failure: Failure, faulty: set[object], recording: Recording) -> bool:
    if alarm.kind not in failure.kinds:
        return False
    if failure.fault is not None and not (alarm.units & faulty or not alarm.is_about_heads):
        return False
    if failure.fault is None and alarm.is_about_heads and "rank_collapse" not in failure.kinds:
        return False
    onset = failure.fault.onset if failure.fault else 0
    return failure.within is None or samples_between(recording, onset, alarm.step) <= failure.within


def failure_table(results: list[Told]) -> str:
    """Return one row per failure and family, all seeds together."""
    rows = []
    for title, family in dict.fromkeys((each.failure.title, each.failure.setting.family) for each in results):
        group = [each for each in results if (each.failure.title, each.failure.setting.family) == (title, family)]
        found = [each for each in group if each.step is not None]
        rows.append(
            (
                title,
                family,
                share(len(found), len(group)),
                ", ".join(f"`{each.rule}` {each.step}" for each in found) or "not seen",
                _steps(each.loss_step for each in group),
                _steps(each.gradient_step for each in group),
                "; ".join(", ".join(each.wrong) for each in group if each.wrong) or "none",
                sum(each.innocents for each in group),
            )
        )
    header = (
        "failure",
        "family",
        "named rightly",
        "rule and step",
        "loss",
        "gradient norm",
        "said before",
        "innocents",
    )
    return table(header, rows)


def _steps(steps: Iterator[int | None]) -> str:
    return ", ".join("-" if step is None else str(step) for step in steps)


def lead_sentences(results: list[Told]) -> str:
    """Return how many failures were named, and how long before the loss and the gradient norm, where these tell."""
    named = sum(each.step is not None for each in results)
    parts = [f"Named rightly: {share_and_interval(named, len(results))}, the brackets being 95 % intervals."]
    for what in ("loss", "gradient"):
        steps = [(each.step, getattr(each, f"{what}_step")) for each in results]
        leads = [theirs - ours for ours, theirs in steps if ours is not None and theirs is not None]
        number = sum(theirs is not None for _, theirs in steps)
        sentence = f"The {'loss' if what == 'loss' else 'gradient norm'} tells in {share(number, len(results))} runs"
        if leads:
            ahead = sum(lead > 0 for lead in leads)
            sentence += (
                f"; in {ahead} of them a rule tells before, by {statistics.median(leads):.0f} steps in the median"
            )
        parts.append(f"{sentence}.")
    return " ".join(parts)


def control_table(runs: dict[str, list[Recording]], detector: Detector) -> str:
    """Return the alarms on runs without a fault, by what is unusual about them."""
    rows = []
    for title, group in [*runs.items(), ("**all**", [run for each in runs.values() for run in each])]:
        alarms = [detector(recording) for recording in group]
        samples = sum(rows.size for recording in group for rows in recording.values["query_rms"].values())
        heads = sum(len(alarm.units) for each in alarms for alarm in each if alarm.is_about_heads)
        rules = dict.fromkeys(alarm.rule for each in alarms for alarm in each)
        count = share_and_interval if title == "**all**" else share
        cells = (count(sum(map(bool, alarms)), len(group)), f"{1000 * heads / samples:.2f}")
        rows.append((title, *cells, ", ".join(f"`{rule}`" for rule in rules) or "none"))
    return table(("run", "with any alarm", "head alarms per 1,000 head-samples", "rules"), rows)


def measured_section(name: str, cache: Path, kind: str | None) -> str:
    """Record what is missing; return the tables as Markdown: of all failures, or of those of one kind of fault."""
    detector = cached(rule_detector(COLLECTED_BY_DEFAULT))
    planned = [each for each in failures(name) if kind is None or kind in each.kinds]
    by_setting: dict[Setting, list[Fault]] = {}
    for failure in planned:
        by_setting.setdefault(failure.healthy, [])
        if failure.fault is not None:
            by_setting[failure.setting].append(failure.fault)
        else:
            by_setting.setdefault(failure.setting, [])
    recorded: dict[tuple[Setting, Fault | None], Recording] = {}
    for setting, faults in by_setting.items():
        for fault, recording in zip([None, *faults], recordings(setting, faults, cache / name), strict=True):
            recorded[setting, fault] = recording
        print(setting.family, setting.layout, setting.seed, len(faults), flush=True)
    results = [
        told(each, recorded[each.setting, each.fault], recorded[each.healthy, None], detector) for each in planned
    ]
    quiet = {"beside a failure": [recorded[each, None] for each in dict.fromkeys(each.healthy for each in planned)]}
    quiet |= healthy_recordings(controls(name) if kind is None else (), cache / name)
    parts = (
        lead_sentences(results),
        failure_table(results),
        "### Runs without a fault",
        control_table(quiet, detector),
    )
    return "\n\n".join(parts)


def main() -> None:
    parser = command_line(__doc__, "natural", SETS)
    parser.add_argument("--only", metavar="KIND", help="failures of one kind of fault, and the runs beside them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    section = measured_section(arguments.name, arguments.cache, arguments.only)
    publish(section, arguments.only or "natural", arguments.docs)


if __name__ == "__main__":
    main()
