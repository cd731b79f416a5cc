"""What follows the forward of a measurement: finishing its layers and copying their numbers to the host.

Both may be left for later, so that training goes on while the host's cores solve eigenproblems.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from attnmonitor.functional.host_solver import HostCopy
from attnmonitor.measurement.collected import Key
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.measurement.reduction import Reduction

__all__ = ["Transfer", "Unfinished"]

T = TypeVar("T")


class Transfer:
    """Tensors on their way to the host, as one float32 vector.

    The only place where a sample waits for the device.

    Args:
        on_device: By name.
    """

    def __init__(self, on_device: Mapping[Key, Tensor]) -> None:
        of_type: dict[torch.dtype, dict[Key, Tensor]] = {}
        for key, tensor in on_device.items():
            of_type.setdefault(tensor.dtype, {})[key] = tensor.detach()
        self._shapes = {key: tensor.shape for some in of_type.values() for key, tensor in some.items()}
        self._vector: HostCopy | None = None
        if on_device:
            device = next(iter(on_device.values())).device
            vectors = [  # of one type at a time: a launch for each tensor to convert would be hundreds
                torch.cat([tensor.reshape(-1).to(device) for tensor in some.values()]).to(torch.float32)
                for some in of_type.values()
            ]
            self._vector = HostCopy(torch.cat(vectors))

    def has_arrived(self) -> bool:
        """Whether `result` returns at once."""
        return self._vector is None or self._vector.has_arrived()

    def result(self) -> dict[Key, Tensor]:
        """The tensors on the host, float32."""
        if self._vector is None:
            return {}
        parts = torch.split(self._vector.result(), [shape.numel() for shape in self._shapes.values()])
        # Cloned, because a view would keep the whole vector alive.
        return {key: part.clone().view(shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}


class Unfinished(Generic[T]):
    """A measurement whose forward has run, and whose numbers are not on the host yet.

    Args:
        reduction: The forward.
        collect: Gives what is sent to the host, once all layers are finished.
        judge: Makes the result of what has arrived.
    """

    def __init__(
        self,
        reduction: Reduction,
        collect: Callable[[Reduction], Mapping[Key, Tensor]],
        judge: Callable[[Reduction, Mapping[Key, Tensor]], T],
    ) -> None:
        self._reduction, self._collect, self._judge = reduction, collect, judge
        self._transfer: Transfer | None = None

    def advance(self) -> bool:
        """Go on as far as no wait is needed; return whether `result` returns at once."""
        with default_torch_state():
            if self._transfer is None and self._reduction.advance():
                self._transfer = Transfer(self._collect(self._reduction))
            return self._transfer is not None and self._transfer.has_arrived()

    def result(self) -> T:
        """The result, waited for."""
        with default_torch_state():
            if self._transfer is None:
                self._reduction.finish()
                self._transfer = Transfer(self._collect(self._reduction))
            return self._judge(self._reduction, self._transfer.result())
