"""Settings a process has one of, changed while any of its threads needs them otherwise.

Two threads that each save, change and restore such a setting interleave: the second saves what the first has changed
it to, and puts that back for good. So the first to come changes it, and the last to leave restores it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

__all__ = ["ProcessSetting", "pushed", "thread_stack"]


class ProcessSetting:
    """A change of one such setting; called, a context in which it is changed.

    Args:
        change: A context manager that makes the change and takes it back.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.RLock()  # a signal handler may measure as well
        self._inside: set[object] = set()
        self._undo = ExitStack()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._alone)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the setting changed inside the context."""
        own = object()
        try:  # from here on: an interrupt between counting and a later `try` would count for ever
            with self._lock:
                if not self._inside:
                    self._undo.enter_context(self._change())
                self._inside.add(own)
            yield
        finally:
            with self._lock:
                self._inside.discard(own)
                if not self._inside:
                    self._undo.close()

    def _alone(self) -> None:
        """In a forked child: the threads that were inside are not there to leave."""
        self._lock = threading.RLock()
        self._inside.clear()
        self._undo.close()


T = TypeVar("T")


@contextmanager
def pushed(opened: dict[int, list[T]], item: T) -> Iterator[None]:
    """Have ``item`` among what this thread has open, the innermost last."""
    own = opened.setdefault(threading.get_ident(), [])
    own.append(item)
    try:
        yield
    finally:
        own.remove(item)
        if not own:
            del opened[threading.get_ident()]


def thread_stack(opened: dict[int, list[T]]) -> list[T]:
    """What this thread has open."""
    return opened.get(threading.get_ident(), [])
