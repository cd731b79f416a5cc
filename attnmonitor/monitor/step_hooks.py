"""One pair of torch's global optimizer hooks for all monitors of a process.

torch walks through its hooks while it calls them, and raises into the step of whoever trains if one is added or removed
meanwhile: by a monitor that closes or is collected in the step of another, or that attaches in another thread. So these
two are added with the first monitor and removed with the last one, and walk through a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from attnmonitor.measurement.quiet import not_compiled

__all__ = ["add_step_hooks"]

Hook = Callable[[Optimizer], None]

_hooks: dict[object, tuple[Hook, Hook]] = {}
_handles: list[RemovableHandle] = []
_lock = RLock()  # reentrant: a monitor may be collected while another is added


def add_step_hooks(before: Hook, after: Hook) -> Callable[[], None]:
    """Have two functions called before and after each step of every optimizer; return what removes them."""
    key = object()
    with _lock:
        _hooks[key] = before, after
        if not _handles:
            _handles.append(register_optimizer_step_pre_hook(_call_before))
            _handles.append(register_optimizer_step_post_hook(_call_after))

    def remove() -> None:
        with _lock:
            _hooks.pop(key, None)
            while _handles and not _hooks:
                _handles.pop().remove()

    return remove


@not_compiled
def _call_before(optimizer: Optimizer, *_: object) -> None:
    _call(optimizer, 0)


@not_compiled
def _call_after(optimizer: Optimizer, *_: object) -> None:
    _call(optimizer, 1)


def _call(optimizer: Optimizer, which: int) -> None:
    for key in list(_hooks):
        if (hooks := _hooks.get(key)) is not None:  # not removed by one before it
            hooks[which](optimizer)
