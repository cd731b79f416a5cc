"""What a piece of work launches on a device, and what makes the host wait, counted where torch dispatches it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["WAITS", "CountLaunches"]

# Operations that read a value of the device back to the host. Among them every eigensolver: torch reads a status word
# of each matrix, whatever the library that solves it.
WAITS = (
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_to_cpu",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "linalg_eig",
    "masked_select",
    "nonzero",
    "unique",
    "unique_dim",
)
_WITHOUT_KERNEL = (
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "lift_fresh",
    "new_empty",
    "new_empty_strided",
)


class CountLaunches(TorchDispatchMode):
    """Counts operations that are not views, and notes those that wait, in the thread that has entered it.

    Args:
        device: Type of the device whose tensors count.

    Attributes:
        launches: Operations that launch a kernel or a copy; one with a bias counts once.
        waits: Names of those that make the host wait for the device.
        largest: Bytes of the largest tensor that any of them made.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self.launches = 0
        self.waits: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if operation.namespace != "prim" and any(each.device.type == self._device for each in (*made, *given)):
            self.launches += not (operation.is_view or name in _WITHOUT_KERNEL)
            if name in WAITS or _blocking_copy(name, args, kwargs or {}) or _index_from_host(name, args):
                self.waits.append(name)
            self.largest = max([self.largest, *(each.untyped_storage().nbytes() for each in made)])
        return result


def _blocking_copy(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether a copy from or to the CPU blocks: in both directions torch waits."""
    if name == "lift_fresh":  # the end of `torch.tensor`, which has copied what it was given
        return bool(args[0].device.type != "cpu")
    if name == "_to_copy":
        target = kwargs.get("device")
        return target is not None and not kwargs.get("non_blocking") and _touches_host(args[0].device, target)
    if name == "copy_":
        blocks = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return blocks and args[0].device != args[1].device and _touches_host(args[0].device, args[1].device)
    return False


def _touches_host(*devices: torch.device | str) -> bool:
    return any(torch.device(each).type == "cpu" for each in devices)


def _index_from_host(name: str, args: Any) -> bool:
    """Return whether an index is first copied to the device, or the places are counted where it is true."""
    if name not in ("index", "index_put", "index_put_"):
        return False
    indices = [each for each in args[1] if each is not None]
    if any(each.device != args[0].device for each in indices):
        return True
    fills = name != "index" and args[2].numel() == 1  # then torch fills where the index is true
    return not fills and any(each.dtype in (torch.bool, torch.uint8) for each in indices)
