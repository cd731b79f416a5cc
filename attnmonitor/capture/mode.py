"""The function mode of a capture: sees every torch function of a forward and recognizes attention by its operations.

A `TorchFunctionMode` sees every torch function that the model calls, whichever module, library or compiled wrapper it
comes from. It looks up each function's name once and passes the call, after it has run, to its observers: the fused
calls, the tracer of hand-written attention, the notes on repeated keys. What they find goes to the `Emitter`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.call import AttentionCall
from attnmonitor.capture.emitter import Emitter
from attnmonitor.capture.function_call import FunctionCall, Observer
from attnmonitor.capture.fused import padded, read_flex, read_sdpa, with_lead, without_overrides
from attnmonitor.capture.heads import Lead, MadeOf, common_lead_axes, lead_by_shape, lead_of, usual_lead
from attnmonitor.capture.interface import read_interface_call
from attnmonitor.capture.kernels import KernelCall
from attnmonitor.capture.layouts import Layouts
from attnmonitor.capture.missed import suspect, unrecorded
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.operators import is_attention_operator, read_operator_call
from attnmonitor.capture.tracing.repeats import Repeats
from attnmonitor.capture.tracing.trace import ByHead, Trace, as_attention
from attnmonitor.capture.tracing.tracer import Tracer
from attnmonitor.capture.verify import Attention

__all__ = ["AttentionMode"]

# Operations that are attention for certain: where one cannot be read, its layer is missed.
_CERTAINLY_ATTENTION = {"scaled_dot_product_attention", "flex_attention", "capture", "an attention kernel"}


class AttentionMode(TorchFunctionMode):
    """The function mode of one capture: follows a forward and emits every attention that it recognizes.

    Args:
        model: As in `attnmonitor.capture.capture_attention`.
        emit: As there.
        layouts: As there.
        packed: As there.

    Attributes:
        frames: The running module calls; their hooks are on the model while this context is open.
        report: The attention that could not be recorded.
        parts: The objects that it works with; they refer to it, and it to them.
    """

    def __init__(
        self, model: nn.Module, emit: Callable[[AttentionCall], None], layouts: Layouts, *, packed: str
    ) -> None:
        super().__init__()
        self.frames = Frames(model, self._note_inputs, lambda frame: self._emitter.take_turns(frame))
        self._ancestries = None if layouts else Ancestries(model, self.frames.suspect_hidden, self.frames.first_input)
        self._emitter = Emitter(emit, layouts, self.frames, self._ancestries, self._unobserved, packed=packed)
        self.report = self._emitter.report
        self._failures: dict[str, str] = {}
        self._inside_mha = self._is_paused = False
        self._repeats = Repeats()
        found = self._found_traced, self._emitter.missed, self._emitter.known
        self._tracer = Tracer(self.frames, self._repeats.original, self._ancestries, *found)
        own: dict[str, Observer] = {
            "scaled_dot_product_attention": self._observe_sdpa,
            "flex_attention": self._observe_flex,
            "linear": self._observe_projection,
            "addmm": self._observe_projection,
        }
        written = self._emitter.written
        followers = [] if self._ancestries is None else [self._ancestries]
        self.parts: list[object] = [self._repeats, self._tracer, written, self._emitter, *followers]
        self._observers: dict[str, list[Observer]] = {}
        for observers in (self._repeats.observers, self._tracer.observers, written.observers, own):
            for name, observer in observers.items():
                self._observers.setdefault(name, []).append(observer)
        self._known: dict[Any, tuple[str, list[Observer]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        known = self._known.get(func)
        if known is None:
            known = self._known[func] = self._look_up(func)
        name, observers = known
        if name == "multi_head_attention_forward":
            return self._run_mha(func, args, kwargs)
        call = FunctionCall(name, func, args, kwargs, func(*args, **kwargs))
        for observe in observers:
            self._attempt(name, observe, call)
        return call.output

    @contextmanager
    def _unobserved(self) -> Iterator[None]:
        """Run functions without looking at them."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def _note_inputs(self, tensors: Iterable[Tensor]) -> None:
        if self._ancestries is not None:
            self._attempt("the model", self._ancestries.add_inputs, tensors)

    def _attempt(self, what: str, observe: Callable[..., None], *args: Any) -> None:
        """Observe a call of the model; a failure may lose a layer, but never reaches the forward."""
        try:
            observe(*args)
        except Exception as error:
            if self._emitter.is_emitting:
                raise
            layer, reason = self.frames.current_layer()[0], f"a call of {what} could not be followed: {error}"
            if what in _CERTAINLY_ATTENTION:
                self._emitter.missed(layer, reason)
            else:
                self._failures[layer] = reason

    def _look_up(self, func: Any) -> tuple[str, list[Observer]]:
        """Return a function's plain name (``add_`` is ``add``, the getter of ``x.mT`` is ``mT``) and its observers."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        name = name.removeprefix("special_")  # torch.special.softmax
        if name.endswith("_") and not name.startswith("_") and name[:-1] in self._observers:
            name = name[:-1]
        observers: list[Observer] = []
        if self._ancestries is not None:
            observers += [self._ancestries.observe, partial(suspect, self.frames, self._ancestries)]
        if name not in self._tracer.observers:
            observers.append(self._tracer.observe_other)
        if name not in self._observers and is_attention_operator(func):
            return name, [*observers, self._observe_operator]
        return name, observers + self._observers.get(name, [])

    def _run_mha(self, func: FunctionType, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``multi_head_attention_forward`` with the mode on inside it."""
        self._inside_mha = True
        try:
            with self:
                return without_overrides(func)(*args, **kwargs)
        finally:
            self._inside_mha = False

    def _how(self, otherwise: str) -> str:
        """Return how the record of an attention says it was found."""
        return "mha" if self._inside_mha else otherwise

    def _observe_projection(self, call: FunctionCall) -> None:
        x = call.argument(1 if call.name == "addmm" else 0, "input")
        if isinstance(x, Tensor):
            self.frames.note_projection(x)

    def _observe_sdpa(self, call: FunctionCall) -> None:
        self._observe_fused(read_sdpa, call, call.output)

    def _observe_flex(self, call: FunctionCall) -> None:
        self._observe_fused(read_flex, call, call.output[0])

    def _observe_fused(self, read: Callable[..., Attention], call: FunctionCall, output: Tensor) -> None:
        layer, frame = self.frames.current_layer()
        named = {**dict(zip(("query", "key", "value"), call.args, strict=False)), **call.kwargs}
        if named["query"].is_nested:
            named, output = padded(named, output)
        query, key = named["query"], named["key"]
        made_of = self._made_of(query, key)
        lead = self._lead(layer, query.shape[:-2], frame, query.shape[-2], made_of)
        if lead is None:
            self._emitter.missed(
                layer, f"cannot tell sequences from heads in fused attention on queries {tuple(query.shape)}"
            )
            return
        before = self._repeats.original(key)
        is_repeated = (
            before is not None
            and before.source.shape[2:] == key.shape[2:]
            and before.source.shape[:-2].numel() % lead.num_sequences == 0  # copies that pass for sequences are kept
        )
        if before is not None and is_repeated:
            named["key"] = before.source
        operands = (named.pop("query"), named.pop("key"), named.pop("value"))
        attention = with_lead(read(*operands, *call.args[3:], **named), lead)
        attention.tiled = before is not None and is_repeated and before.tiled
        values_before = self._repeats.original(operands[2])
        if values_before is not None and values_before.source.shape[-2:] == operands[2].shape[-2:]:
            attention.value = lead.values(values_before.source)
        attention.operands_in = output.dtype
        self._emitter.found(layer, frame, attention, self._how("sdpa"), output, -2, made_of)

    def _observe_operator(self, call: FunctionCall) -> None:
        result = call.output[0] if isinstance(call.output, tuple) else call.output
        with self._unobserved():
            kernel_call = read_operator_call(call.func, call.args, call.kwargs, result)
        self._found_kernel(kernel_call, result)

    def _made_of(self, query: Tensor, key: Tensor) -> MadeOf | None:
        if self._ancestries is None:
            return None
        of_query, of_key = self._ancestries.of(query), self._ancestries.of(key)
        return MadeOf(of_query, of_key, common_lead_axes(of_query.axes or (None,) * query.dim(), of_key.axes))

    def _lead(
        self, layer: str, sizes: Sequence[int], frame: Frame | None, num_rows: int, made_of: MadeOf | None
    ) -> Lead | None:
        """Return which leading axes of a layer's operands count heads; None where that is unclear."""
        known = self._emitter.known(layer)
        if known is not None and known.lead is not None:
            return known.lead.resized(sizes, heads=False) or known.lead.resized(sizes, heads=True)
        return lead_of(sizes, made_of) or lead_by_shape(sizes, frame, num_rows)

    def _found_traced(self, trace: Trace, output: Tensor, row_axis: int, by_head: Callable[[Lead], ByHead]) -> None:
        origin = trace.origin
        num_rows = origin.product.query.shape[-2]
        lead = self._lead(origin.layer, origin.product.batch, origin.frame, num_rows, origin.made_of)
        if lead is None:
            self._emitter.missed(
                origin.layer, f"cannot tell sequences from heads in logits with leading axes {origin.product.batch}"
            )
            return
        attention = as_attention(trace, lead)
        attention.exact = trace.exact
        attention.value, attention.heads_of = by_head(lead)
        self._emitter.found(
            origin.layer, origin.frame, attention, self._how("traced"), output, row_axis, origin.made_of
        )

    def record_explicit(self, module: nn.Module, attention: Attention, output: Tensor | None) -> None:
        """Record the attention that a module registered, unless this call of it has a record already."""
        frame = self.frames.running_call(module)
        if frame is None:
            layer, frame = self.frames.current_layer()
        else:
            layer = frame.name
        if frame is None or not frame.recorded_by:
            made_of = self._made_of(attention.query, attention.key)
            attention = with_lead(attention, usual_lead(attention.query.shape[:2]))
            self._attempt("capture", self._emitter.found, layer, frame, attention, "explicit", output, -2, made_of)

    def watch_kernel(self, kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run an attention function of transformers, and record its arguments if no attention was found inside it."""
        seen = self._emitter.num_seen
        result = kernel(*args, **kwargs)
        if self._emitter.num_seen == seen:
            self._attempt("an attention kernel", self._record_kernel, result[0], args, kwargs)
        return result

    def _record_kernel(self, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer, frame = self.frames.current_layer()
        attention = read_interface_call(*args, **kwargs)
        made_of = self._made_of(attention.query, attention.key)
        attention = with_lead(attention, usual_lead(attention.query.shape[:2]))
        self._emitter.found(layer, frame, attention, "interface", output, 1, made_of)

    def watch_function(
        self, read: Callable[..., KernelCall], kernel: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Run a kernel known by name, and record its arguments instead of what it does inside."""
        if self._is_paused:
            return kernel(*args, **kwargs)
        with self._unobserved():
            result = kernel(*args, **kwargs)
        self._attempt("an attention kernel", self._record_function, read, kernel, args, kwargs, result)
        return result

    def _record_function(self, read: Callable[..., KernelCall], *call: Any) -> None:
        result = call[-1]
        self._found_kernel(read(*call[:-1]), result[0] if isinstance(result, tuple) else result)

    def _found_kernel(self, call: KernelCall, output: Tensor) -> None:
        layer, frame = self.frames.current_layer()
        made_of = None
        if self._ancestries is not None:
            of_query, of_key = (self._ancestries.of(x) for x in call.operands)
            made_of = MadeOf(of_query, of_key, (None,) * 4)
            self._ancestries.attend(output, of_query)
        attention = with_lead(call.attention, usual_lead(call.attention.query.shape[:2]))
        self._emitter.found(layer, frame, attention, "kernel", call.arranged(output), call.row_axis, made_of)

    def report_missed(self) -> None:
        """Add every module that looks like attention and gave no record to the report."""
        reasons = self._tracer.endings.reasons, self._failures
        found = unrecorded(self.frames, self._emitter.num_calls, reasons, all_seen=self._ancestries is not None)
        for name, reason in found:
            self.report.missed.setdefault(name, reason)
