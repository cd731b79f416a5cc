"""Process-global settings, changed while at least one thread needs the change; and stacks of one thread.

Two threads that each save, change and restore a global setting interleave: the second saves what the first has changed
it to, and restores that for good. So the first thread to enter makes the change, and the last to leave undoes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

__all__ = ["ProcessSetting", "pushed", "thread_stack"]


class ProcessSetting:
    """A change of one process-global setting; calling it gives a context in which the setting is changed.

    Args:
        change: Returns a context manager that makes the change and undoes it.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.RLock()  # reentrant: a signal handler may measure as well
        self._inside: set[object] = set()
        self._undo = ExitStack()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset_in_child)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Change the setting inside the context."""
        own = object()
        try:  # here already: an interrupt between counting and a later `try` would leave the count too high
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

    def _reset_in_child(self) -> None:
        """Undo the change in a forked child, where the threads that were inside do not exist."""
        self._lock = threading.RLock()
        self._inside.clear()
        self._undo.close()


T = TypeVar("T")


@contextmanager
def pushed(stacks: dict[int, list[T]], item: T) -> Iterator[None]:
    """Push ``item`` on this thread's stack while the context is open."""
    own = stacks.setdefault(threading.get_ident(), [])
    own.append(item)
    try:
        yield
    finally:
        own.remove(item)
        if not own:
            del stacks[threading.get_ident()]


def thread_stack(stacks: dict[int, list[T]]) -> list[T]:
    """Return this thread's stack, the innermost item last."""
    return stacks.get(threading.get_ident(), [])
