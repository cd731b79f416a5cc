"""What capture hands over: one softmax attention of one forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["AttentionCall", "CaptureReport"]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One softmax attention of one forward. It lives only while ``emit`` runs: reduce it, do not keep it.

    Attributes:
        layer: The module's own qualified name; further calls of the module in one forward are
            ``name#2``, ``name#3``.
        query: ``(B, Hq, Lq, d)`` as softmax sees it (after RoPE, QK-norm, bias), in the dtype it arrived
            in, not scaled.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head.
        tiled: Which key head query head h reads: h // (Hq / Hkv) where False, h % Hkv where True.
        scale: The factor on ``q kᵀ`` that the layer really uses. A factor that lives on the device (a learned
            temperature) is folded into ``query`` instead, for reading it would wait for the device.
        query_mask: ``(B, Lq)`` bool, True = a token, False = padding; None when no mask arrived.
        key_mask: ``(B, Lk)`` bool, likewise.
        kind: ``"self"`` or ``"cross"``.
        how: ``"sdpa"``, ``"traced"``, ``"interface"``, ``"mha"`` or ``"explicit"``.
        outside: What acts on the logits outside ``s q kᵀ``: of ``"bias"``, ``"sinks"``, ``"softcap"``, ``"window"``.
        error: 0-dim float32 tensor on the device: worst deviation of a few rebuilt output rows from what the layer
            produced, relative to the largest entry of those rows. None when there was nothing to compare with.
        precision: The coarsest type the layer computed in, and so what ``error`` can be held against: under autocast
            queries may be float32 while the attention itself runs in bfloat16.
        logit_rows: Row indices ``(R,)`` to the logits as they enter the softmax, ``(B, Hq, R, Lk)`` float32,
            -inf where hidden.
    """

    layer: str
    query: Tensor
    key: Tensor
    tiled: bool
    scale: float
    query_mask: Tensor | None
    key_mask: Tensor | None
    kind: str
    how: str
    outside: tuple[str, ...]
    error: Tensor | None
    precision: torch.dtype
    logit_rows: Callable[[Tensor], Tensor]


@dataclass
class CaptureReport:
    """What a capture could not see.

    Attributes:
        missed: Layer name to the reason why a module that looks like attention gave no record; complete after exit.
    """

    missed: dict[str, str] = field(default_factory=dict)
