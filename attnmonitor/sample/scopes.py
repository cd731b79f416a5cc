"""What a number or an alarm is about: a query head, a KV head, a layer or the run."""

from __future__ import annotations

from typing import Literal

__all__ = ["AlarmScope", "Scope"]

Scope = Literal["query_head", "kv_head"]
"""What a metric has a number for."""

AlarmScope = Literal["query_head", "kv_head", "layer", "run"]
"""What an alarm is about."""
