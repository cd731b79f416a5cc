"""A batch is a tensor, or anything that holds tensors: walk it, map it, copy it.

What holds them may be mappings, tuples, lists, dataclasses and objects with attributes (a PyG ``Batch``), nested at
will. A tensor may be sparse or nested, or of a subclass. Everything else in a batch (numbers, text, None, objects
without attributes) stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["copied", "is_plain", "map_tensors", "moved", "plain_parts", "shape_of", "tensors_of"]


_NO_PARTS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, Enum, nn.Module, Dataset, DataLoader)


def map_tensors(batch: Any, function: Callable[[Tensor], Any], inside: frozenset[int] = frozenset()) -> Any:
    """Return the batch with ``function`` applied to each tensor; what holds them keeps its type where it can."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, (np.ndarray, set)):
        return batch.copy()  # a later write must not reach it
    if id(batch) in inside:
        return batch
    inside |= {id(batch)}
    if isinstance(batch, Mapping):
        return _of_type(batch, {key: map_tensors(value, function, inside) for key, value in batch.items()})
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function, inside) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, function, inside) for value in batch)
    if next(tensors_of(batch), None) is not None:
        return _with_parts(batch, lambda part: map_tensors(part, function, inside))
    with suppress(Exception):  # a forward may write into it: into an empty cache of keys and values, for example
        return _with_parts(batch, lambda part: map_tensors(part, function, inside))
    return batch


def _with_parts(batch: Any, function: Callable[[Any], Any]) -> Any:
    """Return a copy of an object with ``function`` applied to each attribute; one without attributes as it is."""
    names = _attributes_of(batch)
    mapped = copy.copy(batch) if names else batch
    if mapped is not batch:  # a logger, say, is its own copy
        for name in names:
            object.__setattr__(mapped, name, function(getattr(mapped, name)))
    return mapped


def _of_type(batch: Mapping[Any, Any], mapped: dict[Any, Any]) -> Mapping[Any, Any]:
    """Return the mapping as one of the type of ``batch``; a dict where that type cannot be copied and written."""
    if type(batch) is dict:
        return mapped
    with suppress(Exception):
        same: Any = copy.copy(batch)
        for key, value in mapped.items():
            same[key] = value
        if same is not batch and list(same) == list(mapped):
            return cast("Mapping[Any, Any]", same)
    return mapped


def _attributes_of(batch: Any) -> list[str]:
    """Return the names of an object's attributes; of a class, module, function or other value none."""
    if isinstance(batch, _NO_PARTS):
        return []
    if dataclasses.is_dataclass(batch):
        return [field.name for field in dataclasses.fields(batch)]
    slots = [getattr(kind, "__slots__", ()) for kind in type(batch).__mro__]
    in_slots = [name for names in slots for name in ([names] if isinstance(names, str) else names)]
    return [*getattr(batch, "__dict__", ()), *(name for name in in_slots if hasattr(batch, name) and name[:2] != "__")]


def tensors_of(batch: Any, where: str = "", inside: frozenset[int] = frozenset()) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the batch with its place in it, such as ``.input_ids`` or ``[0]``."""
    if isinstance(batch, Tensor):
        yield where, batch
        return
    if isinstance(batch, (str, bytes, np.ndarray)) or id(batch) in inside:  # an object may hold itself
        return
    inside |= {id(batch)}
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_of(value, f"{where}.{key}", inside)
    elif isinstance(batch, (tuple, list)):
        for index, value in enumerate(batch):
            yield from tensors_of(value, f"{where}[{index}]", inside)
    else:
        for name in _attributes_of(batch):
            yield from tensors_of(getattr(batch, name), f"{where}.{name}", inside)


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor is one block of numbers: neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def shape_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return the shape; of a nested tensor, whose lengths differ, the first size and None for the other axes."""
    return (tensor.size(0), *[None] * (tensor.dim() - 1)) if tensor.is_nested else tuple(tensor.shape)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a sparse, nested or quantized tensor consists of; a plain one alone."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.layout is not torch.strided:
        return [tensor.to_dense()]
    return [tensor.dequantize() if tensor.is_quantized else tensor.resolve_conj().resolve_neg()]


def copied(batch: Any) -> Any:
    """Return a detached copy, which later writes into the batch do not change."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def moved(batch: Any, device: torch.device) -> Any:
    """Return a copy of the batch on a device."""
    return map_tensors(batch, lambda x: x.detach().clone() if x.device == device else x.to(device, non_blocking=True))
