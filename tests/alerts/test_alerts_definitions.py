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

# -- The states of one alarm -----------------------------------------------------------------------------------------


def one_alarm(seen: list[str], patience: int, hold: int) -> list[tuple[int, int, str]]:
    """Phase, first step and change of one alarm after each sample, which is one of the conditions below."""
    history, phase, since, streak, held = [], INACTIVE, -1, 0, 0
    for step, now in enumerate(seen):
        change = ""
        if phase == FIRING:
            if now != "missing":
                held += 1
                streak = streak + 1 if now == "recovered" else 0
            if now == "recovered" and streak == patience:
                history.append((INACTIVE, -1, "cleared"))
                phase, since, streak, held = INACTIVE, -1, 0, 0
                continue
            if now != "missing" and held == hold:
                change = "escalated"
        elif now == "violated":
            since = step if phase == INACTIVE else since
            phase, streak = PENDING, streak + 1
            if streak == patience:
                phase, streak, held = FIRING, 0, 0
                change = "fired and escalated" if hold == 0 else "fired"
        elif now in ("recovered", "between"):
            phase, since, streak = INACTIVE, -1, 0
        history.append((phase, since, change))
    return history


@pytest.mark.parametrize("patience", [1, 2, 3])
@pytest.mark.parametrize("hold", [0, 1, 4])
def test_states_match_one_alarm_written_as_a_loop(patience, hold):
    conditions = ("violated", "recovered", "between", "missing")
    chance = torch.tensor([0.5, 0.2, 0.1, 0.2])
    drawn = torch.multinomial(chance.expand(1000, 4), 40, True, generator=torch.Generator().manual_seed(0))
    expected = [one_alarm([conditions[i] for i in row], patience, hold) for row in drawn.tolist()]
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
        change = {(0, 0, 0): "", (1, 0, 0): "fired", (1, 1, 0): "fired and escalated", (0, 1, 0): "escalated"}
        change[0, 0, 1] = "cleared"
        changed = torch.stack([changes.fired, changes.escalated, changes.cleared], -1).int().tolist()
        found = zip(states.phase.tolist(), states.since_step.tolist(), changed, strict=True)
        assert [(phase, since, change[tuple(flags)]) for phase, since, flags in found] == [
            row[step] for row in expected
        ]


# -- What a threshold sees -------------------------------------------------------------------------------------------

READINGS = {
    "identity": lambda m: m,
    "log": lambda m: math.log(max(m, SMALLEST)),
    "log_slack": lambda m: math.log(max(1 - m, SMALLEST)),
    "log_excess": lambda m: math.log(max(m - 1, SMALLEST)),
}


def median(values) -> float:
    """The median of the known values; the lower one where there are two."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.median_low(known) if known else NAN


def signals(threshold: Threshold, rows, is_excluded, kept: Reference, is_kept, least_heads: int) -> list[float]:
    """The signal of every head, as the docstrings of `Threshold` and `Reference` define it."""
    x = [[READINGS[threshold.reading](m) if math.isfinite(m) else NAN for m in row] for row in rows.tolist()]
    number = rows.isfinite().cumsum(0).tolist()  # of each sample with a value, from 1
    now, window = x[-1], slice(-threshold.window - threshold.gap, -threshold.gap)
    heads = range(len(now))

    def median_of_window(head: int, among: Callable[[bool], bool]) -> float:
        before = [
            row[head]
            for row, excluded, of_head in zip(x[window], is_excluded[window].tolist(), number[window], strict=True)
            if among(excluded[head]) and of_head[head] > threshold.skip
        ]
        return median(before) if sum(not math.isnan(value) for value in before) >= threshold.window / 2 else NAN

    base = [median_of_window(head, among=lambda excluded: not excluded) for head in heads]
    change = [now[head] - median_of_window(head, among=lambda excluded: True) for head in heads]
    enough = sum(not math.isnan(value) for value in change) >= least_heads
    peers = [median(now) - median(change) if enough else NAN] * len(now)
    for head in heads:
        if is_kept[head] or math.isnan(base[head]):
            base[head], peers[head] = kept.base[head].item(), kept.peers[head].item()
    change = [now[head] - base[head] for head in heads]
    moved = [0.0 if math.isnan(median(now) - level) else median(now) - level for level in peers]
    contrast = [change[head] - moved[head] for head in heads]
    spread = 1.4826 * median(abs(value - median(contrast)) for value in contrast)
    spreads = [
        (0 if math.isnan(level) else spread) + abs(shift) / 3 + 0.1 for level, shift in zip(peers, moved, strict=True)
    ]
    z = [contrast[head] / spreads[head] for head in heads]
    can_compare = sum(not math.isnan(value) for value in now) >= least_heads
    offset = [now[head] - median(now) if can_compare else change[head] for head in heads]
    found = {"value": now, "change": change, "offset": offset, "contrast": contrast, "robust_z": z}
    return found[threshold.signal]


@pytest.mark.parametrize("signal", ["value", "change", "offset", "contrast", "robust_z"])
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("least_heads", [5, 9, 10])
def test_signals_match_definition_head_by_head(signal, reading, least_heads):
    generator = torch.Generator().manual_seed(least_heads)
    plain = Threshold("query_rms", signal, reading, fire_above=1.0, clear_below=0.5, window=5, gap=3)
    for skip in [0, 5] * 10:
        threshold = replace(plain, skip=skip)
        rows = 3 * torch.rand(11, 9, generator=generator)
        rows[torch.rand(11, 9, generator=generator) < 0.25] = NAN
        if least_heads > 5:
            rows[-9:] = rows[-9:].nan_to_num(nan=0.5)
        past = MetricPast(depth=8)
        is_excluded = torch.rand(11, 9, generator=generator) < 0.2
        for row, excluded in zip(rows, is_excluded, strict=True):
            past.append(row, torch.ones(9, dtype=torch.bool))
            past.exclude_from_baseline(excluded)
        assert past.seen.tolist() == rows.isfinite().sum(0).tolist()
        kept = Reference(*torch.randn(2, 9, generator=generator))
        is_kept = torch.rand(9, generator=generator) < 0.3
        found, used = evaluate(threshold, past, frozen=kept, is_frozen=is_kept, least_heads=least_heads)
        expected = torch.tensor(signals(threshold, rows, is_excluded, kept, is_kept, least_heads))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(used.base[is_kept], kept.base[is_kept], rtol=0, atol=0)


def test_references_are_not_shared_across_windows():
    generator = torch.Generator().manual_seed(0)
    rows = 1 + torch.rand(30, 9, generator=generator)
    past, unknown, nobody = MetricPast(depth=30), Reference.unknown(9), torch.zeros(9, dtype=torch.bool)
    for row in rows:
        past.append(row, ~nobody)
    healthy = torch.zeros(30, 9, dtype=torch.bool)
    first = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5, window=5, gap=3)
    others = [replace(first, **{name: value}) for name, value in {"window": 9, "gap": 7, "skip": 24}.items()]
    for other in (first, *others, replace(first, reading="log_excess")):
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
def test_invert_reading_inverts_apply_reading(reading):
    metric = {"log_slack": torch.linspace(0.01, 0.99, 9), "log_excess": torch.linspace(1.01, 9, 9)}.get(
        reading, torch.linspace(0.1, 5, 9)
    )
    torch.testing.assert_close(invert_reading(reading, apply_reading(reading, metric)), metric)
    lowest = apply_reading(reading, torch.tensor([{"log_slack": 1.0, "log_excess": 1.0}.get(reading, 0.0)]))
    assert lowest.item() == pytest.approx(0.0 if reading == "identity" else math.log(SMALLEST))


# -- What the rules are ------------------------------------------------------------------------------------------------


def test_default_rules_equal_the_published_file(tmp_path: Path) -> None:
    """After a change of a level the published tables are invalid: run `benchmarks.detection`, which writes it."""
    published = Path(__file__).parents[2] / "docs" / "default_rules.json"
    assert load_rules(published) == DEFAULT_RULES
    save_rules(DEFAULT_RULES, tmp_path / "rules.json")
    assert (tmp_path / "rules.json").read_text() == published.read_text()


def test_defaults_of_rule_fields_never_change() -> None:
    """Files leave out fields at their default: a new default would change the alarms of every existing file."""
    when = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5)
    assert when == Threshold(
        "query_rms", "change", "log", fire_above=1.0, clear_below=0.5, fire_below=None, clear_above=None,
        window=15, gap=8, quantile=None, skip=0,
    )  # fmt: skip
    assert Rule("name", "kind", "query_head", when) == Rule(
        "name", "kind", "query_head", when, patience=2, grace=25, until=None, hold=10, least_heads=8,
        source_only=False, optional=False,
    )  # fmt: skip
    assert FiringShare() == FiringShare(heads=0.25, layers=2 / 3, clear_heads=0.1)


def test_depth_is_window_plus_gap_or_one() -> None:
    levels = {"fire_above": 1.0, "clear_below": 0.5}
    for signal in ("change", "offset", "contrast", "robust_z"):
        assert Threshold("query_rms", signal, window=4, gap=3, **levels).depth == 7
    for signal in ("value", "non_finite"):
        assert Threshold("query_rms", signal, window=4, gap=3, **levels).depth == 1


def test_threshold_levels_carry_their_direction() -> None:
    assert Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5).levels == (1.0, 1.0, 0.5)
    assert Threshold("query_rms", "change", fire_below=-1.0, clear_above=-0.5).levels == (-1.0, -1.0, -0.5)
    for half in ({"fire_above": 1.0}, {"clear_below": 1.0}, {"fire_below": 1.0}, {"clear_above": 1.0}, {}):
        with pytest.raises(ValueError, match="give fire_above and clear_below, or fire_below and clear_above"):
            Rule("half", "test", "query_head", Threshold("query_rms", "change", **half))
    both = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5, fire_below=-1.0)
    with pytest.raises(ValueError, match="one threshold has one direction"):
        Rule("both", "test", "query_head", both)


@pytest.mark.parametrize("group", [AllOf, AnyOf])
def test_nested_conditions_are_checked(group: type) -> None:
    sound = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5)
    for wrong, found in ((AllOf(), "all_of has no conditions"), (AnyOf(), "any_of has no conditions"), ("x", "'x'")):
        with pytest.raises(ValueError, match=found):
            Rule("deep", "test", "query_head", group(sound, group(sound, wrong)))


SIZE = {"metric": "query_rms", "signal": "value", "reading": "identity", "fire_above": 2.0, "clear_below": 1.0}


def observed(watch: Alerts, **series: list[Any]) -> list[AlertEvent]:
    """All events of one layer; ``metric=[...]`` has the values of its heads (or head) per sample."""
    return [
        event
        for step, values in enumerate(zip(*series.values(), strict=True))
        for event in watch.observe(
            {metric: {"a": torch.tensor(value).reshape(-1)} for metric, value in zip(series, values, strict=True)}, step
        )
    ]


def test_value_at_a_level_does_not_pass_it() -> None:
    watch = Alerts([Rule("size", "test", "query_head", Threshold(**SIZE), patience=1, grace=0)])
    found = [(event.global_step, event.state) for event in observed(watch, query_rms=[2.0, 2.5, 1.0, 0.5])]
    assert found == [(1, "firing"), (3, "cleared")]


def test_share_of_a_single_head_does_not_hold() -> None:
    head = Rule("size", "test", "query_head", Threshold(**SIZE), patience=1, grace=0)
    mass = Rule("mass", "mass", "run", FiringShare(heads=1.0, layers=1.0, clear_heads=1.0), patience=1, grace=0)
    events = observed(Alerts([head, mass]), query_rms=[3.0])
    assert [(event.rule, event.value) for event in events] == [("size", 3.0)]


@pytest.mark.parametrize(("least_heads", "found"), [(4, False), (5, True)])
def test_message_says_when_there_are_too_few_heads(least_heads: int, found: bool) -> None:
    left = Threshold("query_rms", "contrast", fire_above=1.0, clear_below=0.5, window=2, gap=1)
    watch = Alerts([Rule("left", "test", "query_head", left, patience=1, grace=0, least_heads=least_heads)])
    [event] = observed(watch, query_rms=[[1.0, 1.0, 1.0, 1.0]] * 5 + [[1.0, 1.0, 1.0, 9.0]])
    assert event.global_step == 5
    assert ("too few heads" in event.message) == found


@pytest.mark.parametrize(("window", "missing", "stands"), [(4, 2, False), (4, 3, True), (5, 2, False), (5, 3, True)])
def test_a_baseline_needs_half_of_its_window(window: int, missing: int, stands: bool) -> None:
    """With more missing there is no baseline, and a head that jumps has no change."""
    change = Threshold("query_rms", "change", fire_above=1.0, clear_below=0.5, window=window, gap=1)
    watch = Alerts([Rule("changed", "test", "query_head", change, patience=1, grace=0)])
    assert observed(watch, query_rms=[math.nan] * missing + [1.0] * (window - missing)) == []
    assert (observed(watch, query_rms=[9.0]) == []) == stands


def test_grace_is_that_of_the_slowest_rule() -> None:
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


def test_missing_value_does_not_keep_all_of_alive() -> None:
    large, small, missing = 3.0, 0.5, math.nan
    assert states_of(Alerts([both_large(2)]), [(large, large), (small, missing), (large, large)]) == []
    assert states_of(Alerts([both_large(2)]), [(large, large), (large, missing), (large, large)]) == [(2, "firing")]
    assert states_of(Alerts([both_large(1)]), [(large, large), (small, missing)]) == [(0, "firing"), (1, "cleared")]
    assert states_of(Alerts([both_large(1)]), [(large, large), (large, missing)]) == [(0, "firing")]


def test_alarm_is_worded_by_the_threshold_that_raised_it() -> None:
    either = AnyOf(Threshold(**SIZE), Threshold(**dict(SIZE, metric="energy_rms")))
    watch = Alerts([Rule("either", "test", "query_head", either, patience=1, grace=0, hold=2)])
    events = observed(watch, query_rms=[1.5, 3.0, 1.5, 0.5], energy_rms=[3.0, 1.5, 1.5, 0.5])
    messages = [(event.state, event.message.split()[0]) for event in events]
    assert messages == [("firing", "energy_rms"), ("firing", "energy_rms"), ("cleared", "energy_rms")]


def test_recovery_is_not_a_new_fault() -> None:
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


def test_metric_missing_in_state_starts_without_past() -> None:
    before, after = Alerts([Rule("size", "test", "query_head", Threshold(**SIZE), grace=0)]), Alerts([both_large(1)])
    observed(before, query_rms=[1.0])
    after.load_state_dict(before.state_dict())
    assert states_of(after, [(1.0, 1.0), (3.0, 3.0)]) == [(1, "firing")]
