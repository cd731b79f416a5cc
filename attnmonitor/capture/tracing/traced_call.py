"""A call on logits or weights, kept so that it can be replayed on a few rows.

To replay it, the rows replace the traced operand, and every other operand that has the query axis is cut to the same
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture.function_call import FunctionCall

__all__ = ["Apply", "TracedCall", "add_rows", "rows_of", "size_along"]

Apply = Callable[[Tensor, Tensor], Tensor]
"""From rows of the traced operand, and their positions ``(R,)``, to the rows of the result."""


class TracedCall(FunctionCall):
    """One call of a torch function, its operands in a uniform order, and how to repeat it on some rows.

    It is a part of the note on its output, so it may not keep the output alive: of that it has shape, type and device.

    Attributes:
        operands: The arguments in a uniform order: of ``cat`` its parts, of ``where`` the two that are chosen from.
        slot: Index of the traced operand.
        condition: The condition of ``where``.
    """

    def __init__(self, call: FunctionCall) -> None:
        super().__init__(call.name, call.func, call.args, call.kwargs, _without_values(call.output))
        self.slot = 0
        self.condition: Any = None
        self.operands = call.arguments()
        if call.name == "where":
            first, second, other = self.operands[:3]
            if isinstance(first, Tensor) and first.dtype == torch.bool:
                self.condition, self.operands = first, [second, other]
            else:
                self.condition, self.operands = second, [first, other]
            self.args, self.kwargs, self.func = (self.condition, *self.operands), {}, torch.where

    def drop_traced(self, output: Tensor) -> None:
        """Keep shape, type and device alone of the traced operand: a layer's logits of every step are not kept."""
        traced = self.operands[self.slot]
        empty = _without_values(traced)

        def drop(x: Tensor) -> Tensor:
            return empty if x is traced else self.output if x is output else x

        self.operands = [_with_tensors(drop, operand) for operand in self.operands]
        self.args, self.kwargs = self._arguments(drop)

    def repeat_on(self, x: Tensor) -> Tensor:
        """Return the result of the same call on another first operand."""
        result: Tensor = self.func(x, *self.args[1:], **self.kwargs)
        return result

    def replay(self, axis: int, traced: Tensor | None = None) -> Apply:
        """Return the same call for some rows of the traced operand, with other operands cut to the same rows.

        Args:
            axis: The axis of query positions, counted from the right.
            traced: The traced operand, where it is not that of the slot.
        """
        num_rows = (self.operands[self.slot] if traced is None else traced).shape[axis]

        def apply(x: Tensor, rows: Tensor) -> Tensor:
            target = self.operands[self.slot] if traced is None else traced

            def place(argument: Tensor) -> Tensor:
                if argument is target:
                    return x
                return argument.to(x.dtype) if traced is not None else rows_of(argument, rows, axis, num_rows)

            args, kwargs = self._arguments(place)
            result: Tensor = self.func(*args, **kwargs)
            return result

        return apply

    def _arguments(self, change: Callable[[Tensor], Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments of the call with their tensors changed."""
        return (
            [_with_tensors(change, argument) for argument in self.args],
            {key: _with_tensors(change, argument) for key, argument in self.kwargs.items()},
        )


def _with_tensors(change: Callable[[Tensor], Tensor], argument: Any) -> Any:
    """Return an argument of a call with its tensors changed, those in a list too."""
    if isinstance(argument, list | tuple) and any(isinstance(part, Tensor) for part in argument):
        return [change(part) if isinstance(part, Tensor) else part for part in argument]
    return change(argument) if isinstance(argument, Tensor) else argument


def _without_values(x: Tensor) -> Tensor:
    """Return a tensor of the same shape, type and device that takes the memory of one value."""
    return x.new_empty(()).expand(x.shape)


def size_along(x: Tensor, axis: int) -> int:
    """Return the size of an axis counted from the right; 1 where broadcasting would add it."""
    return x.shape[axis] if x.dim() >= -axis else 1


def rows_of(x: Tensor, rows: Tensor, axis: int, num_rows: int) -> Tensor:
    """Return the rows of an operand that has the query axis; all of one that is broadcast along it."""
    return x.index_select(axis, rows) if num_rows > 1 and size_along(x, axis) == num_rows else x


def add_rows(added: Tensor, beta: float, axis: int, num_rows: int, x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x + beta · added`` on some rows."""
    return x + beta * rows_of(added, rows, axis, num_rows)
