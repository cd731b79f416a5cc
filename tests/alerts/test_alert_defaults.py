"""The default rules on healthy and faulty runs."""

from __future__ import annotations

import math

import pytest
from alert_runs import (
    NAN,
    contrast_rule,
    events_of,
    heads_run,
    healthy_run,
    plain_rule,
    tensors,
)

from attnmonitor.alerts import (
    DEFAULT_RULES,
    Alerts,
    Threshold,
    notifications_of,
)
from attnmonitor.alerts.judged import judged_values
from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS
from attnmonitor.sample import LayerCoverage


def test_default_rules_need_default_metrics_only():
    assert Alerts().required_metrics <= set(DEFAULT_METRICS)
    named = {metric for rule in DEFAULT_RULES for metric in rule.metrics}
    assert not named & {"attention_entropy", "max_logit", "sink_mass", "energy_effective_rank"}
    kinds = {rule.kind for rule in DEFAULT_RULES}
    of_heads = {"logit_blowup", "dead_head", "silent_head", "twin_heads", "key_sink", "rank_collapse", "non_finite"}
    assert kinds == of_heads | {"broken_start", "mass"}


def test_healthy_run_with_drift_is_silent():
    assert events_of(list(DEFAULT_RULES), healthy_run(120, layers=4)) == []


@pytest.mark.parametrize(
    ("metric", "faulty", "kind"),
    [
        ("energy_rms", 30.0, "logit_blowup"),
        ("query_rms", 0.1, "dead_head"),
        ("key_rms", 0.1, "dead_head"),
        ("key_leverage_max", 0.98, "key_sink"),
        ("key_participation_ratio", 1.1, "rank_collapse"),
    ],
)
def test_each_fault_kind_names_only_its_head(metric, faulty, kind):
    run = healthy_run(60)
    for sample in run[40:]:
        sample[metric]["layers.1"][2] = faulty
    events = events_of(list(DEFAULT_RULES), run)
    assert {(event.layer, event.head, event.kind) for event in events} == {("layers.1", 2, kind)}
    assert events[0].global_step == 410
    assert events[-1].severity == "critical"


@pytest.mark.parametrize(
    ("metric", "rate", "rule"),
    [
        ("query_rms", 0.022, "query_grown"),
        ("key_rms", 0.022, "key_grown"),
        ("query_rms", -0.022, "query_faded"),
        ("key_rms", -0.022, "key_faded"),
    ],
)
def test_long_baseline_finds_slow_drift(metric, rate, rule):
    run = healthy_run(125, noise=0.02)
    for index, sample in enumerate(run):
        for moved in {metric, "energy_rms"}:  # the logits follow
            sample[moved]["layers.1"][2] *= math.exp(rate * max(0, index - 40))
    events = events_of(list(DEFAULT_RULES), run)
    assert {(event.rule, event.layer, event.head) for event in events} == {(rule, "layers.1", 2)}
    assert abs(math.log(events[0].value / events[0].baseline)) > 0.8


@pytest.mark.parametrize(
    ("metric", "faulty", "rules"),
    [
        ("energy_rms", 6.0, {"mass_shift"}),
        ("energy_rms", 100.0, {"mass_shift", "broken_start"}),
        ("key_participation_ratio", 3.0, {"mass_shift"}),
        ("key_norm_participation", 0.2, {"broken_start"}),
        ("energy_rms", NAN, {"non_finite_run"}),
    ],
)
def test_fault_of_all_heads_is_a_run_alarm_that_clears(metric, faulty, rules):
    run = healthy_run(70)
    for sample in run[40:44]:
        sample[metric] = {layer: [faulty] * len(heads) for layer, heads in sample[metric].items()}
    events = events_of(list(DEFAULT_RULES), run)
    states = {(event.rule, event.layer, event.state) for event in events}
    assert states == {(rule, None, state) for rule in rules for state in ("firing", "cleared")}


@pytest.mark.parametrize(
    ("metric", "faulty"),
    [("energy_rms", 30.0), ("query_rms", 0.1), ("key_rms", 9.0), ("key_leverage_max", 0.98), ("energy_rms", NAN)],
)
@pytest.mark.parametrize("length", [7, 10, 30])
def test_head_alarm_clears_after_a_fault_of_any_length(metric, faulty, length):
    run, watch, end = healthy_run(80 + length), Alerts(), 40 + length
    for sample in run[40:end]:
        sample[metric]["layers.1"][2] = faulty
    firing = []
    for index, sample in enumerate(run):
        watch.observe(tensors(sample), index)
        firing.append(bool(watch.firing))
    assert firing[:40] == [False] * 40
    assert all(firing[41:end])
    assert not any(firing[end + 3 :])


@pytest.mark.parametrize("length", [10, 30])
def test_second_fault_is_compared_with_healthy_baseline(length):
    """Queries grow, then fade: the baseline of fading is the healthy size, not that of the first fault."""
    run = healthy_run(60 + length)
    for index, sample in enumerate(run[40:]):
        for moved in ("query_rms", "energy_rms"):
            sample[moved]["layers.1"][2] *= 4.0 if index < length else 0.25
    events = events_of([rule for rule in DEFAULT_RULES if rule.name in ("query_grown", "query_faded")], run)
    began = [event for event in events if (event.state, event.severity) == ("firing", "warning")]
    assert [(event.rule, event.global_step // 10) for event in began] == [
        ("query_grown", 41),
        ("query_faded", 41 + length),
    ]
    assert began[1].baseline == pytest.approx(began[0].baseline, rel=0.2)


@pytest.mark.parametrize(("follows", "rules"), [(True, ["query_grown"]), (False, [])])
def test_queries_that_grow_without_their_logits_are_healthy(follows, rules):
    run = healthy_run(60)
    for sample in run[40:]:
        sample["query_rms"]["layers.1"][2] *= 2.0
        sample["energy_rms"]["layers.1"][2] *= 2.0 if follows else 1.0
    assert [event.rule for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"] == rules


def test_key_ratio_near_one_is_no_shift_of_the_run():
    """From 1.16 to 1.04 the excess falls to a quarter, the ratio by a tenth."""
    run = healthy_run(60)
    for index, sample in enumerate(run):
        for heads in sample["key_participation_ratio"].values():
            heads[:] = [1.16 if index < 40 else 1.04] * len(heads)
    assert events_of([rule for rule in DEFAULT_RULES if rule.name == "mass_shift"], run) == []


def test_level_alarm_excludes_nothing_from_baselines():
    """A head whose level is always high still has a baseline like any other."""
    run = heads_run(60, {5: 4.0}, onset=40)
    high = plain_rule(when=Threshold("query_rms", "value", fire_above=-1.0, clear_below=-2.0))
    assert len({event.head for event in events_of(high, run)}) == 12
    together = [event for event in events_of([high, contrast_rule()], run) if event.rule == "apart"]
    assert together == events_of(contrast_rule(), run) != []


@pytest.mark.parametrize(
    ("fault", "rules"), [(1.0, []), (4.0, ["query_grown", "energy_hot"]), (0.25, ["query_faded", "energy_cold"])]
)
def test_fast_learner_is_healthy_while_all_heads_grow(fault, rules):
    """The growth of all is 5 % per sample, that of one head 9 %: 0.6 more over a baseline, six times their spread."""
    run = healthy_run(50)
    for index, sample in enumerate(run):
        for layer, heads in sample["query_rms"].items():
            sample["query_rms"][layer] = [value * math.exp(0.05 * index) for value in heads]
        sample["query_rms"]["layers.0"][1] *= math.exp(0.04 * index)
        for moved in ("query_rms", "energy_rms"):
            sample[moved]["layers.1"][2] *= fault if index >= 40 else 1.0
    began = [event for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"]
    assert [(event.rule, event.layer, event.head) for event in began] == [(rule, "layers.1", 2) for rule in rules]


def test_head_less_than_half_way_back_keeps_its_alarm():
    run, watch = healthy_run(50), Alerts()
    for index, sample in enumerate(run[40:]):
        sample["query_rms"]["layers.1"][2] *= 0.2 if index < 4 else 0.72
    for index, sample in enumerate(run):
        watch.observe(tensors(sample), index)
        assert [event.rule for event in watch.firing] == (["query_faded"] if index > 40 else [])


@pytest.mark.parametrize(
    "moved", [("key_leverage_max",), ("key_incoherence",), ("key_leverage_max", "key_incoherence")]
)
@pytest.mark.parametrize("length", [1, 2])
def test_moderate_sink_needs_both_metrics_in_two_samples(moved, length):
    run = healthy_run(60)
    for sample in run[40 : 40 + length]:
        for metric in moved:
            # Moderate: a third of the slack 1 - leverage is gone, incoherence is half as large again.
            sample[metric]["layers.1"][2] = {"key_leverage_max": 0.58, "key_incoherence": 1.45}[metric]
    began = [(event.rule, event.head, event.global_step) for event in events_of(list(DEFAULT_RULES), run)]
    assert began[:1] == ([("key_sink", 2, 410)] if len(moved) == length == 2 else [])


@pytest.mark.parametrize(("start", "rules"), [(0.4, []), (1.0, ["query_grown"])])
def test_head_that_wakes_up_and_catches_up_is_healthy(start, rules):
    """It more than doubles within 8 samples: from below to the size of the others, or from their size."""
    run = healthy_run(60)
    for index, sample in enumerate(run):
        for moved in ("query_rms", "energy_rms"):
            sample[moved]["layers.1"][2] *= start * 2.4 ** min(max(index - 40, 0) / 8, 1)
    began = [event.rule for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"]
    assert sorted(set(began) - {"energy_hot"}) == rules


def test_no_drift_is_measured_from_the_first_samples():
    """With QK-norm the keys of all heads are nearly equal at first, and some wake up before others."""
    run = healthy_run(90, noise=0.02)
    for sample in run[:20]:
        sample["key_rms"]["layers.1"][2] *= 0.3
    assert events_of([rule for rule in DEFAULT_RULES if rule.name == "key_grown"], run) == []


@pytest.mark.parametrize(("head_dim", "rules"), [(0, ["query_grown"]), (2, []), (4, ["query_grown"])])
def test_sizes_of_heads_of_two_dimensions_are_not_judged(head_dim, rules):
    run, watch = healthy_run(60), Alerts()
    coverage = {f"layers.{layer}": LayerCoverage(f"layers.{layer}", head_dim=head_dim) for layer in range(3)}
    for sample in run[40:]:
        for moved in ("query_rms", "energy_rms"):
            sample[moved]["layers.1"][2] *= 2.0
    found = [watch.observe(judged_values(tensors(sample), coverage), step) for step, sample in enumerate(run)]
    assert [event.rule for events in found for event in events if event.severity == "warning"] == rules


def test_positions_are_not_judged_where_they_are_channels():
    coverage = {"tokens": LayerCoverage("tokens"), "channels": LayerCoverage("channels", sees="channels")}
    values = tensors({metric: {layer: [1, 1] for layer in coverage} for metric in ("key_incoherence", "energy_rms")})
    judged = {metric: list(layers) for metric, layers in judged_values(values, coverage).items()}
    assert judged == {"key_incoherence": ["tokens"], "energy_rms": ["tokens", "channels"]}


@pytest.mark.parametrize(
    ("metric", "faulty", "rule"),
    [
        ("query_rms", 0.4, "query_faded"),
        ("key_rms", 0.4, "key_faded"),
        ("energy_rms", 0.1, "energy_cold"),
        ("key_leverage_max", 0.98, "key_sink"),
        ("key_participation_ratio", 1.1, "key_rank"),
    ],
)
def test_fading_and_sinks_need_logits_that_matter(metric, faulty, rule):
    """Where all logits were as small as those of a random start nothing is named, whatever they are now."""
    for small, found in (
        (range(70), []),
        (range(40), []),
        (range(40, 70), [(rule, 41)]),
        (range(45, 70), [(rule, 41)]),
    ):
        run, watch = healthy_run(70), Alerts([each for each in DEFAULT_RULES if each.name == rule])
        for index, sample in enumerate(run):
            if index >= 40:
                sample[metric]["layers.1"][2] = faulty
            if index in small:
                for heads in sample["energy_rms"].values():
                    heads[:] = [0.3 * energy for energy in heads]
        events = [event for index, sample in enumerate(run) for event in watch.observe(tensors(sample), index)]
        assert [(event.rule, event.global_step) for event in events if event.severity == "warning"] == found
        assert len(watch.firing) == len(found)


def test_logits_may_grow_in_all_heads_while_they_are_small():
    """Where a model learns at once all heads sharpen; the softmax of no one freezes below ln 4."""
    for grown, rules in ((3.0, []), (6.0, ["mass_shift"])):
        run = healthy_run(60)
        for sample in run[40:]:
            sample["energy_rms"] = {layer: [grown] * len(heads) for layer, heads in sample["energy_rms"].items()}
        events = events_of([rule for rule in DEFAULT_RULES if rule.name == "mass_shift"], run)
        assert [event.rule for event in events][:1] == rules


@pytest.mark.parametrize(
    ("metric", "before", "after", "rules"),
    [
        ("value_rms", [1.0, 1.0], [1.0, 0.12], ["silent_value"]),  # of two heads each is the other's only peer
        ("value_rms", [1.0, 0.5], [1.0, 0.25], []),
        ("output_share", [0.05, 0.05, 0.6, 0.3], [0.09, 0.08, 0.005, 0.83], ["silent_output"]),  # wrote the most
        ("output_share", [0.02, 0.01, 0.48, 0.49], [0.02, 0.005, 0.48, 0.495], []),
    ],
)
def test_silent_heads_are_far_below_the_others(metric, before, after, rules):
    run = healthy_run(40, layers=1, heads=len(before))
    for index, sample in enumerate(run):
        sample[metric] = {"layers.0": before if index < 35 else after}
    events = events_of([rule for rule in DEFAULT_RULES if rule.kind == "silent_head"], run)
    assert [event.rule for event in events] == rules
    assert all((event.head, event.global_step) == (after.index(min(after)), 360) for event in events)


@pytest.mark.parametrize(
    ("metric", "rule", "patience"),
    [
        ("energy_rms", "dead", 1),
        ("value_rms", "silent_value", 2),
        ("value_spread", "silent_value", 2),
        ("output_share", "silent_output", 2),
    ],
)
@pytest.mark.parametrize("broken", [1, 3, 4])
def test_heads_at_zero_are_named_without_a_past(metric, rule, patience, broken):
    """Also where all heads of a layer, or most, are zero, and no other is left to compare with."""
    run = healthy_run(patience)
    for sample in run:
        sample[metric] = {f"layers.{layer}": [0.2, 0.3, 0.25, 0.25] for layer in range(3)}
        sample[metric]["layers.1"] = [0.0] * broken + [0.25] * (4 - broken)
    found = events_of(list(DEFAULT_RULES), run)
    all_alike = metric == "value_spread" and broken == 4  # a collapse of the layer's tokens, not of a head
    assert [(event.rule, event.layer, event.head) for event in found if event.head is not None] == (
        [] if all_alike else [(rule, "layers.1", head) for head in range(broken)]
    )
    assert "nan" not in "".join(event.message for event in found)


@pytest.mark.parametrize(("size", "rules"), [(0.1, set()), (1.0, {"query_grown", "energy_hot"})])
def test_small_logits_that_grow_are_no_blowup(size, rules):
    run = healthy_run(60)
    for index, sample in enumerate(run):
        sample["energy_rms"] = {layer: [size * x for x in heads] for layer, heads in sample["energy_rms"].items()}
        for moved in ("query_rms", "energy_rms"):
            sample[moved]["layers.1"][2] *= 5.0 if index >= 40 else 1.0
    assert {event.rule for event in events_of(list(DEFAULT_RULES), run) if event.head == 2} == rules


def test_run_whose_heads_are_all_dead_is_named():
    run = healthy_run(2)
    for sample in run:
        sample["energy_rms"] = {layer: [0.0] * len(heads) for layer, heads in sample["energy_rms"].items()}
    assert [(event.rule, event.global_step) for event in events_of(list(DEFAULT_RULES), run)] == [("broken_start", 10)]


def test_fewer_samples_than_grace_are_silent():
    run = healthy_run(24)
    for sample in run[12:]:
        sample["energy_rms"]["layers.1"][2] = 100.0
    assert events_of([rule for rule in DEFAULT_RULES if rule.scope != "run"], run) == []


@pytest.mark.parametrize(
    ("metric", "level", "begin", "rule"),
    [
        ("energy_rms", 30.0, 0, "hot_start"),
        ("energy_rms", 100.0, 3, "broken_start"),
        ("key_norm_participation", 0.2, 3, "keys_gathered"),
        ("energy_rms", 30.0, 1, None),  # sharpness that was earned after the first sample
        ("key_norm_participation", 0.3, 0, None),
    ],
)
def test_broken_and_hot_start_fire_by_level(metric, level, begin, rule):
    run = healthy_run(12)
    for sample in run[begin:]:
        sample[metric] = {layer: [level] * len(heads) for layer, heads in sample[metric].items()}
    began = [event for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"]
    assert [(event.rule, event.layer, event.global_step) for event in began] == (
        [(rule, None, 10 * begin + 10)] if rule else []
    )


@pytest.mark.parametrize(
    ("metric", "level", "rule"),
    [("key_participation_ratio", 3.0, "mass_shift"), ("key_norm_participation", 0.2, "broken_start")],
)
def test_keys_of_all_heads_matter_once_they_made_logits(metric, level, rule):
    """Keys of a model that has learned nothing turn and part without a fault, whatever the logits are now."""
    for energy, rules in ((1.0, {rule}), (0.2, set())):
        run = healthy_run(60)
        for index, sample in enumerate(run):
            size = energy if index < 40 else 1.0
            sample["energy_rms"] = {layer: [size] * len(heads) for layer, heads in sample["energy_rms"].items()}
            if index >= 40:
                sample[metric] = {layer: [level] * len(heads) for layer, heads in sample[metric].items()}
        of_keys = [each for each in DEFAULT_RULES if each.name in ("mass_shift", "broken_start", "keys_gathered")]
        assert {event.rule for event in events_of(of_keys, run[:50])} == rules


def test_alarms_of_many_heads_become_a_run_alarm():
    run = healthy_run(60)
    for sample in run[40:]:
        for layer in sample["query_rms"]:
            sample["query_rms"][layer][0] *= 0.1
    events = events_of(list(DEFAULT_RULES), run)
    assert any(event.kind == "mass" and event.layer is None for event in events)
    at_onset = [event for event in events if event.global_step == 410]
    assert len(at_onset) == 4
    [notification] = notifications_of(at_onset)
    assert (notification.rule, notification.level) == ("mass", "error")
    assert "Head alarms that began with it: 3." in notification.text


def test_every_default_metric_is_in_the_catalog():
    assert {metric for rule in DEFAULT_RULES for metric in rule.metrics} <= set(METRICS)
