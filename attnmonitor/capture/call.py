"""The records of a capture: one `AttentionCall` per softmax attention, and a report of what gave none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture.comparison import Comparison
from attnmonitor.capture.documents import Documents
from attnmonitor.capture.layouts import Layout
from attnmonitor.capture.verify import HIDDEN, RebuiltRows, checked_rows, grouped_product

__all__ = ["AttentionCall", "CaptureReport", "by_document", "with_own_rows"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One softmax attention of one forward. Reduce it inside ``emit`` and do not keep it: its tensors are large.

    Attributes:
        layer: The module's own qualified name; further calls of the module in one forward are
            ``name#2``, ``name#3``.
        query: ``(B, Hq, Lq, d)`` as softmax sees it (after RoPE, QK-norm, bias), in the dtype it arrived
            in, not scaled.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head.
        value: ``(B, Hv, Lk, dv)``: as many heads as the keys, or as the queries where the code repeats values in a way
            that is not known; None where the values could not be read.
        tiled: Query head h reads key head h // (Hq / Hkv) where False, h % Hkv where True.
        scale: The factor on ``q kᵀ`` that the layer really uses. A factor on the device (a learned temperature) is
            multiplied into ``query`` instead, because reading it would wait for the device.
        query_mask: ``(B, Lq)`` bool, True = a token, False = padding; None when no mask arrived.
        key_mask: ``(B, Lk)`` bool, likewise.
        kind: ``"self"`` or ``"cross"``.
        how: ``"sdpa"``, ``"traced"``, ``"interface"``, ``"mha"``, ``"kernel"`` or ``"explicit"``.
        outside: What acts on the logits outside ``s q kᵀ``: any of ``"bias"``, ``"sinks"``, ``"softcap"``,
            ``"window"``.
        precision: The coarsest type the layer computed in, which sets how large `error` may be: under autocast
            queries may be float32 while the attention itself runs in bfloat16.
        logit_rows: Maps row indices ``(R,)`` to the logits as they enter the softmax, ``(B, Hq, R, Lk)`` float32,
            -inf where hidden.
        rows: The rows that verification rebuilt.
        layout: What was found out of the layer at its first forward.
        gained_bias: 0-dim bool: whether a bias acts that did not at the first forward, as one that is learned from zero
            does. None where none can.
        when_written: Functions to add inside ``emit``. They are called with what each head writes through the output
            projection, ``(B, Hq, R, n)`` in ``rows``, each time a further part or scale of it has acted, and with None
            while only a part is known. The last call counts; none comes where no projection can be read.
    """

    layer: str
    query: Tensor
    key: Tensor
    value: Tensor | None
    tiled: bool
    scale: float
    query_mask: Tensor | None
    key_mask: Tensor | None
    kind: str
    how: str
    outside: tuple[str, ...]
    precision: torch.dtype
    logit_rows: Callable[[Tensor], Tensor]
    rows: RebuiltRows
    layout: Layout
    gained_bias: Tensor | None = None
    when_written: list[Callable[[Tensor | None], None]] = field(default_factory=list)

    @property
    def error(self) -> Tensor | None:
        """Largest deviation of a few rebuilt output rows from the layer's output, relative to their largest entry.

        A 0-dim float32 tensor on the device; None when there was nothing to compare with.
        """
        return self.rows.error


def by_document(
    call: AttentionCall, documents: Documents, output_rows: Callable[[Tensor], Tensor] | None
) -> AttentionCall:
    """Return the attention with each document as a sequence of its own.

    Args:
        call: The attention on whole rows.
        documents: The documents in them.
        output_rows: Maps rows ``(R,)`` to what the layer computed in them, ``(B, Hq, R, dv)``.
    """
    documents, length = documents.to(call.query.device), call.query.shape[-2]
    cut = replace(
        call,
        query=documents.cut(call.query),
        key=documents.cut(call.key),
        value=None if call.value is None else documents.cut(call.value),
        query_mask=documents.valid,
        key_mask=documents.valid,
        logit_rows=documents.rows(call.logit_rows, length),
    )
    own_rows = None if output_rows is None else partial(documents.of_rows, output_rows, length)
    return with_own_rows(cut, own_rows, call.rows.comparisons)


def with_own_rows(
    call: AttentionCall, output_rows: Callable[[Tensor], Tensor] | None, comparisons: tuple[Comparison, ...]
) -> AttentionCall:
    """Return an attention with rows of its own, after its sequences were cut or joined.

    Args:
        call: The attention.
        output_rows: Maps its rows ``(R,)`` to what the layer computed in them, ``(B, Hq, R, dv)``; None where that is
            not known.
        comparisons: The layer's output as rebuilt and as it is, from before.
    """
    rows = checked_rows(call.query)
    logits = call.logit_rows(rows)
    product = call.scale * grouped_product(call.query.index_select(-2, rows), call.key, tiled=call.tiled)
    output = None if output_rows is None else output_rows(rows)
    return replace(call, rows=RebuiltRows(rows, product, logits <= HIDDEN, output, comparisons, logits))


@dataclass
class CaptureReport:
    """The attention that a capture could not record.

    Attributes:
        missed: For each module that looks like attention and gave no record, the reason; complete after exit.
    """

    missed: dict[str, str] = field(default_factory=dict)
