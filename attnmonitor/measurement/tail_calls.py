"""The calls of torch functions that a forward makes after its last attention, recorded.

A call that is skipped later returns what it returned when it was recorded, a tensor as zeros of the same shape, type
and device.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.hooks import versions_of
from attnmonitor.measurement.quiet import statistics_of
from attnmonitor.messages import error_text
from attnmonitor.parallel.process_state import random_state

__all__ = ["Call", "Emit", "Recording", "Skippable", "name_of", "output_of", "shapes_of", "tensors_in"]

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
class Call:
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


@dataclass(frozen=True)
class Skippable:
    """A part of a forward, at its end, that may be skipped.

    Attributes:
        seen: What is seen before it: attentions, and outputs of attentions through their projections.
        calls: Its calls.
        projecting: Index of each call in it that makes such an output, which are read but not computed.
        obstacle: Why it cannot be skipped; ``""`` if it can.
    """

    seen: Sequence[str]
    calls: Sequence[Call]
    projecting: Sequence[int]
    obstacle: str


class Recording(TorchFunctionMode):
    """Runs a forward in full and records its calls after its last attention.

    Args:
        model: The model.

    Attributes:
        statistics: The model's statistics when the forward had ended.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.statistics: Mapping[str, bytes] = {}
        self._model = model
        self._before: list[str] = []  # attentions and outputs, up to the last attention
        self._outputs: list[str] = []  # outputs after it
        self._calls: list[Call] = []
        self._projecting: list[int] = []
        self._obstacles: list[tuple[int, str]] = []  # number of calls before it
        self._results: list[tuple[int, str, Callable[[], bool]]] = []  # the call and its name; is its result there?
        self._random_state: object = None
        self._explicit = ""

    def following(self, emit: Emit) -> Emit:
        """Return ``emit``, watched: each attention may be the last, so the record begins anew."""

        def emit_and_begin(call: AttentionCall) -> None:
            emit(call)
            self._before += [*self._outputs, call.layer]
            self._outputs, self._calls, self._projecting, self._obstacles, self._results = [], [], [], [], []
            self._random_state = random_state()
            self._explicit = self._explicit or (call.layer if call.how == "explicit" else "")
            if call.when_written:
                output = output_of(call.layer)
                call.when_written.append(lambda _: self._saw_output(output))

        return emit_and_begin

    def _saw_output(self, output: str) -> None:
        self._outputs.append(output)
        self._note_random_numbers()

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        num_before, num_outputs = len(self._before), len(self._outputs)
        before = versions_of(tensors_in(args, kwargs)) if num_before else []
        output = func(*args, **kwargs)
        if before and len(self._before) == num_before:
            if len(self._outputs) > num_outputs:
                self._projecting.append(len(self._calls))
            try:
                self._record(func, kwargs, before, output)
            except Exception as error:
                self._note(f"{name_of(func)} cannot be recorded ({error_text(error)})")
        return output

    def _record(self, func: Any, kwargs: Mapping[str, Any], before: list[tuple[Tensor, int]], output: Any) -> None:
        name, tensors, number = name_of(func), [tensor for tensor, _ in before], len(self._calls)
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        written = [tensor for tensor, version in before if version != -1 and tensor._version != version]
        made = [tensor for tensor in tensors_in(output) if not any(tensor is given for given in tensors)]
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
        self._results += [(number, name, _object_of(tensor)) for tensor in made]
        self._results += [(number, name, _storage_of(tensor)) for tensor in (*new, *written)]
        self._calls.append(Call(func, shapes_of(tensors), _described(output, tensors)))

    def _note(self, obstacle: str) -> None:
        self._obstacles.append((len(self._calls), obstacle))

    def _note_random_numbers(self) -> None:
        state = random_state()
        if state != self._random_state:
            self._note("random numbers are drawn after the last attention")
        self._random_state = state

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._note_random_numbers()
        self.statistics = statistics_of(self._model)

    def skippable(self) -> Iterator[Skippable]:
        """Yield what may be skipped, the largest part first; to be asked when the forward's output is gone."""
        first = self._projecting[-1] + 1 if self._projecting else 0
        own = self._before and all(output == output_of(self._before[-1]) for output in self._outputs)
        if own and self._projecting and len(self._projecting) == len(self._outputs):
            yield Skippable(self._before, self._calls, self._projecting, self._obstacle(0))
        yield Skippable([*self._before, *self._outputs], self._calls[first:], (), self._obstacle(first))

    def _obstacle(self, first: int) -> str:
        """Why the calls from the first on cannot be skipped, ``""`` if they can."""
        if self._explicit:
            return f"{self._explicit} registers its attention itself"
        if obstacle := next((obstacle for number, obstacle in self._obstacles if number >= first), ""):
            return obstacle
        results = [(name, is_there) for number, name, is_there in self._results if number >= first]
        if any(is_there() for _, is_there in results):
            gc.collect()  # what is only kept by a cycle of references is nobody's
        return next((f"what {name} returns or writes is kept" for name, is_there in results if is_there()), "")


def tensors_in(*values: Any) -> list[Tensor]:
    """The tensors in nested structures, in order."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def shapes_of(tensors: Iterable[Tensor]) -> tuple[tuple[torch.Size, torch.device], ...]:
    """Shape and device of each tensor, for a comparison."""
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


def output_of(layer: str) -> str:
    """How the output of a layer's attention is called among what is seen."""
    return f"the output of {layer}"


def name_of(function: Any) -> str:
    """The plain name of a torch function; of the getter of an attribute the attribute's."""
    name: str = getattr(function, "__name__", str(function))
    return getattr(function.__self__, "__name__", name) if name == "__get__" else name
