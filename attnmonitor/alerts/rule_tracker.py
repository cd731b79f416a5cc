"""One rule followed over the samples of a run: its alarms, and the events when they begin, escalate or clear."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnmonitor.alerts.conditions import Finding, answer_of, message_of, share_finding, subject_of, threshold_finding
from attnmonitor.alerts.courses import AlarmCourses, direction_of, follow
from attnmonitor.alerts.heads import Unit
from attnmonitor.alerts.past import Reference, RunPast
from attnmonitor.alerts.rule_files import to_plain
from attnmonitor.alerts.rules import FiringShare, Rule, Threshold, leaves
from attnmonitor.alerts.states import FIRING, INACTIVE, AlarmStates, advance
from attnmonitor.sample import AlertEvent

__all__ = ["RuleTracker"]


class RuleTracker:
    """A rule with the state it needs: alarm states, references, and the latest event of each firing alarm.

    U is the number of units the rule may alarm: heads, layers, or 1 for the run.

    Args:
        rule: The rule.

    Attributes:
        num_samples: Samples observed.
        states: States of the U alarms.
        leaf: (U,) int64: index of the leaf that each alarm began with; it words all events of that alarm.
        references: What each leaf compares its values with.
        courses: How far out each alarm was and is.
        firing: Each firing alarm: its latest event, with its values when it fired, now and at its worst.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.num_samples = 0
        self.states = AlarmStates.inactive(0)
        self.leaf = torch.zeros(0, dtype=torch.int64)
        self.references = [Reference.unknown(0) for _ in leaves(rule.when)]
        self.courses = AlarmCourses.unknown(0)
        self.firing: dict[Unit, AlertEvent] = {}

    def observe(self, past: RunPast, firing_share: tuple[float, float], global_step: int) -> list[AlertEvent]:
        """Evaluate the present sample and return the events of alarms that began, became critical, grew or cleared.

        Args:
            past: The run so far, the present sample included.
            firing_share: Share of the heads, and of the layers, with a firing head alarm.
            global_step: Global step of this sample.
        """
        self.num_samples += 1
        units = past.units(self.rule.scope)
        if grown := len(units) - len(self.leaf):
            self.states = self.states.extended(AlarmStates.inactive(grown))
            self.courses = self.courses.grown_to(len(units))
            self.leaf = torch.cat([self.leaf, self.leaf.new_zeros(grown)])
        findings = [self._finding(index, leaf, past, firing_share) for index, leaf in enumerate(leaves(self.rule.when))]
        answer = answer_of(self.rule.when, iter([finding.answer for finding in findings]))
        before, was_firing = self.states, self.states.phase == FIRING
        self.leaf = torch.where(answer.holds & ~was_firing, answer.leaf, self.leaf)
        self.states, changes = advance(
            before,
            violated=answer.holds & (was_firing | self._may_begin(answer.holds, past)),
            not_violated=~answer.may_hold,
            recovered=~answer.may_last,
            patience=self.rule.patience,
            hold=self.rule.hold,
            global_step=global_step,
        )
        is_firing = self.states.phase == FIRING
        self.courses, has_grown = follow(
            self.courses,
            self._of_leaf([finding.value for finding in findings]),
            self._of_leaf([finding.distance for finding in findings]),
            direction=torch.tensor([direction_of(leaf) for leaf in leaves(self.rule.when)])[self.leaf],
            fired=changes.fired,
            firing=is_firing | changes.cleared,
        )
        escalated = changes.escalated | (is_firing & has_grown)
        since_step = torch.where(changes.cleared, before.since_step, self.states.since_step)
        noted = (changes.fired | escalated | changes.cleared).nonzero().flatten().tolist()
        find = list(zip(leaves(self.rule.when), findings, strict=True))
        events = [
            self._event(unit, units[unit], *find[int(self.leaf[unit])], past, int(since_step[unit]), global_step)
            for unit in noted
        ]
        self.firing |= {units[unit]: event for unit, event in zip(noted, events, strict=True)}
        self._bring_up_to_date(units)
        return events

    def exclude_from_baseline(self, past: RunPast) -> None:
        """Exclude heads with an alarm about a change from the baselines of the metrics that the rule compares."""
        for metric in {leaf.metric for leaf in self.rule.thresholds if leaf.has_baseline and leaf.quantile is None}:
            past.metrics[metric].exclude_from_baseline(self.states.phase != INACTIVE)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors."""
        return {
            "rule": to_plain(self.rule),
            "num_samples": self.num_samples,
            "states": dict(vars(self.states)),
            "leaf": self.leaf,
            "references": [dict(vars(reference)) for reference in self.references],
            "courses": dict(vars(self.courses)),
            "firing": [dataclasses.asdict(event) for event in self.firing.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same rule; a rule that was changed since then starts anew."""
        if state["rule"] != to_plain(self.rule):
            return
        self.num_samples = state["num_samples"]
        self.states = AlarmStates(**state["states"])
        self.leaf = state["leaf"]
        self.references = [Reference(**reference) for reference in state["references"]]
        # A state of version 0.1 has no courses: they begin with the next sample.
        known = state.get("courses")
        self.courses = AlarmCourses.unknown(len(self.leaf)) if known is None else AlarmCourses(**known)
        self.firing = {(event["layer"], event["head"]): AlertEvent(**event) for event in state["firing"]}

    def _finding(
        self, index: int, leaf: Threshold | FiringShare, past: RunPast, firing_share: tuple[float, float]
    ) -> Finding:
        if isinstance(leaf, FiringShare):
            return share_finding(index, leaf, firing_share)
        finding, self.references[index] = threshold_finding(
            index, leaf, self.rule, past, frozen=self.references[index], has_alarm=self.states.phase != INACTIVE
        )
        return finding

    def _may_begin(self, holds: Tensor, past: RunPast) -> Tensor:
        """Return where an alarm may begin, (U,) bool: after ``grace``, until ``until``, and only at the source."""
        rule = self.rule
        allowed = torch.full_like(holds, rule.until is None or self.num_samples <= rule.until)
        for threshold in rule.thresholds:
            is_past_grace = past.metrics[threshold.metric].seen >= rule.grace
            allowed = allowed & (is_past_grace if threshold.quantile is None else is_past_grace.any())
        if rule.source_only and holds.any():
            if holds.all() or FIRING in self.states.phase:
                return torch.zeros_like(allowed)
            layers = torch.split(holds, list(past.heads[rule.scope].layers.values()))
            source = next(index for index, layer in enumerate(layers) if layer.any())
            allowed = allowed & torch.cat([torch.full_like(layer, i == source) for i, layer in enumerate(layers)])
        return allowed

    def _of_leaf(self, parts: list[Tensor]) -> Tensor:
        """Return for each unit, (U,), what the leaf that its alarm began with has in ``parts``."""
        return torch.stack(parts).gather(0, self.leaf[None])[0]

    def _bring_up_to_date(self, units: list[Unit]) -> None:
        """Keep the alarms that fire, each with its values when it fired, now and at its worst."""
        firing = (self.states.phase == FIRING).nonzero().flatten().tolist()
        self.firing = {
            units[unit]: dataclasses.replace(self.firing[units[unit]], **self.courses.shown(unit)) for unit in firing
        }

    def _event(
        self,
        unit: int,
        place: Unit,
        leaf: Threshold | FiringShare,
        finding: Finding,
        past: RunPast,
        since_step: int,
        global_step: int,
    ) -> AlertEvent:
        num_heads = 0 if isinstance(leaf, FiringShare) else len(past.heads_of(leaf.metric))
        return AlertEvent(
            rule=self.rule.name,
            kind=self.rule.kind,
            scope=self.rule.scope,
            layer=place[0],
            head=place[1],
            baseline=float(finding.baseline[unit]),
            global_step=global_step,
            state="firing" if self.states.phase[unit] == FIRING else "cleared",
            severity="critical" if self.states.held[unit] >= self.rule.hold else "warning",
            since_step=since_step,
            message=message_of(leaf, finding, unit, too_few_heads=num_heads < self.rule.least_heads),
            metric=subject_of(leaf),
            **{**self.courses.shown(unit), "value": float(finding.value[unit])},
        )
