"""What a run came to in numbers, and the state that follows: alarm, healthy, or unknown.

Healthy is a claim. It holds only where every layer was measured, the rules were ready, and no alarm fires; anything
less is unknown, whatever the charts look like.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from attnmonitor.sample import AlertEvent, LayerCoverage, RunState

__all__ = ["Doubt", "RunCounts"]

Doubt = Literal["no_sample", "failed", "not_measured", "no_rules", "waiting", "few_heads"]


@dataclass
class RunCounts:
    """Counts of samples and alarms, the alarms that fire, and how the layers were captured.

    Attributes:
        coverage: How each layer was captured in the latest sample, or why it was not.
        firing: Alarms that have begun and not cleared, worst first.
        num_samples: Samples taken, failed ones included.
        num_cleared: Alarms that began and cleared.
        num_failed: Samples without values.
        failure: Why the last failed sample failed; None if none has failed.
        last_failed: Whether the latest sample is without values.
        has_rules: Whether any alert rule is on; without one nobody can say "healthy".
        grace: Samples that the slowest rule needs before it may fire; before that nobody can say "healthy" either.
        least_heads: Heads of each scope that the rules need to compare heads with each other; empty where none compare.
        idle_rules: Rules that cannot fire, each with the metrics that it reads and that are not measured.
    """

    coverage: Mapping[str, LayerCoverage] = field(default_factory=dict)
    firing: Sequence[AlertEvent] = ()
    num_samples: int = 0
    num_cleared: int = 0
    num_failed: int = 0
    failure: str | None = None
    last_failed: bool = False
    has_rules: bool = True
    grace: int = 0
    least_heads: Mapping[str, int] = field(default_factory=dict)
    idle_rules: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def measured(self) -> list[LayerCoverage]:
        """Layers whose numbers are verified."""
        return [layer for layer in self.coverage.values() if layer.measured]

    @property
    def not_measured(self) -> list[LayerCoverage]:
        """Layers that were found and could not be measured."""
        return [layer for layer in self.coverage.values() if not layer.measured]

    @property
    def num_heads(self) -> dict[str, int]:
        """Measured heads of each scope."""
        return {
            "query_head": sum(layer.num_query_heads for layer in self.measured),
            "kv_head": sum(layer.num_kv_heads for layer in self.measured),
        }

    @property
    def state(self) -> RunState:
        """``"alarm"`` where an alarm fires, ``"healthy"`` where nothing is in doubt, else ``"unknown"``."""
        return "alarm" if self.firing else "unknown" if self.doubts else "healthy"

    @property
    def doubts(self) -> tuple[Doubt, ...]:
        """Why nobody can say that the run is healthy, the most important first."""
        if not self.num_samples:
            return ("no_sample",)
        if self.num_failed == self.num_samples:
            return ("failed",)
        if not self.measured:
            return ("not_measured",)
        found: dict[Doubt, bool] = {
            "failed": self.last_failed,
            "not_measured": bool(self.not_measured),
            "no_rules": not self.has_rules,
            "waiting": self.num_samples - self.num_failed <= self.grace,
            "few_heads": any(self.num_heads[scope] < least for scope, least in self.least_heads.items()),
        }
        return tuple(doubt for doubt, holds in found.items() if holds)
