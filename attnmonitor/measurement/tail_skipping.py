"""Runs a forward without the recorded calls at its end.

Every call is compared with the recorded one. From the first that differs on, one that gets zeros in the place of a
result raises.

Where what the heads write is measured, the output projection of the last attention is read, but not computed: the
capture sees its input and its weight, which are real, and zeros as its result. What only leads to them is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.measurement.quiet import statistics_of
from attnmonitor.measurement.tail_calls import Call, Emit, Skippable, name_of, output_of, shapes_of, tensors_in
from attnmonitor.messages import error_text

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Skipping", "Trial"]


class _DepartureError(Exception):
    """A forward does something else after its last attention than at attach."""


class Skipping(TorchFunctionMode):
    """Skips the recorded calls of a forward after its last attention.

    Args:
        part: What is skipped.

    Attributes:
        begun: Whether all has been seen that comes before it.
        departure: How the forward differed from the recorded one; ``""`` if it did not.
        in_call: Whether a call that the mode sees is running.
    """

    def __init__(self, part: Skippable) -> None:
        super().__init__()
        self.begun = self.in_call = False
        self.departure = ""
        self._due = Counter(part.seen)
        self._last = part.seen[-1] if part.seen else ""
        self._zeros = Notes[bool]()
        self._calls = part.calls
        self._projecting = frozenset(part.projecting)
        self._num_read = max(part.projecting, default=-1) + 1  # calls up to the last that is read
        self._position = 0

    def following(self, emit: Emit) -> Emit:
        """Return ``emit``, watched: after the last attention and output that are due the calls are skipped."""

        def emit_and_follow(call: AttentionCall) -> None:
            if self.begun:
                self._depart(f"{call.layer} computes attention")
                return
            emit(call)
            self._saw(call.layer)
            output = output_of(call.layer)
            if call.when_written or output == self._last:
                call.when_written.append(lambda _: self._saw(output))
            else:  # where processes share the work, this one may not read it
                self._saw(output)

        return emit_and_follow

    def _saw(self, seen: str) -> None:
        self._due -= Counter([seen])
        if not (self._due or self.begun):
            self._begin()

    def _begin(self) -> None:
        self.begun = True

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.in_call = True
        try:
            tensors = tensors_in(args, kwargs) if self.begun else []
            if not tensors:  # it makes a tensor of its own, or sets something
                return func(*args, **kwargs)
            if not self.departure and (call := self._expected(func, tensors)) is not None:
                self._position += 1
                if self._position <= self._num_read:
                    return self._read(call, tensors, args, kwargs)
                result = call.again(tensors)
                for tensor in tensors_in(result):
                    if not any(tensor is given for given in tensors):
                        self._zeros.put(tensor, True)
                return result
            # Nobody may read zeros. What has none may be needed: code that puts weights back after a forward.
            if any(self._zeros.get(tensor) for tensor in tensors):
                raise _DepartureError(self.departure)
            return func(*args, **kwargs)
        finally:
            self.in_call = False

    def _read(self, call: Call, tensors: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show a call to the capture; one that projects, or gets zeros, is not computed and returns zeros.

        The capture reads operands: it is a departure if more than one is zeros, but for a sum.
        """
        zeros = [tensor for tensor in tensors if self._zeros.get(tensor)]
        if not zeros and self._position - 1 not in self._projecting:
            return call.function(*args, **kwargs)
        result = call.again(tensors)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return result

        stand_in.__name__ = name_of(call.function)
        if len(zeros) > 1 and "add" not in stand_in.__name__:
            self._depart(f"{stand_in.__name__} gets more than one result of the output projection")
        for tensor in tensors_in(result):
            self._zeros.put(tensor, True)
        return handle_torch_function(stand_in, tensors, *args, **kwargs)

    def _expected(self, func: Any, tensors: Sequence[Tensor]) -> Call | None:
        """Return the recorded call in the place of this one; None if it is another."""
        call = self._calls[self._position] if self._position < len(self._calls) else None
        if call is None:
            self._depart(f"{name_of(func)} is called after its last call")
        elif call.function != func:
            self._depart(f"{name_of(func)} is called in place of {name_of(call.function)}")
        elif call.given != shapes_of(tensors):
            self._depart(f"{name_of(func)} gets tensors of other shapes or devices")
        return None if self.departure else call

    def _depart(self, what: str) -> None:
        self.departure = self.departure or f"after the last attention {what}, which is not so at attach"

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        if not self.begun or self.departure or isinstance(error, torch.OutOfMemoryError):
            return
        if isinstance(error, Exception):
            self.departure = f"after the last attention, {error_text(error)}"
        elif error is None and self._position < len(self._calls):
            self.departure = f"after the last attention {name_of(self._calls[self._position].function)} is not called"


class Trial(Skipping):
    """Skips the calls of a recorded forward, and finds out what else is done after its last attention."""

    def __init__(self, model: nn.Module, part: Skippable) -> None:
        super().__init__(part)
        self._model = model
        self._watching = ExitStack()
        self._num_around = 0  # dispatch modes that are left after this one
        self.statistics: Mapping[str, bytes] = {}

    def __enter__(self) -> Self:
        self._num_around = len(_get_current_dispatch_mode_stack())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _begin(self) -> None:
        super()._begin()
        if modes := _get_current_dispatch_mode_stack()[self._num_around :]:  # the code leaves it in another order
            self.departure = f"the code of the model runs its attention under {type(modes[-1]).__name__}"
        else:
            # Not before: under a dispatch mode torch solves eigenproblems in another way, with other last digits.
            self._watching.enter_context(_Operations(self))

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._watching.close()
        self.statistics = statistics_of(self._model)


class _Operations(TorchDispatchMode):
    """Sees the operations of a forward that come from no call of a torch function: of scripted code and extensions."""

    supports_higher_order_operators = True

    def __init__(self, trial: Skipping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trial = trial

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self._trial.in_call:
            self._trial.departure = self._trial.departure or f"{func} after the last attention cannot be skipped"
        return func(*args, **(kwargs or {}))
