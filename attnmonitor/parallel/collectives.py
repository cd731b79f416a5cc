"""Record the collectives of a forward, and run the remaining ones with zeros when a rank has failed."""

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


_COLLECTIVES = ("c10d", "_c10d_functional")


_ALONE = ("wait_tensor", "_wrap_tensor_autograd")  # in that namespace, but done by each process for itself


@dataclass(frozen=True)
class _Blank:
    """A tensor without its contents."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def filled(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


Collective = tuple[Any, Any, Any]  # operation, arguments, keyword arguments; tensors left blank


class CollectiveRecorder(TorchDispatchMode):
    """Notes every collective that this process starts while the context is open.

    One that fails has not been started: on a GPU it is memory for its outcome that is short.

    Attributes:
        calls: What `run_with_zeros` takes, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, dtensor_class()) for each in types):
            return NotImplemented  # it comes back in pieces that are plain tensors and collectives
        result = func(*args, **kwargs)
        if func.namespace in _COLLECTIVES and func._opname not in _ALONE:
            blank = tree_map_only(Tensor, lambda x: _Blank(x.shape, x.dtype, x.device), (args, kwargs))
            self.calls.append((func, *blank))
        return result


def run_with_zeros(calls: Sequence[Collective]) -> None:
    """Take part in these collectives with zeros, so that nobody waits; what comes of it is good for nothing."""
    for func, args, kwargs in calls:
        args, kwargs = tree_map_only(_Blank, _Blank.filled, (args, kwargs))
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional":
            for each in tree_iter(result):
                torch.ops._c10d_functional.wait_tensor(each)
