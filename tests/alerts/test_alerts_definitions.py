"""Alerts against their definitions written the slow way: one head at a time, in plain Python and float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from attnmonitor.alerts import DEFAULT_RULES, Alerts, AllOf, AnyOf, FiringShare, Rule, Threshold, load_rules, save_rules
from attnmonitor.alerts.heads import Heads
from attnmonitor.alerts.past import MetricPast, Reference
from attnmonitor.alerts.readings import SMALLEST, apply_reading, invert_reading
from attnmonitor.alerts.signals import evaluate
from attnmonitor.alerts.states import FIRING, INACTIVE, PENDING, AlarmStates, advance
from attnmonitor.sample import AlertEvent

NAN = math.nan

# -- The life of one alarm -------------------------------------------------------------------------------------------


def life(seen: list[str], patience: int, hold: int) -> list[tuple[int, int, str]]:
    """Phase, first step and what was told, per sample, of one alarm that sees ill, well, between or nothing."""
    told, phase, since, streak, held = [], INACTIVE, -1, 0, 0
    for step, now in enumerate(seen):
        news = ""
        if phase == FIRING:
            if now != "nothing":
                held += 1
                streak = streak + 1 if now == "well" else 0
            if now == "well" and streak == patience:
                told.append((INACTIVE, -1, "cleared"))
                phase, since, streak, held = INACTIVE, -1, 0, 0
                continue
            if now != "nothing" and held == hold:
                news = "escalated"
        elif now == "ill":
            since = step if phase == INACTIVE else since
            phase, streak = PENDING, streak + 1
            if streak == patience:
                phase, streak, held = FIRING, 0, 0
                news = "fired and escalated" if hold == 0 else "fired"
        elif now in ("well", "between"):
            phase, since, streak = INACTIVE, -1, 0
        told.append((phase, since, news))
    return told


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("hold", [0, 1, 4])
def test_a_thousand_alarms_live_as_one_alarm_is_defined_to(patience, hold):
    words = ("ill", "well", "between", "nothing")
    chance = torch.tensor([0.5, 0.2, 0.1, 0.2])
    drawn = torch.multinomial(chance.expand(1000, 4), 40, True, generator=torch.Generator().manual_seed(0))
    expected = [life([words[i] for i in row], patience, hold) for row in drawn.tolist()]
    states = AlarmStates.inactive(600).extended(AlarmStates.inactive(400))
    assert states.since_step.tolist() == [-1] * 1000
    for step, now in enumerate(drawn.T):
        states, changes = advance(
            states,
            violated=now == 0,
            not_violated=(now == 1) | (now == 2),
            recovered=now == 1,
            patience=patience,
            hold=hold,
            global_step=step,
        )
        news = {(0, 0, 0): "", (1, 0, 0): "fired", (1, 1, 0): "fired and escalated", (0, 1, 0): "escalated"}
        news[0, 0, 1] = "cleared"
        changed = torch.stack([changes.fired, changes.escalated, changes.cleared], -1).int().tolist()
        found = zip(states.phase.tolist(), states.since_step.tolist(), changed, strict=True)
        assert [(phase, since, news[tuple(flags)]) for phase, since, flags in found] == [row[step] for row in expected]


# -- What a threshold sees -------------------------------------------------------------------------------------------

READINGS = {
    "identity": lambda m: m,
    "log": lambda m: math.log(max(m, SMALLEST)),
    "log_slack": lambda m: math.log(max(1 - m, SMALLEST)),
    "log_excess": lambda m: math.log(max(m - 1, SMALLEST)),
}


def median(values) -> float:
    """The lower one where there are two, of the values that are known."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median_low(known) if known else NAN


def signals(threshold: Threshold, rows, is_sick, kept: Reference, is_kept, least_heads: int) -> list[float]:
    """The signal of every head, by the words of `Threshold` and `Reference`."""
    x = [[READINGS[threshold.reading](m) if math.isfinite(m) else NAN for m in row] for row in rows.tolist()]
    now, window = x[-1], slice(-threshold.window - threshold.gap, -threshold.gap)
    heads = range(len(now))

    def median_of_window(head: int, among: Callable[[bool], bool]) -> float:
        before = [row[head] for row, sick in zip(x[window], is_sick[window].tolist(), strict=True) if among(sick[head])]
        return median(before) if sum(not math.isnan(value) for value in before) >= threshold.window / 2 else NAN

    base = [median_of_window(head, among=lambda sick: not sick) for head in heads]
    change = [now[head] - median_of_window(head, among=lambda sick: True) for head in heads]
    enough = sum(not math.isnan(value) for value in change) >= least_heads
    crowd = [median(now) - median(change) if enough else NAN] * len(now)
    for head in heads:
        if is_kept[head] or math.isnan(base[head]):
            base[head], crowd[head] = kept.base[head].item(), kept.peers[head].item()
    change = [now[head] - base[head] for head in heads]
    moved = [0.0 if math.isnan(median(now) - level) else median(now) - level for level in crowd]
    contrast = [change[head] - moved[head] for head in heads]
    spread = 1.4826 * median(abs(value - median(contrast)) for value in contrast)
    spreads = [
        (0 if math.isnan(level) else spread) + abs(shift) / 3 + 0.1 for level, shift in zip(crowd, moved, strict=True)
    ]
    z = [contrast[head] / spreads[head] for head in heads]
    return {"value": now, "change": change, "contrast": contrast, "robust_z": z}[threshold.signal]


@pytest.mark.parametrize("signal", ["value", "change", "contrast", "robust_z"])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("least_heads", [5, 9, 10])
def test_a_signal_is_what_its_definition_gives_head_by_head(signal, reading, least_heads):
    generator = torch.Generator().manual_seed(least_heads)
    threshold = Threshold("query_rms", signal, reading, fire_above=1.0, clear_below=0.5, window=5, gap=3)
    for _ in range(20):
        rows = 3 * torch.rand(11, 9, generator=generator)
        rows[torch.rand(11, 9, generator=generator) < 0.25] = NAN
        if least_heads > 5:
            rows[-9:] = rows[-9:].nan_to_num(nan=0.5)
        past = MetricPast(depth=8)
        is_sick = torch.rand(11, 9, generator=generator) < 0.2
        for row, sick in zip(rows, is_sick, strict=True):
            past.append(row, torch.ones(9, dtype=torch.bool))
            past.exclude_from_baseline(sick)
        assert past.seen.tolist() == rows.isfinite().sum(0).tolist()
        kept = Reference(*torch.randn(2, 9, generator=generator))
        is_kept = torch.rand(9, generator=generator) < 0.3
        found, used = evaluate(threshold, past, frozen=kept, is_frozen=is_kept, least_heads=least_heads)
        expected = torch.tensor(signals(threshold, rows, is_sick, kept, is_kept, least_heads))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(used.base[is_kept], kept.base[is_kept], rtol=0, atol=0)


def test_thresholds_that_differ_in_their_past_alone_are_not_given_each_others():
    generator = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(30, 9, generator=generator)
    past, unknown, nobody = MetricPast(depth=30), Reference.unknown(9), torch.zeros(9, dtype=torch.bool)
    for row in rows:
        past.append(row, ~nobody)
    healthy = torch.zeros(30, 9, dtype=torch.bool)
    first = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5, window=5, gap=3)
    for other in (first, replace(first, window=9), replace(first, gap=7), replace(first, reading="log_excess")):
        for least_heads in (5, 10):
            found, _ = evaluate(other, past, frozen=unknown, is_frozen=nobody, least_heads=least_heads)
            expected = torch.tensor(signals(other, rows, healthy, unknown, nobody, least_heads))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_is_non_finite_only_where_it_was_measured():
    threshold = Threshold("query_rms", "non_finite", fire_above=0.5, clear_below=0.5)
    heads = Heads({"a": 2, "b": 1})
    row, is_measured = heads.flatten({"a": torch.tensor([math.inf, 2.0])})
    past, unknown = MetricPast(depth=1), Reference.unknown(3)
    past.append(row, is_measured)
    found, _ = evaluate(threshold, past, frozen=unknown, is_frozen=is_measured, least_heads=1)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, NAN]), equal_nan=True)


@pytest.mark.parametrize("reading", READINGS)
def test_what_was_read_can_be_told_in_the_metrics_own_unit(reading):
    metric = {"log_slack": torch.linspace(0.01, 0.99, 9), "log_excess": torch.linspace(1.01, 9, 9)}.get(
        reading, torch.linspace(0.1, 5, 9)
    )
    torch.testing.assert_close(invert_reading(reading, apply_reading(reading, metric)), metric)
    lowest = apply_reading(reading, torch.tensor([{"log_slack": 1.0, "log_excess": 1.0}.get(reading, 0.0)]))
    assert lowest.item() == pytest.approx(0.0 if reading == "identity" else math.log(SMALLEST))


# -- What the rules are ------------------------------------------------------------------------------------------------


def test_the_default_rules_are_those_that_the_page_on_alerts_reports_on(tmp_path: Path) -> None:
    """After a change of a level the tables are another rule's: `benchmarks.detection` scores, and writes this file."""
    published = Path(__file__).parents[2] / "docs" / "default_rules.json"
    assert load_rules(published) == DEFAULT_RULES
    save_rules(DEFAULT_RULES, tmp_path / "rules.json")
    assert (tmp_path / "rules.json").read_text() == published.read_text()


def test_what_a_file_of_rules_leaves_out_means_what_it_meant_when_it_was_written() -> None:
    """Files leave out what is at its default: another default would change the alarms of every one of them."""
    when = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5)
    assert when == Threshold(
        "query_rms", "change", "log", fire_above=1.0, clear_below=0.5, fire_below=None, clear_above=None,
        window=15, gap=8, quantile=None,
    )  # fmt: skip
    assert Rule("name", "kind", "query_head", when) == Rule(
        "name", "kind", "query_head", when, patience=2, grace=25, until=None, hold=10, least_heads=8,
        source_only=False, optional=False,
    )  # fmt: skip
    assert FiringShare() == FiringShare(heads=0.25, layers=2 / 3, clear_heads=0.1)


def test_a_threshold_needs_as_much_of_the_past_as_its_baseline_and_otherwise_none() -> None:
    levels = {"fire_above": 1.0, "clear_below": 0.5}
    for signal in ("change", "contrast", "robust_z"):
        assert Threshold("query_rms", signal, window=4, gap=3, **levels).depth == 7
    for signal in ("value", "non_finite"):
        assert Threshold("query_rms", signal, window=4, gap=3, **levels).depth == 1


def test_the_direction_of_a_threshold_is_a_sign_of_one() -> None:
    assert Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5).levels == (1.0, 1.0, 0.5)
    assert Threshold("query_rms", "change", fire_below=-1.0, clear_above=-0.5).levels == (-1.0, -1.0, -0.5)
    for half in ({"fire_above": 1.0}, {"clear_below": 1.0}, {"fire_below": 1.0}, {"clear_above": 1.0}, {}):
        with pytest.raises(ValueError, match="give fire_above and clear_below, or fire_below and clear_above"):
            Rule("half", "test", "query_head", Threshold("query_rms", "change", **half))
    both = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5, fire_below=-1.0)
    with pytest.raises(ValueError, match="one threshold has one direction"):
        Rule("both", "test", "query_head", both)


@pytest.mark.parametrize("group", [AllOf, AnyOf])
def test_conditions_are_checked_however_deep_they_are(group: type) -> None:
    sound = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5)
    for wrong, told in ((AllOf(), "all_of has no conditions"), (AnyOf(), "any_of has no conditions"), ("x", "'x'")):
        with pytest.raises(ValueError, match=told):
            Rule("deep", "test", "query_head", group(sound, group(sound, wrong)))


SIZE = {"metric": "query_rms", "signal": "value", "reading": "identity", "fire_above": 2.0, "clear_below": 1.0}


def observed(watch: Alerts, **series: list[Any]) -> list[AlertEvent]:
    """All events of one layer, of whose heads (or head) ``metric=[...]`` gives the values, a sample after the other."""
    return [
        event
        for step, values in enumerate(zip(*series.values(), strict=True))
        for event in watch.observe(
            {metric: {"a": torch.tensor(value).reshape(-1)} for metric, value in zip(series, values, strict=True)}, step
        )
    ]


def test_a_value_at_a_level_is_not_past_it() -> None:
    watch = Alerts([Rule("size", "test", "query_head", Threshold(**SIZE), patience=1, grace=0)])
    told = [(event.global_step, event.state) for event in observed(watch, query_rms=[2.0, 2.5, 1.0, 0.5])]
    assert told == [(1, "firing"), (3, "cleared")]


def test_the_only_head_of_the_only_layer_is_all_of_the_run() -> None:
    head = Rule("size", "test", "query_head", Threshold(**SIZE), patience=1, grace=0)
    mass = Rule("mass", "mass", "run", FiringShare(heads=1.0, layers=1.0, clear_heads=1.0), patience=1, grace=0)
    events = observed(Alerts([head, mass]), query_rms=[3.0])
    assert [(event.rule, event.value) for event in events] == [("size", 3.0), ("mass", 1.0)]


@pytest.mark.parametrize(("least_heads", "told"), [(4, False), (5, True)])
def test_a_message_says_that_there_are_too_few_heads_when_there_are_fewer_than_needed(
    least_heads: int, told: bool
) -> None:
    left = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5, window=2, gap=1)
    watch = Alerts([Rule("left", "test", "query_head", left, patience=1, grace=0, least_heads=least_heads)])
    [event] = observed(watch, query_rms=[[1.0, 1.0, 1.0, 1.0]] * 5 + [[1.0, 1.0, 1.0, 9.0]])
    assert event.global_step == 5
    assert ("too few heads" in event.message) == told


@pytest.mark.parametrize(("window", "missing", "stands"), [(4, 2, False), (4, 3, True), (5, 2, False), (5, 3, True)])
def test_a_baseline_needs_half_of_its_window(window: int, missing: int, stands: bool) -> None:
    """With more missing there is none, and a head that jumps is not called changed."""
    change = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5, window=window, gap=1)
    watch = Alerts([Rule("changed", "test", "query_head", change, patience=1, grace=0)])
    assert observed(watch, query_rms=[math.nan] * missing + [1.0] * (window - missing)) == []
    assert (observed(watch, query_rms=[9.0]) == []) == stands


def test_a_watch_waits_as_long_as_its_slowest_rule_and_without_rules_not_at_all() -> None:
    size = Threshold(**SIZE)
    rules = [Rule(f"after {grace}", "test", "query_head", size, grace=grace) for grace in (3, 7, 5)]
    assert [Alerts(rules).grace, Alerts([]).grace] == [7, 0]


# -- Conditions of several metrics -------------------------------------------------------------------------------------


def both_large(patience: int) -> Rule:
    size, level = dict(SIZE), dict(SIZE, metric="energy_rms")
    return Rule("both", "test", "query_head", AllOf(Threshold(**size), Threshold(**level)), patience=patience, grace=0)


def states_of(watch: Alerts, samples: list[tuple[float, float]]) -> list[tuple[int, str]]:
    query, energy = map(list, zip(*samples, strict=True))
    return [(event.global_step, event.state) for event in observed(watch, query_rms=query, energy_rms=energy)]


def test_what_one_condition_of_all_denies_no_missing_value_of_another_keeps_up() -> None:
    large, small, missing = 3.0, 0.5, math.nan
    assert states_of(Alerts([both_large(2)]), [(large, large), (small, missing), (large, large)]) == []
    assert states_of(Alerts([both_large(2)]), [(large, large), (large, missing), (large, large)]) == [(2, "firing")]
    assert states_of(Alerts([both_large(1)]), [(large, large), (small, missing)]) == [(0, "firing"), (1, "cleared")]
    assert states_of(Alerts([both_large(1)]), [(large, large), (large, missing)]) == [(0, "firing")]


def test_an_alarm_is_told_to_its_end_by_the_threshold_that_raised_it() -> None:
    either = AnyOf(Threshold(**SIZE), Threshold(**dict(SIZE, metric="energy_rms")))
    watch = Alerts([Rule("either", "test", "query_head", either, patience=1, grace=0, hold=2)])
    events = observed(watch, query_rms=[1.5, 3.0, 1.5, 0.5], energy_rms=[3.0, 1.5, 1.5, 0.5])
    messages = [(event.state, event.message.split()[0]) for event in events]
    assert messages == [("firing", "energy_rms"), ("firing", "energy_rms"), ("cleared", "energy_rms")]


def test_recovery_is_no_fault_also_where_nothing_but_the_rules_own_metric_is_measured() -> None:
    grown = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5, window=4, gap=1)
    faded = Threshold("query_rms", "change", fire_below=-1.0, clear_above=-0.5, window=4, gap=1)
    rules = [
        Rule(name, "test", "query_head", when, patience=1, grace=0) for name, when in (("up", grown), ("down", faded))
    ]
    events = observed(Alerts(rules), query_rms=[1.0] * 6 + [9.0] * 8 + [1.0] * 8)
    assert [(event.rule, event.state, event.global_step) for event in events] == [
        ("up", "firing", 6),
        ("up", "cleared", 14),
    ]


def test_a_rule_over_a_metric_that_the_saved_state_does_not_know_begins_without_a_past() -> None:
    before, after = Alerts([Rule("size", "test", "query_head", Threshold(**SIZE), grace=0)]), Alerts([both_large(1)])
    observed(before, query_rms=[1.0])
    after.load_state_dict(before.state_dict())
    assert states_of(after, [(1.0, 1.0), (3.0, 3.0)]) == [(1, "firing")]
