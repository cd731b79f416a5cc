"""The values and tensors in the arguments of a call, whatever lists, mappings and functions they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["flat", "plain_tensors", "read_by"]


def plain_tensors(value: Any) -> Iterator[Tensor]:
    """Yield the plain tensors in a value."""
    return (x for x in flat(value) if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested)


def flat(value: Any) -> Iterator[Any]:
    """Yield what stands in lists, tuples and mappings, also in one another."""
    if isinstance(value, list | tuple):
        for part in value:
            yield from flat(part)
    elif isinstance(value, Mapping):
        yield from flat(list(value.values()))
    else:
        yield value


def read_by(function: Any) -> Iterator[Tensor]:
    """Yield the tensors that a function reads beside its arguments, also in functions it is composed of."""
    pending, seen = [function], set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif callable(value) and id(value) not in seen:
            seen.add(id(value))
            bound = [value.func, value.args, value.keywords] if isinstance(value, partial) else []
            cells = getattr(value, "__closure__", None) or ()
            pending += flat([*bound, *(cell.cell_contents for cell in cells)])
