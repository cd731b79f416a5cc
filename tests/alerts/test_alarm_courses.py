"""How far out alarms are: at alarm, now, at the worst; what doubles is an event again; the worst comes first."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from alert_runs import NAN, contrast_rule, events_of, heads_run, one_head, plain_rule, tensors

from attnmonitor.alerts import Alerts, Threshold, replay_text
from attnmonitor.alerts.firing import course_text, most_severe_first
from attnmonitor.alerts.replay import Replayed
from attnmonitor.sample import AlertEvent, worst_first


def watched(rule, samples) -> Alerts:
    alerts = Alerts([rule])
    for index, sample in enumerate(samples):
        alerts.observe(tensors(sample), 10 * index)
    return alerts


def test_alarms_are_grouped_in_the_order_to_look_at_them():
    """The run, critical, farther out, more alarms of a head, earlier; in a group the worst first."""

    def alarm(layer: str | None, distance: float, *, rule: str = "rule", critical: bool = False, began: int = 50):
        scope, head = ("run", None) if layer is None else ("query_head", 0)
        severity = "critical" if critical else "warning"
        event = AlertEvent(rule, "kind", scope, layer, head, 1.0, 1.0, 90, "firing", severity, began)
        return replace(event, distance=distance)

    groups = [
        [alarm(None, 1.1)],
        [alarm("critical", 1.1, critical=True)],
        [alarm("far", 1.9)],
        [alarm("three", 1.5), alarm("three", 1.4, rule="second"), alarm("three", NAN, rule="third")],
        [alarm("two", 1.5), alarm("two", 1.2, rule="second", began=0)],
        [alarm("early", 1.5, began=40)],
        [alarm("late", 1.5)],
    ]
    mixed = [event for group in reversed(groups) for event in reversed(group)]
    assert most_severe_first(mixed) == groups


def test_alarm_has_values_at_alarm_now_and_worst():
    [alarm] = watched(plain_rule(patience=1), one_head([0, 3, 3.5, 2.5])).firing
    assert (alarm.value, alarm.now, alarm.worst, alarm.distance) == (3.0, 2.5, 3.5, 1.25)
    assert course_text(alarm) == "query_rms 3 at alarm, 2.5 now, 3.5 worst"
    [alarm] = watched(plain_rule(patience=1), one_head([0, 3, 3.5, NAN])).firing
    assert math.isnan(alarm.now)
    assert (alarm.worst, alarm.distance) == (3.5, 1.75), "the last that is known"


@pytest.mark.parametrize(("factor", "worst"), [(20.0, max), (1 / 20, min)])
def test_worst_value_is_kept_where_other_heads_follow(factor, worst):
    """Compared with the other heads the head was farthest out before they moved; its value went on."""
    levels = {"fire_above": 0.5, "clear_below": 0.1} if worst is max else {"fire_below": -0.5, "clear_above": -0.1}
    rule = replace(contrast_rule(hold=100), when=Threshold("query_rms", "contrast", **levels))
    run = heads_run(50, {0: factor}, onset=40, heads=8)
    for sample in run[46:]:
        head, *others = sample["query_rms"]["layer"]
        sample["query_rms"]["layer"] = [head * factor**0.1, *(other * factor**0.5 for other in others)]
    before = watched(rule, run[:46]).firing[0]
    [alarm] = [alarm for alarm in watched(rule, run).firing if alarm.head == 0]
    assert alarm.distance < before.distance
    assert alarm.worst == alarm.now == worst(alarm.now, before.worst) != before.worst


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        ([0, 3, 5, 5.9], [10]),
        ([0, 3, 6, 6, 11, 12], [10, 20, 50]),
        ([0, 3, NAN, 6], [10, 30]),
        ([0, 3, 6, 3, 6, 11.9], [10, 20]),
        ([0, 3, 6, 0, 3, 6], [10, 20, 30, 40, 50]),
    ],
)
def test_alarm_that_doubles_is_an_event_again(values, steps):
    events = events_of(plain_rule(patience=1, hold=100), one_head(values))
    assert [event.global_step for event in events] == steps


def test_small_alarms_do_not_hide_a_later_fault():
    """All four heads are in alarm when one of them breaks: it is named first, and it is an event."""
    rule = replace(contrast_rule(hold=5), least_heads=3)
    run = heads_run(60, {0: 3.5, 1: 3.5, 2: 3.5}, onset=20, heads=8)
    for sample in run[45:]:
        sample["query_rms"]["layer"][2] *= 500
    alerts = watched(rule, run)
    assert [alarm.severity for alarm in alerts.firing] == ["critical"] * 3
    assert alerts.firing[0].head == 2
    assert alerts.firing[0].now > 100 * alerts.firing[0].value
    late = [event for event in events_of(rule, run) if event.global_step >= 450]
    assert [(event.head, event.global_step) for event in late] == [(2, 450)]


def test_order_is_severity_then_distance_then_time():
    alarm = AlertEvent("hot", "x", "query_head", "a", 0, 1.0, 1.0, 90, "firing", since_step=50)
    expected = [
        replace(alarm, head=0, severity="critical", distance=math.inf),
        replace(alarm, head=1, distance=6.0),  # so far out that it does not wait to be held
        replace(alarm, head=2, severity="critical", distance=2.0, since_step=10),
        replace(alarm, head=3, severity="critical"),
        replace(alarm, head=4, distance=3.0),
        replace(alarm, head=5, distance=1.1, since_step=10),
        replace(alarm, head=6, distance=1.1, since_step=20),
    ]
    assert [each.head for each in worst_first(expected[::-1])] == list(range(7))


def test_state_without_courses_goes_on():
    first, second = watched(plain_rule(patience=1), one_head([0, 3])), Alerts([plain_rule(patience=1)])
    state = first.state_dict()
    del state["rules"]["high"]["courses"]
    second.load_state_dict(state)
    assert second.observe(tensors(one_head([3.1])[0]), 20) == []
    assert second.firing[0].now == pytest.approx(3.1)
    assert second.observe(tensors(one_head([7])[0]), 30) != []


def test_replay_shows_how_far_alarms_came():
    rule, run = plain_rule(patience=1), one_head([0, 3, 4])
    events = Replayed(events_of(rule, run))
    events.firing = watched(rule, run).firing
    [line] = replay_text(events).splitlines()
    assert line.endswith("; query_rms 3 at alarm, 4 now, 4 worst")


def test_non_finite_head_is_farthest_out():
    rule = replace(plain_rule(), when=replace(plain_rule().when, signal="non_finite", fire_above=0.5, clear_below=0.5))
    alerts = Alerts([replace(rule, name="nan", patience=1), plain_rule(patience=1)])
    alerts.observe({"query_rms": {"a": torch.tensor([1.0, 9.0, math.nan, 1.0])}}, 0)
    assert [(alarm.rule, alarm.head, alarm.distance) for alarm in alerts.firing] == [
        ("nan", 2, math.inf),
        ("high", 1, 4.5),
    ]
