"""Arguments of a monitor, checked: each ValueError quotes the argument, what arrived and the way out."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator
from typing import Any

from attnmonitor.alerts import DEFAULT_RULES, Alerts, Rule
from attnmonitor.alerts.actions import check_actions
from attnmonitor.loggers import check_logger
from attnmonitor.measurement.probe import check_probe_settings
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.measurement.tokens import checked_decode
from attnmonitor.messages import nearest, whole_argument
from attnmonitor.metrics.catalog import DEFAULT_METRICS, check_metric_names

__all__ = [
    "alerts_on",
    "check_metrics",
    "check_name",
    "check_processes",
    "check_settings",
    "check_weights_every",
    "idle_rules",
]

_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.")


def check_settings(
    *,
    metrics: Any = None,
    alerts: Any = True,
    actions: Any = None,
    loggers: Any = None,
    name: Any = None,
    forward: Any = None,
    skip_hooks: Any = None,
    packed: Any = "documents",
    processes: Any = "first",
    weights_every: Any = 10,
    decode: Any = None,
    **_: Any,
) -> None:
    """Raise the ValueError with which `AttentionMonitor` would refuse an argument, before there is a model.

    What can be read only once is left to the monitor.
    """
    check_name(name)
    check_weights_every(weights_every)
    check_processes(processes)
    check_probe_settings(forward, skip_hooks, packed)
    checked_decode(decode)
    if loggers is not None:
        for logger in loggers if isinstance(loggers, (list, tuple)) else [loggers]:
            check_logger(logger)
    if not isinstance(metrics, Iterator) and not isinstance(alerts, Iterator):
        check_actions(actions or {}, alerts_on(alerts, check_metrics(metrics)).rules)


def check_name(name: str | None) -> str | None:
    """Return the name, if keys and file names may contain it."""
    if name is not None and (not name or not set(name) <= _NAME_CHARACTERS):
        raise ValueError(f"name={name!r} becomes part of keys and file names: letters, digits, '-', '_' and '.' only")
    return name


def check_metrics(metrics: Iterable[str] | None) -> tuple[str, ...]:
    """Return the metrics in table order; the default ones if none are named."""
    checked = check_metric_names(DEFAULT_METRICS if metrics is None else metrics)
    if not checked:
        raise ValueError("metrics=[] names no metric; leave it out for the defaults")
    return checked


def check_weights_every(weights_every: int) -> int:
    """Return the number of samples between two measurements of weights."""
    if (whole := whole_argument(weights_every, least=1)) is None:
        raise ValueError(f"weights_every={weights_every!r} must be a whole number of samples, 1 or more")
    return whole


def check_processes(processes: str) -> str:
    """Return which processes measure where each holds the whole model."""
    if processes not in ("first", "all"):
        raise ValueError(
            f'processes={processes!r}; give "first" to have the first process measure for all, or "all" to have each '
            "of them run the same probe and finish some of the layers"
        )
    return processes


def alerts_on(alerts: bool | Iterable[Rule] | None, metrics: tuple[str, ...]) -> Alerts:
    """Return the alerts of these rules; True means the default rules whose metrics are measured."""
    if alerts is True:
        alerts = [rule for rule in DEFAULT_RULES if rule.metrics <= set(metrics)]
    if isinstance(alerts, str):
        way_out = "True turns on the default rules, load_rules(path) reads a file of rules, False turns alerts off"
        raise ValueError(f"alerts={alerts!r} is not a list of rules; {way_out}")
    alerts = list(alerts or ())
    if named := [rule for rule in alerts if isinstance(rule, str)]:
        near = nearest(named[0], [rule.name for rule in DEFAULT_RULES]) or DEFAULT_RULES[0].name
        raise ValueError(
            f"alerts: {named[0]!r} is a name, not a rule; the default rule {near!r} is "
            f"[rule for rule in DEFAULT_RULES if rule.name == {near!r}]"
        )
    with default_torch_state():
        chosen = Alerts(alerts)
    for rule in chosen.rules:
        missing = sorted(rule.metrics - set(metrics))
        if missing and not rule.optional:
            raise ValueError(
                f"alerts: rule {rule.name!r} watches {missing[0]!r}, which is not measured; add it: "
                f"metrics=[..., {missing[0]!r}]"
            )
    return chosen


def idle_rules(alerts: Any, chosen: Alerts, metrics: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the rules that cannot fire, each with the metrics that it reads and that are not measured.

    Args:
        alerts: The argument of the monitor: with True these are default rules.
        chosen: The alerts of these rules.
        metrics: What is measured.
    """
    rules = DEFAULT_RULES if alerts is True else chosen.rules
    return {rule.name: missing for rule in rules if (missing := sorted(rule.metrics - set(metrics)))}
