"""Alerts that continue from a saved state."""

from __future__ import annotations

import io

import pytest
import torch
from alert_runs import (
    changes,
    healthy_run,
    one_head,
    plain_rule,
    tensors,
)

from attnmonitor.alerts import (
    Alerts,
)


@pytest.mark.parametrize("cut", [1, 38, 41, 61, 64])
def test_resumed_alerts_give_the_events_of_one_run(cut):
    run = [tensors(sample) for sample in healthy_run(85)]
    for sample in run[40:]:
        sample["energy_rms"]["layers.1"][2] = 30.0
    for sample in run[60:]:
        sample["energy_rms"]["layers.1"][2] = 1.5
    unbroken, first, second = Alerts(), Alerts(), Alerts()
    expected = [unbroken.observe(sample, index) for index, sample in enumerate(run)]
    events = [first.observe(sample, index) for index, sample in enumerate(run[:cut])]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert [event.rule for event in second.firing] == [event.rule for event in first.firing]
    events += [second.observe(sample, index) for index, sample in enumerate(run[cut:], start=cut)]
    assert events == expected
    assert second.firing == unbroken.firing


def test_a_state_is_a_snapshot():
    watch = Alerts([plain_rule()])
    watch.observe(tensors(one_head([3])[0]), 0)
    state = watch.state_dict()
    watch.observe(tensors(one_head([3])[0]), 10)
    fresh = Alerts([plain_rule()])
    fresh.load_state_dict(state)
    assert changes(fresh.observe(tensors(one_head([3])[0]), 10)) == [(1, "firing", "warning")]


def test_changed_rule_starts_anew():
    watch = Alerts([plain_rule()])
    for index in range(3):
        watch.observe(tensors(one_head([3])[0]), index)
    changed = Alerts([plain_rule(patience=3)])
    changed.load_state_dict(watch.state_dict())
    assert changed.firing == []
    assert changed.observe(tensors(one_head([3])[0]), 3) == []


def as_version_0_1_saved_it(state):
    """The same state under the names that version 0.1 had."""
    metrics = {
        metric: {"rows": past["rows"], "is_sick": past["is_excluded"], "seen": past["seen"]}
        for metric, past in state["past"]["metrics"].items()
    }
    rules = {}
    for name, rule in state["rules"].items():
        renamed = {"samples" if key == "num_samples" else key: value for key, value in rule.items()}
        references = [{"base": each["base"], "crowd": each["peers"]} for each in rule["references"]]
        rules[name] = {**renamed, "references": references}
    return {"recent": {"heads": state["past"]["heads"], "pasts": metrics}, "rules": rules}


def test_state_of_version_0_1_is_continued():
    run = [tensors(sample) for sample in healthy_run(60)]
    for sample in run[35:50]:
        sample["energy_rms"]["layers.1"][2] = 30.0
    unbroken, first, second = Alerts(), Alerts(), Alerts()
    expected = [unbroken.observe(sample, index) for index, sample in enumerate(run)]
    for index, sample in enumerate(run[:40]):
        first.observe(sample, index)
    assert first.firing
    second.load_state_dict(as_version_0_1_saved_it(first.state_dict()))
    assert [second.observe(sample, index) for index, sample in enumerate(run[40:], start=40)] == expected[40:]
