"""The ten-second test: the headline of a recorded run names the worst head, its step and kind, or what is unknown."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from alert_runs import healthy_run, tensors

from attnmonitor.alerts import Alerts
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import LayerCoverage, Sample
from attnmonitor.summary.verdict import closing_lines, verdict

Values = dict[str, dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A run of layers × heads, what breaks in it, and what its headline says."""

    layers: int
    heads: int
    change: Callable[[int, Values], None] = lambda index, values: None
    samples: int = 70
    state: str = "alarm"
    says: tuple[str, ...] = ()
    missed: tuple[int, ...] = ()
    failed: bool = False


def hotter(layer: int, head: int, factor: float, onset: int = 40) -> Callable[[int, Values], None]:
    def change(index: int, values: Values) -> None:
        if index >= onset:
            for metric in ("query_rms", "energy_rms"):
                values[metric][f"layers.{layer}"][head] *= factor

    return change


def crowded(index: int, values: Values) -> None:
    """Many heads drift a little, and are in alarm, before one of them breaks."""
    if index >= 35:
        for layer in list(values["query_rms"])[:2]:
            for metric in ("query_rms", "energy_rms"):
                values[metric][layer][:12] *= 2.6
    hotter(5, 7, 256.0, onset=55)(index, values)


def all_at_once(index: int, values: Values) -> None:
    """All four heads are in alarm from sample 32 on; sample 50 breaks one of them."""
    if index >= 32:
        for metric in ("query_rms", "energy_rms"):
            values[metric]["layers.0"] *= torch.tensor([2.2, 2.5, 2.3, 2.6])
    hotter(0, 2, 256.0, onset=50)(index, values)


def two_faults(index: int, values: Values) -> None:
    hotter(1, 1, 6.0)(index, values)
    hotter(2, 3, 60.0, onset=45)(index, values)


def becomes_nan(index: int, values: Values) -> None:
    if index >= 40:
        values["energy_rms"]["layers.1"][3] = math.nan


CASES = {
    "4 heads": Case(
        1, 4, hotter(0, 2, 256.0), says=("1 head needs a look: layers.0 head 2 (logit blowup since step 400", "about 6")
    ),
    "4 heads in alarm": Case(1, 4, all_at_once, says=("so do 4 heads: layers.0 head 2 (logit blowup since step 320",)),
    "16 heads": Case(
        4, 4, hotter(3, 1, 30.0), says=("1 head needs a look: layers.3 head 1 (logit blowup since step 400",)
    ),
    "144 heads": Case(
        12, 12, hotter(9, 11, 12.0), says=("needs a look: layers.9 head 11 (logit blowup since step 400",)
    ),
    "1,024 heads": Case(16, 64, crowded, says=("need a look: layers.5 head 7 (logit blowup since step 550",)),
    "two faults": Case(
        4, 4, two_faults, says=("2 heads need a look: layers.2 head 3 (logit blowup since step 450", "layers.1 head 1")
    ),
    "NaN": Case(3, 4, becomes_nan, says=("layers.1 head 3 (values are not finite since step 400)",)),
    "nothing measured": Case(
        3, 4, state="unknown", missed=(0, 1, 2), says=("unknown: nothing measured in 3 attention layers", "flash")
    ),
    "a third not measured": Case(
        6,
        4,
        state="unknown",
        missed=(4, 5),
        says=("unknown: ", "2 of 6 layers not measured: layers.4, layers.5 (flash kernel)"),
    ),
    "short": Case(4, 4, samples=20, state="unknown", says=("unknown: ", "some rules first wait for 25 samples")),
    "failed": Case(4, 4, state="unknown", failed=True, says=("unknown: ", "the latest sample failed (out of memory)")),
    "healthy": Case(4, 4, state="healthy", says=("16 heads in 4 layers watched over 70 samples: healthy",)),
}


def record_of(case: Case, path: Path) -> RunRecord:
    alerts, run = Alerts(), healthy_run(case.samples, case.layers, case.heads)
    names = [f"layers.{layer}" for layer in range(case.layers)]
    coverage = {
        name: LayerCoverage(name, reason="flash kernel")
        if at in case.missed
        else LayerCoverage(name, "sdpa", "self", case.heads, case.heads, 64, 0.125)
        for at, name in enumerate(names)
    }
    seen = [name for name in names if coverage[name].measured]
    config = {"alerts": ["default"], "alerts_grace": alerts.grace, "alerts_least_heads": alerts.least_heads}
    with RecordWriter(path, run=config) as record:
        for index in range(case.samples):
            values = {
                metric: {name: values for name, values in layers.items() if name in seen}
                for metric, layers in tensors(run[index]).items()
            }
            if seen:
                case.change(index, values)
            is_lost = case.failed and index == case.samples - 1
            events = [] if is_lost else alerts.observe(values if seen else {}, 10 * index)
            record.append(
                Sample(
                    10 * index,
                    values if seen and not is_lost else {},
                    coverage=coverage,
                    events=events,
                    firing=alerts.firing,
                    failure="out of memory" if is_lost else None,
                )
            )
    return RunRecord.open(path)


@pytest.mark.parametrize("name", CASES)
def test_headline_names_the_worst_head_or_what_is_unknown(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    record = record_of(case, tmp_path / "run.sqlite")
    summary = record.counts
    line = verdict(summary)
    print(line)
    assert record.state == case.state == summary.state, line
    for words in case.says:
        assert words in line, line
    ending = closing_lines(summary, "attnmonitor: ")
    print(ending)
    assert max(map(len, ending.splitlines())) <= 80
    assert len(ending.splitlines()) <= 16
