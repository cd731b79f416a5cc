"""The time that samples take, for a clock that may stand still, run backwards or jump: tests freeze it."""

from __future__ import annotations

import math
from time import perf_counter  # not through `time`: a clock that a test puts there has its own answers to give

__all__ = ["now", "passed", "share"]


def now() -> float:
    """Return seconds on the clock; NaN where it fails."""
    try:
        return float(perf_counter())
    except Exception:
        return math.nan


def passed(start: float, end: float) -> float:
    """Return the seconds between two readings; 0 where the clock ran backwards or failed."""
    return end - start if end > start else 0.0


def share(seconds: float, elapsed: float) -> float:
    """Return ``seconds / elapsed``; NaN where no time has passed."""
    return seconds / elapsed if elapsed > 0 else math.nan
