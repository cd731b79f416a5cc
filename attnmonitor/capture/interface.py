"""Read what transformers hands to a kernel that torch cannot show: FlashAttention and others from outside of torch.

Recent transformers dispatch every attention through one table, ``AttentionInterface``. While the context is open, what
comes out of the table is wrapped: the real function runs, and if nothing of its work was seen at the level of torch
functions, the arguments it was called with are the record. The output it returned verifies them like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.fused import attend, hide_future, mask_step, mask_visibility
from attnmonitor.capture.verify import Attention, Step
from attnmonitor.parallel.threads import ProcessSetting, pushed, thread_stack

__all__ = ["kernels_in_sight", "read_interface_call"]

Kernel = Callable[..., Any]

_watching: dict[int, list[Callable[..., Any]]] = {}
"""Who watches the kernels that a thread runs, by thread."""


@contextmanager
def kernels_in_sight(watch: Callable[..., Any]) -> Iterator[None]:
    """Route the attention functions of transformers through ``watch(kernel, module, query, key, value, mask, ...)``.

    Only those this thread calls. Does nothing where transformers has not been imported or has no such table.
    """
    if _table() is None:
        yield
        return
    with pushed(_watching, watch), _lookups_in_sight():
        yield


def _table() -> Any:
    return getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)


@ProcessSetting
@contextmanager
def _lookups_in_sight() -> Iterator[None]:
    """Have the table hand out kernels that ask who watches."""
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
    """The arguments of one call of the interface, keys and values with their own heads, as an attention.

    What such a function returns is ``(B, Lq, Hq, dv)``, and that is the layout of the rebuilt rows.

    Kernels behind the interface take a padding mask ``(B, Lk)`` or none, and apply causality and windows themselves.
    """
    num_rows, num_keys = query.shape[-2], key.shape[-2]
    attention = Attention(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, exact=dropout == 0)
    if softcap is not None:
        attention.bent.append(Step(lambda x, rows: softcap * torch.tanh(x / softcap)))
        attention.outside.add("softcap")
    if position_bias is not None:
        attention.bent.append(mask_step(position_bias, num_rows))
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        valid = attention_mask.bool()
        attention.bent.append(Step(lambda x, rows: x.masked_fill(~valid[:, None, None, :], -torch.inf)))
        if num_rows == num_keys:  # such kernels skip padded queries altogether
            attention.bent.append(
                Step(lambda x, rows: x.masked_fill(~valid.index_select(-1, rows)[:, None, :, None], -torch.inf))
            )
        attention.visible.append(valid)
    elif isinstance(attention_mask, Tensor):
        attention.bent.append(mask_step(attention_mask, num_rows))
        attention.visible.extend(mask_visibility(attention_mask, query, key))
    if (is_causal if is_causal is not None else getattr(module, "is_causal", False)) and num_rows > 1:
        attention.bent.append(Step(hide_future))
    if sliding_window is not None:
        attention.bent.append(_hide_distant(sliding_window, num_keys))
    if s_aux is None:
        attention.after.append(attend(value))
    else:
        attention.outside.add("sinks")
        attention.after.append(_attend_with_sinks(value, s_aux))
    attention.after.append(Step(lambda x, rows: x.transpose(1, 2)))
    return attention


def _hide_distant(window: int, num_keys: int) -> Step:
    def apply(x: Tensor, rows: Tensor) -> Tensor:
        distance = rows[:, None] - torch.arange(num_keys, device=x.device)
        return x.masked_fill(distance >= window, -torch.inf)

    return Step(apply)


def _attend_with_sinks(value: Tensor, sinks: Tensor) -> Step:
    """One learned logit per head takes part in the softmax and has no value."""
    plain = attend(value)

    def apply(x: Tensor, rows: Tensor) -> Tensor:
        sink = sinks.to(x.dtype).reshape(1, -1, 1, 1)
        share = torch.sigmoid(x.logsumexp(-1, keepdim=True) - sink)
        output: Tensor = share * plain.apply(x, rows)
        return output

    return Step(apply)
