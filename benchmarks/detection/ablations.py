"""The default head rules with one of their parts changed or left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from attnmonitor.alerts import DEFAULT_RULES, AllOf, AnyOf, Rule, Threshold
from attnmonitor.metrics.catalog import DEFAULT_METRICS

COLLECTED_BY_DEFAULT = tuple(rule for rule in DEFAULT_RULES if rule.metrics <= set(DEFAULT_METRICS))


def with_thresholds(change: Callable[[Threshold], Threshold | None]) -> tuple[Rule, ...]:
    """Return the head rules with every threshold changed, or left out where the change is None."""

    def changed(condition: object) -> object:
        if isinstance(condition, (AllOf, AnyOf)):
            parts = [part for part in map(changed, condition.conditions) if part is not None]
            return type(condition)(*parts) if parts else None
        return change(condition)

    heads = (rule for rule in COLLECTED_BY_DEFAULT if rule.scope != "run" and rule.kind != "non_finite")
    return tuple(replace(rule, when=when) for rule in heads if (when := changed(rule.when)) is not None)


def _own_past(threshold: Threshold) -> Threshold | None:
    """Compare a head with its own past where the rule compares it with the other heads."""
    if threshold.signal == "robust_z":
        return None
    return replace(threshold, signal="change") if threshold.signal == "contrast" else threshold


def _without_robust_z(threshold: Threshold) -> Threshold | None:
    return None if threshold.signal == "robust_z" else threshold


HEAD_RULES = with_thresholds(lambda threshold: threshold)
ABLATIONS: dict[str, tuple[Rule, ...]] = {
    "head rules as they are": HEAD_RULES,
    "own past instead of the contrast": with_thresholds(_own_past),
    "contrast without robust z": with_thresholds(_without_robust_z),
    "patience of one sample": tuple(replace(rule, patience=1) for rule in HEAD_RULES),
    "grace of 12 samples": tuple(replace(rule, grace=12) for rule in HEAD_RULES),
}
