"""A batch is a tensor, or mappings, tuples, lists and dataclasses that hold tensors: walk it, map it, copy it.

A tensor may be sparse or nested, or of a subclass. Everything else in a batch (numbers, text, None) stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["copied", "is_plain", "map_tensors", "moved", "plain_parts", "shape_of", "tensors_of"]


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return the batch with ``function`` applied to each tensor; mappings become dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(value, function) for value in batch)
    if _is_dataclass(batch):
        mapped = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(mapped, field.name, map_tensors(getattr(batch, field.name), function))
        return mapped
    return batch.copy() if isinstance(batch, np.ndarray) else batch  # a later write of the user must not reach it


def _is_dataclass(batch: Any) -> bool:
    return dataclasses.is_dataclass(batch) and not isinstance(batch, type)


def tensors_of(batch: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor of the batch with its place in it, such as ``.input_ids`` or ``[0]``."""
    if isinstance(batch, Tensor):
        yield where, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from tensors_of(value, f"{where}.{key}")
    elif isinstance(batch, (tuple, list)):
        for index, value in enumerate(batch):
            yield from tensors_of(value, f"{where}[{index}]")
    elif _is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name), f"{where}.{field.name}")


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
    """Return the batch on another device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
