"""Alerts on lists of numbers: what a rule sees, when it fires, whom it names, and that it forgets nothing on resume."""

from __future__ import annotations

import io
import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.alerts import (
    DEFAULT_RULES,
    Alerts,
    AllOf,
    AnyOf,
    FiringShare,
    Rule,
    Threshold,
    load_rules,
    notifications_of,
    save_rules,
)
from attnmonitor.metrics.catalog import DEFAULT_METRICS, METRICS
from attnmonitor.sample import AlertEvent

NAN = math.nan


def events_of(rule: Rule | list[Rule], samples: list[dict], **alerts) -> list[AlertEvent]:
    """Every event of a run given as one ``{metric: {layer: [heads]}}`` per sample; the step is ten times the sample."""
    watch = Alerts([rule] if isinstance(rule, Rule) else rule, **alerts)
    return [event for index, sample in enumerate(samples) for event in watch.observe(tensors(sample), 10 * index)]


def tensors(sample: dict) -> dict:
    return {
        metric: {layer: torch.tensor(heads, dtype=torch.float32) for layer, heads in layers.items()}
        for metric, layers in sample.items()
    }


def one_head(values: list[float], metric: str = "query_rms") -> list[dict]:
    return [{metric: {"layer": [value]}} for value in values]


def plain_rule(**fields) -> Rule:
    threshold = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0)
    return Rule(**{"name": "high", "kind": "test", "scope": "query_head", "when": threshold, "grace": 0, **fields})


def told(events: list[AlertEvent]) -> list[tuple[int, str, str]]:
    return [(event.global_step // 10, event.state, event.severity) for event in events]


def healthy_run(num_samples: int, layers: int = 3, heads: int = 4, *, seed: int = 0) -> list[dict]:
    """All default metrics of a run that drifts slowly and alike in all heads, with 5 % of noise of each head's own."""
    noise = torch.Generator().manual_seed(seed)
    start = dict.fromkeys(DEFAULT_METRICS, 1.0) | {
        "key_leverage_max": 0.4,
        "key_participation_ratio": 9.0,
        "energy_participation_ratio": 6.0,
        "key_norm_participation": 0.9,
    }
    samples = []
    for index in range(num_samples):
        drift = 1 + 0.5 * min(index, 20) / 20
        samples.append(
            {
                metric: {
                    f"layers.{layer}": (
                        value
                        * (drift if metric in ("energy_rms", "query_rms", "key_rms") else 1.0)
                        * (0.05 * torch.randn(heads, generator=noise)).exp()
                    ).tolist()
                    for layer in range(layers)
                }
                for metric, value in start.items()
            }
        )
    return samples


# -- The alarm's life ------------------------------------------------------------------------------------------------


def test_an_alarm_fires_after_patience_and_clears_after_patience():
    run = one_head([0, 3, 3, 3, 0.5, 0.5, 0.5])
    assert told(events_of(plain_rule(patience=2), run)) == [(2, "firing", "warning"), (5, "cleared", "warning")]
    assert told(events_of(plain_rule(patience=1), run)) == [(1, "firing", "warning"), (4, "cleared", "warning")]


def test_a_single_spike_is_not_an_alarm():
    assert events_of(plain_rule(patience=2), one_head([0, 9, 0, 9, 0, 9, 0])) == []


def test_an_event_knows_its_beginning_and_its_value():
    fired, cleared = events_of(plain_rule(), one_head([0, 3, 4, 0, 0]))
    assert (fired.since_step, fired.value, fired.global_step) == (10, 4.0, 20)
    assert (cleared.since_step, cleared.state, cleared.global_step) == (10, "cleared", 40)


@given(st.lists(st.floats(1.01, 8.0), min_size=1, max_size=40))
def test_a_value_that_hovers_above_the_clearing_level_fires_at_most_once(values):
    assert len(events_of(plain_rule(hold=1000), one_head(values))) <= 1


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0, NAN, math.inf]), max_size=40), st.integers(1, 4))
def test_firing_and_cleared_alternate_and_each_needs_patience_certain_samples(values, patience):
    events = events_of(plain_rule(patience=patience, hold=1000), one_head(values))
    assert [event.state for event in events] == ["firing", "cleared"] * (len(events) // 2) + ["firing"] * (
        len(events) % 2
    )
    for event in events:
        certain = [value for value in values[: event.global_step // 10 + 1] if math.isfinite(value)][-patience:]
        assert certain == [3.0 if event.state == "firing" else 0.0] * patience


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0]), max_size=25), st.data())
def test_missing_values_change_nothing_but_the_time(values, data):
    """NaN never fires and never clears: with any NaN put in between, the same events come in the same order."""
    holes = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    with_holes = [x for value, hole in zip(values, holes, strict=True) for x in [*([NAN] * hole), value]]
    rule = plain_rule(hold=4)
    expected = [(event.state, event.severity) for event in events_of(rule, one_head(values))]
    assert [(event.state, event.severity) for event in events_of(rule, one_head(with_holes))] == expected


def test_an_alarm_that_holds_becomes_critical_once():
    assert told(events_of(plain_rule(patience=1, hold=3), one_head([3] * 9))) == [
        (0, "firing", "warning"),
        (3, "firing", "critical"),
    ]
    assert told(events_of(plain_rule(patience=1, hold=0), one_head([3] * 9))) == [(0, "firing", "critical")]


def test_what_is_firing_is_the_latest_news_of_every_head_that_fired_and_did_not_clear():
    generator = torch.Generator().manual_seed(0)
    watch, expected, lengths = Alerts([plain_rule(patience=1, hold=2)]), {}, set()
    for step in range(80):
        values = 3 * torch.rand(2, 3, generator=generator).round()
        for event in watch.observe({"query_rms": {"a": values[0], "b": values[1]}}, step):
            expected.pop((event.layer, event.head), None)
            if event.state == "firing":
                expected[event.layer, event.head] = event
        assert {(event.layer, event.head): event for event in watch.firing} == expected
        lengths.add(len(watch.firing))
    assert lengths >= {0, 1, 2, 3, 4}, "too tame a run"


def test_nothing_begins_before_grace_or_after_until():
    assert told(events_of(plain_rule(patience=1, grace=5), one_head([3] * 8)))[0] == (4, "firing", "warning")
    assert events_of(plain_rule(patience=1, until=3), one_head([0, 0, 0, 3, 3])) == []
    assert told(events_of(plain_rule(patience=1, until=3), one_head([0, 3, 3, 3, 0, 0]))) == [
        (1, "firing", "warning"),
        (4, "cleared", "warning"),
    ]


# -- What a threshold sees -------------------------------------------------------------------------------------------


def contrast_rule(**fields) -> Rule:
    threshold = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5)
    return Rule(**{"name": "apart", "kind": "test", "scope": "query_head", "when": threshold, "grace": 0, **fields})


def heads_run(num_samples: int, factor_of_head: dict[int, float], *, onset: int, heads: int = 12, growth: float = 1.0):
    samples = []
    for index in range(num_samples):
        values = [growth**index * (1 + 0.1 * head) for head in range(heads)]
        for head, factor in factor_of_head.items():
            values[head] *= factor if index >= onset else 1.0
        samples.append({"query_rms": {"layer": values}})
    return samples


def test_the_contrast_names_the_one_head_that_left_the_others():
    events = events_of(contrast_rule(), heads_run(40, {5: 4.0}, onset=30))
    assert [(event.head, event.global_step) for event in events] == [(5, 310)]
    assert events[0].value == pytest.approx(4 * 1.5)
    assert events[0].baseline == pytest.approx(1.5)


def test_what_moves_all_heads_alike_cancels():
    assert events_of(contrast_rule(), heads_run(60, {}, onset=0, growth=1.3)) == []
    assert events_of(contrast_rule(), heads_run(60, dict.fromkeys(range(12), 50.0), onset=30)) == []


def test_with_few_heads_the_contrast_is_the_heads_own_past_and_says_so():
    [event] = events_of(contrast_rule(), heads_run(40, {1: 4.0}, onset=30, heads=4))
    assert event.head == 1
    assert "too few heads" in event.message
    assert "too few heads" not in events_of(contrast_rule(), heads_run(40, {1: 4.0}, onset=30))[0].message


def test_a_fault_that_stays_does_not_become_its_own_baseline():
    events = events_of(contrast_rule(hold=10), heads_run(300, {5: 4.0}, onset=30, growth=1.01))
    assert told(events) == [(31, "firing", "warning"), (41, "firing", "critical")]


def test_an_alarm_that_stands_still_follows_the_drift_of_the_others():
    """A firing head is compared with where the others went since, not with where they were."""
    run = heads_run(100, {5: 4.0}, onset=30, growth=1.05)
    for sample in run[60:]:
        sample["query_rms"]["layer"][5] /= 4.0
    assert [(event.state, event.head) for event in events_of(contrast_rule(hold=1000), run)] == [
        ("firing", 5),
        ("cleared", 5),
    ]


def test_a_ramp_does_not_eat_its_own_baseline():
    run = one_head([1.0] * 30 + [math.exp(0.15 * min(i, 12)) for i in range(1, 30)])
    rule = plain_rule(when=Threshold("query_rms", "change", fire_above=1.1, clear_below=0.5))
    [event] = events_of(rule, run)[:1]
    assert event.baseline == pytest.approx(1.0)


@given(st.lists(st.floats(-3, 3), min_size=30, max_size=30))
def test_the_change_is_the_logarithm_over_the_median_of_the_window(logs):
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


def test_robust_z_measures_in_units_of_the_other_heads_spread():
    threshold = Threshold("query_rms", "robust_z", fire_above=4.5, clear_below=2.0)
    rule = replace(contrast_rule(), when=threshold)
    assert [event.head for event in events_of(rule, heads_run(40, {5: 1.7}, onset=30))] == [5]
    assert events_of(rule, heads_run(40, {5: 1.4}, onset=30)) == []
    spread = {head: 1.7 ** (head - 5) for head in range(12)}
    assert events_of(rule, heads_run(40, spread, onset=30)) == []


@pytest.mark.parametrize(("reading", "healthy", "sick"), [("log_slack", 0.5, 0.99), ("log_excess", 9.0, 1.01)])
def test_slack_and_excess_see_what_nears_one(reading, healthy, sick):
    metric = "key_leverage_max" if reading == "log_slack" else "key_participation_ratio"
    threshold = Threshold(metric, "change", reading, fire_below=-2.0, clear_above=-1.0)
    rule = Rule("near_one", "test", "kv_head", threshold, grace=0)
    [event] = events_of(rule, one_head([healthy] * 30 + [sick] * 5, metric))
    assert event.value == pytest.approx(sick)
    assert event.baseline == pytest.approx(healthy, rel=1e-4)
    assert events_of(rule, one_head([healthy] * 30 + [healthy * 0.9] * 5, metric)) == []


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0, NAN]), min_size=1, max_size=12), st.data())
def test_all_of_and_any_of_are_the_logic_of_their_parts(values, data):
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
    assert "limit of 50" in event.message


def test_rules_about_layers_and_the_run_look_at_quantiles_over_heads():
    threshold = Threshold("query_rms", "value", "identity", fire_above=2.0, clear_below=1.0, quantile=0.5)
    samples = [{"query_rms": {"a": [0, 9, 0], "b": [9, 9, 0]}}] * 3
    [event] = events_of(plain_rule(scope="layer", when=threshold), samples)
    assert (event.layer, event.head, event.value) == ("b", None, 9.0)
    run = plain_rule(scope="run", when=replace(threshold, quantile=0.4))
    assert events_of(run, samples) == []
    [event] = events_of(plain_rule(scope="run", when=replace(threshold, quantile=0.9)), samples)
    assert (event.layer, event.head) == (None, None)


@pytest.mark.parametrize(
    ("fields", "values", "message"),
    [
        ({"signal": "value", "reading": "identity"}, [4.0], "query_rms is 4 (query_rms against a limit of 1)"),
        ({"signal": "value"}, [8.0], "query_rms is 8 (ln query_rms against a limit of 1)"),
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
def test_a_message_tells_the_value_what_it_was_the_signal_and_the_limit(fields, values, message):
    level = 0.5 if fields["signal"] == "non_finite" else 1.0
    threshold = Threshold("query_rms", fire_above=level, clear_below=0.5, window=2, gap=1, **fields)
    [event] = events_of(plain_rule(when=threshold, patience=1), one_head(values))
    assert event.message == message


def test_a_message_names_the_quantile_and_a_share_its_own_and_what_is_over():
    threshold = Threshold(**VALUE, reading="identity", fire_above=2.0, clear_below=1.0, quantile=0.75)
    [began] = events_of(plain_rule(scope="run", when=threshold, patience=1), one_head([4.0]))
    assert began.message == "the 75% quantile of query_rms is 4 (the 75% quantile of query_rms against a limit of 2)"
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


def test_a_share_of_no_heads_is_no_share():
    mass = Rule("mass", "mass", "run", FiringShare(), patience=1, grace=0)
    assert events_of(mass, one_head([1.0])) == []


@pytest.mark.parametrize("layers", [2 / 3, 0.7])
def test_a_share_holds_at_its_levels_and_lets_go_below_its_own(layers):
    """Three of twelve heads in two of three layers: exactly a quarter, exactly two thirds."""
    mass = Rule("mass", "mass", "run", FiringShare(layers=layers, clear_heads=1 / 12), patience=1, grace=0)
    ill = [{0, 1, 4}, {0}, set()]
    samples = [
        {"query_rms": {f"layers.{i}": [3.0 * (4 * i + j in heads) for j in range(4)] for i in range(3)}}
        for heads in ill
    ]
    events = [event for event in events_of([plain_rule(patience=1), mass], samples) if event.rule == "mass"]
    expected = [(0, "firing", "warning"), (2, "cleared", "warning")] if layers < 0.7 else []
    assert told(events) == expected


# -- What is not finite, and what is missing -------------------------------------------------------------------------

FINITE_RULES = [rule for rule in DEFAULT_RULES if rule.kind == "non_finite"]


def test_non_finite_names_the_heads_of_the_earliest_layer_only():
    run = healthy_run(4)
    for layer, heads in (("layers.1", [2]), ("layers.2", range(4))):
        for head in heads:
            run[2]["energy_rms"][layer][head] = NAN
            run[3]["energy_rms"][layer][head] = NAN
    assert [(e.layer, e.head, e.global_step, e.severity) for e in events_of(FINITE_RULES, run)] == [
        ("layers.1", 2, 20, "critical")
    ]


def test_after_an_unguarded_step_nobody_new_is_named_and_all_at_once_is_the_run():
    run = healthy_run(6)
    run[2]["energy_rms"]["layers.1"][2] = math.inf
    for sample in run[3:]:
        for metric in ("query_rms", "key_rms", "energy_rms"):
            sample[metric] = {layer: [NAN] * 4 for layer in sample[metric]}
    events = events_of(FINITE_RULES, run)
    assert [(e.scope, e.layer, e.head) for e in events] == [("query_head", "layers.1", 2), ("run", None, None)]


def test_a_layer_that_was_not_measured_is_not_non_finite_and_keeps_its_alarm():
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


def test_a_sample_without_values_changes_nothing():
    watch = Alerts([plain_rule()])
    watch.observe(tensors(one_head([3])[0]), 0)
    assert watch.observe({}, 10) == []
    assert len(watch.observe(tensors(one_head([3])[0]), 20)) == 1


def test_a_metric_that_is_measured_seldom_is_watched_at_its_own_pace():
    threshold = Threshold(
        "interaction_participation_ratio", "change", fire_below=-1.0, clear_above=-0.5, window=3, gap=1
    )
    rule = Rule("learned", "rank_collapse", "query_head", threshold, patience=2, grace=3, optional=True)
    run = healthy_run(60)
    for index in range(0, 60, 6):
        run[index]["interaction_participation_ratio"] = {"layers.0": [20.0 if index < 36 else 2.0, 20.0]}
    assert [(event.head, event.global_step) for event in events_of(rule, run)] == [(0, 420)]
    assert "interaction_participation_ratio" not in Alerts([rule]).required_metrics


def test_a_layer_that_appears_later_is_watched_from_then_on():
    run = [{"query_rms": {"a": [1.0]}}] * 3 + [{"query_rms": {"a": [1.0], "b": [3.0, 1.0]}}] * 3
    assert [(event.layer, event.head) for event in events_of(plain_rule(), run)] == [("b", 0)]


def test_a_changed_number_of_heads_is_an_error():
    watch = Alerts([plain_rule()])
    watch.observe({"query_rms": {"a": torch.ones(4)}}, 0)
    with pytest.raises(ValueError, match=r"'a' arrived with 3 heads but had 4"):
        watch.observe({"query_rms": {"a": torch.ones(3)}}, 10)


# -- The default rules -----------------------------------------------------------------------------------------------


def test_the_default_rules_need_default_metrics_only_and_shun_unsafe_ones():
    assert Alerts().required_metrics <= set(DEFAULT_METRICS)
    named = {metric for rule in DEFAULT_RULES for metric in rule.metrics}
    assert not named & {"attention_entropy", "max_logit", "sink_mass", "energy_effective_rank"}
    kinds = {rule.kind for rule in DEFAULT_RULES}
    assert kinds == {"logit_blowup", "dead_head", "key_sink", "rank_collapse", "non_finite", "broken_start", "mass"}


def test_a_healthy_run_is_silent_whatever_its_drift():
    assert events_of(list(DEFAULT_RULES), healthy_run(120, layers=4)) == []


@pytest.mark.parametrize(
    ("metric", "sick", "kind"),
    [
        ("energy_rms", 30.0, "logit_blowup"),
        ("query_rms", 0.1, "dead_head"),
        ("key_rms", 0.1, "dead_head"),
        ("key_leverage_max", 0.98, "key_sink"),
        ("key_participation_ratio", 1.1, "rank_collapse"),
    ],
)
def test_each_kind_of_fault_names_its_head_within_patience_and_nobody_else(metric, sick, kind):
    run = healthy_run(60)
    for sample in run[40:]:
        sample[metric]["layers.1"][2] = sick
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
def test_a_drift_too_slow_for_the_short_past_is_found_by_the_long_one(metric, rate, rule):
    run = healthy_run(125)
    for index, sample in enumerate(run):
        sample[metric]["layers.1"][2] *= math.exp(rate * max(0, index - 40))
    events = events_of(list(DEFAULT_RULES), run)
    assert {(event.rule, event.layer, event.head) for event in events} == {(rule, "layers.1", 2)}
    assert abs(math.log(events[0].value / events[0].baseline)) > 0.8


@pytest.mark.parametrize(
    ("metric", "sick", "rules"),
    [
        ("energy_rms", 6.0, {"mass_shift"}),
        ("energy_rms", 100.0, {"mass_shift", "broken_start"}),
        ("key_participation_ratio", 3.0, {"mass_shift"}),
        ("key_norm_participation", 0.2, {"broken_start"}),
        ("energy_rms", NAN, {"non_finite_run"}),
    ],
)
def test_what_hits_all_heads_is_the_runs_fault_and_lets_go_when_it_is_over(metric, sick, rules):
    run = healthy_run(70)
    for sample in run[40:44]:
        sample[metric] = {layer: [sick] * len(heads) for layer, heads in sample[metric].items()}
    events = events_of(list(DEFAULT_RULES), run)
    news = {(event.rule, event.layer, event.state) for event in events}
    assert news == {(rule, None, state) for rule in rules for state in ("firing", "cleared")}


@pytest.mark.parametrize(
    ("metric", "sick"),
    [("energy_rms", 30.0), ("query_rms", 0.1), ("key_rms", 9.0), ("key_leverage_max", 0.98), ("energy_rms", NAN)],
)
@pytest.mark.parametrize("length", [7, 10, 30])
def test_what_hits_one_head_lets_go_when_it_is_over_however_long_it_took(metric, sick, length):
    run, watch, end = healthy_run(80 + length), Alerts(), 40 + length
    for sample in run[40:end]:
        sample[metric]["layers.1"][2] = sick
    firing = []
    for index, sample in enumerate(run):
        watch.observe(tensors(sample), index)
        firing.append(bool(watch.firing))
    assert firing[:40] == [False] * 40
    assert all(firing[41:end])
    assert not any(firing[end + 3 :])


@pytest.mark.parametrize("length", [10, 30])
def test_a_fault_is_compared_with_health_also_when_another_one_came_before(length):
    """Queries grow and then fade: the size they faded from is that of a healthy head, not that of the first fault."""
    run = healthy_run(60 + length)
    for index, sample in enumerate(run[40:]):
        sample["query_rms"]["layers.1"][2] *= 4.0 if index < length else 0.25
    events = events_of([rule for rule in DEFAULT_RULES if rule.name in ("query_grown", "query_faded")], run)
    began = [event for event in events if (event.state, event.severity) == ("firing", "warning")]
    assert [(event.rule, event.global_step // 10) for event in began] == [
        ("query_grown", 41),
        ("query_faded", 41 + length),
    ]
    assert began[1].baseline == pytest.approx(began[0].baseline, rel=0.2)


def test_an_alarm_about_a_level_leaves_the_baselines_of_others_alone():
    """A level says nothing of what is normal for a head: one that is high all along is watched like any other."""
    run = heads_run(60, {5: 4.0}, onset=40)
    high = plain_rule(when=Threshold("query_rms", "value", fire_above=-1.0, clear_below=-2.0))
    assert len({event.head for event in events_of(high, run)}) == 12
    together = [event for event in events_of([high, contrast_rule()], run) if event.rule == "apart"]
    assert together == events_of(contrast_rule(), run) != []


@pytest.mark.parametrize(("fault", "rules"), [(1.0, []), (4.0, ["query_grown"]), (0.25, ["query_faded"])])
def test_while_all_heads_grow_one_that_learns_faster_is_healthy_and_a_fault_is_found(fault, rules):
    """The growth of all is 5 % per sample, that of one head 9 %: 0.6 more over a baseline, six times their spread."""
    run = healthy_run(50)
    for index, sample in enumerate(run):
        for layer, heads in sample["query_rms"].items():
            sample["query_rms"][layer] = [value * math.exp(0.05 * index) for value in heads]
        sample["query_rms"]["layers.0"][1] *= math.exp(0.04 * index)
        sample["query_rms"]["layers.1"][2] *= fault if index >= 40 else 1.0
    began = [event for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"]
    assert [(event.rule, event.layer, event.head) for event in began] == [(rule, "layers.1", 2) for rule in rules]


def test_a_head_that_came_back_less_than_half_way_is_not_healthy_yet():
    run, watch = healthy_run(50), Alerts()
    for index, sample in enumerate(run[40:]):
        sample["query_rms"]["layers.1"][2] *= 0.2 if index < 4 else 0.72
    for index, sample in enumerate(run):
        watch.observe(tensors(sample), index)
        assert [event.rule for event in watch.firing] == (["query_faded"] if index > 40 else [])


@pytest.mark.parametrize(
    "moved", [("key_leverage_max",), ("key_incoherence",), ("key_leverage_max", "key_incoherence")]
)
def test_a_key_that_takes_over_needs_two_witnesses_and_then_one_sample_is_enough(moved):
    run = healthy_run(60)
    for sample in run[40:41]:
        for metric in moved:
            # Moderate: a third of the slack 1 - leverage is gone, incoherence is half as large again.
            sample[metric]["layers.1"][2] = {"key_leverage_max": 0.61, "key_incoherence": 1.5}[metric]
    began = [(event.rule, event.head, event.global_step) for event in events_of(list(DEFAULT_RULES), run)]
    assert began[:1] == ([("key_takeover", 2, 400)] if len(moved) == 2 else [])


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
        ("key_norm_participation", 0.3, 3, "broken_start"),
        ("energy_rms", 30.0, 1, None),  # sharpness that was earned after the first sample
        ("key_norm_participation", 0.5, 0, None),
    ],
)
def test_a_broken_start_is_told_by_its_level_and_a_hot_one_by_its_first_two_samples(metric, level, begin, rule):
    run = healthy_run(12)
    for sample in run[begin:]:
        sample[metric] = {layer: [level] * len(heads) for layer, heads in sample[metric].items()}
    began = [event for event in events_of(list(DEFAULT_RULES), run) if event.severity == "warning"]
    assert [(event.rule, event.layer, event.global_step) for event in began] == (
        [(rule, None, 10 * begin + 10)] if rule else []
    )


def test_many_heads_at_once_are_the_runs_fault():
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


# -- Resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 38, 41, 61, 64])
def test_a_resumed_watch_says_what_an_unbroken_one_says(cut):
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
    assert told(fresh.observe(tensors(one_head([3])[0]), 10)) == [(1, "firing", "warning")]


def test_a_rule_that_was_changed_starts_afresh():
    watch = Alerts([plain_rule()])
    for index in range(3):
        watch.observe(tensors(one_head([3])[0]), index)
    changed = Alerts([plain_rule(patience=3)])
    changed.load_state_dict(watch.state_dict())
    assert changed.firing == []
    assert changed.observe(tensors(one_head([3])[0]), 3) == []


# -- Bad input, and rules in files -----------------------------------------------------------------------------------

VALUE = {"metric": "query_rms", "signal": "value"}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"patience": -1}, "rule 'high': patience=-1"),
        ({"patience": 0}, "rule 'high': patience=0"),
        ({"grace": -1}, "rule 'high': grace=-1"),
        ({"scope": "head"}, "rule 'high': scope='head'"),
        ({"scope": "kv_head"}, "rule 'high': scope='kv_head': query_rms belongs to scope 'query_head'"),
        ({"scope": "run"}, "rule 'high': quantile=None"),
        ({"when": AllOf()}, "rule 'high': all_of has no conditions"),
        ({"when": FiringShare()}, "rule 'high': scope='query_head'"),
        ({"when": Threshold(**VALUE, fire_above=1.0, clear_below=2.0)}, "rule 'high': query_rms: .* healthy side"),
        ({"when": Threshold(**VALUE, fire_below=2.0, clear_above=1.0)}, "rule 'high': query_rms: .* healthy side"),
        ({"when": Threshold(**VALUE, fire_above=1.0)}, "rule 'high': query_rms: give fire_above and clear_below"),
        ({"when": Threshold(**VALUE, fire_above=NAN, clear_below=0.0)}, "rule 'high': query_rms: fire_above=nan"),
        ({"when": Threshold("query_rmz", fire_above=1.0, clear_below=0.0)}, "rule 'high': .*'query_rmz'.*query_rms"),
        ({"when": Threshold(**VALUE, fire_above=1.0, clear_below=0.0, gap=0)}, "rule 'high': gap=0"),
    ],
)
def test_a_senseless_rule_is_an_error_that_names_it(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        plain_rule(**fields)


LEAST = {"patience": 1, "grace": 0, "hold": 0, "least_heads": 1, "until": 1}
LEAST_OF_THRESHOLD = {"window": 1, "gap": 1}


@pytest.mark.parametrize("field", [*LEAST, *LEAST_OF_THRESHOLD])
def test_a_count_may_be_its_least_and_neither_less_nor_a_truth_value_nor_a_fraction(field):
    def rule(value):
        if field in LEAST:
            return plain_rule(**{field: value})
        return plain_rule(when=Threshold(**VALUE, fire_above=1.0, clear_below=0.0, **{field: value}))

    least = (LEAST | LEAST_OF_THRESHOLD)[field]
    rule(least)
    for value in (least - 1, True, float(least)):
        with pytest.raises(ValueError, match=f"rule 'high': {field}={value!r}: must be an integer of at least {least}"):
            rule(value)


def test_levels_may_meet_and_quantiles_and_shares_may_be_their_ends():
    Threshold(**VALUE, fire_above=1.0, clear_below=1.0).check("query_head")
    Threshold(**VALUE, fire_below=1.0, clear_above=1.0).check("query_head")
    for quantile in (0.0, 1.0):
        Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=quantile).check("run")
    for quantile in (-0.1, 1.1, None):
        with pytest.raises(ValueError, match=f"quantile={quantile}"):
            Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=quantile).check("layer")
    with pytest.raises(ValueError, match="only rules of scope 'layer' or 'run' take a quantile"):
        Threshold(**VALUE, fire_above=1.0, clear_below=1.0, quantile=0.5).check("query_head")
    FiringShare(heads=1.0, layers=1.0, clear_heads=1.0).check("run")
    for name in ("heads", "layers", "clear_heads"):
        for share in (0.0, 1.01):
            with pytest.raises(ValueError, match=f"{name}={share}: a share must be in"):
                replace(FiringShare(heads=1.0), **{name: share}).check("run")
    with pytest.raises(ValueError, match=r"clear_heads=0\.3 must not exceed heads=0\.25"):
        FiringShare(clear_heads=0.3).check("run")
    with pytest.raises(ValueError, match="AnyOf combines two"):
        Threshold(**VALUE, fire_above=3.0, clear_below=2.0, fire_below=1.0, clear_above=1.5).check("query_head")
    with pytest.raises(ValueError, match="only rules about heads have a source"):
        plain_rule(scope="run", source_only=True, when=FiringShare())


def test_rules_are_values():
    tree = AnyOf(AllOf(Threshold(**VALUE, fire_above=2.0, clear_below=1.0, quantile=0.5), FiringShare()), FiringShare())
    rule = Rule("mine", "test", "run", tree)
    assert len({rule, replace(rule), replace(rule, patience=3)}) == 2
    for record in (rule, tree, *tree.conditions, *rule.thresholds):
        with pytest.raises(FrozenInstanceError):
            setattr(record, fields(record)[0].name, None)


def test_two_rules_of_one_name_and_things_that_are_no_rules_are_errors():
    with pytest.raises(ValueError, match="rule 'high': the name is used twice"):
        Alerts([plain_rule(), plain_rule()])
    with pytest.raises(TypeError, match="expected Rule records"):
        Alerts(["high"])


def test_rules_survive_a_file(tmp_path):
    save_rules(DEFAULT_RULES, tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == DEFAULT_RULES


def test_a_rule_in_a_file_is_what_was_said_of_it_and_no_more(tmp_path):
    when = AnyOf(Threshold(**VALUE, fire_above=1.0, clear_below=0.5, quantile=0.5), FiringShare(heads=0.5))
    save_rules([Rule("mine", "test", "run", when, grace=3)], tmp_path / "rules.json")
    value = {"metric": "query_rms", "signal": "value", "fire_above": 1.0, "clear_below": 0.5, "quantile": 0.5}
    assert json.loads((tmp_path / "rules.json").read_text()) == [
        {
            "name": "mine",
            "kind": "test",
            "scope": "run",
            "when": {"any_of": [value, {"firing_share": {"heads": 0.5}}]},
            "grace": 3,
        }
    ]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda rule: rule.update(patient=3), "rule 'high': unknown field 'patient'"),
        (lambda rule: rule["when"].update(fire_over=3), "rule 'high': unknown field 'fire_over'"),
        (lambda rule: rule.pop("kind"), "rule 'high': Rule lacks the field 'kind'"),
        (lambda rule: rule.update(when={"any_of": 3}), "rule 'high': any_of: expected a list"),
        (lambda rule: rule.update(when=[]), "rule 'high': expected an object with the fields of Threshold"),
        (lambda rule: rule.update(patience="two"), "rule 'high': patience='two'"),
        (lambda rule: rule.pop("name"), "rule 'number 0': Rule lacks the field 'name'"),
    ],
)
def test_a_bad_rules_file_is_an_error_that_names_the_rule(tmp_path, change, complaint):
    path = tmp_path / "rules.json"
    save_rules([plain_rule()], path)
    rules = json.loads(path.read_text())
    change(rules[0])
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match=complaint):
        load_rules(path)


def test_a_file_that_is_not_a_list_of_rules_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    for name, complaint in (("a.json", "not JSON"), ("b.json", "expected a list of rules")):
        with pytest.raises(ValueError, match=complaint):
            load_rules(tmp_path / name)
