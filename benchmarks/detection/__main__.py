"""The proof of the alerts: short runs in which it is known what broke, where and when.

    python -m benchmarks.detection --set report --docs docs/alert-evaluation.md

records the runs of a set once into a cache (about twenty minutes of one core; later runs take fewer), replays the
default rules over them, does the same for what people use today, and writes the tables, one picture per kind of fault
and the rules that were scored into the document's folder. Thresholds were chosen with ``--set dev``; the document shows
``--set report``.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt

from attnmonitor.alerts import DEFAULT_RULES, AllOf, AnyOf, Rule, Threshold, save_rules
from benchmarks.detection.document import publish, share, table
from benchmarks.detection.runs import FINITE_FAULTS, LEARNED, SAMPLE_EVERY, Recording, recordings
from benchmarks.detection.score import (
    Alarm,
    Alarming,
    Clean,
    Verdict,
    alarms_of_fault,
    by_rules,
    count_clean,
    deviation,
    first_run_alarm,
    heads_at_fault,
    judge,
    level,
    median_delay,
    spikes,
)
from benchmarks.detection.sets import SETS, planned_runs

WITHIN_SAMPLES = 16  # a fault counts as found when it is named while its branch lasts
BROKEN_WITHIN_SAMPLES = 10


@dataclass
class Runs:
    """The recordings of a set by what they are examples of."""

    clean: list[Recording]
    broken: list[Recording]
    faults: list[Recording]
    slow: list[Recording]
    jumps: list[Recording]

    @classmethod
    def of(cls, name: str, cache: Path) -> Runs:
        """Record the set, or read it from the cache."""
        runs = cls([], [], [], [], [])
        for plan in planned_runs(name):
            trunk, *branches = recordings(plan.setting, list(plan.faults), cache / name)
            (runs.broken if plan.kind == "broken_start" else runs.clean).append(trunk)
            for branch in branches:
                is_jump, is_slow = branch.fault.kind == "learning_rate_jump", branch.fault.ramp_steps > 60
                (runs.jumps if is_jump else runs.slow if is_slow else runs.faults).append(branch)
            print(f"{plan.kind:<13} {plan.setting.family:<7} {len(branches)} faults", flush=True)
        return runs

    def faults_of(self, strength: float) -> list[Recording]:
        """Return the branches whose fault has that strength."""
        return [recording for recording in self.faults if recording.fault.strength == strength]


# -- Ways of alarming --------------------------------------------------------------------------------------------------

COLLECTED_BY_DEFAULT = tuple(rule for rule in DEFAULT_RULES if not rule.optional)


def remembered(alarming: Alarming) -> Alarming:
    """Return the same, computing each recording once."""
    known: dict[int, list[Alarm]] = {}

    def alarms(recording: Recording) -> list[Alarm]:
        if id(recording) not in known:
            known[id(recording)] = alarming(recording)
        return known[id(recording)]

    return alarms


TODAY: dict[str, Alarming] = {
    "loss, z > 5": remembered(spikes("loss")),
    "gradient norm, z > 5": remembered(spikes("gradient_norm")),
    "largest logit > 100": remembered(level("max_logit", np.nanmax, 100.0, "largest logit", above=True)),
    "mean entropy, robust z > 5": remembered(deviation("attention_entropy", np.nanmean, "mean entropy")),
    "least entropy < 0.1 nats": remembered(level("attention_entropy", np.nanmin, 0.1, "least entropy", above=False)),
}


def with_thresholds(change: Callable[[Threshold], Threshold | None]) -> tuple[Rule, ...]:
    """Return the head rules with every threshold changed, or left out where the change is None."""

    def changed(condition: object) -> object:
        if isinstance(condition, (AllOf, AnyOf)):
            parts = [part for part in map(changed, condition.conditions) if part is not None]
            return type(condition)(*parts) if parts else None
        return change(condition)

    heads = (rule for rule in COLLECTED_BY_DEFAULT if rule.scope != "run" and rule.kind != "non_finite")
    return tuple(replace(rule, when=when) for rule in heads if (when := changed(rule.when)) is not None)


ABLATIONS: dict[str, tuple[Rule, ...]] = {
    "head rules as they are": with_thresholds(lambda threshold: threshold),
    "own past instead of the contrast": with_thresholds(
        lambda threshold: (
            None
            if threshold.signal == "robust_z"
            else replace(threshold, signal="change")
            if threshold.signal == "contrast"
            else threshold
        )
    ),
    "contrast without robust z": with_thresholds(
        lambda threshold: None if threshold.signal == "robust_z" else threshold
    ),
    "patience of one sample": tuple(replace(rule, patience=1) for rule in with_thresholds(lambda t: t)),
    "grace of 12 samples": tuple(replace(rule, grace=12) for rule in with_thresholds(lambda t: t)),
}


# -- Tables ------------------------------------------------------------------------------------------------------------


def found_count(verdicts: Sequence[Verdict]) -> str:
    return share(sum(verdict.delay is not None for verdict in verdicts), len(verdicts))


def is_any_alarm_after_onset(recording: Recording, alarming: Alarming) -> bool:
    until = recording.fault.onset + WITHIN_SAMPLES * SAMPLE_EVERY
    return any(alarm.step <= until for alarm in alarms_of_fault(recording, alarming))


def comparison(runs: Runs, default: Alarming) -> str:
    """What is used today beside the rules; any alarm that the run without the fault does not have counts as a find."""
    rows = []
    for name, alarming in {"**default rules**": default, **TODAY}.items():
        full, half = (
            share(sum(is_any_alarm_after_onset(recording, alarming) for recording in faults), len(faults))
            for faults in (
                [recording for recording in runs.faults_of(strength) if recording.fault.kind != "non_finite"]
                for strength in (1.0, 0.5)
            )
        )
        noisy = sum(bool(alarming(recording)) for recording in runs.clean)
        early = BROKEN_WITHIN_SAMPLES * SAMPLE_EVERY
        broken = sum(any(alarm.step <= early for alarm in alarming(recording)) for recording in runs.broken)
        jumps = sum(is_any_alarm_after_onset(recording, alarming) for recording in runs.jumps)
        rows.append(
            (
                name,
                full,
                half,
                share(broken, len(runs.broken)),
                share(jumps, len(runs.jumps)),
                share(noisy, len(runs.clean)),
            )
        )
    header = ("", "full strength", "half strength", "broken from the start", "learning-rate jump", "clean runs alarmed")
    return table(header, rows)


def fault_rows(runs: Runs, alarming: Alarming, strength: float) -> list[tuple[object, ...]]:
    by_kind: dict[str, list[Verdict]] = defaultdict(list)
    for recording in runs.faults_of(strength):
        by_kind[recording.fault.kind].append(judge(recording, alarming))
    rows = [(kind.replace("_", " "), *verdict_cells(verdicts)) for kind, verdicts in by_kind.items()]
    everything = [verdict for verdicts in by_kind.values() for verdict in verdicts]
    return [*rows, ("**all**", *verdict_cells(everything))]


def verdict_cells(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    found = [verdict for verdict in verdicts if verdict.delay is not None]
    named, innocents = sum(v.innocents_named for v in verdicts), sum(v.innocents for v in verdicts)
    rules = ", ".join(f"{rule} {count}" for rule, count in Counter(v.found_by for v in found).most_common())
    return (
        share(len(found), len(verdicts)),
        f"{median_delay(found):.0f} / {max(v.delay for v in found)}" if found else "",
        share(sum(v.is_first_true for v in found), len(found)),
        share(named, innocents),
        rules,
    )


FAULT_HEADER = ("fault", "found", "delay, median / worst", "first alarm true", "innocents named", "found by")


def clean_table(runs: Runs, rules: Sequence[Rule]) -> str:
    """False alarms, also when fewer of the samples are taken."""
    rows = []
    for stride in (1, 2, 3, 5):
        clean = count_clean(runs.clean, by_rules(rules, stride), stride)
        by_rule = Counter(alarm.rule for _, alarm, _ in clean.head_alarms)
        rows.append(
            (
                f"every {stride * SAMPLE_EVERY} steps",
                f"{len(clean.head_alarms)} in {clean.head_samples:,}",
                f"{clean.per_thousand:.2f}",
                f"{clean.watched:,}",
                share(clean.runs_alarmed, clean.runs),
                len(clean.run_alarms),
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


def run_level_table(runs: Runs, alarming: Alarming) -> str:
    rows = []
    for title, group in (("broken from the start", runs.broken), ("learning-rate jump", runs.jumps)):
        delays = [first_run_alarm(recording, alarming) for recording in group]
        found = [delay for delay in delays if delay is not None]
        in_time = sum(delay <= BROKEN_WITHIN_SAMPLES for delay in found)
        middle = f"{statistics.median(found):.0f} / {max(found):.0f}" if found else ""
        rows.append((title, share(in_time, len(delays)), middle))
    return table(("fault of the run", f"told within {BROKEN_WITHIN_SAMPLES} samples", "delay, median / worst"), rows)


def ablation_table(runs: Runs) -> str:
    rows = []
    for name, rules in ABLATIONS.items():
        alarming = remembered(by_rules(rules))
        verdicts = {
            strength: [judge(r, alarming) for r in runs.faults_of(strength) if r.fault.kind != "non_finite"]
            for strength in (1.0, 0.5)
        }
        clean: Clean = count_clean(runs.clean, alarming)
        both = [verdict for group in verdicts.values() for verdict in group]
        named, innocents = sum(v.innocents_named for v in both), sum(v.innocents for v in both)
        rows.append(
            (
                name,
                found_count(verdicts[1.0]),
                found_count(verdicts[0.5]),
                f"{median_delay(verdicts[1.0]):.0f}",
                share(named, innocents),
                f"{clean.per_thousand:.2f}",
                share(clean.runs_alarmed, clean.runs),
            )
        )
    header = ("", "full", "half", "median delay", "innocents named", "false alarms per 1,000", "clean runs alarmed")
    return table(header, rows)


# -- Pictures ----------------------------------------------------------------------------------------------------------

SHOWN_METRIC = {
    "query_hot": "query_rms",
    "query_fading": "query_rms",
    "key_fading": "key_rms",
    "layer_hot": "query_rms",
    "layer_cold": "query_rms",
    "key_takeover": "key_leverage_max",
    "key_rank_1": LEARNED,
    "non_finite": "energy_rms",
}


def picture(recording: Recording, alarming: Alarming, path: Path) -> None:
    """Draw every head, the one at fault, the alarm, and the loss that shows nothing."""
    metric = SHOWN_METRIC[recording.fault.kind]
    guilty = heads_at_fault(recording)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.4, 4.2), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    scope = "kv_head" if metric.startswith("key") else "query_head"
    for layer, rows in recording.values[metric].items():
        for head in range(rows.shape[1]):
            is_guilty = (scope, layer, head) in guilty
            top.plot(
                recording.steps,
                rows[:, head],
                color="#c0392b" if is_guilty else "#9aa5b1",
                linewidth=1.8 if is_guilty else 0.7,
                zorder=3 if is_guilty else 1,
            )
    alarms = [alarm for alarm in alarms_of_fault(recording, alarming) if alarm.units & guilty]
    for axis in (top, bottom):
        axis.axvline(recording.fault.onset, color="#2c3e50", linestyle=":", linewidth=1)
        if alarms:
            axis.axvline(alarms[0].step, color="#c0392b", linestyle="--", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
    if metric not in ("key_leverage_max",):
        top.set_yscale("log")
    title = f"{recording.fault.kind.replace('_', ' ')}, {recording.setting.family}"
    told = f"{alarms[0].rule} at step {alarms[0].step}" if alarms else "no alarm"
    top.set_title(f"{title}: dotted onset, dashed {told}", fontsize=10, loc="left")
    top.set_ylabel(metric)
    bottom.plot(np.arange(1, len(recording.loss) + 1), recording.loss, color="#34495e", linewidth=0.8)
    bottom.set_ylabel("loss")
    bottom.set_xlabel("optimizer step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(runs: Runs, alarming: Alarming, folder: Path) -> list[str]:
    """Draw the first run of each kind at full strength; return Markdown that shows the pictures."""
    lines = []
    for kind in (*FINITE_FAULTS, "non_finite"):
        shown = next((r for r in runs.faults_of(1.0) if r.fault.kind == kind and r.setting.family == "llama"), None)
        if shown is not None:
            name = f"collapse_{kind}.png"
            picture(shown, alarming, folder / name)
            lines.append(f"![{kind.replace('_', ' ')}](images/{name})")
    return lines


# -- The document ------------------------------------------------------------------------------------------------------


def measured_section(runs: Runs, name: str, images: Path) -> str:
    default, with_learned = remembered(by_rules(COLLECTED_BY_DEFAULT)), remembered(by_rules(DEFAULT_RULES))
    slow = [judge(recording, default) for recording in runs.slow]
    parts = [
        f"Set `{name}`: {len(runs.clean)} clean runs, {len(runs.faults_of(1.0))} faults at full and "
        f"{len(runs.faults_of(0.5))} at half strength, {len(runs.broken)} runs broken from the start, "
        f"{len(runs.jumps)} learning-rate jumps, {len(runs.slow)} slow drifts. Delays are in samples of "
        f"{SAMPLE_EVERY} steps after onset; the ramp takes 6.",
        "### Beside what is used today",
        comparison(runs, default),
        "### Faults at full strength",
        table(FAULT_HEADER, fault_rows(runs, default, 1.0)),
        "With `interaction_participation_ratio` collected as well:",
        table(
            FAULT_HEADER, [row for row in fault_rows(runs, with_learned, 1.0) if row[0] in ("key rank 1", "**all**")]
        ),
        "### Faults at half strength",
        table(FAULT_HEADER, fault_rows(runs, default, 0.5)),
        "### Slow drift",
        f"A factor of 4 over 50 samples: found {found_count(slow)}, median delay {median_delay(slow):.0f} samples, "
        f"{sum(verdict.innocents_named for verdict in slow)} innocents named.",
        "### False alarms",
        clean_table(runs, DEFAULT_RULES),
        "### Faults of the run",
        run_level_table(runs, default),
        "### Ablations",
        ablation_table(runs),
        "### Pictures",
        "Red is what is at fault, grey every other head. Below, the loss of the same run.",
        *draw(runs, with_learned, images),
    ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--set", choices=sorted(SETS), default="report", dest="name")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "attnmonitor-collapse")
    parser.add_argument("--docs", type=Path, help="document whose measured section is rewritten; else printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mpl.use("Agg")
    images = (arguments.docs.parent if arguments.docs else arguments.cache) / "images"
    section = measured_section(Runs.of(arguments.name, arguments.cache), arguments.name, images)
    publish(section, "measured", arguments.docs)
    if arguments.docs:
        save_rules(DEFAULT_RULES, arguments.docs.parent / "default_rules.json")  # those that were scored


if __name__ == "__main__":
    main()
