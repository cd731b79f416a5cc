"""Tables have one row per layer and show its alarms."""

from __future__ import annotations

import math
import sys

import pytest
from synthetic_runs import SyntheticRun

from attnmonitor.sample import AlertEvent, LayerCoverage
from attnmonitor.summary.tables import coverage_table, layer_table, print_layer_table


def test_table_has_row_per_layer_with_alarms(capsys: pytest.CaptureFixture[str]) -> None:
    sample = list(SyntheticRun(num_layers=3, num_heads=4, num_samples=5).samples())[-1]
    layer = "model.layers.1.self_attn"
    sick = [AlertEvent("key_sink", "key_sink", "query_head", layer, 2, 9.0, 2.0, 500, "firing", since_step=400)]
    known = {**sample.coverage, "pooler": LayerCoverage("pooler", reason="no softmax [seen]")}
    table = layer_table(sample.values, firing=sick, coverage=known)
    lines = table.splitlines()
    assert len(lines) == 3 + 4
    assert lines[0].split() == ["energy", "energy", "key"]
    assert lines[1].split()[:3] == ["layer", "effective", "rank"]
    assert lines[4].endswith("head 2: key sink since step 400")
    assert lines[6].endswith("not measured: no softmax [seen]")
    assert max(map(len, lines)) < 120
    print_layer_table(sample.values, firing=sick, coverage=known)
    printed = capsys.readouterr().out
    assert "[seen]" in printed, "a reason is shown as it is, not read as rich markup"
    assert "head 2" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_layers_of_which_the_same_is_said_share_a_line() -> None:
    unread, alike = "its output could not be read", "keys of all 4 heads are equal to another's"
    coverage = {
        name: LayerCoverage(name, "sdpa", "self", 4, 4, 8, 0.3, 1e-7, (), remarks=(alike,), values_reason=unread)
        for name in ("h.0", "h.1", "h.2", "h.3", "h.4")
    }
    coverage["h.1"] = LayerCoverage("h.1", "sdpa", "self", 4, 4, 8, 0.3, 1e-7, (), values_reason=unread)
    said = coverage_table(coverage).splitlines()[2 + 5 :]
    assert said == [f"h.0, h.2, h.3 and 1 more: {alike}", f"h.0, h.1, h.2 and 2 more: {unread}"]


def test_plain_table_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.box", None)
    print_layer_table({"energy_rms": {"attn": [1.0, math.nan, 3.0]}})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["attn", "2", "(1–3)"]
