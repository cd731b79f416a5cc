"""The numbers that thresholds are put on, how conditions combine them, and the messages."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from alert_runs import (
    NAN,
    VALUE,
    changes,
    contrast_rule,
    events_of,
    heads_run,
    one_head,
    plain_rule,
)
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.alerts import (
    AllOf,
    AnyOf,
    FiringShare,
    Rule,
    Threshold,
)


def test_contrast_finds_the_head_that_moved():
    events = events_of(contrast_rule(), heads_run(40, {5: 4.0}, onset=30))
    assert [(event.head, event.global_step) for event in events] == [(5, 310)]
    assert events[0].value == pytest.approx(4 * 1.5)
    assert events[0].baseline == pytest.approx(1.5)


def test_change_of_all_heads_cancels():
    assert events_of(contrast_rule(), heads_run(60, {}, onset=0, growth=1.3)) == []
    assert events_of(contrast_rule(), heads_run(60, dict.fromkeys(range(12), 50.0), onset=30)) == []


def test_contrast_of_few_heads_is_change_and_says_so():
    [event] = events_of(contrast_rule(), heads_run(40, {1: 4.0}, onset=30, heads=4))
    assert event.head == 1
    assert "too few heads" in event.message
    assert "too few heads" not in events_of(contrast_rule(), heads_run(40, {1: 4.0}, onset=30))[0].message


def test_lasting_fault_does_not_enter_its_baseline():
    events = events_of(contrast_rule(hold=10), heads_run(300, {5: 4.0}, onset=30, growth=1.01))
    assert changes(events) == [(31, "firing", "warning"), (41, "firing", "critical")]


def test_frozen_reference_follows_drift_of_peers():
    """A firing head is compared with where the others went since, not with where they were."""
    run = heads_run(100, {5: 4.0}, onset=30, growth=1.05)
    for sample in run[60:]:
        sample["query_rms"]["layer"][5] /= 4.0
    assert [(event.state, event.head) for event in events_of(contrast_rule(hold=1000), run)] == [
        ("firing", 5),
        ("cleared", 5),
    ]


def test_ramp_does_not_enter_its_baseline():
    run = one_head([1.0] * 30 + [math.exp(0.15 * min(i, 12)) for i in range(1, 30)])
    rule = plain_rule(when=Threshold("query_rms", "change", fire_above=1.1, clear_below=0.5))
    [event] = events_of(rule, run)[:1]
    assert event.baseline == pytest.approx(1.0)


def test_baseline_is_what_the_change_is_measured_from():
    """Of a head, and of a quantile of all heads: the present sample does not count, neither value nor alarm."""
    large = {"reading": "identity", "fire_above": 1.95, "clear_below": 0.0, "window": 5, "gap": 3}
    fell = Threshold("query_rms", "change", fire_below=-1.0, clear_above=-0.5, window=5, gap=3)
    run = heads_run(40, dict.fromkeys(range(12), 0.1), onset=30)  # heads of size 1 to 2.1
    of_each = Threshold("query_rms", "baseline", **large)
    of_most = Threshold("query_rms", "baseline", quantile=0.75, **large)
    found = [
        {event.head for event in events_of(plain_rule(when=AllOf(fell, was)), run) if event.severity == "warning"}
        for was in (of_each, of_most, replace(of_most, quantile=1.0))
    ]
    assert found == [{10, 11}, set(), set(range(12))]
    [event] = events_of(plain_rule(when=of_each, grace=9), run[:11])[:1]
    assert event.message == "query_rms was 2 (limit 1.95)"


@given(st.lists(st.floats(-3, 3), min_size=30, max_size=30))
def test_change_is_log_ratio_to_median_of_window(logs):
    """Against the definition in float64: the event quotes the median of the 5 samples that ended 3 samples ago."""
    threshold = Threshold("query_rms", "change", fire_above=0.7, clear_below=0.7, window=5, gap=3)
    rule = plain_rule(when=threshold, patience=1, grace=8)
    found = {
        event.global_step // 10: event.baseline for event in events_of(rule, one_head([math.exp(x) for x in logs]))
    }
    begun = False
    for now in range(7, len(logs)):
        change = logs[now] - sorted(logs[now - 7 : now - 2])[2]
        if begun or abs(change - 0.7) < 1e-4:
            break
        begun = change > 0.7
        assert (now in found) == begun
        if begun:
            assert math.log(found[now]) == pytest.approx(sorted(logs[now - 7 : now - 2])[2], abs=1e-4)


def test_robust_z_scales_with_spread_of_peers():
    threshold = Threshold("query_rms", "robust_z", fire_above=4.5, clear_below=2.0)
    rule = replace(contrast_rule(), when=threshold)
    assert [event.head for event in events_of(rule, heads_run(40, {5: 1.7}, onset=30))] == [5]
    assert events_of(rule, heads_run(40, {5: 1.4}, onset=30)) == []
    spread = {head: 1.7 ** (head - 5) for head in range(12)}
    assert events_of(rule, heads_run(40, spread, onset=30)) == []


@pytest.mark.parametrize(("reading", "healthy", "faulty"), [("log_slack", 0.5, 0.99), ("log_excess", 9.0, 1.01)])
def test_slack_and_excess_see_what_nears_one(reading, healthy, faulty):
    metric = "key_leverage_max" if reading == "log_slack" else "key_participation_ratio"
    threshold = Threshold(metric, "change", reading, fire_below=-2.0, clear_above=-1.0)
    rule = Rule("near_one", "test", "kv_head", threshold, grace=0)
    [event] = events_of(rule, one_head([healthy] * 30 + [faulty] * 5, metric))
    assert event.value == pytest.approx(faulty)
    assert event.baseline == pytest.approx(healthy, rel=1e-4)
    assert events_of(rule, one_head([healthy] * 30 + [healthy * 0.9] * 5, metric)) == []


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0, NAN]), min_size=1, max_size=12), st.data())
def test_all_of_and_any_of_are_and_and_or(values, data):
    other = data.draw(st.lists(st.sampled_from([0.0, 1.5, 3.0, NAN]), min_size=len(values), max_size=len(values)))
    part = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0)
    second = replace(part, metric="energy_rms")
    samples = [{"query_rms": {"layer": [a]}, "energy_rms": {"layer": [b]}} for a, b in zip(values, other, strict=True)]
    for group, combine in ((AllOf, all), (AnyOf, any)):
        fired = events_of(plain_rule(when=group(part, second), patience=1), samples)
        expected = next(
            (i for i, pair in enumerate(zip(values, other, strict=True)) if combine(x > 2 for x in pair)), None
        )
        assert (fired[0].global_step // 10 if fired else None) == expected


def test_any_of_quotes_the_part_that_fired():
    part = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0)
    rule = plain_rule(when=AnyOf(AllOf(part, replace(part, metric="energy_rms")), replace(part, fire_above=50.0)))
    samples = [{"query_rms": {"layer": [60.0]}, "energy_rms": {"layer": [0.0]}}] * 3
    [event] = events_of(rule, samples)
    assert "limit 50" in event.message


def test_layer_and_run_rules_use_quantiles_over_heads():
    threshold = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0, quantile=0.5)
    samples = [{"query_rms": {"a": [0, 9, 0], "b": [9, 9, 0]}}] * 3
    [event] = events_of(plain_rule(scope="layer", when=threshold), samples)
    assert (event.layer, event.head, event.value) == ("b", None, 9.0)
    run = plain_rule(scope="run", when=replace(threshold, quantile=0.4))
    assert events_of(run, samples) == []
    [event] = events_of(plain_rule(scope="run", when=replace(threshold, quantile=0.9)), samples)
    assert (event.layer, event.head) == (None, None)


def test_layer_rule_compares_with_the_largest_layer():
    threshold = Threshold("query_rms", "peers", "identity", fire_below=-4.0, clear_above=-3.0, quantile=0.5)
    samples = [{"query_rms": {"a": [10, 10, 0], "b": [5, 5, 10], "c": [7, 7, 7]}}] * 3
    [event] = events_of(plain_rule(scope="layer", when=threshold), samples)
    assert event.layer == "b"


@pytest.mark.parametrize(("quantile", "named"), [(0.75, [("b", 1)]), (0.5, [])])
def test_rules_about_heads_may_ask_for_a_quantile_over_all(quantile, named):
    """The keys of one KV head are large; three of six query heads, in both layers, are."""
    own = Threshold("key_rms", "value", "identity", fire_above=2.0, clear_below=1.0)
    rule = plain_rule(scope="kv_head", when=AllOf(own, replace(own, metric="query_rms", quantile=quantile)))
    samples = [{"query_rms": {"a": [0, 9, 0], "b": [9, 9, 0]}, "key_rms": {"a": [0], "b": [0, 5]}}] * 3
    assert [(event.layer, event.head) for event in events_of(rule, samples)] == named


@pytest.mark.parametrize(
    ("fields", "values", "message"),
    [
        ({"signal": "value", "reading": "identity"}, [4.0], "query_rms is 4 (limit 1)"),
        ({"signal": "value"}, [8.0], "query_rms is 8 (limit 2.72)"),
        ({"signal": "change"}, [2.0, 2.0, 16.0], "query_rms is 16, was 2 (change +2.08 in ln query_rms, limit +1.00)"),
        (
            {"signal": "contrast"},
            [2.0, 2.0, 16.0],
            "query_rms is 16, was 2 (against the other heads +2.08 in ln query_rms, limit +1.00; own past only, too "
            "few heads to compare with)",
        ),
        (
            {"signal": "robust_z"},
            [2.0, 2.0, 16.0],
            "query_rms is 16, was 2 (robust z +20.79 in ln query_rms, limit +1.00; own past only, too few heads to "
            "compare with)",
        ),
        ({"signal": "non_finite"}, [NAN], "query_rms is not finite"),
    ],
)
def test_message_has_value_baseline_signal_and_limit(fields, values, message):
    level = 0.5 if fields["signal"] == "non_finite" else 1.0
    threshold = Threshold("query_rms", fire_above=level, clear_below=0.5, window=2, gap=1, **fields)
    [event] = events_of(plain_rule(when=threshold, patience=1), one_head(values))
    assert event.message == message


def test_messages_of_quantiles_shares_and_recovery():
    threshold = Threshold(**VALUE, reading="identity", fire_above=2.0, clear_below=1.0, quantile=0.75)
    [began] = events_of(plain_rule(scope="run", when=threshold, patience=1), one_head([4.0]))
    assert began.message == "the 75% quantile of query_rms is 4 (limit 2)"
    finite = Threshold("query_rms", "non_finite", fire_above=0.5, clear_below=0.5)
    assert events_of(plain_rule(when=finite, patience=1), one_head([NAN, 1.0]))[-1].message == "query_rms is finite"
    mass = Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0)
    samples = [{"query_rms": {"a": [3.0, 0, 0], "b": [0, value, 0]}} for value in (0, 3.0)]
    events = events_of([mass, plain_rule(patience=1)], samples)
    assert [(event.rule, event.layer, event.head) for event in events] == [
        ("high", "a", 0),
        ("high", "b", 1),
        ("mass", None, None),
    ]
    assert events[-1].message == "33% of the heads have an alarm of their own (limit 25%)"
    assert math.isnan(events[-1].baseline)


def test_one_head_far_away_moves_neither_quantile_nor_share():
    samples = [{"query_rms": {f"layers.{i}": [1.0] for i in range(3)} | {"layers.3": [400.0]}}] * 3
    above = Threshold(**VALUE, reading="identity", fire_above=2.0, clear_below=1.0, quantile=0.75)
    below = Threshold(**VALUE, reading="identity", fire_below=2.0, clear_above=3.0, quantile=0.25)
    mass = Rule("mass", "mass", "run", FiringShare(layers=0.25), patience=1, grace=0)
    for rule in (plain_rule(scope="run", when=above), plain_rule(name="low", scope="run", when=below), mass):
        found = events_of([plain_rule(name="head", patience=1), rule], samples)
        assert {event.scope for event in found} == {"query_head"} | ({"run"} if rule.name == "low" else set())


def test_share_of_no_heads_does_not_fire():
    mass = Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0)
    assert events_of(mass, one_head([1.0])) == []


@pytest.mark.parametrize("layers", [2 / 3, 0.7])
def test_share_fires_at_and_clears_below_its_levels(layers):
    """Three of twelve heads in two of three layers: exactly a quarter, exactly two thirds."""
    mass = Rule("mass", "mass", "run", FiringShare(layers=layers, clear_heads=2 / 12), patience=1, grace=0)
    violated = [{0, 1, 4}, {0, 1}, {0}]
    samples = [
        {"query_rms": {f"layers.{i}": [3.0 * (4 * i + j in heads) for j in range(4)] for i in range(3)}}
        for heads in violated
    ]
    events = [event for event in events_of([plain_rule(patience=1), mass], samples) if event.rule == "mass"]
    expected = [(0, "firing", "warning"), (2, "cleared", "warning")] if layers < 0.7 else []
    assert changes(events) == expected
