"""The values and tensors in the arguments of a call, whatever lists and mappings they stand in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["flat", "plain_tensors"]


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
