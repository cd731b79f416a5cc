"""What a live run came to so far: counts and alarms, one sample after the other.

The monitor adds each sample as it is taken and carries the counts in its state; `RunRecord.counts` has the same of a
file. All texts about a run are made from these counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnmonitor.record.counts import RunCounts
from attnmonitor.sample import Sample

__all__ = ["RunSummary"]

_SAVED = ("num_samples", "num_cleared", "num_failed", "failure", "last_failed")


@dataclass
class RunSummary(RunCounts):
    """The counts of a live run, one sample after the other."""

    def add(self, sample: Sample) -> None:
        """Count one more sample of a live run, and take over its coverage and its firing alarms."""
        self.coverage = sample.coverage
        self.firing = sample.firing
        self.num_samples += 1
        self.num_cleared += sum(event.state == "cleared" for event in sample.events)
        self.last_failed = sample.failure is not None
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
