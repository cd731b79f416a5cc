"""Alerts: which head is at fault, since when, and with which kind of fault.

* what to look for: `rules` (rules as data), `rule_files` (as JSON), `defaults` (the rules of a monitor);
* what was measured: `heads`, `past` (the latest samples), `readings` and `signals` (the numbers thresholds are put on);
* what follows: `conditions` (what a rule says about each head), `states` (an alarm's state, a pure function),
  `rule_tracker` (one rule over a run), `rule_set` (all rules);
* what a person gets: `firing` (most severe first), `notifications`, `actions`, `replay` (rules over a recorded run).
"""

from attnmonitor.alerts.defaults import DEFAULT_RULES
from attnmonitor.alerts.notifications import Notification, log_events, notifications_of
from attnmonitor.alerts.replay import replay, replay_text
from attnmonitor.alerts.rule_files import load_rules, save_rules
from attnmonitor.alerts.rule_set import Alerts
from attnmonitor.alerts.rules import AllOf, AnyOf, FiringShare, Rule, Threshold

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
