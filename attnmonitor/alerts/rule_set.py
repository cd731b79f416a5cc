"""A rule set at work on a run: values of all heads in, events out.

`Alerts` knows neither models nor loggers. The monitor feeds it while a run trains, `replay` feeds it from a recorded
run, and both see the same events.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from attnmonitor.alerts.defaults import DEFAULT_RULES
from attnmonitor.alerts.rules import FiringShare, Rule, check_rules, leaves
from attnmonitor.alerts.signals import Recent
from attnmonitor.alerts.watch import RuleWatch
from attnmonitor.sample import AlertEvent

__all__ = ["Alerts"]


class Alerts:
    """Watches a run by a set of rules.

    Args:
        rules: Rules to watch by; names must differ.

    Raises:
        TypeError: An element is not a `Rule`.
        ValueError: Two rules share a name.

    Example:
        >>> import torch
        >>> from attnmonitor.alerts import Alerts, Rule, Threshold
        >>> faint = Threshold("query_rms", signal="value", fire_below=-3.0, clear_above=-2.0)
        >>> watch = Alerts([Rule("faint_query", "dead_head", "query_head", faint, patience=1, grace=0)])
        >>> [event] = watch.observe({"query_rms": {"layers.0": torch.tensor([1.0, 0.01])}}, global_step=10)
        >>> event.layer, event.head, event.state
        ('layers.0', 1, 'firing')
    """

    def __init__(self, rules: Iterable[Rule] = DEFAULT_RULES) -> None:
        self.rules = check_rules(rules)
        depths: dict[str, int] = {}
        for threshold in (threshold for rule in self.rules for threshold in rule.thresholds):
            depths[threshold.metric] = max(threshold.depth, depths.get(threshold.metric, 1))
        self._recent = Recent(depths)
        self._watches = [RuleWatch(rule) for rule in self.rules]

    @property
    def required_metrics(self) -> frozenset[str]:
        """Names of the metrics that must be collected for these rules."""
        return frozenset[str]().union(*(rule.metrics for rule in self.rules if not rule.optional))

    @property
    def grace(self) -> int:
        """Samples that the slowest rule waits for before it may fire."""
        return max((rule.grace for rule in self.rules), default=0)

    @property
    def firing(self) -> list[AlertEvent]:
        """The latest event of everything that is firing now, in order of rules."""
        return [event for watch in self._watches for event in watch.firing.values()]

    def observe(self, values: Mapping[str, Mapping[str, Tensor]], global_step: int) -> list[AlertEvent]:
        """Take in one sample and return what began, grew critical or ceased with it.

        A layer that is not in ``values`` was not measured and keeps its state; a value that is NaN or infinite was
        measured and is not finite. A rule whose metrics are not all in ``values`` rests.

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
        self._recent.append(values)
        events: list[AlertEvent] = []
        for watch in sorted(self._watches, key=lambda watch: _asks_other_rules(watch.rule)):
            if watch.rule.metrics <= values.keys():
                events += watch.step(self._recent, self._firing_share(), global_step)
        for watch in self._watches:
            if watch.rule.metrics <= values.keys():
                watch.mark_sick(self._recent)
        return events

    def _firing_share(self) -> tuple[float, float]:
        """Return the share of heads with an alarm, of query or of KV heads, whichever is larger, and that of layers."""
        share_of_heads, layers = 0.0, set[str | None]()
        for scope, heads in self._recent.heads.items():
            units = {unit for watch in self._watches if watch.rule.scope == scope for unit in watch.firing}
            share_of_heads = max(share_of_heads, len(units) / max(len(heads), 1))
            layers |= {layer for layer, _ in units}
        return share_of_heads, len(layers) / max(len(self._recent.layers), 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain containers and tensors, which ``torch.load(weights_only=True)`` reads."""
        return {
            "recent": self._recent.state_dict(),
            "rules": {watch.rule.name: watch.state_dict() for watch in self._watches},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken; rules that are new or were changed since start afresh."""
        self._recent.load_state_dict(state["recent"])
        for watch in self._watches:
            if watch.rule.name in state["rules"]:
                watch.load_state_dict(state["rules"][watch.rule.name])


def _asks_other_rules(rule: Rule) -> bool:
    return any(isinstance(leaf, FiringShare) for leaf in leaves(rule.when))
