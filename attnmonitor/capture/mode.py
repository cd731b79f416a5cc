"""Watch a forward at the level of torch functions and recognise attention by what it computes.

A `TorchFunctionMode` sees every torch function the model calls, whichever module, library or compiled wrapper it comes
from. A call of `scaled_dot_product_attention` names its operands outright.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch.overrides import TorchFunctionMode

from attnmonitor.capture.call import AttentionCall, CaptureReport
from attnmonitor.capture.frames import Frame, Frames
from attnmonitor.capture.notes import Notes
from attnmonitor.capture.rebuild import Attention, Step, grouped_product, visible_keys

__all__ = ["AttentionMode"]

Function = Callable[..., Any]


class AttentionMode(TorchFunctionMode):
    """The function mode of one capture: follows a forward and emits every attention it recognises."""

    def __init__(
        self,
        model: nn.Module,
        emit: Callable[[AttentionCall], None],
        layouts: dict[str, tuple[str, ...]],
    ) -> None:
        super().__init__()
        self.frames = Frames(model)
        self.report = CaptureReport()
        self._emit = emit
        self._layouts = layouts
        self._calls: Counter[str] = Counter()
        self._last_self_mask: Tensor | None = None
        self._repeats = Notes[Tensor]()
        self._visible = Notes[Tensor]()
        self._handlers: dict[Any, Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]] = {
            nn.functional.scaled_dot_product_attention: self._on_sdpa,
            nn.functional.linear: self._on_projection,
            torch.addmm: self._on_projection,
            Tensor.addmm: self._on_projection,
            Tensor.expand: self._on_expand,
            Tensor.reshape: self._on_merge,
            Tensor.flatten: self._on_merge,
            torch.reshape: self._on_merge,
            torch.flatten: self._on_merge,
            Tensor.repeat_interleave: self._on_repeat_interleave,
            torch.repeat_interleave: self._on_repeat_interleave,
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        return handler(func, args, kwargs or {})

    def _on_sdpa(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = func(*args, **kwargs)
        self._record_sdpa(output, *args, **kwargs)
        return output

    def _record_sdpa(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        name, frame = self.frames.layer()
        if query.dim() != 4:
            self.report.missed[name] = f"scaled_dot_product_attention got a query of {query.dim()} dimensions, not 4"
            return
        attention = Attention(query, self.unrepeated(key), query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            attention.affine.append(_mask_step(attn_mask, query.shape[-2]))
            self._note_mask(attention, attn_mask, query.shape[0])
        if is_causal:
            attention.affine.append(Step(_hide_future))
        attention.after.append(_attend(value, query.shape[1]))
        self._finish(name, frame, attention, "sdpa", output if dropout_p == 0 else None, -2)

    def _note_mask(self, attention: Attention, mask: Tensor, batch: int) -> None:
        """Reduce a mask ``(B|1, H|1, Lq|1, Lk)`` to the keys it lets be seen; once per mask, for layers share it."""
        if mask.shape[-1] != attention.key.shape[-2]:
            return
        seen = self._visible.get(mask)
        if seen is None:
            seen = visible_keys(mask if mask.dim() >= 2 else mask[None])  # (..., Lk)
            while seen.dim() > 2:
                seen = seen.any(1)
            self._visible.put(mask, seen)
        attention.visible.append(seen.expand(batch, -1))

    def _finish(
        self, name: str, frame: Frame | None, attention: Attention, how: str, output: Tensor | None, row_axis: int
    ) -> None:
        """Verify, name and emit one attention."""
        self._calls[name] += 1
        layer = name if self._calls[name] == 1 else f"{name}#{self._calls[name]}"
        same_length = attention.query.shape[-2] == attention.key.shape[-2]
        is_self = same_length and (frame is None or len(frame.projected) < 2)
        key_mask = None
        for seen in attention.visible:
            key_mask = seen if key_mask is None else key_mask & seen
        if is_self:
            query_mask = self._last_self_mask = key_mask
        else:
            query_mask = self._last_self_mask
            if query_mask is not None and query_mask.shape != (attention.query.shape[0], attention.query.shape[-2]):
                query_mask = None
        outside = self._layouts.get(layer)
        if outside is None:
            outside = self._layouts[layer] = attention.act_outside(query_mask, key_mask, is_self=is_self)
        self._emit(
            AttentionCall(
                layer=layer,
                query=attention.query,
                key=attention.key,
                scale=attention.scale,
                query_mask=query_mask,
                key_mask=key_mask,
                kind="self" if is_self else "cross",
                how=how,
                outside=outside,
                error=None if output is None else attention.deviation(output, row_axis),
                logit_rows=attention.logit_rows,
            )
        )

    def name_missed(self) -> None:
        """Add to the report every module that looks like attention and gave no record."""
        for name in self.frames.looks_like_attention():
            if not any(name == layer or layer.startswith(name + ".") for layer in self._calls):
                called = name in self.frames.called
                reason = "no softmax of a query-key product was seen in it" if called else "not called in this forward"
                self.report.missed.setdefault(name, reason)

    # Keys repeated per query head, and what they were before.

    def unrepeated(self, key: Tensor) -> Tensor:
        """The key with one head per key head, where code repeated it to one per query head on the way."""
        source = self._repeats.get(key)
        return key if source is None else source

    def _on_expand(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = func(*args, **kwargs)
        source: Tensor = args[0]
        if output.dim() == 5 and source.dim() == 5 and source.shape[2] == 1 and output.shape[2] > 1:
            self._repeats.put(output, source)
        return output

    def _on_merge(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = func(*args, **kwargs)
        source = self._repeats.get(args[0])
        if source is not None and output.dim() == 4 and output.shape == args[0].flatten(1, 2).shape:
            self._repeats.put(output, source.squeeze(2))
        return output

    def _on_repeat_interleave(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output: Tensor = func(*args, **kwargs)
        dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
        if (
            args[0].dim() == 4
            and dim in (1, -3)
            and isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), int)
        ):
            self._repeats.put(output, args[0])
        return output

    def _on_projection(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if func is nn.functional.linear else args[1] if len(args) > 1 else None
        if isinstance(x, Tensor):
            self.frames.note_projection(x)
        return func(*args, **kwargs)


def _mask_step(mask: Tensor, num_rows: int) -> Step:
    def apply(x: Tensor, rows: Tensor) -> Tensor:
        part = mask.index_select(-2, rows) if mask.dim() >= 2 and mask.shape[-2] == num_rows and num_rows > 1 else mask
        return torch.where(part, x, -torch.inf) if mask.dtype == torch.bool else x + part

    return Step(apply)


def _hide_future(x: Tensor, rows: Tensor) -> Tensor:
    future = torch.arange(x.shape[-1], device=x.device) > rows[:, None]
    return x.masked_fill(future, -torch.inf)


def _attend(value: Tensor, num_query_heads: int) -> Step:
    def apply(logits: Tensor, rows: Tensor) -> Tensor:
        weights = logits.softmax(-1)
        return grouped_product(weights, value.transpose(-1, -2))

    return Step(apply)
