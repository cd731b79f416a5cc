"""Modules that look like attention and gave no record: which of them are named, and for what reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.function_call import FunctionCall
from attnmonitor.capture.modules import Frames, is_graph_attention

__all__ = ["suspect", "unrecorded"]

_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax", "log_softmax", "logsumexp", "softmin", "gumbel_softmax"}
_READS_OUTSIDE = {"numpy", "data_ptr", "tolist", "__array__", "__dlpack__"}


def suspect(frames: Frames, ancestries: Ancestries, call: FunctionCall) -> None:
    """Note where a function may be attention: a softmax of numbers per pair of positions, or of another library."""
    if isinstance(call.func, torch._ops.OpOverload | torch._ops.OpOverloadPacket) or call.name in _READS_OUTSIDE:
        frames.suspect()
        return
    x = call.args[0] if call.name in _SOFTMAXES and call.args else None
    if isinstance(x, Tensor) and (frames.heads_were_mixed() or ancestries.may_be_logits(x)):
        frames.suspect()


def unrecorded(
    frames: Frames, recorded: Iterable[str], reasons: Sequence[Mapping[str, str]], *, all_seen: bool
) -> Iterator[tuple[str, str]]:
    """Yield the modules that look like attention and gave no record, each with the reason.

    Args:
        frames: The module calls of the forward.
        recorded: Names of the layers that gave a record.
        reasons: Why layers could not be followed, by name; the first mapping that has one decides.
        all_seen: Whether every function was looked at, so that a module in which nothing was suspect is no attention:
            a gate, a convolution, a recurrence, linear attention.
    """
    for name, module in frames.unrecorded(recorded):
        is_quiet = all_seen and name not in frames.suspected
        counted = reasons[1:] if is_quiet else reasons  # a trace also ends where linear attention goes on
        known = [why for several in counted for layer, why in several.items() if f"{layer}.".startswith(f"{name}.")]
        if name in frames.scripted:
            yield name, "it is a scripted module, whose operations cannot be seen"
        elif known:
            yield name, known[0]
        elif name not in frames.called:
            yield name, "not called in this forward"
        elif is_graph_attention(module):
            yield name, "it attends along the edges of a graph, so it has no queries and keys of a sequence"
        elif not is_quiet:
            why = "no softmax of a query-key product was seen in it"
            if name in frames.hidden:
                why += "; it calls a function that cannot be seen: a scripted one, or no torch's"
            yield name, why
