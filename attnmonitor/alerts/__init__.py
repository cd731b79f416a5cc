"""Alerts: which head broke, when, how; and silence otherwise.

Rules are data (`rules`, `defaults`), the numbers they look at are made in `signals`, an alarm's life is a pure function
(`states`), `watch` puts one rule to work and `run` a rule set, `digest` turns events into what a person
is sent, and `replay` runs rules over a recorded run.
"""

from attnmonitor.alerts.defaults import DEFAULT_RULES
from attnmonitor.alerts.notifications import Notification, log_events, notifications_of
from attnmonitor.alerts.replay import replay, replay_text
from attnmonitor.alerts.rule_set import Alerts
from attnmonitor.alerts.rules import AllOf, AnyOf, FiringShare, Rule, Threshold, load_rules, save_rules

__all__ = [
    "DEFAULT_RULES",
    "Alerts",
    "AllOf",
    "AnyOf",
    "FiringShare",
    "Notification",
    "Rule",
    "Threshold",
    "load_rules",
    "log_events",
    "notifications_of",
    "replay",
    "replay_text",
    "save_rules",
]
