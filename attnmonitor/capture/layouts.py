"""What is known of each attention layer of a model: found at its first forward, and read at later ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from attnmonitor.capture.documents import Documents
from attnmonitor.capture.heads import Lead
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.capture.verify import Attention

__all__ = ["Layout", "Layouts", "OutputPlace"]


@dataclass(frozen=True)
class OutputPlace:
    """Where the output of an attention meets a weight, and how it is laid out there.

    Attributes:
        number: How many weights were applied to something of its size before; -1 where it meets none.
        rows_first: Whether positions come before sequences.
        heads_last: Whether the head is the inner factor of a feature's index.
    """

    number: int
    rows_first: bool = False
    heads_last: bool = False


@dataclass(frozen=True, eq=False)
class Layout:
    """What is known of one layer.

    Attributes:
        lead: Which leading axes of its operands count heads; None for the usual order.
        is_self: Whether queries and keys are of one sequence.
        between_channels: Whether features attend to features.
        rows_of: The layer whose keys are the positions of this layer's queries, ``""`` if none is known.
        key_mask: ``(B, Lk)``, True for a token, where the masks that arrive do not show it.
        documents: Where its rows are cut, None where they are not.
        outside: What acts on its logits outside ``s q kᵀ``.
        sees: ``"causal"``, ``"both"``, ``"window"``, ``"documents"``, ``"cross"`` or ``"channels"``.
        future_mass: Mean attention probability on later positions, NaN where it does not apply.
        padding_mass: The same on padding.
        reach_back: How many earlier positions a query sees at most, None for all or where it does not apply.
        reach_ahead: The same of later positions.
        reaches_evenly: Whether every query sees ``reach_ahead`` later positions, as far as there are so many.
        remarks: What stands out in its queries, keys and weights.
        in_turns: Whether its code loops over its positions, so that its sequences come one after the other.
        positions: Sequences and keys of the forward in which this was found.
        ranked_masks: Which of its masks choose the best keys, and so show no padding.
        rows_at: The leading axis of its product, in the code's order, that counts query positions where heads stand in
            the place of rows; None for the usual order.
        merged: How the rows of its product count positions and heads at once; None where they count positions alone.
        product_axes: Axes of the query and the key positions in its product.
        output_at: Where its output meets a weight; None where that was not looked for, or is not clear yet.
    """

    lead: Lead | None = None
    is_self: bool = True
    between_channels: bool = False
    rows_of: str = ""
    key_mask: Tensor | None = None
    documents: Documents | None = None
    outside: tuple[str, ...] = ()
    sees: str = ""
    future_mass: float = math.nan
    padding_mass: float = math.nan
    reach_back: int | None = None
    reach_ahead: int | None = None
    reaches_evenly: bool = False
    remarks: tuple[str, ...] = ()
    in_turns: bool = False
    positions: tuple[int, int] = (0, 0)
    ranked_masks: tuple[bool, ...] = ()
    rows_at: int | None = None
    merged: MergedRows | None = None
    product_axes: tuple[int, ...] = ()
    output_at: OutputPlace | None = None

    def fits(self, attention: Attention) -> bool:
        """Return whether what was kept of the positions is of a forward of the same sequences."""
        return self.positions == (len(attention.key), attention.key.shape[-2]) or (
            self.key_mask is None and self.documents is None
        )


Layouts = dict[str, Layout]
"""What is known of each layer, by its name."""
