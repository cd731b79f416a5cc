"""What a rule's condition says about every unit in one sample, and the message for a person.

A condition gives three answers: does it hold, may it hold, may an alarm last? They differ where a value is unknown (the
condition may hold, but it does not) and between the firing and the clearing level (it no longer holds, but an alarm
lasts). ``AllOf`` combines each answer by *and*, ``AnyOf`` by *or*. So a missing value decides nothing anywhere in the
tree.

Letters: U is the number of units the rule may alarm: heads, layers, or 1 for the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.alerts.courses import distance_of
from attnmonitor.alerts.past import Reference, RunPast
from attnmonitor.alerts.readings import FORMULA, invert_reading
from attnmonitor.alerts.rules import AllOf, AnyOf, Condition, FiringShare, Rule, Threshold
from attnmonitor.alerts.signals import evaluate

__all__ = ["Answer", "Finding", "answer_of", "message_of", "share_finding", "subject_of", "threshold_finding"]


@dataclass(frozen=True)
class Answer:
    """What a condition says about each unit, (U,) each; ``leaf`` is the index of the leaf that decided."""

    holds: Tensor
    may_hold: Tensor
    may_last: Tensor
    leaf: Tensor

    def __and__(self, other: Answer) -> Answer:
        return Answer(
            self.holds & other.holds, self.may_hold & other.may_hold, self.may_last & other.may_last, self.leaf
        )

    def __or__(self, other: Answer) -> Answer:
        leaf = torch.where(self.holds, self.leaf, other.leaf)
        return Answer(self.holds | other.holds, self.may_hold | other.may_hold, self.may_last | other.may_last, leaf)


@dataclass(frozen=True)
class Finding:
    """What one leaf finds for each unit, (U,) each: its answer, and the numbers for events and messages."""

    answer: Answer
    value: Tensor
    baseline: Tensor
    signal: Tensor
    distance: Tensor


def answer_of(condition: Condition, answers: Iterator[Answer]) -> Answer:
    """Return the answer of a condition, given the answers of its leaves in order."""
    if not isinstance(condition, (AllOf, AnyOf)):
        return next(answers)
    parts = [answer_of(part, answers) for part in condition.conditions]
    total = parts[0]
    for part in parts[1:]:
        total = total & part if isinstance(condition, AllOf) else total | part
    return total


def threshold_finding(
    index: int,
    threshold: Threshold,
    rule: Rule,
    past: RunPast,
    *,
    frozen: Reference,
    has_alarm: Tensor,  # (U,) bool
) -> tuple[Finding, Reference]:
    """Return what a threshold finds in the present sample, and the reference it used.

    Args:
        index: Index of the threshold among the leaves of the rule.
        threshold: The threshold.
        rule: Its rule.
        past: The run so far, the present sample included.
        frozen: Reference of the sample before.
        has_alarm: (U,) bool: units with a pending or firing alarm, which keep ``frozen``.
    """
    metric_past, heads = past.metrics[threshold.metric], past.heads_of(threshold.metric)
    if rule.scope in ("layer", "run"):
        is_frozen = heads.per_head(has_alarm)
    elif threshold.quantile is None:
        is_frozen = has_alarm
    else:  # a number of the whole model, which one head's alarm does not stop
        is_frozen = torch.zeros(len(heads), dtype=torch.bool)
    signal, reference = evaluate(
        threshold,
        metric_past,
        frozen=frozen.grown_to(len(heads)),
        is_frozen=is_frozen,
        least_heads=rule.least_heads,
    )
    value, baseline = metric_past.rows[-1], invert_reading(threshold.reading, reference.base)
    sign, fire, clear = threshold.levels
    if threshold.quantile is not None:
        per_layer = rule.scope == "layer"
        signal, value, baseline = (
            heads.quantile(row, threshold.quantile, per_layer=per_layer, least=sign > 0).expand(len(has_alarm))
            for row in (signal, value, baseline)
        )
    if threshold.signal == "peers":
        if threshold.quantile is None:
            signal = heads.minus_layer(signal)
        elif signal.isfinite().any():
            signal = signal - signal[signal.isfinite()].max()
    # A missing value may hide an alarm that lasts; a value without a baseline is no reason for an alarm to last.
    is_missing, has_no_baseline = signal.isnan() & value.isnan(), signal.isnan() & ~value.isnan()
    holds, is_recovered = sign * signal > sign * fire, sign * signal < sign * clear
    answer = Answer(
        holds=holds,
        may_hold=holds | is_missing,
        may_last=~(is_recovered | has_no_baseline),
        leaf=torch.full(holds.shape, index),
    )
    return Finding(answer, value, baseline, signal, distance_of(threshold, signal)), reference


def share_finding(index: int, share: FiringShare, firing_share: tuple[float, float]) -> Finding:
    """Return what a share of firing heads finds: for the run, (1,) each.

    Args:
        index: Index of the share among the leaves of the rule.
        share: The share.
        firing_share: Share of the heads, and of the layers, with a firing alarm.
    """
    heads, layers = firing_share
    holds = torch.tensor([heads >= share.heads and layers >= share.layers])
    value = torch.tensor([heads])
    answer = Answer(holds, may_hold=holds, may_last=value >= share.clear_heads, leaf=torch.tensor([index]))
    return Finding(answer, value, torch.full((1,), torch.nan), value, distance_of(share, value))


_QUANTILES = {0.0: "least", 0.5: "median", 1.0: "largest"}


def subject_of(leaf: Threshold | FiringShare) -> str:
    """Return what the values of a leaf are values of: a metric, or a quantile of it over the heads.

    Example:
        >>> subject_of(Threshold("key_rms", fire_above=1.0, clear_below=1.0, quantile=0.5))
        'the median key_rms'
    """
    if isinstance(leaf, FiringShare):
        return "share of heads in alarm"
    if leaf.quantile is None:
        return leaf.metric
    return f"the {_QUANTILES.get(leaf.quantile, f'{leaf.quantile:.0%} quantile of')} {leaf.metric}"


def message_of(leaf: Threshold | FiringShare, finding: Finding, unit: int, *, too_few_heads: bool) -> str:
    """Return one line about the finding of a unit.

    Args:
        leaf: The leaf that decided.
        finding: Its finding.
        unit: Index of the unit.
        too_few_heads: Whether there were too few heads for a comparison.
    """
    signal = float(finding.signal[unit])
    if isinstance(leaf, FiringShare):
        return f"{signal:.0%} of the heads have an alarm of their own (limit {leaf.heads:.0%})"
    what = subject_of(leaf)
    value, baseline = float(finding.value[unit]), float(finding.baseline[unit])
    _, limit, _ = leaf.levels
    if leaf.signal == "non_finite":
        return f"{what} is not finite" if signal else f"{what} is finite"
    if leaf.signal in ("value", "baseline"):
        number = f"is {value:.3g}" if leaf.signal == "value" else f"was {baseline:.3g}"
        of_metric = float(invert_reading(leaf.reading, torch.tensor(limit, dtype=torch.float64)))
        return f"{what} {number} (limit {of_metric:.3g})"
    caveat = "; own past only, too few heads to compare with" if too_few_heads and leaf.signal != "change" else ""
    if leaf.signal == "peers":
        others = "the other heads of its layer" if leaf.quantile is None else "the largest layer"
        return (
            f"{what} is {value:.3g} ({signal:+.2f} from {others} in {FORMULA[leaf.reading].format(leaf.metric)}, "
            f"limit {limit:+.2f})"
        )
    name = {
        "change": "change",
        "offset": "from the median head",
        "contrast": "against the other heads",
        "robust_z": "robust z",
    }[leaf.signal]
    was = "" if math.isnan(baseline) else f", was {baseline:.3g}"  # an offset needs no past
    return (
        f"{what} is {value:.3g}{was} "
        f"({name} {signal:+.2f} in {FORMULA[leaf.reading].format(leaf.metric)}, limit {limit:+.2f}{caveat})"
    )
