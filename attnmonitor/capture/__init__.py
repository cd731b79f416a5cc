"""q, k and s of every attention layer during one forward of any model, each verified against what the layer produced::

    with capture_attention(model, emit) as report:
        model(**batch)

calls ``emit`` once per attention, in order, with an `AttentionCall`; afterwards ``report.missed`` names what looked
like attention and gave no record. Nothing stays on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from attnmonitor.capture.call import AttentionCall, CaptureReport
from attnmonitor.capture.explicit import capture, listening
from attnmonitor.capture.interface import kernels_in_sight
from attnmonitor.capture.mode import AttentionMode

__all__ = ["AttentionCall", "CaptureReport", "capture", "capture_attention"]


@contextmanager
def capture_attention(
    model: nn.Module,
    emit: Callable[[AttentionCall], None],
    *,
    layouts: dict[str, tuple[str, ...]] | None = None,
) -> Iterator[CaptureReport]:
    """Hand every softmax attention of the forwards run inside the context to ``emit``.

    Train mode, RNG, buffers, grad mode and the compile stance are not touched: guard them outside.

    Args:
        model: The model whose modules name the layers.
        emit: Called with each `AttentionCall` while its tensors are alive. What it raises propagates.
        layouts: What was learnt of each layer's mask, by layer name; filled on the first pass and read on later ones.
            Learning waits for the device, so keep one dictionary per model between passes.

    Yields:
        The report; its ``missed`` is complete once the context has been left.
    """
    mode = AttentionMode(model, emit, {} if layouts is None else layouts)
    with mode.frames, listening(mode), kernels_in_sight(mode.watch_kernel), mode:
        yield mode.report
    mode.name_missed()
