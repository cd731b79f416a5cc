"""What a person is sent when alarms begin and end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.alerts import DEFAULT_RULES, notifications_of
from attnmonitor.sample import AlertEvent


def event(**fields) -> AlertEvent:
    base = {"rule": "energy_hot", "kind": "logit_blowup", "scope": "query_head", "layer": "l", "head": 0, "value": 9.0}
    return AlertEvent(**{**base, "baseline": 1.0, "global_step": 50, "state": "firing", "since_step": 40, **fields})


def test_one_notification_per_rule_however_many_heads():
    events = [event(head=head, message="energy_rms is 9, was 1") for head in range(30)]
    [notification] = notifications_of([*events, event(head=31, state="cleared")])
    assert notification.text.count("alarm:") == 8
    assert "... and 22 more" in notification.text
    assert "l head 0: alarm: energy_rms is 9, was 1, since step 40" in notification.text
    assert "recovered" in notification.text
    assert "Try:" in notification.text
    assert notification.level == "warning"


def test_notification_names_heads_and_counts_the_rest():
    began = [event(head=head, message="m") for head in range(9)]
    over = [event(head=head, message="m", state="cleared") for head in range(10)]
    [notification] = notifications_of([*began, *over])
    lines = notification.text.splitlines()
    assert lines[0] == "step 50, l head 0: alarm: m, since step 40"
    assert lines[8] == "... and 1 more"
    assert lines[9] == "step 50, l head 0: recovered: m, since step 40"
    assert lines[17] == "... and 2 more recovered"
    assert [line.split(":")[0] for line in lines[18:]] == ["Usually", "Try"]
    [short] = notifications_of([*began[:8], *over[:8]])
    assert "more" not in short.text.replace("gradient", "")
    [recovered] = notifications_of(over[:1])
    assert recovered.text == "step 50, l head 0: recovered: m, since step 40"
    assert recovered.level == "info"
    [own] = notifications_of([event(kind="mine", rule="r", message="m")])
    assert (own.title, own.text) == ("mine (r)", "step 50, l head 0: alarm: m, since step 40")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"scope": "kv_head"}, "step 50, l KV head 0: alarm: m, since step 40"),
        ({"scope": "layer", "head": None}, "step 50, l: alarm: m, since step 40"),
        ({"scope": "run", "layer": None, "head": None}, "step 50, the whole run: alarm: m, since step 40"),
        ({"severity": "critical"}, "step 50, l head 0: still: m, since step 40"),
        ({"severity": "critical", "state": "cleared"}, "step 50, l head 0: recovered: m, since step 40"),
    ],
)
def test_a_line_names_the_head_the_layer_or_the_run(fields, line):
    assert notifications_of([event(kind="mine", message="m", **fields)])[0].text == line


def test_run_fault_comes_first_and_includes_symptoms_only():
    mass = event(rule="mass", kind="mass", scope="run", layer=None, head=None)
    symptom, held = event(head=1), event(rule="key_sink", head=2, severity="critical")
    over = event(rule="key_faded", head=3, state="cleared")
    sent = notifications_of([symptom, held, over, mass])
    assert [notification.rule for notification in sent] == ["mass", "key_sink", "key_faded"]
    assert "Head alarms that began with it: 1." in sent[0].text
    # A run at fault in another way, or one that recovers, explains no head.
    for other in (replace(mass, kind="broken_start", rule="broken_start"), replace(mass, state="cleared")):
        first, second = notifications_of([symptom, other])
        assert (first.rule, second.rule) == (other.rule, "energy_hot")
        assert "Head alarms" not in first.text


@given(st.text(min_size=1, max_size=100), st.sampled_from([*sorted({rule.kind for rule in DEFAULT_RULES}), "x" * 80]))
def test_titles_are_short_and_constant_per_rule(rule, kind):
    [first] = notifications_of([event(rule=rule, kind=kind)])
    [second] = notifications_of([event(rule=rule, kind=kind, head=7, state="cleared", global_step=999)])
    assert len(first.title) < 64
    assert first.title.endswith(f"({rule})") or (len(first.title) == 63 and first.title.endswith("..."))
    assert first.title == second.title
    assert second.level == "info"


def test_a_title_that_just_fits_is_not_cut():
    room = 63 - len(notifications_of([event(rule="", kind="other")])[0].title)
    for spare, cut in ((0, False), (-1, True)):
        [sent] = notifications_of([event(rule="x" * (room - spare), kind="other")])
        assert len(sent.title) == 63
        assert sent.title.endswith("...") == cut


def test_default_titles_are_all_different():
    titles = {notifications_of([event(rule=rule.name, kind=rule.kind)])[0].title for rule in DEFAULT_RULES}
    assert len(titles) == len(DEFAULT_RULES)


def test_critical_alarms_and_faults_of_the_run_are_errors():
    assert notifications_of([event(severity="critical")])[0].level == "error"
    assert notifications_of([event(scope="run", kind="broken_start", layer=None, head=None)])[0].level == "error"
    assert notifications_of([]) == []
