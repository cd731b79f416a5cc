"""Modules that are one attention kernel, known by their class: Transformer Engine's ``DotProductAttention``.

Its kernels are no torch functions, so a call is read from its arguments and the settings of the module, and verified by
its output like any other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.kernels import KernelCall, read_named_call
from attnmonitor.parallel.threads import ProcessSetting, pushed, thread_stack

__all__ = ["MODULES", "watched_modules"]

MODULES: dict[str, tuple[str, ...]] = {"transformer_engine.pytorch": ("DotProductAttention",)}
"""The known classes of each module of Python."""

_UNREAD = ("cu_seqlens_q_padded", "cu_seqlens_kv_padded", "inference_params", "score_mod", "g", "beta")
"""Arguments that change what is computed in ways that are not read."""

_watching: dict[int, list[Callable[..., Any]]] = {}
"""The functions that watch modules, of each thread."""


@contextmanager
def watched_modules(watch: Callable[..., Any]) -> Iterator[None]:
    """Run this thread's calls of known modules as ``watch(read, forward, module, *args, **kwargs)``."""
    with pushed(_watching, watch), _replaced_forwards():
        yield


@ProcessSetting
@contextmanager
def _replaced_forwards() -> Iterator[None]:
    """Make the forwards of the known classes that are imported run under this thread's watching functions."""
    found = {getattr(sys.modules.get(module), name, None) for module, names in MODULES.items() for name in names}
    originals = {
        known: vars(known)["forward"] for known in found if isinstance(known, type) and "forward" in vars(known)
    }
    try:
        for known, forward in originals.items():
            known.forward = _watched(forward)  # type: ignore[attr-defined]
        yield
    finally:
        for known, forward in originals.items():
            known.forward = forward  # type: ignore[attr-defined]


def _watched(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        stack = thread_stack(_watching)
        return stack[-1](_read_call, forward, *args, **kwargs) if stack else forward(*args, **kwargs)

    return watched


def _read_call(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KernelCall:
    """Return what a call of ``DotProductAttention`` computes.

    Raises:
        ValueError: The call has a form that cannot be read; the message says which.
    """
    given = inspect.signature(forward).bind(*args, **kwargs)
    given.apply_defaults()
    named = given.arguments
    module = named["self"]
    for name in _UNREAD:
        if named.get(name) is not None:
            raise ValueError(f"it was called with {name}")
    if getattr(module, "cp_group", None) is not None:
        raise ValueError("its sequences are divided over processes")
    if getattr(module, "softmax_type", "vanilla") != "vanilla":
        raise ValueError(f"its softmax is {module.softmax_type!r}")
    order = named["qkv_format"] or module.qkv_format
    operands = _operands(named)
    rows_first = order == "sbhd"
    query, key, value = (x.transpose(0, 1) if rows_first else x for x in operands)
    kind = (named["attn_mask_type"] or module.attn_mask_type).replace(",", "_")
    causal = "causal" in kind
    if causal and "bottom_right" not in kind and order != "thd" and query.shape[1] != key.shape[1]:
        raise ValueError("its causal mask begins at the first key, with fewer queries than keys or more")
    scale = next(part.softmax_scale for part in module.children() if hasattr(part, "softmax_scale"))
    lengths = {"cu_seqlens_q": named["cu_seqlens_q"], "cu_seqlens_k": named["cu_seqlens_kv"]} if order == "thd" else {}
    call = read_named_call(
        {
            "q": query,
            "k": key,
            "v": value,
            "softmax_scale": scale,
            "causal": causal,
            "window_size": named["window_size"] or module.window_size,
            "alibi_slopes": _slopes(named),
            "attn_bias": _bias(named, kind, scale, query, key) if order != "thd" else None,
            "dropout_p": module.attention_dropout if module.training else 0.0,
            **lengths,
        }
    )

    def arranged(output: Tensor) -> Tensor:
        by_head: Tensor = output.unflatten(-1, (query.shape[-2], value.shape[-1]))
        return by_head.transpose(0, 1) if rows_first else by_head

    return replace(call, arranged=arranged)


def _operands(named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    query = named["query_layer"]
    if named.get("qkv_layer") is not None:
        query, key, value = named["qkv_layer"].unbind(named["qkv_interleave_dim"])
        return query, key, value
    if named.get("kv_layer") is not None:
        return query, *named["kv_layer"].unbind(named["qkv_interleave_dim"])
    return query, named["key_layer"], named["value_layer"]


def _slopes(named: Mapping[str, Any]) -> Tensor | None:
    slopes: Tensor | None = named["alibi_slopes"]
    if named["core_attention_bias_type"] == "alibi" and slopes is None:
        raise ValueError("it uses ALiBi slopes that are not among its arguments")
    return slopes


def _bias(named: Mapping[str, Any], kind: str, scale: float, query: Tensor, key: Tensor) -> Tensor | None:
    """Return what is added to the logits, ``-inf`` where a key is hidden; None where nothing is."""
    seen = _seen(named, kind, query, key)
    bias: Tensor | None = named["core_attention_bias"]
    if bias is not None and named["core_attention_bias_type"] == "pre_scale_bias":
        bias = bias * scale
    if bias is None or seen is None:
        return bias if seen is None else seen
    hidden_as: Tensor = bias.masked_fill(~seen, -torch.inf)
    return hidden_as


def _seen(named: Mapping[str, Any], kind: str, query: Tensor, key: Tensor) -> Tensor | None:
    """Return which keys the queries see by the mask, broadcast against ``(B, H, Lq, Lk)``; None for all."""
    hidden: Any = named["attention_mask"]
    if kind == "arbitrary" and hidden is not None:
        return torch.logical_not(hidden)
    if "padding" not in kind:
        return None
    ours, theirs = named["cu_seqlens_q"], named["cu_seqlens_kv"]
    if hidden is not None:
        both = hidden if isinstance(hidden, tuple) else (hidden, hidden)
        of_queries, of_keys = (~x.flatten(1) for x in both)
    elif ours is not None:
        ends = ours, ours if theirs is None else theirs
        of_queries, of_keys = (
            torch.arange(x.shape[1], device=x.device) < end.diff()[:, None]
            for x, end in zip((query, key), ends, strict=True)
        )
    else:
        return None
    return torch.logical_and(of_queries[:, None, :, None], of_keys[:, None, None, :])
