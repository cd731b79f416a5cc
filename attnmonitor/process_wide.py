"""Settings a process has one of, changed while any of its threads needs them otherwise.

Two threads that each save, change and restore such a setting interleave: the second saves what the first has changed
it to, and puts that back for good. So the first to come changes it, and the last to leave restores it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

__all__ = ["ProcessWide"]


class ProcessWide:
    """A change of one such setting.

    Args:
        change: A context manager that makes the change and takes it back.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[object]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._num_inside = 0
        self._undo = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Have the setting changed inside the context."""
        with self._lock:
            if not self._num_inside:
                self._undo.enter_context(self._change())
            self._num_inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_inside -= 1
                if not self._num_inside:
                    self._undo.close()
