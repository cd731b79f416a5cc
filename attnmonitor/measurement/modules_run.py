"""Which modules run in a forward, for the message of one in which no attention was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress

from torch.nn.modules.module import register_module_forward_pre_hook

from attnmonitor.messages import first_names

__all__ = ["modules_run"]

_MOST_NAMED = 12


def modules_run(forward: Callable[[], object]) -> str:
    """Call ``forward()``, and return the classes of the modules that ran in it, most frequent first."""
    ran = Counter[str]()
    handle = register_module_forward_pre_hook(lambda module, _: ran.update([type(module).__qualname__]))
    try:
        with suppress(Exception):
            forward()
    finally:
        handle.remove()
    named = first_names([f"{name} ({number})" for name, number in ran.most_common()], _MOST_NAMED)
    return f"modules that ran: {named or 'none'}"
