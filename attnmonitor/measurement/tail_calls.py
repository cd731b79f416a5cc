"""The calls of torch functions that a forward makes after its last attention: recorded in one forward, then skipped.

Where the output projection of an attention is read, it is a part of that attention, and not skipped. A call that is
skipped returns what it returned when it was recorded, a tensor as zeros of the same shape, type and device. Every call
is compared with the recorded one. From the first that differs on, one that gets such zeros raises.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.hooks import versions_of
from attnmonitor.capture.tensor_notes import Notes
from attnmonitor.measurement.quiet import statistics_of
from attnmonitor.messages import error_text
from attnmonitor.parallel.process_state import random_state

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Recording", "Skipping", "Trial"]

Emit = Callable[[AttentionCall], None]

# What a call may return that is no tensor: what is known of a tensor without its values.
_METADATA = frozenset((
    "__len__", "__hash__", "device", "dim", "dim_order", "dtype", "element_size", "get_device", "grad", "grad_fn",
    "is_complex", "is_contiguous", "is_conj", "is_cpu", "is_cuda", "is_floating_point", "is_inference", "is_leaf",
    "is_meta", "is_mps", "is_neg", "is_nested", "is_pinned", "is_quantized", "is_same_size", "is_shared",
    "is_signed", "is_sparse", "is_sparse_csr", "is_xla", "is_xpu", "itemsize", "layout", "names", "nbytes", "ndim",
    "ndimension", "nelement", "numel", "requires_grad", "result_type", "shape", "size", "storage_offset", "stride",
    "type",
))  # fmt: skip


@dataclass(frozen=True)
class _Made:
    """A tensor that a call made."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        length = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        length = length if self.shape.numel() else 0
        if self.device.type == "cpu":
            # Zeros that the system makes when they are read, and nobody reads them.
            flat = torch.from_numpy(np.zeros(length * self.dtype.itemsize, np.uint8)).view(self.dtype)
        else:
            flat = torch.zeros(length, dtype=self.dtype, device=self.device)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Passed:
    """A tensor that a call got and returned."""

    index: int


@dataclass(frozen=True)
class _Call:
    """One call of a torch function after the last attention.

    Attributes:
        function: The function.
        given: Shape and device of each tensor it got.
        result: What it returned, with `_Made` or `_Passed` in the place of each tensor.
    """

    function: Any
    given: tuple[tuple[torch.Size, torch.device], ...]
    result: Any

    def again(self, tensors: Sequence[Tensor]) -> Any:
        """Return the result for these tensors, zeros for each that the call made."""
        if isinstance(self.result, _Made):
            return self.result.zeros()
        made = tree_map_only(_Made, lambda made: made.zeros(), self.result)
        return tree_map_only(_Passed, lambda passed: tensors[passed.index], made)


class Recording(TorchFunctionMode):
    """Runs a forward in full and records its calls after its last attention.

    Args:
        model: The model.

    Attributes:
        seen: The attentions, and what is known of the output of each, in order: all that numbers depend on.
        calls: The calls after it.
        statistics: The model's statistics when the forward had ended.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls: list[_Call] = []
        self.statistics: Mapping[str, bytes] = {}
        self._model = model
        self._random_state: object = None
        self._obstacle = ""
        self._explicit = ""
        self._results: list[tuple[str, Callable[[], bool]]] = []  # name of a call; is its result still there?

    def following(self, emit: Emit) -> Emit:
        """Return ``emit``, watched: each attention and each output may be the last, so the record begins anew."""

        def emit_and_begin(call: AttentionCall) -> None:
            emit(call)
            self._begin(call.layer)
            self._explicit = self._explicit or (call.layer if call.how == "explicit" else "")
            if call.when_written:
                output = _output_of(call.layer)
                call.when_written.append(lambda _: self._begin(output))

        return emit_and_begin

    def _begin(self, seen: str) -> None:
        self.seen.append(seen)
        self.calls, self._results, self._obstacle = [], [], ""
        self._random_state = random_state()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        num_seen = len(self.seen)
        before = versions_of(_tensors(args, kwargs)) if num_seen else []
        output = func(*args, **kwargs)
        if before and len(self.seen) == num_seen:
            try:
                self._record(func, kwargs, before, output)
            except Exception as error:
                self._note(f"{_name(func)} cannot be recorded ({error_text(error)})")
        return output

    def _record(self, func: Any, kwargs: Mapping[str, Any], before: list[tuple[Tensor, int]], output: Any) -> None:
        name, tensors = _name(func), [tensor for tensor, _ in before]
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        written = [tensor for tensor, version in before if version != -1 and tensor._version != version]
        made = [tensor for tensor in _tensors(output) if not any(tensor is given for given in tensors)]
        for tensor in made:
            if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.grad_fn is not None:
                self._note(f"{name} returns a {type(tensor).__name__} that is not plain, or has a gradient")
        if kwargs.get("generator") is not None:
            self._note(f"{name} draws from a generator of the model's own")
        if name not in _METADATA and not (name == "__setitem__" and output is None):
            values = [value for value in tree_leaves(output) if value is not None]
            if not values or not all(isinstance(value, Tensor) for value in values):
                self._note(f"{name} takes values out of a tensor")
        new = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        self._results += [(name, _object_of(tensor)) for tensor in made]
        self._results += [(name, _storage_of(tensor)) for tensor in (*new, *written)]
        self.calls.append(_Call(func, _given(tensors), _described(output, tensors)))

    def _note(self, obstacle: str) -> None:
        self._obstacle = self._obstacle or obstacle

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        if random_state() != self._random_state:
            self._note("random numbers are drawn after the last attention")
        self.statistics = statistics_of(self._model)

    def obstacle(self) -> str:
        """Why its calls cannot be skipped, ``""`` if they can; to be asked when the forward's output is gone."""
        if self._explicit:
            return f"{self._explicit} registers its attention itself"
        if self._obstacle:
            return self._obstacle
        if any(is_there() for _, is_there in self._results):
            gc.collect()  # what is only kept by a cycle of references is nobody's
        return next((f"what {name} returns or writes is kept" for name, is_there in self._results if is_there()), "")


class _DepartureError(Exception):
    """A forward does something else after its last attention than at attach."""


class Skipping(TorchFunctionMode):
    """Skips the recorded calls of a forward after its last attention.

    Args:
        seen: What has to be seen before: `Recording.seen`.
        calls: The calls.

    Attributes:
        begun: Whether all of it has been seen.
        departure: How the forward differed from the recorded one; ``""`` if it did not.
        in_call: Whether a call that the mode sees is running.
    """

    def __init__(self, seen: Sequence[str], calls: Sequence[_Call]) -> None:
        super().__init__()
        self.begun = self.in_call = False
        self.departure = ""
        self._due = Counter(seen)
        self._last = seen[-1] if seen else ""
        self._zeros = Notes[bool]()
        self._calls = calls
        self._position = 0

    def following(self, emit: Emit) -> Emit:
        """Return ``emit``, watched: after the last attention and output that are due the calls are skipped."""

        def emit_and_follow(call: AttentionCall) -> None:
            if self.begun:
                self._depart(f"{call.layer} computes attention")
                return
            emit(call)
            self._saw(call.layer)
            output = _output_of(call.layer)
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
            tensors = _tensors(args, kwargs) if self.begun else []
            if not tensors:  # it makes a tensor of its own, or sets something
                return func(*args, **kwargs)
            if not self.departure and (call := self._expected(func, tensors)) is not None:
                self._position += 1
                result = call.again(tensors)
                for tensor in _tensors(result):
                    if not any(tensor is given for given in tensors):
                        self._zeros.put(tensor, True)
                return result
            # Nobody may read zeros. What has none may be needed: code that puts weights back after a forward.
            if any(self._zeros.get(tensor) for tensor in tensors):
                raise _DepartureError(self.departure)
            return func(*args, **kwargs)
        finally:
            self.in_call = False

    def _expected(self, func: Any, tensors: Sequence[Tensor]) -> _Call | None:
        """Return the recorded call in the place of this one; None if it is another."""
        call = self._calls[self._position] if self._position < len(self._calls) else None
        if call is None:
            self._depart(f"{_name(func)} is called after its last call")
        elif call.function != func:
            self._depart(f"{_name(func)} is called in place of {_name(call.function)}")
        elif call.given != _given(tensors):
            self._depart(f"{_name(func)} gets tensors of other shapes or devices")
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
            self.departure = f"after the last attention {_name(self._calls[self._position].function)} is not called"


class Trial(Skipping):
    """Skips the calls of a recorded forward, and finds out what else is done after its last attention."""

    def __init__(self, model: nn.Module, recording: Recording) -> None:
        super().__init__(recording.seen, recording.calls)
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


def _tensors(*values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _given(tensors: Iterable[Tensor]) -> tuple[tuple[torch.Size, torch.device], ...]:
    return tuple((tensor.shape, tensor.device) for tensor in tensors)


def _object_of(tensor: Tensor) -> Callable[[], bool]:
    """Return a function that says whether the tensor's object is still there."""
    reference = weakref.ref(tensor)
    return lambda: reference() is not None


def _storage_of(tensor: Tensor) -> Callable[[], bool]:
    """Return a function that says whether the tensor's memory is still there, perhaps through another tensor."""
    storage = StorageWeakRef(tensor.untyped_storage())
    return lambda: not storage.expired()


def _described(output: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a call's output with `_Made` or `_Passed` in the place of each tensor."""

    def described(tensor: Tensor) -> _Made | _Passed:
        for index, given in enumerate(tensors):
            if tensor is given:
                return _Passed(index)
        return _Made(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    return tree_map_only(Tensor, described, output)


def _output_of(layer: str) -> str:
    return f"the output of {layer}"


def _name(function: Any) -> str:
    name: str = getattr(function, "__name__", str(function))
    return getattr(function.__self__, "__name__", name) if name == "__get__" else name
