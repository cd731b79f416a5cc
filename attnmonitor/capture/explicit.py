"""Register q and k explicitly, for attention that cannot be captured: an own kernel or a scripted function.

    def forward(self, x):
        ...
        out = my_kernel(q, k, v)
        capture(self, q, k, scale=self.scale, causal=True)

Outside of a capture the call costs one test of a module-level dictionary, and a compiled region traces through it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor, nn

from attnmonitor.capture.fused import add_mask, attend, hide_future
from attnmonitor.capture.verify import Attention, Step
from attnmonitor.parallel.threads import pushed, thread_stack

__all__ = ["capture", "listening"]


class Listener(Protocol):
    """Receives the explicit calls made while a capture is open."""

    def record_explicit(self, module: nn.Module, attention: Attention, output: Tensor | None) -> None:
        """Record ``attention`` as the attention of ``module``."""


_listeners: dict[int, list[Listener]] = {}
"""The open captures of each thread."""


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Send this thread's explicit calls to ``listener`` while the context is open."""
    return pushed(_listeners, listener)


def capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    value: Tensor | None = None,
    output: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> None:
    """Register queries and keys of ``module`` with the open capture; without one, do nothing.

    The first record of a module's call is kept: an explicit call before the attention is computed replaces what would
    have been found in it; one after it is used only where nothing was found.

    Args:
        module: The layer they belong to, whose name the record gets.
        query: ``(B, Hq, Lq, d)`` as softmax sees it, not scaled.
        key: ``(B, Hkv, Lk, d)``, Hkv dividing Hq.
        scale: Factor on ``q kᵀ``; ``d ** -0.5`` when None.
        value: ``(B, Hv, Lk, dv)``; with ``output`` it lets the call be verified.
        output: ``(B, Hq, Lq, dv)``, what the attention produced.
        mask: Bool (True = may be seen) or additive, broadcast against ``(B, Hq, Lq, Lk)``.
        causal: Whether query i sees keys 0 to i only.

    Raises:
        ValueError: query or key are not 4-dimensional, or their sizes do not fit.
    """
    if not _listeners or not thread_stack(_listeners):
        return
    if query.dim() != 4 or key.dim() != 4 or query.shape[-1] != key.shape[-1] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"capture(query={tuple(query.shape)}, key={tuple(key.shape)}): expected (B, Hq, Lq, d) and (B, Hkv, Lk, d) "
            "with Hq a multiple of Hkv; transpose or unflatten the heads first"
        )
    attention = Attention(query, key, query.shape[-1] ** -0.5 if scale is None else scale, value=value)
    if mask is not None:
        add_mask(attention, mask, attention.affine)
    if causal:
        attention.affine.append(Step(hide_future))
    if value is not None:
        attention.after.append(attend(value))
    thread_stack(_listeners)[-1].record_explicit(module, attention, output if value is not None else None)
