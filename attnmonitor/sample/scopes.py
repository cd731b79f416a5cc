"""What a number or an alarm is about: a head, a layer, the run; and the states of a run."""

from __future__ import annotations

from typing import Literal

__all__ = ["AlarmScope", "RunState", "Scope"]

Scope = Literal["query_head", "kv_head"]
"""What a metric has a number for."""

AlarmScope = Literal["query_head", "kv_head", "layer", "run"]
"""What an alarm is about."""

RunState = Literal["alarm", "healthy", "unknown"]
"""Whether there is anything to look at in a run."""
