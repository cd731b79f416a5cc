"""One attention that code computes in a loop over its positions: windows, or sequences of several lengths (Qwen2.5-VL).

Each turn is attention on some of the positions. Where all turns together have the positions of the module's input, and
each has all heads, they are the sequences of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnmonitor.capture.call import AttentionCall, with_own_rows
from attnmonitor.capture.heads import MadeOf
from attnmonitor.capture.modules import Frame
from attnmonitor.capture.verify import Attention

__all__ = ["Found", "is_turn", "joined", "num_positions"]


@dataclass(frozen=True, eq=False)
class Found:
    """An attention as it was found: of a whole layer, or of one turn of a loop.

    Attributes:
        attention: The attention.
        how: The way it was found, as in `AttentionCall`.
        output: What the layer computed, in the code's layout; None where its rows cannot be compared.
        row_axis: The axis of ``output`` that counts query positions.
        made_of: What its operands are made of; None where it is not followed.
    """

    attention: Attention
    how: str
    output: Tensor | None
    row_axis: int
    made_of: MadeOf | None


def num_positions(frame: Frame) -> int:
    """Return how many positions a module's first input has, ``(L, D)`` or ``(B, L, D)``; 0 for any other."""
    hidden = frame.inputs[0] if frame.inputs else None
    return 0 if hidden is None or hidden.dim() > 3 else hidden.numel() // hidden.shape[-1]


def is_turn(attention: Attention, frame: Frame) -> bool:
    """Return whether an attention has some of the positions of its module's input, and all heads."""
    query, key, count = attention.query, attention.key, num_positions(frame)
    if query.shape[-2] != key.shape[-2] or len(query) * query.shape[-2] >= count or query._base is None:
        return False
    # A slice of positions is a view of the queries of all heads, perhaps beside keys and values: one of heads is not.
    width = query.shape[1] * query.shape[-1]
    return query._base.numel() in (count * width, count * (width + 2 * key.shape[1] * key.shape[-1]))


def joined(calls: Sequence[AttentionCall], outputs: Sequence[Callable[[Tensor], Tensor] | None]) -> AttentionCall:
    """Return the turns of a loop as sequences of one attention, padded to one length.

    Args:
        calls: The attention of each turn, with the same heads and scale.
        outputs: For each, the function from rows ``(R,)`` to what it computed in them, ``(B, H, R, dv)``.
    """
    first = calls[0]
    length = max(call.query.shape[-2] for call in calls)

    def padded(x: Tensor) -> Tensor:
        return pad(x, (0, 0, 0, length - x.shape[-2]))

    def mask(which: str) -> Tensor:
        rows = []
        for call in calls:
            size = call.query.shape[-2]
            own = getattr(call, which)
            own = torch.ones(len(call.query), size, dtype=torch.bool, device=call.query.device) if own is None else own
            rows.append(pad(own, (0, length - size)))
        return torch.cat(rows)

    def own_rows(call: AttentionCall, rows: Tensor) -> Tensor:
        return rows.clamp_max(call.query.shape[-2] - 1)

    def logit_rows(rows: Tensor) -> Tensor:
        parts = [call.logit_rows(own_rows(call, rows)) for call in calls]
        return torch.cat([pad(part, (0, length - part.shape[-1]), value=-torch.inf) for part in parts])

    query, key = (torch.cat([padded(getattr(call, name)) for call in calls]) for name in ("query", "key"))
    values = [call.value for call in calls if call.value is not None]
    known = [output for output in outputs if output is not None]

    def output_rows(rows: Tensor) -> Tensor:
        return torch.cat([output(own_rows(call, rows)) for call, output in zip(calls, known, strict=True)])

    whole = replace(
        first,
        query=query,
        key=key,
        value=torch.cat([padded(value) for value in values]) if len(values) == len(calls) else None,
        query_mask=mask("query_mask"),
        key_mask=mask("key_mask"),
        logit_rows=logit_rows,
        when_written=[],
    )
    comparisons = tuple(each for call in calls for each in call.rows.comparisons)
    return with_own_rows(whole, output_rows if len(known) == len(calls) else None, comparisons)
