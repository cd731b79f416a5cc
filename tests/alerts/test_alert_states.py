"""When alarms fire, become critical and clear."""

from __future__ import annotations

import math

import torch
from alert_runs import (
    NAN,
    changes,
    events_of,
    one_head,
    plain_rule,
)
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.alerts import (
    Alerts,
)


def test_alarm_fires_and_clears_after_patience():
    run = one_head([0, 3, 3, 3, 0.5, 0.5, 0.5])
    assert changes(events_of(plain_rule(patience=2), run)) == [(2, "firing", "warning"), (5, "cleared", "warning")]
    assert changes(events_of(plain_rule(patience=1), run)) == [(1, "firing", "warning"), (4, "cleared", "warning")]


def test_single_spike_is_no_alarm():
    assert events_of(plain_rule(patience=2), one_head([0, 9, 0, 9, 0, 9, 0])) == []


def test_event_holds_its_value_and_first_step():
    fired, cleared = events_of(plain_rule(), one_head([0, 3, 4, 0, 0]))
    assert (fired.since_step, fired.value, fired.global_step) == (10, 4.0, 20)
    assert (cleared.since_step, cleared.state, cleared.global_step) == (10, "cleared", 40)


@given(st.lists(st.floats(1.01, 8.0), min_size=1, max_size=40))
def test_value_hovering_above_clearing_level_fires_once(values):
    first, *later = events_of(plain_rule(hold=1000), one_head(values)) or [None]
    assert len(later) <= 1, "from the limit of 2 to 8 a distance can double only once more"
    for event in later:
        assert event.now >= 2 * first.now


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0, NAN, math.inf]), max_size=40), st.integers(1, 4))
def test_firing_and_cleared_alternate_with_patience(values, patience):
    events = events_of(plain_rule(patience=patience, hold=1000), one_head(values))
    assert [event.state for event in events] == ["firing", "cleared"] * (len(events) // 2) + ["firing"] * (
        len(events) % 2
    )
    for event in events:
        certain = [value for value in values[: event.global_step // 10 + 1] if math.isfinite(value)][-patience:]
        assert certain == [3.0 if event.state == "firing" else 0.0] * patience


@given(st.lists(st.sampled_from([0.0, 1.5, 3.0]), max_size=25), st.data())
def test_missing_values_only_delay_events(values, data):
    """NaN never fires and never clears: with any NaN put in between, the same events come in the same order."""
    holes = data.draw(st.lists(st.integers(0, 2), min_size=len(values), max_size=len(values)))
    with_holes = [x for value, hole in zip(values, holes, strict=True) for x in [*([NAN] * hole), value]]
    rule = plain_rule(hold=4)
    expected = [(event.state, event.severity) for event in events_of(rule, one_head(values))]
    assert [(event.state, event.severity) for event in events_of(rule, one_head(with_holes))] == expected


def test_held_alarm_becomes_critical_once():
    assert changes(events_of(plain_rule(patience=1, hold=3), one_head([3] * 9))) == [
        (0, "firing", "warning"),
        (3, "firing", "critical"),
    ]
    assert changes(events_of(plain_rule(patience=1, hold=0), one_head([3] * 9))) == [(0, "firing", "critical")]


def test_firing_is_latest_event_of_each_open_alarm():
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
    assert changes(events_of(plain_rule(patience=1, grace=5), one_head([3] * 8)))[0] == (4, "firing", "warning")
    assert events_of(plain_rule(patience=1, until=3), one_head([0, 0, 0, 3, 3])) == []
    assert changes(events_of(plain_rule(patience=1, until=3), one_head([0, 3, 3, 3, 0, 0]))) == [
        (1, "firing", "warning"),
        (4, "cleared", "warning"),
    ]
