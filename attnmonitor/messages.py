"""Telling the user something: without ever raising into the training step, and with the way out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager

__all__ = ["AttentionMonitorWarning", "did_you_mean", "needed", "warn"]

_logger = logging.getLogger("attnmonitor")


class AttentionMonitorWarning(UserWarning):
    """Something about the monitoring needs a look; training goes on."""


def warn(message: str) -> None:
    """Warn; where warnings are turned into errors, log instead: a run must not stop for its monitor."""
    try:
        warnings.warn(message, AttentionMonitorWarning, stacklevel=3)
    except AttentionMonitorWarning:
        _logger.warning(message)


def did_you_mean(name: object, known: Collection[str], *, otherwise: str) -> str:
    """The known names nearest to an unknown one, as a question; ``otherwise`` and all of them if none is near."""
    import difflib

    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"{otherwise} {', '.join(known) or 'none'}"


@contextmanager
def needed(*, by: str, extra: str) -> Iterator[None]:
    """Import optional libraries in this context.

    Args:
        by: What needs them, in words the user has written.
        extra: The extra of this package that installs them.

    Raises:
        ModuleNotFoundError: One of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        library = str(missing.name).partition(".")[0]
        raise ModuleNotFoundError(
            f"{by} needs {library}: pip install 'attnmonitor[{extra}]'", name=library
        ) from missing
