"""Messages to the user: warnings that never raise into the training step, and errors that name the way out."""

from __future__ import annotations

import difflib
import logging
import operator
import unicodedata
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress

__all__ = [
    "AttentionMonitorWarning",
    "did_you_mean",
    "error_text",
    "first_names",
    "nearest",
    "needed",
    "printable",
    "tail_of",
    "warn",
    "whole_argument",
]

_logger = logging.getLogger("attnmonitor")


class AttentionMonitorWarning(UserWarning):
    """A problem of the monitoring, not of training, which continues."""


def warn(message: str) -> None:
    """Warn; where warnings are turned into errors, log instead, because a run must not stop for its monitor."""
    try:
        message = printable(message)
        warnings.warn(message, AttentionMonitorWarning, stacklevel=3)
    except Exception:  # also what a `warnings.showwarning` of the user raises
        with suppress(Exception):
            _logger.warning(message)


def error_text(error: BaseException) -> str:
    """Return type and message of an exception; the type alone where its message cannot be made."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:
        return name


def printable(text: str, *, one_line: bool = False) -> str:
    """Return a text that does nothing to a terminal but show characters: control characters become escapes.

    Names of layers and rules, messages and paths may come from files of others. An escape sequence in them could
    change the terminal's title or clear it, a change of writing direction could hide what is written.

    Args:
        text: Any text.
        one_line: Escape line ends and tabs too, so that a name cannot add lines of its own.

    Example:
        >>> printable("layer" + chr(27) + "[2J") == "layer" + chr(92) + "x1b[2J"
        True
    """
    kept = "" if one_line else "\n\t"
    if text.isprintable():
        return text
    return "".join(
        char if char in kept or unicodedata.category(char) not in _NOT_SHOWN else char.encode("unicode_escape").decode()
        for char in text
    )


# Control, format, surrogate, private and unassigned characters; ends of lines and paragraphs.
_NOT_SHOWN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def did_you_mean(name: object, known: Collection[str], *, otherwise: str) -> str:
    """Return a question with the known names most similar to ``name``, or ``otherwise`` and all names if none is."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4)
    if near:
        return f"did you mean {' or '.join(map(repr, near))}?"
    return f"{otherwise} {', '.join(known) or 'none'}"


def first_names(names: Sequence[str], most: int = 3) -> str:
    """Return the first names, and how many there are beside them.

    Example:
        >>> first_names(["h.0", "h.1", "h.2", "h.3", "h.4"])
        'h.0, h.1, h.2 and 2 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def tail_of(name: str, most: int) -> str:
    """Return the end of a name, which tells layers apart: ``most`` characters, with an ellipsis where it is longer.

    Example:
        >>> tail_of("model.decoder.layers.11.self_attn", 20)
        '…layers.11.self_attn'
    """
    return name if len(name) <= most else f"…{name[len(name) - most + 1 :]}"


def nearest(name: object, known: Collection[str]) -> str | None:
    """Return the known name that ``name`` most likely stands for; None where none is near.

    Example:
        >>> nearest("enrgy_hot", ["energy_hot", "key_rank"])
        'energy_hot'
    """
    return next(iter(difflib.get_close_matches(str(name), known, n=1, cutoff=0.7)), None)


def whole_argument(value: object, *, least: int) -> int | None:
    """Return an argument that is an integer of any type (numpy's, torch's) as an int; None where it is not.

    Args:
        value: The argument. A bool is not an integer, and neither is an array with axes.
        least: The smallest that is allowed.
    """
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or getattr(value, "ndim", None):
        return None
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except Exception:
        return None
    return number if number >= least else None


@contextmanager
def needed(*, by: str, extra: str) -> Iterator[None]:
    """Turn the ModuleNotFoundError of an import in this context into one that names the extra to install.

    Args:
        by: What needs the libraries, in the user's words.
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
