"""One rule at work: what its condition sees of every head, and the alarms that follow.

A condition is asked three questions at once: does it hold, may it hold, may it last? They differ where a value is
unknown (it may hold, but it does not) and between the firing and the clearing level (it no longer holds, but it lasts).
``AllOf`` is a logical and of each answer and ``AnyOf`` a logical or, so a missing value counts for neither side
anywhere in the tree.

Letters: U is the number of units the rule may alarm: heads, layers, or 1 for the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnmonitor.alerts.rules import AllOf, AnyOf, Condition, FiringShare, Rule, Threshold, leaves, to_plain
from attnmonitor.alerts.signals import Recent, Reference, Unit, evaluate, unread
from attnmonitor.alerts.states import FIRING, INACTIVE, AlarmStates, advance
from attnmonitor.sample import AlertEvent

__all__ = ["RuleWatch"]


@dataclass(frozen=True)
class Answer:
    """What a condition says of each unit, (U,) each; ``leaf`` is the number of the leaf that speaks for it."""

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
class Seen:
    """What one leaf sees of each unit, (U,) each: its answer, and the figures a person is told."""

    answer: Answer
    value: Tensor
    baseline: Tensor
    signal: Tensor


def answer_of(condition: Condition, answers: Iterator[Answer]) -> Answer:
    """Return what a condition says, given what its leaves say in order."""
    if not isinstance(condition, (AllOf, AnyOf)):
        return next(answers)
    parts = [answer_of(part, answers) for part in condition.conditions]
    total = parts[0]
    for part in parts[1:]:
        total = total & part if isinstance(condition, AllOf) else total | part
    return total


class RuleWatch:
    """A rule and all that it remembers: its alarms, what each is compared with, what is firing.

    Args:
        rule: The rule.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.samples = 0
        self.states = AlarmStates.inactive(0)
        self.leaf = torch.zeros(0, dtype=torch.int64)  # (U,) number of the leaf an alarm began with
        self.references = [Reference.unknown(0) for _ in leaves(rule.when)]
        self.firing: dict[Unit, AlertEvent] = {}

    def step(self, recent: Recent, firing_share: tuple[float, float], global_step: int) -> list[AlertEvent]:
        """Look at the latest sample and return what began, grew critical or ceased.

        Args:
            recent: The run so far, this sample included.
            firing_share: Share of the heads, and of the layers, that have a head alarm.
            global_step: Of this sample.
        """
        units = recent.units(self.rule.scope)
        grown = len(units) - len(self.leaf)
        self.samples += 1
        if grown:
            self.states = self.states.followed_by(AlarmStates.inactive(grown))
            self.leaf = torch.cat([self.leaf, self.leaf.new_zeros(grown)])
        seen = [
            _see_share(number, leaf, firing_share) if isinstance(leaf, FiringShare) else self._see(number, leaf, recent)
            for number, leaf in enumerate(leaves(self.rule.when))
        ]
        answer = answer_of(self.rule.when, iter([leaf.answer for leaf in seen]))
        was_firing, before = self.states.phase == FIRING, self.states.since_step
        self.leaf = torch.where(answer.holds & ~was_firing, answer.leaf, self.leaf)
        self.states, changes = advance(
            self.states,
            ill=answer.holds & (was_firing | self._may_begin(answer.holds, recent)),
            not_ill=~answer.may_hold,
            well=~answer.may_last,
            patience=self.rule.patience,
            hold=self.rule.hold,
            global_step=global_step,
        )
        since_step = torch.where(changes.cleared, before, self.states.since_step)
        changed = (changes.fired | changes.escalated | changes.cleared).nonzero().flatten().tolist()
        events = [
            AlertEvent(
                rule=self.rule.name,
                kind=self.rule.kind,
                scope=self.rule.scope,
                layer=units[index][0],
                head=units[index][1],
                value=float(seen[self.leaf[index]].value[index]),
                baseline=float(seen[self.leaf[index]].baseline[index]),
                global_step=global_step,
                state="cleared" if changes.cleared[index] else "firing",
                severity="critical" if self.states.held[index] >= self.rule.hold else "warning",
                since_step=int(since_step[index]),
                message=self._message(seen[self.leaf[index]], index, recent),
            )
            for index in changed
        ]
        for event in events:
            unit = (event.layer, event.head)
            self.firing = {key: kept for key, kept in self.firing.items() if key != unit}
            if event.state == "firing":
                self.firing[unit] = event
        return events

    def mark_sick(self, recent: Recent) -> None:
        """Leave the present sample out of the baselines of heads that an alarm about a baseline lives in."""
        for metric in {leaf.metric for leaf in self.rule.thresholds if leaf.has_baseline and leaf.quantile is None}:
            recent.pasts[metric].mark_sick(self.states.phase != INACTIVE)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors."""
        return {
            "rule": to_plain(self.rule),
            "samples": self.samples,
            "states": dict(vars(self.states)),
            "leaf": self.leaf,
            "references": [dict(vars(reference)) for reference in self.references],
            "firing": [dataclasses.asdict(event) for event in self.firing.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same rule; a rule that was changed meanwhile starts afresh."""
        if state["rule"] != to_plain(self.rule):
            return
        self.samples = state["samples"]
        self.states = AlarmStates(**state["states"])
        self.leaf = state["leaf"]
        self.references = [Reference(**reference) for reference in state["references"]]
        self.firing = {(event["layer"], event["head"]): AlertEvent(**event) for event in state["firing"]}

    # -- Looking ---------------------------------------------------------------------------------------------------

    def _see(self, number: int, leaf: Threshold, recent: Recent) -> Seen:
        past, heads = recent.pasts[leaf.metric], recent.heads_of(leaf.metric)
        is_alive = self.states.phase != INACTIVE
        signal, self.references[number] = evaluate(
            leaf,
            past,
            kept=self.references[number].grown_to(len(heads)),
            is_kept=is_alive if leaf.quantile is None else heads.scatter(is_alive),
            least_heads=self.rule.least_heads,
        )
        value, baseline = past.rows[-1], unread(leaf, self.references[number].base)
        if leaf.quantile is not None:
            is_layer = self.rule.scope == "layer"
            signal, value, baseline = (
                heads.gather(row, leaf.quantile, per_layer=is_layer) for row in (signal, value, baseline)
            )
        sign, fire, clear = leaf.levels
        # A missing value may hide an alarm that lasts; a value that has no baseline yet is no reason for one.
        is_missing, is_new = signal.isnan() & value.isnan(), signal.isnan() & ~value.isnan()
        holds, is_over = sign * signal > sign * fire, sign * signal < sign * clear
        answer = Answer(holds, holds | is_missing, ~(is_over | is_new), torch.full(holds.shape, number))
        return Seen(answer, value, baseline, signal)

    def _may_begin(self, holds: Tensor, recent: Recent) -> Tensor:
        """Return which units may become ill at all: not before grace, not after ``until``, only at the source."""
        rule = self.rule
        allowed = torch.full_like(holds, rule.until is None or self.samples <= rule.until)
        for threshold in rule.thresholds:
            is_known = recent.pasts[threshold.metric].seen >= rule.grace
            allowed = allowed & (is_known if threshold.quantile is None else is_known.any())
        if rule.source_only and holds.any():
            if holds.all() or FIRING in self.states.phase:
                return torch.zeros_like(allowed)
            layers = torch.split(holds, list(recent.heads[rule.scope].layers.values()))
            source = next(index for index, layer in enumerate(layers) if layer.any())
            allowed = allowed & torch.cat([torch.full_like(layer, i == source) for i, layer in enumerate(layers)])
        return allowed

    def _message(self, seen: Seen, index: int, recent: Recent) -> str:
        leaf = list(leaves(self.rule.when))[int(self.leaf[index])]
        signal = float(seen.signal[index])
        if isinstance(leaf, FiringShare):
            return f"{signal:.0%} of the heads have an alarm of their own (limit {leaf.heads:.0%})"
        what = leaf.metric if leaf.quantile is None else f"the {leaf.quantile:.0%} quantile of {leaf.metric}"
        value, baseline = float(seen.value[index]), float(seen.baseline[index])
        _, limit, _ = leaf.levels
        if leaf.signal == "non_finite":
            return f"{what} is not finite" if signal else f"{what} is finite"
        if leaf.signal == "value":
            return f"{what} is {value:.3g} ({_FORMULA[leaf.reading].format(what)} against a limit of {limit:.3g})"
        lacks_heads = leaf.signal != "change" and len(recent.heads_of(leaf.metric)) < self.rule.least_heads
        against = "; own past only, too few heads to compare with" if lacks_heads else ""
        name = {"change": "change", "contrast": "against the other heads", "robust_z": "robust z"}[leaf.signal]
        return (
            f"{what} is {value:.3g}, was {baseline:.3g} "
            f"({name} {signal:+.2f} in {_FORMULA[leaf.reading].format(leaf.metric)}, limit {limit:+.2f}{against})"
        )


_FORMULA = {"identity": "{}", "log": "ln {}", "log_slack": "ln(1 - {})", "log_excess": "ln({} - 1)"}


def _see_share(number: int, leaf: FiringShare, firing_share: tuple[float, float]) -> Seen:
    heads, layers = firing_share
    holds = torch.tensor([heads >= leaf.heads and layers >= leaf.layers])
    share = torch.tensor([heads])
    answer = Answer(holds, holds, share >= leaf.clear_heads, torch.tensor([number]))
    return Seen(answer, share, torch.full((1,), torch.nan), share)
