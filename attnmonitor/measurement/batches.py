"""A batch is a tensor, or mappings, tuples and lists that hold tensors: walk it, map it, copy it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["copied", "map_tensors", "moved", "tensors_of"]


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
    return batch


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


def copied(batch: Any) -> Any:
    """Return a detached copy, which later writes into the batch do not change."""
    return map_tensors(batch, lambda tensor: tensor.detach().clone())


def moved(batch: Any, device: torch.device) -> Any:
    """Return the batch on another device."""
    return map_tensors(batch, lambda tensor: tensor.to(device, non_blocking=True))
