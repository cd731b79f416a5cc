"""Loss, learning rate and the worst head stand over the same steps, within the width of the terminal."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from attnmonitor.sample import AlertEvent, LayerCoverage
from attnmonitor.summary.timeline import run_timeline, timeline

HOT = AlertEvent("energy_hot", "logit_blowup", "query_head", "h.0", 1, 9.0, 1.0, 60, "firing", since_step=50)
HOT = replace(HOT, metric="energy_rms")
COVERAGE = {"h.0": LayerCoverage("h.0", "sdpa", num_query_heads=2, num_kv_heads=2, head_dim=4, scale=0.5)}
LOSS = [(step, 4.0 - step / 50) for step in range(0, 101, 2)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_curves_share_their_steps_and_fit_the_width(width: int) -> None:
    steps = np.arange(0, 101, 10)
    heads = np.stack([np.ones(11), np.where(steps < 50, 1.0, 2.0**steps)], axis=1)
    logged = {"train/loss": LOSS, "lr": [(0, 1e-3), (100, 1e-4)], "accuracy": LOSS}
    lines = run_timeline(logged, [HOT], COVERAGE, {"energy_rms": {"h.0": heads}}, steps, width=width)
    assert [line.split("  ")[0] for line in lines] == ["train/loss", "lr", "h.0 head 1", "steps 0–100"]
    assert all(len(line) <= width for line in lines)
    assert lines[0].endswith("4 → 2")
    assert "energy_rms: alarm since step 50" in lines[-1]
    begins, rises = lines[-1].index("▲"), next(at for at, bar in enumerate(lines[2]) if bar in "▃▄▅▆▇█")
    assert 0 <= rises - begins <= 0.12 * width, "the head rises where the alarm is marked"


def test_runs_that_log_nothing_have_no_timeline() -> None:
    assert run_timeline({}, [HOT], COVERAGE, {"energy_rms": {"h.0": np.ones((3, 2))}}, [0, 1, 2]) == []
    assert run_timeline({"accuracy": LOSS}, [HOT], COVERAGE, {}, []) == []
    assert timeline({"loss": [(0, math.nan)]}) == []


def test_values_that_are_not_finite_leave_gaps() -> None:
    [bars, _] = timeline({"loss": [(0, 2.0), (1, math.nan), (2, math.inf), (3, 1.0)]}, width=60)
    assert bars.endswith("2 → 1")
    assert timeline({"loss\x1b[2J": [(7, 3.0)]})[0].startswith("loss\\x1b[2J")
