"""What is open in each thread: a forward is seen by the captures of its own thread, and by no other."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["open_here", "opened_here"]

T = TypeVar("T")


@contextmanager
def opened_here(opened: dict[int, list[T]], item: T) -> Iterator[None]:
    """Have ``item`` among what this thread has open, the innermost last."""
    own = opened.setdefault(threading.get_ident(), [])
    own.append(item)
    try:
        yield
    finally:
        own.remove(item)
        if not own:
            del opened[threading.get_ident()]


def open_here(opened: dict[int, list[T]]) -> list[T]:
    """What this thread has open."""
    return opened.get(threading.get_ident(), [])
