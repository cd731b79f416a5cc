"""How long before the loss the rules tell, in runs that nobody breaks and whose loss comes to rise.

    python -m benchmarks.detection.leads --docs docs/alert-evaluation.md

trains small models at high or growing rates, without clipping gradients, without norms or with norms after the skip
connections, until their loss rises, each beside the same run at the usual rate, and replays the default rules. There is
more than one way to watch a loss, so three are compared. Recordings are kept in a cache: only the first call takes long
(about 25 minutes on one core).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.detection.ablations import COLLECTED_BY_DEFAULT
from benchmarks.detection.baselines import spikes
from benchmarks.detection.document import command_line, publish, share, share_and_interval, table
from benchmarks.detection.models import FAMILIES, Shape
from benchmarks.detection.natural import control_table, gradient_alarm, loss_alarm
from benchmarks.detection.recording import Recording, Setting
from benchmarks.detection.runs import recordings
from benchmarks.detection.score import Detector, rule_detector

SETS = {
    "dev": ((31, 32), Shape(3, 4, 16, length=64)),
    "report": ((9101, 9102, 9103), Shape(3, 4, 12, length=72)),
}
"""Seeds and sizes. Rates were chosen on ``dev``, by the loss alone."""
USUAL_RATE = 2e-3
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "slow warm-up to a high peak": ({}, 0.3),
    "slow warm-up to a high peak, no norms": ({"layout": "no_norm"}, 0.03),
    "slow warm-up to a high peak, post-norm": ({"layout": "post_norm"}, 0.03),
    "rate doubles ten times": ({"change": "growing rate", "warmup_steps": 60}, USUAL_RATE),
}
"""What is unusual about a run, and its rate at the peak or at first."""


@dataclass(frozen=True)
class Course:
    """A way of training whose loss comes to rise, and the same way at the usual rate."""

    title: str
    setting: Setting
    usual: Setting


def courses(name: str) -> Iterator[Course]:
    """Yield every run of a set."""
    seeds, shape = SETS[name]
    for seed in seeds:
        for family in (*FAMILIES, "vit"):
            of_family = replace(shape, length=64, vocabulary=8) if family == "vit" else shape
            plain = Setting(family, seed, USUAL_RATE, of_family, num_steps=450, sample_every=5, warmup_steps=225)
            plain = replace(plain, change="no clipping", change_at=0)
            for title, (fields, rate) in WAYS.items():
                usual = replace(plain, layout=fields.get("layout", plain.layout))
                yield Course(title, replace(plain, learning_rate=rate, **fields), usual)


def loss_above_best(recording: Recording, factor: float = 1.1) -> int | None:
    """Return the step at which the smoothed loss stays above its best by this factor for 3 samples."""
    smooth, best, run = None, np.inf, 0
    for step, loss in enumerate(recording.loss.astype(float), start=1):
        if not np.isfinite(loss):
            return step
        smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
        if step % recording.setting.sample_every:
            continue
        run = run + 1 if smooth > factor * best else 0
        if run == 3:
            return step
        best = min(best, smooth)
    return None


def loss_jump(recording: Recording) -> int | None:
    """Return the step of the first z > 5 of the loss against its last 100 steps."""
    return next((alarm.step for alarm in spikes("loss")(recording)), None)


LOSS_ALARMS: dict[str, Callable[[Recording], int | None]] = {
    "smoothed, 3 sd above its best": loss_alarm,
    "smoothed, 10 % above its best": loss_above_best,
    "z > 5": loss_jump,
}


@dataclass(frozen=True)
class Outcome:
    """What the loss, the gradient norm and the rules said of one run, in optimizer steps; None for nothing."""

    course: Course
    of_loss: dict[str, int | None]
    of_gradient: int | None
    rule: str
    of_rules: int | None
    final_loss: float
    usual_loss: float
    usual_of_loss: dict[str, int | None]


def outcome(course: Course, recording: Recording, usual: Recording, detector: Detector) -> Outcome:
    """Return the first alarms of a run; of rules those about the run or a layer."""
    named = next((alarm for alarm in detector(recording) if all(head is None for _, _, head in alarm.units)), None)
    return Outcome(
        course,
        {name: alarm(recording) for name, alarm in LOSS_ALARMS.items()},
        gradient_alarm(recording),
        named.rule if named else "",
        named.step if named else None,
        float(recording.loss[-50:].mean()),
        float(usual.loss[-50:].mean()),
        {name: alarm(usual) for name, alarm in LOSS_ALARMS.items()},
    )


def course_table(results: list[Outcome]) -> str:
    """Return one row per way and family, the seeds in order."""
    rows = []
    for title, family in dict.fromkeys((each.course.title, each.course.setting.family) for each in results):
        group = [each for each in results if (each.course.title, each.course.setting.family) == (title, family)]
        columns: list[list[object]] = [[each.of_loss[name] or "-" for each in group] for name in LOSS_ALARMS]
        columns += [
            [each.of_gradient or "-" for each in group],
            [f"`{each.rule}` {each.of_rules}" if each.rule else "-" for each in group],
            [f"{each.final_loss:.2f}" for each in group],
            [f"{each.usual_loss:.2f}" for each in group],
        ]
        rate = f"{group[0].course.setting.learning_rate:g}"
        rows.append((title, family, rate, *(", ".join(map(str, cells)) for cells in columns)))
    header = ("training", "family", "rate", *(f"loss {name}" for name in LOSS_ALARMS), "gradient norm z > 5")
    return table((*header, "first rule", "loss at the end", "at the usual rate"), rows)


def lead_table(results: list[Outcome]) -> str:
    """Return how often each alarm on the loss tells, and how often and how long before a rule does."""
    rows = []
    for kind, families in (("without QK-norm", ("gpt2", "llama", "vit")), ("with QK-norm", ("qknorm",))):
        group = [each for each in results if each.course.setting.family in families]
        for name in LOSS_ALARMS:
            told = [each for each in group if each.of_loss[name] is not None]
            leads = [each.of_loss[name] - each.of_rules for each in told if each.of_rules is not None]
            before = [lead for lead in leads if lead > 0]
            spread = f"{statistics.median(leads):.0f} ({min(leads)} to {max(leads)})" if leads else "-"
            only = sum(each.of_rules is not None for each in group) - len(leads)
            found = share_and_interval(len(before), len(told)) if told else "-"
            at_usual_rate = {each.course.usual: each.usual_of_loss[name] is not None for each in group}
            false = share(sum(at_usual_rate.values()), len(at_usual_rate))
            rows.append((kind, f"loss {name}", share(len(told), len(group)), found, spread, only, false))
    header = ("models", "alarm on the loss", "tells", "a rule tells before", "lead in steps, median (range)")
    return table((*header, "only a rule tells", "tells at the usual rate"), rows)


def measured_section(name: str, cache: Path) -> str:
    """Record what is missing; return the tables as Markdown."""
    detector = rule_detector(COLLECTED_BY_DEFAULT)
    results, quiet = [], dict[Setting, Recording]()
    for course in courses(name):
        for setting in {course.usual} - quiet.keys():
            [quiet[setting]] = recordings(setting, [], cache / name)
        [recording] = recordings(course.setting, [], cache / name)
        results.append(outcome(course, recording, quiet[course.usual], detector))
        print(course.title, course.setting.family, course.setting.seed, results[-1].of_rules, flush=True)
    runs: dict[str, list[Recording]] = {}
    for course in courses(name):
        runs.setdefault(course.title, []).append(quiet[course.usual])
    parts = (
        lead_table(results),
        course_table(results),
        "### The same at the usual rate",
        control_table(runs, detector),
    )
    return "\n\n".join(parts)


def main() -> None:
    arguments = command_line(__doc__, "leads", SETS).parse_args()
    torch.set_num_threads(1)
    publish(measured_section(arguments.name, arguments.cache), "leads", arguments.docs)


if __name__ == "__main__":
    main()
