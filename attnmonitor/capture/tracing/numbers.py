"""Plain numbers among the operands of a model: also those in tensors of one entry, where the host knows them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.function_call import FunctionCall, Observer
from attnmonitor.capture.tensor_notes import Notes

__all__ = ["Numbers"]


class Numbers:
    """Notes on tensors that were made of one number.

    Attributes:
        observers: Observers of the functions that make them.
    """

    def __init__(self) -> None:
        self._notes = Notes[float]()
        self.observers: dict[str, Observer] = dict.fromkeys(("full", "tensor", "scalar_tensor"), self._note)

    def _note(self, call: FunctionCall) -> None:
        output, value = call.output, call.argument(1 if call.name == "full" else 0, "fill_value")
        if isinstance(output, Tensor) and output.dim() == 0 and isinstance(value, int | float):
            self._notes.put(output, float(value))

    def of(self, x: Any) -> float | None:
        """Return ``x`` as a number if it is one or holds one on the host; None on a device."""
        if isinstance(x, int | float) and not isinstance(x, bool):
            return float(x)
        if not isinstance(x, Tensor) or x.numel() != 1:
            return None
        noted = self._notes.get(x)
        if noted is not None:
            return noted
        on_host = type(x) is Tensor and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
        return float(x.numpy().reshape(())) if on_host and not x.requires_grad else None
