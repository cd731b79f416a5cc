"""Which leading axes of an attention's operands count heads, and which sequences.

Operands come as ``(B, H, L, d)``, but also as ``(B·H, L, d)`` or ``(H·B, L, d)``, as ``(H, L, d)`` of one sequence, and
with further axes of windows, frames or rows. A `Lead` sorts the factors of all leading axes: those that count features
of a projection are heads, all others are sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from attnmonitor.capture.ancestry import Ancestry
from attnmonitor.capture.axes import Axes, Axis, Factor
from attnmonitor.capture.modules import Frame

__all__ = ["Lead", "MadeOf", "common_lead_axes", "lead_by_shape", "lead_of", "usual_lead"]


@dataclass(frozen=True)
class Lead:
    """The leading axes of operands ``(*lead, L, d)``, factor by factor, in the code's order.

    Attributes:
        axes: For each leading axis its factors, ``(counts heads, size)``, outermost first.
    """

    axes: tuple[Axis, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the leading axes."""
        return tuple(math.prod(size for _, size in axis) for axis in self.axes)

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""
        return math.prod(size for is_head, size in self._factors if not is_head)

    @property
    def _factors(self) -> list[Factor]:
        return [factor for axis in self.axes for factor in axis]

    @property
    def _order(self) -> list[int]:
        kinds = [is_head for is_head, _ in self._factors]
        return sorted(range(len(kinds)), key=lambda position: kinds[position])

    @property
    def is_in_order(self) -> bool:
        """Whether all axes of sequences stand before all axes of heads."""
        return self._order == sorted(self._order)

    def split(self, x: Tensor) -> Tensor:
        """Return ``(*lead, R, C)``, or anything that reshapes to it, as ``(B, H, R, C)``."""
        rows, columns = x.shape[-2:]
        if not self.is_in_order:
            order = self._order
            x = x.reshape(*(size for _, size in self._factors), rows, columns)
            x = x.permute(*order, len(order), len(order) + 1)
        return x.reshape(self.num_sequences, -1, rows, columns)

    def join(self, x: Tensor) -> Tensor:
        """Return ``(B, H, R, C)`` as ``(*lead, R, C)``: the inverse of `split`."""
        rows, columns = x.shape[-2:]
        if not self.is_in_order:
            order = self._order
            x = x.reshape(*(self._factors[position][1] for position in order), rows, columns)
            back = sorted(range(len(order)), key=lambda position: order[position])
            x = x.permute(*back, len(order), len(order) + 1)
        return x.reshape(*self.sizes, rows, columns)

    def of_sequences(self, seen: Tensor) -> Tensor:
        """Return what holds for some head, ``(B, Lk)``, from a bool that broadcasts to ``(*lead, Lk)``."""
        return self.split(seen.expand(*self.sizes, -1).unsqueeze(-2)).any(1).squeeze(-2)

    def resized(self, sizes: Sequence[int], *, heads: bool) -> Lead | None:
        """Return the lead of operands with another number of heads, or of sequences; None where that is unclear."""
        if len(sizes) != len(self.axes):
            return None
        axes = []
        for axis, own, wanted in zip(self.axes, self.sizes, sizes, strict=True):
            changing = [position for position, (is_head, size) in enumerate(axis) if is_head == heads and size > 1]
            others = own // math.prod(axis[position][1] for position in changing)
            if own == wanted:
                axes.append(axis)
            elif not changing and wanted % own == 0:
                axes.append(((heads, wanted // own), *axis))
            elif len(changing) == 1 and wanted % others == 0:
                at = changing[0]
                axes.append((*axis[:at], (heads, wanted // others), *axis[at + 1 :]))
            else:
                return None
        return Lead(tuple(axes))

    def values(self, value: Tensor) -> Tensor | None:
        """Return values ``(*lead, Lk, dv)``, also of fewer heads or shared, as ``(B, Hv, Lk, dv)``; None if unclear."""
        own = list(value.shape[:-2])
        if math.prod(own) == math.prod(self.sizes):
            return self.split(value)
        lead = self
        if len(own) > len(self.axes):  # the code has unfolded an axis of sequences and heads since
            lead = Lead(tuple((factor,) for factor in self._factors))
            while len(own) > len(lead.axes) and 1 in own:
                own.remove(1)
        fewer = lead.resized(own, heads=True)
        if fewer is not None:
            return fewer.split(value)
        broadcast = len(own) == len(self.axes) and all(a in (1, b) for a, b in zip(own, self.sizes, strict=True))
        return self.keys(value) if broadcast else None

    def keys(self, key: Tensor) -> Tensor:
        """Return keys ``(*lead, Lk, d)``, shared ones with axes of size 1, as ``(B, Hkv, Lk, d)``."""
        own = list(key.shape[:-2])
        shared = []
        for position in reversed(range(len(own))):
            if all(is_head for is_head, _ in self.axes[position]) and own[position] == 1:
                shared.append(position)
            elif self.sizes[position] > 1 and any(is_head for is_head, _ in self.axes[position]):
                break
        wanted = [1 if position in shared else size for position, size in enumerate(self.sizes)]
        lead = self.resized(wanted, heads=True)
        assert lead is not None
        return lead.split(key.expand(*wanted, *key.shape[-2:]))


@dataclass(frozen=True)
class MadeOf:
    """What the operands of an attention are made of.

    Attributes:
        query: Ancestry of the queries.
        key: Ancestry of the keys.
        axes: Factors of the queries' axes, ``(*lead, L, d)``; None for an axis of which they are unknown.
    """

    query: Ancestry
    key: Ancestry
    axes: Axes

    @property
    def between_channels(self) -> bool:
        """Whether features attend to features, summed over positions."""
        rows, summed = self.axes[-2:]
        if not rows or not summed or not self.query.projected:
            return False
        return rows[-1][0] and not any(is_feature for is_feature, _ in summed)

    @property
    def mixes_positions(self) -> bool:
        """Whether rows of queries and of keys count positions and features at once."""

        def is_mixed(axis: Axis | None) -> bool:
            return len({is_feature for is_feature, _ in axis or ()}) == 2

        return is_mixed(self.axes[-2]) and any(map(is_mixed, (self.key.axes or ())[-2:]))


def common_lead_axes(of_query: Axes, of_key: Axes | None) -> Axes:
    """Return the queries' axes, with those of the keys where they say more of a leading axis.

    Along copies of a learned query only the keys know what is counted. Sequences of queries are sequences of keys as
    well: where experts project the queries, the choices of a token would pass for sequences.
    """
    if of_key is None or len(of_key) != len(of_query):
        return of_query

    def is_of_heads(axis: Axis | None) -> bool:
        return bool(axis) and all(is_head for is_head, _ in axis or ())

    def size(axis: Axis | None) -> int:
        return math.prod(size for _, size in axis or ())

    def says_more(other: Axis | None, own: Axis | None) -> bool:
        return own is None or (is_of_heads(other) and not is_of_heads(own) and size(own) == size(other))

    pairs = zip(of_query[:-2], of_key[:-2], strict=True)
    return (*(other if says_more(other, own) else own for own, other in pairs), *of_query[-2:])


def lead_of(sizes: Sequence[int], made_of: MadeOf | None) -> Lead | None:
    """Return the lead that is known from how the operands were made; None where that is not known."""
    if made_of is None:
        return None
    known = [axis for axis in made_of.axes[:-2] if axis is not None]
    has_heads = any(is_head for axis in known for is_head, _ in axis)
    of_keys = made_of.key.projected and None not in (made_of.key.axes or (None,))
    if len(known) != len(sizes) or not (made_of.query.projected or of_keys or has_heads):
        return None
    lead = Lead(tuple(known))
    return lead if lead.sizes == tuple(sizes) else None


def lead_by_shape(sizes: Sequence[int], frame: Frame | None, num_rows: int) -> Lead | None:
    """Return the lead by the usual order of axes, for unknown operands; None where it is unclear.

    ``(B, H)`` is sequences and heads; no axis is one head of one sequence. In ``(B·H, L, d)`` they are one axis, and
    the number follows from the layer's own input, ``(B, L, D)`` in any order.
    """
    if not sizes:
        return Lead(())
    if len(sizes) == 2:
        return usual_lead(sizes)
    if len(sizes) != 1 or frame is None or not frame.inputs:
        return None
    hidden = frame.inputs[0]
    sequences, rest = divmod(hidden.numel() // hidden.shape[-1], num_rows)
    if not sequences or rest or sizes[0] % sequences:
        return None
    return Lead((((False, sequences), (True, sizes[0] // sequences)),))


def usual_lead(sizes: Sequence[int]) -> Lead:
    """Return the lead ``(B, H)``."""
    num_sequences, num_heads = sizes
    return Lead((((False, num_sequences),), ((True, num_heads),)))
