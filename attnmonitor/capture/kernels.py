"""Kernels known by name, which no torch function shows: flash_attn, xformers and torch's packed attention.

A model imports such a function in any way, so it is recognized by what it is and not by where it is looked up: while a
capture is open its code is replaced by a call of `watched_call`, which runs the original on every thread and reports
the calls of the threads that watch. Operands are ``(B, L, H, d)``, or ``(T, H, d)`` with the cumulative lengths of the
sequences packed into one row.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.documents import Documents, documents_at
from attnmonitor.capture.fused import add_mask, add_soft_cap, attend
from attnmonitor.capture.verify import Attention, Step
from attnmonitor.parallel.threads import ProcessSetting, pushed, thread_stack

__all__ = ["KERNELS", "KernelCall", "read_named_call", "watched_call", "watched_functions"]

_FLASH = ("func", "varlen_func", "qkvpacked_func", "kvpacked_func", "varlen_qkvpacked_func", "varlen_kvpacked_func")
KERNELS: dict[str, tuple[str, ...]] = {
    "flash_attn.flash_attn_interface": tuple(f"flash_attn_{form}" for form in _FLASH),
    "flash_attn": tuple(f"flash_attn_{form}" for form in _FLASH),
    "flash_attn_interface": tuple(f"flash_attn_{form}" for form in _FLASH),
    "xformers.ops": ("memory_efficient_attention",),
    "xformers.ops.fmha": ("memory_efficient_attention",),
    "torch.nn.attention.varlen": ("varlen_attn",),
}
"""The known functions of each module."""

_UNREAD = ("qv", "seqused_q", "seqused_k", "block_table", "page_table")
"""Arguments that change what is computed in ways that are not read."""

_watching: dict[int, list[Callable[..., Any]]] = {}
"""The functions that watch kernels, of each thread."""

_originals: dict[str, FunctionType] = {}


@contextmanager
def watched_functions(watch: Callable[..., Any]) -> Iterator[None]:
    """Run this thread's calls of known kernels as ``watch(read, kernel, *args, **kwargs)``."""
    with pushed(_watching, watch), _replaced_code():
        yield


def watched_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a known kernel under this thread's watching functions."""
    run: Callable[..., Any] = _originals[name]
    stack = thread_stack(_watching)
    return stack[-1](_read_call, run, *args, **kwargs) if stack else run(*args, **kwargs)


@ProcessSetting
@contextmanager
def _replaced_code() -> Iterator[None]:
    """Make the known functions that are imported call `watched_call`."""
    replaced: list[tuple[FunctionType, CodeType, Any, Any]] = []
    try:
        for function in _imported():
            key = f"{function.__module__}.{function.__qualname__}"
            original = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)
            original.__kwdefaults__ = function.__kwdefaults__
            _originals[key] = original
            replaced.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
            function.__defaults__ = function.__kwdefaults__ = None
            function.__code__ = _calling(key)
        yield
    finally:
        for function, code, defaults, keyword_defaults in replaced:
            function.__code__ = code
            function.__defaults__, function.__kwdefaults__ = defaults, keyword_defaults


def _imported() -> list[FunctionType]:
    """Return the known functions whose modules are imported, each once."""
    found: dict[int, FunctionType] = {}
    for module, names in KERNELS.items():
        for name in names:
            function = getattr(sys.modules.get(module), name, None)
            if isinstance(function, FunctionType) and not function.__closure__:
                found[id(function)] = function
    return list(found.values())


def _calling(key: str) -> CodeType:
    """Return the code of a function that hands its arguments to `watched_call`."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        import attnmonitor.capture.kernels as kernels

        return kernels.watched_call("name of the kernel", args, kwargs)

    code = stand_in.__code__
    return code.replace(co_consts=tuple(key if x == "name of the kernel" else x for x in code.co_consts))


@dataclass(frozen=True)
class KernelCall:
    """A call of a known kernel.

    Attributes:
        attention: Its attention, with operands ``(B, H, L, d)``.
        operands: The arguments that hold queries and keys.
        row_axis: The axis of its arranged output that counts query positions.
        arranged: From its output to the same with axes in the order of its operands.
    """

    attention: Attention
    operands: tuple[Tensor, Tensor]
    row_axis: int
    arranged: Callable[[Tensor], Tensor] = lambda output: output


def _read_call(kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> KernelCall:
    """Return what a call of a known kernel computes.

    Raises:
        ValueError: The call has a form that cannot be read; the message says which.
    """
    given = inspect.signature(kernel).bind(*args, **kwargs)
    given.apply_defaults()
    return read_named_call(given.arguments)


def read_named_call(named: Mapping[str, Any], *, heads_first: bool = False) -> KernelCall:
    """Return what a kernel computes, from its arguments by name.

    Args:
        named: The arguments.
        heads_first: Whether operands of four axes are ``(B, H, L, d)``, not ``(B, L, H, d)``.

    Raises:
        ValueError: The call has a form that cannot be read; the message says which.
    """
    query, key, value = _operands(named)
    if query.dim() not in (3, 4):
        raise ValueError(f"queries of shape {tuple(query.shape)}")
    for name in _UNREAD:
        if named.get(name) is not None:
            raise ValueError(f"it was called with {name}")
    is_packed = query.dim() == 3 and _first(named, "cu_seqlens_q", "cu_seqlens", "cu_seq_q") is not None
    new_axis = 0 if is_packed else 2  # (T, H, d) is one row; xformers takes (B, L, d) for one head

    def by_head(x: Tensor) -> Tensor:
        if heads_first:
            return x
        return (x if x.dim() == 4 else x.unsqueeze(new_axis)).transpose(1, 2)

    def as_output(x: Tensor, rows: Tensor) -> Tensor:
        if heads_first:
            return x
        x = x.transpose(1, 2)
        return x if query.dim() == 4 else x.squeeze(new_axis)

    q, k, v = (by_head(x) for x in (query, key, value))
    scale = _first(named, "softmax_scale", "scale", "sm_scale", "scaling")
    attention = Attention(q, k, q.shape[-1] ** -0.5 if scale is None else scale, value=v, heads_of=by_head)
    attention.exact = not _first(named, "dropout_p", "p")
    places = _places(named, q, k, is_packed=is_packed)
    _add_terms(attention, named, places)
    attention.after += [attend(v), Step(as_output)]
    sources = _first(named, "q", "query", "qkv"), _first(named, "k", "key", "kv", "qkv")
    return KernelCall(attention, sources, 2 if heads_first else 0 if is_packed else 1)


def _first(named: Mapping[str, Any], *names: str) -> Any:
    return next((named[name] for name in names if named.get(name) is not None), None)


def _bias(named: Mapping[str, Any]) -> Any:
    return _first(named, "attn_bias", "attn_mask", "mask", "bias")


def _operands(named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    qkv, kv = named.get("qkv"), named.get("kv")
    if qkv is not None and named.get("num_heads_q") is not None and qkv.dim() == 4:  # heads of all three side by side
        num_heads = named["num_heads_q"]
        query, key, value = qkv.tensor_split((num_heads, (qkv.shape[-2] + num_heads) // 2), -2)
        return query, key, value
    if qkv is not None:
        query, key, value = qkv.unbind(-3)
        return query, key, value
    if kv is not None:
        return named["q"], *kv.unbind(-3)
    return _first(named, "q", "query"), _first(named, "k", "key"), _first(named, "v", "value")


@dataclass(frozen=True)
class _Places:
    """Where each position stands in its own sequence.

    Attributes:
        queries: Position of each query, ``(Lq,)``; the last one stands at the last key.
        keys: Position of each key, ``(Lk,)``.
        packed: Which packed sequence each query and each key belongs to; None where nothing is packed.
        cumulative: Cumulative lengths of queries and of keys; None likewise.
    """

    queries: Tensor
    keys: Tensor
    packed: tuple[Tensor, Tensor] | None = None
    cumulative: tuple[Tensor, Tensor] | None = None


def _places(named: Mapping[str, Any], query: Tensor, key: Tensor, *, is_packed: bool) -> _Places:
    rows, columns = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
    bias = _bias(named)
    ours = theirs = None
    if is_packed:
        ours = _first(named, "cu_seqlens_q", "cu_seqlens", "cu_seq_q")
        theirs = _first(named, "cu_seqlens_k", "cu_seqlens", "cu_seq_k")
    elif hasattr(bias, "q_seqinfo") and hasattr(bias, "k_seqinfo"):
        ours, theirs = bias.q_seqinfo.seqstart, bias.k_seqinfo.seqstart
    if ours is None:
        from_first = type(bias).__name__ == "LowerTriangularMask"
        return _Places(rows if from_first else rows + (len(columns) - len(rows)), columns)
    ours = ours.to(device=query.device, dtype=torch.int64)
    theirs = ours if theirs is None else theirs.to(device=query.device, dtype=torch.int64)
    of_query = torch.searchsorted(ours[1:].contiguous(), rows, right=True).clamp_max(len(ours) - 2)
    of_key = torch.searchsorted(theirs[1:].contiguous(), columns, right=True).clamp_max(len(theirs) - 2)
    ahead = (theirs.diff() - ours.diff())[of_query]
    return _Places(rows - ours[of_query] + ahead, columns - theirs[of_key], (of_query, of_key), (ours, theirs))


def _documents(ours: Tensor, theirs: Tensor) -> Documents:
    """Return the packed sequences as documents; waits for the device."""
    ends = ours.tolist()
    if ends != theirs.tolist():
        raise ValueError("the packed sequences of queries and of keys have other lengths")
    spans = [(start, end) for start, end in pairwise(ends) if end - start > 1]
    return documents_at(spans, ours.device)


def _add_terms(attention: Attention, named: Mapping[str, Any], places: _Places) -> None:
    """Add what acts on the logits of a call: soft-cap, ALiBi, bias and what is hidden."""
    softcap, slopes, bias = named.get("softcap"), named.get("alibi_slopes"), _bias(named)
    if softcap:
        add_soft_cap(attention, softcap)
    if slopes is not None:
        slope = slopes.reshape(*slopes.shape[:-1], slopes.shape[-1], 1, 1)
        attention.nonlinear.append(
            Step(lambda x, rows: x - slope * (places.queries[rows][:, None] - places.keys).abs())
        )
    if isinstance(bias, Tensor):
        add_mask(attention, bias, attention.nonlinear)
    left, right = _window(named, places)
    chunk = named.get("attention_chunk") or 0

    def hide(x: Tensor, rows: Tensor) -> Tensor:
        ahead = places.keys - places.queries[rows][:, None]  # how far a key stands after the query
        hidden = torch.zeros_like(ahead, dtype=torch.bool)
        if right is not None:
            hidden = hidden | (ahead > right)
        if left is not None:
            hidden = hidden | (ahead < -left)
        if chunk:
            hidden = hidden | (places.keys // chunk != places.queries[rows][:, None] // chunk)
        if places.packed is not None:
            hidden = hidden | (places.packed[0][rows][:, None] != places.packed[1])
        return x.masked_fill(hidden, -torch.inf)

    attention.nonlinear.append(Step(hide))
    if places.cumulative is not None:
        attention.documents = partial(_documents, *places.cumulative)


def _window(named: Mapping[str, Any], places: _Places) -> tuple[int | None, int | None]:
    """Return how many keys before and after its own position a query sees; None for all."""
    left, right = (None if side is None or side < 0 else int(side) for side in named.get("window_size") or (-1, -1))
    bias = _bias(named)
    kind = "" if bias is None or isinstance(bias, Tensor) else type(bias).__name__
    if _first(named, "causal", "is_causal") or "Causal" in kind or "LowerTriangular" in kind:
        right = 0
    elif kind and places.packed is None:
        raise ValueError(f"attn_bias is a {kind}")
    return left, right
