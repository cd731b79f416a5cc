"""What a run came to so far: counts and alarms, from samples or from a file.

The monitor adds each sample as it is taken and carries the counts in its state; the report and the plots build the
same record from a file. All texts about a run are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnmonitor.alerts.firing import still_firing
from attnmonitor.record import RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

__all__ = ["RunSummary"]

_SAVED = ("num_samples", "num_cleared", "num_failed", "failure")


@dataclass
class RunSummary:
    """Counts of samples and alarms, the alarms that fire, and how the layers were captured.

    Attributes:
        coverage: How each layer was captured in the latest sample, or why it was not.
        firing: Alarms that have begun and not cleared.
        num_samples: Samples taken, failed ones included.
        num_cleared: Alarms that began and cleared.
        num_failed: Samples without values.
        failure: Why the last failed sample failed; None if none has failed.
        has_rules: Whether any alert rule is on; without one nobody can say "healthy".
        grace: Samples that the slowest rule needs before it may fire; before that nobody can say "healthy" either.
    """

    coverage: Mapping[str, LayerCoverage] = field(default_factory=dict)
    firing: Sequence[AlertEvent] = ()
    num_samples: int = 0
    num_cleared: int = 0
    num_failed: int = 0
    failure: str | None = None
    has_rules: bool = True
    grace: int = 0

    @classmethod
    def of_record(cls, record: RunRecord) -> RunSummary:
        """Return the summary of a recorded run."""
        events = record.events
        failures = [sample.failure for sample in record.samples if sample.failure is not None]
        return cls(
            coverage=record.coverage,
            firing=still_firing(events),
            num_samples=len(record.samples),
            num_cleared=sum(event.state == "cleared" for event in events),
            num_failed=len(failures),
            failure=failures[-1] if failures else None,
            has_rules=bool(record.config.get("alerts", True)),
            grace=record.config.get("alerts_grace", 0),
        )

    def add(self, sample: Sample) -> None:
        """Count one more sample of a live run, and take over its coverage and its firing alarms."""
        self.coverage = sample.coverage
        self.firing = sample.firing
        self.num_samples += 1
        self.num_cleared += sum(event.state == "cleared" for event in sample.events)
        if sample.failure is not None:
            self.num_failed += 1
            self.failure = sample.failure

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; coverage and firing alarms come with the next sample."""
        return {name: getattr(self, name) for name in _SAVED}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting where a state was taken; a count that ``state`` does not have stays as it is."""
        for name in _SAVED:
            setattr(self, name, state.get(name, getattr(self, name)))
