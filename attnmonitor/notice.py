"""Telling the user something without ever raising into the training step."""

from __future__ import annotations

import logging
import warnings

__all__ = ["AttentionMonitorWarning", "warn"]

_logger = logging.getLogger("attnmonitor")


class AttentionMonitorWarning(UserWarning):
    """Something about the monitoring needs a look; training goes on."""


def warn(message: str) -> None:
    """Warn; where warnings are turned into errors, log instead: a run must not stop for its monitor."""
    try:
        warnings.warn(message, AttentionMonitorWarning, stacklevel=3)
    except AttentionMonitorWarning:
        _logger.warning(message)
