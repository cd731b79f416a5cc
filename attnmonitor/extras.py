"""Libraries that not every user has: where one is missing, the error names the extra that brings it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed"]


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
