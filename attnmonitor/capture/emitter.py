"""What becomes of an attention that was found: it gets its layer's name, is verified, and is emitted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.ancestry import same_sequence
from attnmonitor.capture.call import AttentionCall, CaptureReport, by_document
from attnmonitor.capture.findings import Findings
from attnmonitor.capture.heads import MadeOf
from attnmonitor.capture.layouts import Layout, Layouts
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.turns import Found, is_turn, joined, num_positions
from attnmonitor.capture.verify import Attention, RebuiltRows
from attnmonitor.capture.written import WrittenOutputs

__all__ = ["Emitter"]


class Emitter:
    """Names, verifies and emits the attentions of one forward.

    Args:
        emit: Called with each `AttentionCall`.
        layouts: What is known of each layer; filled where a layer is not there yet.
        frames: The running module calls.
        ancestries: What tensors are made of; None where it is not followed.
        unobserved: A context in which the mode looks at no function.
        packed: As in `attnmonitor.capture.capture_attention`.

    Attributes:
        report: The attention that could not be recorded.
        written: What the heads of the emitted layers write.
        num_calls: Attentions so far, by the name of their module.
        num_seen: Attentions so far, with those that are not emitted.
        is_emitting: Whether ``emit`` runs or has raised: its errors go to the caller of the model.
    """

    def __init__(
        self,
        emit: Callable[[AttentionCall], None],
        layouts: Layouts,
        frames: Frames,
        ancestries: Ancestries | None,
        unobserved: Callable[[], AbstractContextManager[None]],
        *,
        packed: str,
    ) -> None:
        self._emit = emit
        self._layouts = layouts
        self._frames = frames
        self._ancestries = ancestries
        self._unobserved = unobserved
        self._findings = Findings(layouts, frames, ancestries, packed)
        self.report = CaptureReport()
        self.written = WrittenOutputs(layouts, frames)
        self.num_calls: Counter[str] = Counter()
        self.num_seen = 0
        self.is_emitting = False

    def known(self, name: str) -> Layout | None:
        """Return what is known of a module's next attention; None before the first forward has shown it."""
        return self._layouts.get(self._name_of_next(name))

    def _name_of_next(self, name: str) -> str:
        """Return the name of a layer's next call: that of a second one ends in ``#2``."""
        count = self.num_calls[name] + 1
        return name if count == 1 else f"{name}#{count}"

    def _next_name(self, name: str) -> str:
        next_name = self._name_of_next(name)
        self.num_calls[name] += 1
        return next_name

    def missed(self, name: str, reason: str) -> None:
        """Report that a module's attention cannot be measured."""
        self.num_seen += 1
        self.report.missed[self._next_name(name)] = reason

    def found(
        self,
        name: str,
        frame: Frame | None,
        attention: Attention,
        how: str,
        output: Tensor | None,
        row_axis: int,
        made_of: MadeOf | None,
    ) -> None:
        """Emit one attention, unless its module registers its own or it waits for others of a loop.

        Args:
            name: The name of its module.
            frame: The running call of it; None where none has its own.
            attention: The attention.
            how: The way it was found, as in `AttentionCall`.
            output: What the layer computed, in the code's layout; None where that is not known.
            row_axis: The axis of ``output`` that counts query positions.
            made_of: What its operands are made of; None where it is not followed.
        """
        if self._ancestries is not None and made_of is not None and output is not None:
            self._ancestries.attend(output, made_of.query)
        if how != "explicit" and self._frames.has_explicit_record():
            return
        if torch._C._functorch.is_functorch_wrapped_tensor(attention.query):
            self.missed(name, "it runs inside of torch.func (vmap, grad), whose tensors cannot be read")
            return
        self.num_seen += 1
        found = Found(attention, how, output if attention.exact else None, row_axis, made_of)
        if frame is not None and self._is_turn(name, found, frame):
            frame.turns.append(found)
            left = num_positions(frame) - sum(len(x.query) * x.query.shape[-2] for x in frame.attentions())
            if left <= 0:
                self.take_turns(frame, complete=left == 0)
            return
        self._take(name, frame, [found])

    def _is_turn(self, name: str, found: Found, frame: Frame) -> bool:
        """Return whether an attention is one of several of a module that are sequences of one layer."""
        known, made_of = self.known(name), found.made_of
        if known is not None:
            return known.in_turns and is_turn(found.attention, frame)
        if made_of is None or same_sequence(made_of.query, made_of.key) is False or not is_turn(found.attention, frame):
            return False
        return all(x.query.shape[1::2] == found.attention.query.shape[1::2] for x in frame.attentions())

    def take_turns(self, frame: Frame, *, complete: bool = False) -> None:
        """Take what a module computed in turns: as one layer if they have all positions, else each by itself."""
        turns, frame.turns = frame.turns, []
        together = complete and len({turn.attention.scale for turn in turns}) == 1
        for each in [turns] if together else [[turn] for turn in turns]:
            self._take(frame.name, frame, each)

    def _take(self, name: str, frame: Frame | None, turns: Sequence[Found]) -> None:
        """Emit one layer, or report why it cannot be verified."""
        if frame is not None:
            frame.recorded_by, frame.num_found = turns[0].how, frame.num_found + 1
        layer = self._next_name(name)
        try:
            with self._unobserved():
                self._verify_and_emit(layer, frame, turns)
        except Exception as error:
            if self.is_emitting:
                raise
            self.report.missed[layer] = f"its attention could not be rebuilt: {error}"

    def _verify_and_emit(self, layer: str, frame: Frame | None, turns: Sequence[Found]) -> None:
        verified = [self._verified(layer, frame, turn) for turn in turns]
        call, rows = verified[0]
        if len(turns) > 1:
            outputs = [turn.attention.output_rows(turn.output, turn.row_axis) for turn in turns]
            call = joined([call for call, _ in verified], outputs)
            self._layouts[layer] = replace(self._layouts[layer], in_turns=True)
        self.is_emitting = True
        self._emit(call)
        self.is_emitting = False
        if len(turns) == 1:
            length = turns[0].attention.query.shape[-2]
            self.written.expect(layer, frame, call.when_written, call.rows.output, rows, length)

    def _verified(self, layer: str, frame: Frame | None, found: Found) -> tuple[AttentionCall, RebuiltRows]:
        """Return the record of an attention, and its rebuilt rows as they are before documents are cut."""
        attention, output = found.attention, found.output
        may_append = found.how == "mha"
        layout, query_mask, key_mask = self._findings.layout(
            layer, frame, attention, found.made_of, may_append=may_append
        )
        types = [attention.query.dtype, *([] if output is None else [output.dtype])]
        rows = attention.rebuilt(output, found.row_axis)
        call = AttentionCall(
            layer=layer,
            query=attention.query,
            key=attention.key,
            value=attention.value,
            tiled=attention.tiled,
            scale=attention.scale,
            query_mask=query_mask,
            key_mask=key_mask,
            kind="self" if layout.is_self else "cross",
            how=found.how,
            outside=layout.outside,
            precision=max(types, key=lambda dtype: torch.finfo(dtype).eps),
            logit_rows=attention.logit_rows,
            rows=rows,
            layout=layout,
            gained_bias=attention.is_biased() if attention.may_be_biased and "bias" not in layout.outside else None,
        )
        if layout.documents is not None:
            call = by_document(call, layout.documents, attention.output_rows(output, found.row_axis))
        return call, rows
