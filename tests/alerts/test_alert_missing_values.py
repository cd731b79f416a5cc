"""Alerts on values that are not finite or not measured."""

from __future__ import annotations

import math

import pytest
import torch
from alert_runs import (
    NAN,
    events_of,
    healthy_run,
    one_head,
    plain_rule,
    tensors,
)

from attnmonitor.alerts import (
    DEFAULT_RULES,
    Alerts,
    Rule,
    Threshold,
)

FINITE_RULES = [rule for rule in DEFAULT_RULES if rule.kind == "non_finite"]


def test_non_finite_names_heads_of_earliest_layer_only():
    run = healthy_run(4)
    for layer, heads in (("layers.1", [2]), ("layers.2", range(4))):
        for head in heads:
            run[2]["energy_rms"][layer][head] = NAN
            run[3]["energy_rms"][layer][head] = NAN
    assert [(e.layer, e.head, e.global_step, e.severity) for e in events_of(FINITE_RULES, run)] == [
        ("layers.1", 2, 20, "critical")
    ]


def test_non_finite_in_all_heads_is_a_run_alarm_only():
    run = healthy_run(6)
    run[2]["energy_rms"]["layers.1"][2] = math.inf
    for sample in run[3:]:
        for metric in ("query_rms", "key_rms", "energy_rms"):
            sample[metric] = {layer: [NAN] * 4 for layer in sample[metric]}
    events = events_of(FINITE_RULES, run)
    assert [(e.scope, e.layer, e.head) for e in events] == [("query_head", "layers.1", 2), ("run", None, None)]


def test_unmeasured_layer_keeps_its_alarm():
    run = healthy_run(60)
    for sample in run[40:]:
        sample["key_rms"]["layers.1"][3] *= 0.2
    for sample in run[45:55]:
        for layers in sample.values():
            del layers["layers.1"]
    keyed = [event for event in events_of(list(DEFAULT_RULES), run) if event.rule == "key_faded"]
    assert [(event.layer, event.head, event.state) for event in keyed][:1] == [("layers.1", 3, "firing")]
    assert all(event.state == "firing" for event in keyed)
    assert all(event.kind == "dead_head" for event in events_of(list(DEFAULT_RULES), run))


def test_sample_without_values_changes_nothing():
    watch = Alerts([plain_rule()])
    watch.observe(tensors(one_head([3])[0]), 0)
    assert watch.observe({}, 10) == []
    assert len(watch.observe(tensors(one_head([3])[0]), 20)) == 1


def test_rare_metric_counts_its_own_samples():
    threshold = Threshold(
        "interaction_participation_ratio", "change", fire_below=-1.0, clear_above=-0.5, window=3, gap=1
    )
    rule = Rule("learned", "rank_collapse", "query_head", threshold, patience=2, grace=3, optional=True)
    run = healthy_run(60)
    for index in range(0, 60, 6):
        run[index]["interaction_participation_ratio"] = {"layers.0": [20.0 if index < 36 else 2.0, 20.0]}
    assert [(event.head, event.global_step) for event in events_of(rule, run)] == [(0, 420)]
    assert "interaction_participation_ratio" not in Alerts([rule]).required_metrics


def test_layer_that_appears_later_is_followed():
    run = [{"query_rms": {"a": [1.0]}}] * 3 + [{"query_rms": {"a": [1.0], "b": [3.0, 1.0]}}] * 3
    assert [(event.layer, event.head) for event in events_of(plain_rule(), run)] == [("b", 0)]


def test_a_changed_number_of_heads_is_an_error():
    watch = Alerts([plain_rule()])
    watch.observe({"query_rms": {"a": torch.ones(4)}}, 0)
    with pytest.raises(ValueError, match=r"'a' arrived with 3 heads but had 4"):
        watch.observe({"query_rms": {"a": torch.ones(3)}}, 10)
