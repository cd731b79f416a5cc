"""Read the arguments that transformers passes to a kernel outside of torch, such as FlashAttention.

Recent transformers look up every attention function in one table, ``AttentionInterface``. While the context is open,
functions from the table are wrapped: the real one runs, and if the function mode found no attention in it, its
arguments are the record. They are verified by its output like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.fused import add_mask, add_soft_cap, attend, hide_future, mask_step
from attnmonitor.capture.verify import Attention, Step
from attnmonitor.parallel.threads import ProcessSetting, pushed, thread_stack

__all__ = ["read_interface_call", "watched_kernels"]

Kernel = Callable[..., Any]

_watching: dict[int, list[Callable[..., Any]]] = {}
"""The functions that watch the kernels of each thread."""


@contextmanager
def watched_kernels(watch: Callable[..., Any]) -> Iterator[None]:
    """Run attention functions of transformers as ``watch(kernel, module, query, key, value, mask, ...)``.

    Only those that this thread calls. Does nothing where transformers is not imported or has no such table.
    """
    if _table() is None:
        yield
        return
    with pushed(_watching, watch), _watched_lookups():
        yield


def _table() -> Any:
    return getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)


@ProcessSetting
@contextmanager
def _watched_lookups() -> Iterator[None]:
    """Make the table return kernels that run under this thread's watching functions."""
    table = _table()
    inherited = "__getitem__" not in vars(table)
    lookup = table.__getitem__

    def watched_lookup(self: Any, name: str) -> Kernel:
        kernel: Kernel = lookup(self, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            run = kernel
            for watch in thread_stack(_watching):
                run = partial(watch, run)
            return run(*args, **kwargs)

        return watched

    table.__getitem__ = watched_lookup
    try:
        yield
    finally:
        if inherited:
            del table.__getitem__
        else:
            table.__getitem__ = lookup


def read_interface_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> Attention:
    """Return the attention of one call of the interface; keys and values are not repeated per query head.

    Such a function returns ``(B, Lq, Hq, dv)``, which is the layout of the rebuilt rows. Kernels behind the interface
    take a padding mask ``(B, Lk)`` or none, and apply causality and windows themselves.
    """
    num_rows, num_keys = query.shape[-2], key.shape[-2]
    attention = Attention(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, exact=dropout == 0)
    attention.value, attention.heads_of = value, lambda x: x.transpose(1, 2)
    if softcap is not None:
        add_soft_cap(attention, softcap)
    if position_bias is not None:
        attention.nonlinear.append(mask_step(position_bias, num_rows))
        attention.has_added = True
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        valid = attention_mask.bool()
        attention.nonlinear.append(Step(lambda x, rows: x.masked_fill(~valid[:, None, None, :], -torch.inf)))
        if num_rows == num_keys:  # such kernels skip padded queries
            attention.nonlinear.append(
                Step(lambda x, rows: x.masked_fill(~valid.index_select(-1, rows)[:, None, :, None], -torch.inf))
            )
        attention.visible.append(valid[:, None])
    elif isinstance(attention_mask, Tensor):
        add_mask(attention, attention_mask, attention.nonlinear)
    if (is_causal if is_causal is not None else getattr(module, "is_causal", False)) and num_rows > 1:
        attention.nonlinear.append(Step(hide_future))
    if sliding_window is not None:
        attention.nonlinear.append(_hide_distant(sliding_window, num_keys))
    if s_aux is None:
        attention.after.append(attend(value))
    else:
        attention.outside.add("sinks")
        attention.after.append(_attend_with_sinks(value, s_aux))
    attention.after.append(Step(lambda x, rows: x.transpose(1, 2)))
    return attention


def _hide_distant(window: int, num_keys: int) -> Step:
    """Return the step that hides keys ``window`` or more positions before the query."""

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        distance = rows[:, None] - torch.arange(num_keys, device=x.device)
        return x.masked_fill(distance >= window, -torch.inf)

    return Step(apply)


def _attend_with_sinks(value: Tensor, sinks: Tensor) -> Step:
    """Return the step from logits to output where the softmax also has one learned logit per head without a value."""
    plain = attend(value)

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        sink = sinks.to(x.dtype).reshape(1, -1, 1, 1)
        share = torch.sigmoid(x.logsumexp(-1, keepdim=True) - sink)
        output: Tensor = share * plain.apply(x, rows)
        return output

    return Step(apply)
