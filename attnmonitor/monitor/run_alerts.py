"""The alerts of one run: rules judge each sample, and what begins has evidence taken, requests made and actions called.

Each step is contained: an exception in one of them is counted and warned about once, and the others are still done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attnmonitor.alerts import Alerts
from attnmonitor.alerts.actions import Actions, action_name, calls_of, requests_of
from attnmonitor.alerts.judged import judged_values
from attnmonitor.measurement import Measured
from attnmonitor.measurement.kept import Keeper
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.monitor.evidence import EvidenceTaker
from attnmonitor.monitor.failures import Failures
from attnmonitor.sample import AlertEvent, HeadEvidence, LayerCoverage, Sample
from attnmonitor.summary.run_summary import RunSummary

__all__ = ["RunAlerts"]


class RunAlerts:
    """Applies the rules to each sample of a run, and does what follows when an alarm begins.

    Args:
        rules: The rules and the state of their alarms.
        actions: What to do when an alert begins, checked.
        evidence: Takes the evidence of the heads whose alarms begin.
        failures: Counts what fails here, and warns.
        idle_rules: Rules that cannot fire, each with the metrics that it reads and that are not measured.
    """

    def __init__(
        self,
        rules: Alerts,
        actions: Actions,
        evidence: EvidenceTaker,
        failures: Failures,
        idle_rules: Mapping[str, Sequence[str]],
    ) -> None:
        self.evidence = evidence
        self.idle_rules = idle_rules
        self._rules = rules
        self._actions = actions
        self._failures = failures

    @property
    def firing(self) -> list[AlertEvent]:
        """Alarms that fire now, worst first."""
        return self._rules.firing

    def summary(self, layers: Mapping[str, LayerCoverage]) -> RunSummary:
        """Return the summary of a run that begins with these layers and rules."""
        return RunSummary(
            layers,
            has_rules=bool(self._rules.rules),
            grace=self._rules.grace,
            least_heads=self._rules.least_heads,
            idle_rules=self.idle_rules,
        )

    def wanted(self, layers: Mapping[str, LayerCoverage]) -> set[str] | None:
        """Return the layers whose tensors the next sample keeps first, for evidence; None where nothing is kept."""
        return self.evidence.wanted(self._rules, layers)

    def judge(
        self, measured: Measured, keeper: Keeper, global_step: int
    ) -> tuple[list[AlertEvent], list[HeadEvidence]]:
        """Return the events of a sample, and the evidence of the alarms that begin with it.

        Args:
            measured: The sample's numbers.
            keeper: What was kept of its forward.
            global_step: Optimizer steps done.
        """
        events: list[AlertEvent] = []
        evidence: list[HeadEvidence] = []
        fired_before = {alarm.key for alarm in self.firing}
        with self._failures.contained("alerts"), default_torch_state():
            judged = judged_values(measured.trusted_values(), measured.coverage)
            events = self._rules.observe(judged, global_step)
        began = [event for event in events if event.state == "firing" and event.key not in fired_before]
        with self._failures.contained("evidence"), default_torch_state():
            evidence = self.evidence.take(keeper, self._rules, began, measured.coverage, global_step)
        return events, evidence

    def requests(self, events: Sequence[AlertEvent]) -> tuple[str, ...]:
        """Return what the events request of the training loop."""
        return requests_of(events, self._actions)

    def call_actions(self, sample: Sample) -> None:
        """Call the functions that the sample's events trigger."""
        for event, action in calls_of(sample.events, self._actions):
            with self._failures.contained(f"action {action_name(action)}"):
                action(event, sample)

    def describe(self) -> dict[str, Any]:
        """Return rules and actions as plain values, for the run's settings."""
        return {
            "alerts": [rule.name for rule in self._rules.rules],
            "alerts_grace": self._rules.grace,
            "alerts_least_heads": self._rules.least_heads,
            "alerts_idle": self.idle_rules,
            "actions": {key: [action_name(action) for action in actions] for key, actions in self._actions.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Return alarms, baselines and the count of evidence, for a state of the monitor."""
        return {"alerts": self._rules.state_dict(), "evidence": self.evidence.num_taken}

    def continue_from(self, state: Mapping[str, Any]) -> str:
        """Load alarms and baselines of a monitor's state; return why they cannot be read, and begin anew, or ``""``."""
        return self._rules.continue_from(state["alerts"])

    def without_functions(self, probe: Probe) -> RunAlerts:
        """Return them for a copy of the monitor, which takes no samples: a user's functions may not be picklable."""
        evidence = self.evidence.without_decoder(probe)
        return RunAlerts(self._rules, {}, evidence, self._failures, self.idle_rules)
