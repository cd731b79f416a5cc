"""What is found out of the layers of one forward: self or cross, masks, remarks."""

from __future__ import annotations

from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.ancestry import Ancestry, same_sequence
from attnmonitor.capture.examination import Surroundings, examined, fitting_mask, is_padding_argument
from attnmonitor.capture.heads import MadeOf
from attnmonitor.capture.layouts import Layout, Layouts
from attnmonitor.capture.modules import Frame, Frames
from attnmonitor.capture.verify import Attention

__all__ = ["Findings"]


class Findings:
    """Layouts of the layers of one forward, and the positions of those that came before.

    Args:
        layouts: What is known of each layer; a layer that is not there yet is examined.
        frames: The running module calls.
        ancestries: What tensors are made of; None where it is not followed.
        packed: As in `attnmonitor.capture.capture_attention`.
    """

    def __init__(self, layouts: Layouts, frames: Frames, ancestries: Ancestries | None, packed: str) -> None:
        self._layouts = layouts
        self._frames = frames
        self._ancestries = ancestries
        self._packed = packed
        self._positions: dict[str, tuple[Ancestry | None, Tensor | None]] = {}

    def layout(
        self, layer: str, frame: Frame | None, attention: Attention, made_of: MadeOf | None, *, may_append: bool
    ) -> tuple[Layout, Tensor | None, Tensor | None]:
        """Return what is known of a layer, with the masks of its queries and keys.

        Args:
            layer: Its name.
            frame: The call of its module.
            attention: Its attention.
            made_of: What its operands are made of.
            may_append: Whether the code appends keys that are no positions.
        """
        layout = self._layouts.get(layer)
        if layout is None or not layout.fits(attention):
            layout = self._layouts[layer] = self._examined(frame, attention, made_of)
        attention = attention.without_masks(layout.ranked_masks)
        key_mask = attention.key_mask() if layout.key_mask is None else layout.key_mask.to(attention.key.device)
        query_mask = key_mask if layout.is_self else self._positions.get(layout.rows_of, (None, None))[1]
        query_mask = fitting_mask(query_mask, attention, may_append=may_append and layout.is_self)
        if layout.is_self:
            self._positions[layer] = (None if made_of is None else made_of.query, key_mask)
        return layout, query_mask, key_mask

    def _examined(self, frame: Frame | None, attention: Attention, made_of: MadeOf | None) -> Layout:
        """Find out what an attention does beside ``s q kᵀ``."""
        num_rows, num_keys = attention.query.shape[-2], attention.key.shape[-2]
        ranked = self._ranked_masks(attention)
        attention = attention.without_masks(ranked)
        is_self = None if made_of is None else same_sequence(made_of.query, made_of.key)
        if is_self is None:
            is_self = frame.is_self_attention(num_rows, num_keys) if frame is not None else num_rows == num_keys
        channels = made_of is not None and made_of.between_channels
        rows_of = "" if is_self else self._layer_on(made_of)
        query_mask = fitting_mask(self._positions.get(rows_of, (None, None))[1], attention, may_append=False)
        remarks = []
        if not attention.exact and frame is not None and not frame.module.training:
            remarks.append("dropout acts on its attention in evaluation mode")
        if made_of is not None and made_of.mixes_positions:
            remarks.append("its rows mix positions and features: is there a view where a transpose belongs?")
        if is_self and made_of is not None and made_of.query.rankings - made_of.key.rankings and num_rows < num_keys:
            remarks.append(f"its queries are {num_rows} of {num_keys} positions, chosen by scores")
        if frame is not None and frame.num_found > 1:
            remarks.append("a part, measured apart: one call of its module computes several attentions")
        known = Layout(
            attention.lead,
            is_self or channels,
            channels,
            rows_of,
            remarks=tuple(remarks),
            ranked_masks=ranked,
            rows_at=attention.rows_at,
            merged=attention.merged,
            product_axes=attention.product_axes,
        )
        return examined(known, attention, query_mask, self._surroundings(attention, made_of))

    def _ranked_masks(self, attention: Attention) -> tuple[bool, ...]:
        """Return which of an attention's masks choose keys by their scores (top-k, an indexer)."""
        if self._ancestries is None:
            return ()
        ranked = [bool(self._ancestries.of(mask).rankings) for mask in attention.masked_by]
        if len(ranked) != len(attention.visible):
            ranked = [any(ranked)] * len(attention.visible)
        return tuple(ranked) if any(ranked) else ()

    def _layer_on(self, made_of: MadeOf | None) -> str:
        """Return the last self-attention on the sequence of a cross attention's queries, ``""`` if there was none."""
        for layer, (positions, _) in reversed(self._positions.items()):
            if made_of is None or positions is None or same_sequence(made_of.query, positions):
                return layer
        return ""

    def _surroundings(self, attention: Attention, made_of: MadeOf | None) -> Surroundings:
        arguments, ancestries = self._frames.arguments, self._ancestries
        if ancestries is None or made_of is None:
            return Surroundings(
                arguments, self._packed, on_main_input=False, masked_by_inputs=False, masked_alike=False
            )
        masks = [ancestries.of(mask) for mask in attention.masked_by]
        plain = [ancestries.of(x).inputs for name, x in arguments.items() if is_padding_argument(name) and x.dim() == 2]
        main = next((ancestries.of(x).inputs for x in arguments.values()), frozenset())
        return Surroundings(
            arguments,
            self._packed,
            on_main_input=bool(main & made_of.key.inputs),
            masked_by_inputs=bool(frozenset().union(*(mask.inputs for mask in masks)) - frozenset().union(*plain)),
            masked_alike=bool(masks) and all(max(mask.sources) < 0 for mask in masks),
        )
