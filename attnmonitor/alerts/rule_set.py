"""A rule set applied to a run: values of all heads in, events out.

`Alerts` knows neither models nor loggers. The monitor feeds it while a run trains, `replay` feeds it from a recorded
run, and both get the same events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from attnmonitor.alerts.defaults import DEFAULT_RULES
from attnmonitor.alerts.older_states import with_present_names
from attnmonitor.alerts.past import RunPast
from attnmonitor.alerts.rule_tracker import RuleTracker
from attnmonitor.alerts.rules import FiringShare, Rule, check_rules, leaves
from attnmonitor.alerts.states import PENDING
from attnmonitor.messages import error_text
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.sample import AlertEvent, worst_first

__all__ = ["Alerts"]


class Alerts:
    """Applies a set of rules to each sample of a run.

    Args:
        rules: The rules; their names must differ.

    Raises:
        TypeError: An element is not a `Rule`.
        ValueError: Two rules share a name.

    Example:
        >>> import torch
        >>> from attnmonitor.alerts import Alerts, Rule, Threshold
        >>> faint = Threshold("query_rms", signal="value", fire_below=-3.0, clear_above=-2.0)
        >>> alerts = Alerts([Rule("faint_query", "dead_head", "query_head", faint, patience=1, grace=0)])
        >>> [event] = alerts.observe({"query_rms": {"layers.0": torch.tensor([1.0, 0.01])}}, global_step=10)
        >>> event.layer, event.head, event.state
        ('layers.0', 1, 'firing')
    """

    def __init__(self, rules: Iterable[Rule] = DEFAULT_RULES) -> None:
        self.rules = check_rules(rules)
        self._begin()

    def _begin(self) -> None:
        depths: dict[str, int] = {}
        for threshold in (threshold for rule in self.rules for threshold in rule.thresholds):
            depths[threshold.metric] = max(threshold.depth, depths.get(threshold.metric, 1))
        self._past = RunPast(depths)
        self._trackers = [RuleTracker(rule) for rule in self.rules]

    @property
    def required_metrics(self) -> frozenset[str]:
        """Names of the metrics that these rules need, without those of optional rules."""
        return frozenset[str]().union(*(rule.metrics for rule in self.rules if not rule.optional))

    @property
    def grace(self) -> int:
        """Samples that are needed before every rule may fire."""
        return max((rule.grace for rule in self.rules), default=0)

    @property
    def least_heads(self) -> dict[str, int]:
        """Heads of each scope that are needed before every rule can compare heads; empty where no rule compares."""
        least: dict[str, int] = {}
        for rule in self.rules:
            for scope in {METRICS[each.metric].scope for each in rule.thresholds if each.compares}:
                least[scope] = max(rule.least_heads, least.get(scope, 0))
        return dict(sorted(least.items(), reverse=True))  # query heads first

    @property
    def firing(self) -> list[AlertEvent]:
        """Every firing alarm, worst first: its latest event, with its values when it fired, now and at its worst."""
        return worst_first(event for tracker in self._trackers for event in tracker.firing.values())

    @property
    def pending(self) -> set[tuple[str, str | None, int | None]]:
        """What an alarm may begin about in the next samples: scope, layer and head of each condition that holds."""
        return {
            (tracker.rule.scope, *self._past.units(tracker.rule.scope)[unit])
            for tracker in self._trackers
            for unit in (tracker.states.phase == PENDING).nonzero().flatten().tolist()
        }

    def observe(self, values: Mapping[str, Mapping[str, Tensor]], global_step: int) -> list[AlertEvent]:
        """Add one sample and return the events of alarms that began, became critical, grew or cleared.

        A layer that is not in ``values`` was not measured and keeps its state; a value that is NaN or infinite was
        measured and is not finite. A rule whose metrics are not all in ``values`` is skipped.

        Args:
            values: ``values[metric][layer]``: (num_heads,) per layer, layers in forward order.
            global_step: Optimizer steps done.

        Returns:
            Events in order of rules, then layers and heads; those about shares of firing heads last.

        Raises:
            ValueError: A layer's number of heads changed.
        """
        if not values:
            return []
        self._past.append(values)
        active = [tracker for tracker in self._trackers if tracker.rule.metrics <= values.keys()]
        events: list[AlertEvent] = []
        for tracker in sorted(active, key=lambda tracker: _depends_on_others(tracker.rule)):
            events += tracker.observe(self._past, self._firing_share(), global_step)
        for tracker in active:
            tracker.exclude_from_baseline(self._past)
        return events

    def _firing_share(self) -> tuple[float, float]:
        """Return two shares: of firing heads (the larger one of query and KV heads), and of layers that have one."""
        share_of_heads, layers = 0.0, set[str | None]()
        for scope, heads in self._past.heads.items():
            units = {unit for tracker in self._trackers if tracker.rule.scope == scope for unit in tracker.firing}
            if len(units) > 1:  # one head in alarm is that head's fault, also where it is one of four
                share_of_heads = max(share_of_heads, len(units) / len(heads))
            layers |= {layer for layer, _ in units}
        return share_of_heads, len(layers) / max(len(self._past.layers), 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors, which ``torch.load(weights_only=True)`` reads."""
        return {
            "past": self._past.state_dict(),
            "rules": {tracker.rule.name: tracker.state_dict() for tracker in self._trackers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; rules that are new or were changed since then start anew."""
        state = with_present_names(state)
        self._past.load_state_dict(state["past"])
        for tracker in self._trackers:
            if tracker.rule.name in state["rules"]:
                tracker.load_state_dict(state["rules"][tracker.rule.name])

    def continue_from(self, state: Any) -> str:
        """Load a state of any version; return why it cannot be read, and begin anew, or ``""``."""
        try:
            self.load_state_dict(state)
        except Exception as error:  # names that this version does not know, or no state at all
            self._begin()
            return error_text(error)
        return ""


def _depends_on_others(rule: Rule) -> bool:
    return any(isinstance(leaf, FiringShare) for leaf in leaves(rule.when))
