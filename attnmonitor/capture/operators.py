"""Attention operators that are registered with torch, ``torch.ops.library.name``: read by their arguments' names.

The order of axes is not part of a schema. Where shapes allow both, the one that rebuilds the operator's output is
right, and is kept for the operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.kernels import KernelCall, read_named_call

__all__ = ["is_attention_operator", "read_operator_call"]

_OPERANDS = (("q", "query"), ("k", "key"), ("v", "value"))
_NEAR = 5e-2  # rounding to half precision stays below; a wrong order of axes does not
_heads_first: dict[str, bool] = {}
"""The order of axes of each operator that was seen."""


def is_attention_operator(func: Any) -> bool:
    """Return whether a function is a registered operator with queries, keys and values as arguments."""
    schema = _schema(func)
    if schema is None:
        return False
    names = {argument.name for argument in schema.arguments}
    return all(names & set(operand) for operand in _OPERANDS)


def _schema(func: Any) -> Any:
    if isinstance(func, torch._ops.OpOverloadPacket):
        func = getattr(func, func.overloads()[0])
    return func._schema if isinstance(func, torch._ops.OpOverload) else None


def read_operator_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> KernelCall:
    """Return what a call of an attention operator computes; waits for the device at its first call.

    Raises:
        ValueError: The output is not that of softmax attention on the operands.
    """
    schema = _schema(func)
    names = [argument.name for argument in schema.arguments]
    defaults = {each.name: each.default_value for each in schema.arguments if each.has_default_value()}
    named = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    known = _heads_first.get(schema.name)
    for order, call in _readings(named, (True, False) if known is None else (known,)):
        if known is not None:
            return call
        error = call.attention.rebuilt(output, call.row_axis).error
        if error is not None and float(error) < _NEAR:
            _heads_first[schema.name] = order
            return call
    raise ValueError("its output is not that of softmax attention on its operands")


def _readings(named: Mapping[str, Any], orders: Sequence[bool]) -> Iterator[tuple[bool, KernelCall]]:
    """Yield the orders of axes that fit the operands, each with what the call computes in it."""
    query, key = (next(named[name] for name in names if name in named) for names in _OPERANDS[:2])
    for heads_first in orders:
        heads = 1 if heads_first else -2
        fits = query.dim() == key.dim() and (query.dim() == 4 or not heads_first)
        if fits and query.shape[heads] % key.shape[heads] == 0:
            yield heads_first, read_named_call(named, heads_first=heads_first)
