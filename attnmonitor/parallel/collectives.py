"""Record the collectives of a forward, and run the remaining ones with zeros after a failure.

A forward of a sharded model runs collectives on all ranks: FSDP gathers each layer's weights, tensor parallelism sums
over ranks. If one rank fails in the middle, it joins the remaining ones with zeros so that the others do not hang.
Which ones remain is known from a record of a complete forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from attnmonitor.parallel.sharding import dtensor_class

__all__ = ["Collective", "CollectiveRecorder", "run_with_zeros"]

_NAMESPACES = ("c10d", "_c10d_functional")
_LOCAL_OPERATIONS = ("wait_tensor", "_wrap_tensor_autograd")  # in these namespaces, but no communication

Collective = tuple[Any, Any, Any]  # operation, arguments, keyword arguments; tensors replaced by their _TensorSpec


@dataclass(frozen=True)
class _TensorSpec:
    """Shape, type and device of a tensor, without its contents."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class CollectiveRecorder(TorchDispatchMode):
    """Records every collective that this process starts while the context is open.

    A collective that fails to start is not recorded: on a GPU, memory for its result may be missing.

    Attributes:
        calls: The collectives in order, as `run_with_zeros` takes them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, dtensor_class()) for each in types):
            return NotImplemented  # DTensor then calls plain operations and collectives
        result = func(*args, **kwargs)
        if func.namespace in _NAMESPACES and func._opname not in _LOCAL_OPERATIONS:
            specs = tree_map_only(Tensor, lambda x: _TensorSpec(x.shape, x.dtype, x.device), (args, kwargs))
            self.calls.append((func, *specs))
        return result


def run_with_zeros(calls: Sequence[Collective]) -> None:
    """Run these collectives with zeros, so that no other rank waits for this one; their results are not used."""
    for func, args, kwargs in calls:
        args, kwargs = tree_map_only(_TensorSpec, _TensorSpec.zeros, (args, kwargs))
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional":
            for each in tree_iter(result):
                torch.ops._c10d_functional.wait_tensor(each)
