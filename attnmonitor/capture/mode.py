"""The function mode of a capture: sees every torch function of a forward and recognizes attention by its operations.

A `TorchFunctionMode` sees every torch function that the model calls, whichever module, library or compiled wrapper it
comes from. It looks up each function's name once and passes the call, after it has run, to its observers: the fused
calls, the tracer of hand-written attention, the notes on repeated keys. What they find is named, verified and emitted
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnmonitor.capture.call import AttentionCall, CaptureReport
from attnmonitor.capture.fused import read_flex, read_sdpa, unflatten_heads
from attnmonitor.capture.interface import read_interface_call
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.tracing.repeats import Repeats
from attnmonitor.capture.tracing.trace import num_sequences_in
from attnmonitor.capture.tracing.tracer import Tracer
from attnmonitor.capture.verify import Attention

__all__ = ["AttentionMode"]

Observer = Callable[..., None]

# Operations that are attention for certain: where one cannot be read, its layer is missed.
_CERTAINLY_ATTENTION = {"scaled_dot_product_attention", "flex_attention", "capture", "an attention kernel"}


class AttentionMode(TorchFunctionMode):
    """The function mode of one capture: follows a forward and emits every attention that it recognizes."""

    def __init__(
        self, model: nn.Module, emit: Callable[[AttentionCall], None], layouts: dict[str, tuple[str, ...]]
    ) -> None:
        super().__init__()
        self.frames = Frames(model)
        self.report = CaptureReport()
        self._emit = emit
        self._layouts = layouts
        self._calls: Counter[str] = Counter()
        self._failures: dict[str, str] = {}
        self._last_self_mask: Tensor | None = None
        self._inside_mha = False
        self._paused = False
        self._emitting = False
        self._repeats = Repeats()
        self._tracer = Tracer(self.frames, self._repeats.original, self._found_traced, self._missed)
        self._observers: dict[str, list[Observer]] = {}
        own: dict[str, Observer] = {
            "scaled_dot_product_attention": self._observe_sdpa,
            "flex_attention": self._observe_flex,
            "linear": self._observe_projection,
            "addmm": self._observe_projection,
        }
        for observers in (self._repeats.observers, self._tracer.observers, own):
            for name, observer in observers.items():
                self._observers.setdefault(name, []).append(observer)
        self._known: dict[Any, tuple[str, list[Observer]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = self._look_up(func)
        name, observers = known
        if name == "multi_head_attention_forward":
            return self._run_mha(func, args, kwargs)
        output = func(*args, **kwargs)
        for observe in observers:
            self._attempt(name, observe, name, func, args, kwargs, output)
        return output

    def _attempt(self, what: str, observe: Callable[..., None], *args: Any) -> None:
        """Observe a call of the model; a failure may lose a layer, but never reaches the forward."""
        try:
            observe(*args)
        except Exception as error:
            if self._emitting:
                raise
            layer, reason = self.frames.current_layer()[0], f"a call of {what} could not be followed: {error}"
            if what in _CERTAINLY_ATTENTION:
                self._missed(layer, reason)
            else:
                self._failures[layer] = reason

    def _look_up(self, func: Any) -> tuple[str, list[Observer]]:
        """Return a function's plain name (``add_`` is ``add``, the getter of ``x.mT`` is ``mT``) and its observers."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name.endswith("_") and not name.startswith("_") and name[:-1] in self._observers:
            name = name[:-1]
        return name, self._observers.get(name, [])

    def _run_mha(self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``multi_head_attention_forward`` with the mode on inside it."""
        # Torch passes this function to a mode as one opaque call. A copy of it whose test for overrides is always false
        # computes the same, and the mode sees its inner calls. Torch's own module stays as it is.
        observable = FunctionType(
            func.__code__,
            {**func.__globals__, "has_torch_function": lambda _: False},
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        observable.__kwdefaults__ = func.__kwdefaults__
        self._inside_mha = True
        try:
            with self:
                return observable(*args, **kwargs)
        finally:
            self._inside_mha = False

    def _observe_projection(
        self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        position = 1 if name == "addmm" else 0
        x = args[position] if len(args) > position else kwargs.get("input")
        if isinstance(x, Tensor):
            self.frames.note_projection(x)

    def _observe_sdpa(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        self._observe_fused(read_sdpa, args, kwargs, output)

    def _observe_flex(self, name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        self._observe_fused(read_flex, args, kwargs, output[0])

    def _observe_fused(
        self, read: Callable[..., Attention], args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        layer, frame = self.frames.current_layer()
        named = {**dict(zip(("query", "key", "value"), args, strict=False)), **kwargs}
        query, before = named["query"], self._repeats.original(named["key"])
        lead, num_rows = tuple(query.shape[:-2]), query.shape[-2]
        num_sequences = num_sequences_in(lead, frame, num_rows) if query.dim() in (3, 4) else None
        if num_sequences is None:
            self._missed(layer, f"a fused attention call with a query of shape {tuple(query.shape)}, not (B, H, L, d)")
            return
        is_repeated = before is not None and before.source.shape[2:] == named["key"].shape[2:]
        if before is not None and is_repeated:
            named["key"] = before.source
        operands = (named.pop("query"), named.pop("key"), named.pop("value"))
        attention = read(*operands, *args[3:], **named)
        attention.tiled = before is not None and is_repeated and before.tiled
        values_before = self._repeats.original(operands[2])
        if values_before is not None and values_before.source.shape[-2:] == operands[2].shape[-2:]:
            attention.value = values_before.source
        if query.dim() == 3:
            attention = unflatten_heads(attention, num_sequences)
        attention.operands_in = output.dtype
        self._found(layer, frame, attention, "sdpa", output, -2)

    def _found_traced(
        self, layer: str, frame: Frame | None, attention: Attention, output: Tensor | None, row_axis: int
    ) -> None:
        self._found(layer, frame, attention, "traced", output, row_axis)

    def record_explicit(self, module: nn.Module, attention: Attention, output: Tensor | None) -> None:
        """Record the attention that a module registered, unless this call of it has a record already."""
        frame = self.frames.running_call(module)
        if frame is None:
            layer, frame = self.frames.current_layer()
        else:
            layer = frame.name
        if frame is None or not frame.recorded_by:
            self._attempt("capture", self._found, layer, frame, attention, "explicit", output, -2)

    def watch_kernel(self, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an attention function of transformers, and record its arguments if no attention was found inside it."""
        seen = self._calls.total()
        result = kernel(*args, **kwargs)
        if self._calls.total() == seen:
            self._attempt("an attention kernel", self._record_kernel, result[0], args, kwargs)
        return result

    def _record_kernel(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, frame = self.frames.current_layer()
        self._found(layer, frame, read_interface_call(*args, **kwargs), "interface", output, 1)

    def _next_name(self, name: str) -> str:
        self._calls[name] += 1
        return name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"

    def _missed(self, name: str, reason: str) -> None:
        self.report.missed[self._next_name(name)] = reason

    def _found(
        self, name: str, frame: Frame | None, attention: Attention, how: str, output: Tensor | None, row_axis: int
    ) -> None:
        """Emit one attention, unless its module registers its own. The mode is paused: nothing here is observed."""
        if how != "explicit" and self.frames.has_explicit_record():
            return
        if frame is not None:
            frame.recorded_by = how
        layer = self._next_name(name)
        self._paused = True
        try:
            call = self._verified(layer, frame, attention, how, output if attention.exact else None, row_axis)
            self._emitting = True
            self._emit(call)
            self._emitting = False
        except Exception as error:
            if self._emitting:
                raise
            self.report.missed[layer] = f"its attention could not be rebuilt: {error}"
        finally:
            self._paused = False

    def _verified(
        self, layer: str, frame: Frame | None, attention: Attention, how: str, output: Tensor | None, row_axis: int
    ) -> AttentionCall:
        query, key = attention.query, attention.key
        lengths = query.shape[-2], key.shape[-2]
        is_self = frame.is_self_attention(*lengths) if frame is not None else lengths[0] == lengths[1]
        key_mask = attention.key_mask()
        query_mask = key_mask if is_self else self._last_self_mask
        if is_self and self._inside_mha and key_mask is not None:
            query_mask = key_mask[:, : lengths[0]]  # nn.MultiheadAttention appends its learned and its zero key
        if query_mask is not None and query_mask.shape != (query.shape[0], query.shape[-2]):
            query_mask = None
        if is_self:
            self._last_self_mask = key_mask
        types = [query.dtype, *([] if output is None else [output.dtype])]
        outside = self._layouts.get(layer)
        if outside is None:
            outside = self._layouts[layer] = attention.outside_effects(
                query_mask, key_mask, is_self=is_self and lengths[0] == lengths[1]
            )
        rows = attention.rebuilt(output, row_axis)
        return AttentionCall(
            layer=layer,
            query=query,
            key=key,
            value=attention.value,
            tiled=attention.tiled,
            scale=attention.scale,
            query_mask=query_mask,
            key_mask=key_mask,
            kind="self" if is_self else "cross",
            how="mha" if self._inside_mha else how,
            outside=outside,
            error=rows.error,
            precision=max(types, key=lambda dtype: torch.finfo(dtype).eps),
            logit_rows=attention.logit_rows,
            rows=rows,
        )

    def report_missed(self) -> None:
        """Add every module that looks like attention and gave no record to the report."""
        for name in self.frames.unrecorded(self._calls):
            if name in self.frames.scripted:
                reason = "it is a scripted module, whose operations cannot be seen"
            elif failures := [why for layer, why in self._failures.items() if f"{layer}.".startswith(f"{name}.")]:
                reason = failures[0]
            elif name in self.frames.called:
                reason = "no softmax of a query-key product was seen in it"
            else:
                reason = "not called in this forward"
            self.report.missed.setdefault(name, reason)
