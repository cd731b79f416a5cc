"""Queries, keys and scale of every attention layer in one forward of any model, verified by the layer's own output::

    with capture_attention(model, emit) as report:
        model(**batch)

1. ``mode.py``: a torch function mode sees every torch function that the model calls, in any module or library, and
   passes it to its observers as a ``FunctionCall``.
2. ``fused.py``: ``scaled_dot_product_attention`` and FlexAttention have q, k and scale as arguments.
3. ``tracing/``: hand-written attention is a product ``q kᵀ``, followed through scale, mask and bias to its softmax and
   its values. ``nn.MultiheadAttention`` is run with the mode on inside it, and is then found in the same ways.
4. ``interface.py``: a kernel that torch cannot see, called by transformers, is read from its arguments; so are those
   that ``kernels.py`` and ``kernel_modules.py`` know by name (flash_attn, xformers, Transformer Engine), wherever a
   model calls them.
5. ``explicit.py``: for all else, the model calls ``capture(module, q, k, ...)`` itself.
6. ``modules.py`` names the layer. ``ancestries.py`` follows what tensors are made of, from which ``heads.py`` tells
   heads from sequences, and ``findings.py`` self from cross attention. ``examination.py`` finds masks, padding and
   documents; ``layouts.py`` keeps what was found of a layer.
7. ``verify.py`` rebuilds a few rows of the layer's output from q, k and scale; ``comparison.py`` compares.
8. ``emitter.py`` calls ``emit`` with one `AttentionCall` (``call.py``) per attention, in order; ``written.py`` follows
   what its heads write through the output projection. ``report.missed`` names the modules that look like attention but
   gave no record. Nothing stays on the model.

``projections/`` finds W_Q and W_K of each head, on top of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from attnmonitor.capture.call import AttentionCall, CaptureReport
from attnmonitor.capture.explicit import capture, listening
from attnmonitor.capture.interface import watched_kernels
from attnmonitor.capture.kernel_modules import watched_modules
from attnmonitor.capture.kernels import watched_functions
from attnmonitor.capture.layouts import Layout, Layouts
from attnmonitor.capture.mode import AttentionMode

__all__ = ["AttentionCall", "CaptureReport", "Layout", "Layouts", "capture", "capture_attention"]


@contextmanager
def capture_attention(
    model: nn.Module,
    emit: Callable[[AttentionCall], None],
    *,
    layouts: Layouts | None = None,
    packed: str = "documents",
) -> Iterator[CaptureReport]:
    """Call ``emit`` with every softmax attention of the forwards run inside the context.

    Train mode, RNG, buffers, grad mode and the compile stance are left as they are: `attnmonitor.measurement.quiet`
    sets and restores them.

    Args:
        model: The model whose modules name the layers.
        emit: Called with each `AttentionCall` while its tensors are alive. What it raises propagates.
        layouts: What is known of each layer, by its name; filled on the first pass and read on later ones. Finding it
            out waits for the device, so keep one dictionary per model between passes.
        packed: ``"documents"`` to cut rows that hold several into a sequence each, ``"one"`` to leave them whole.

    Yields:
        The report; its ``missed`` is complete once the context has been left.
    """
    mode = AttentionMode(model, emit, {} if layouts is None else layouts, packed=packed)
    named, modules = watched_functions(mode.watch_function), watched_modules(mode.watch_function)
    try:
        with mode.frames, listening(mode), named, modules, watched_kernels(mode.watch_kernel), mode:
            yield mode.report
        mode.report_missed()
    finally:
        # The mode and its parts refer to themselves by their observers. What they hold, down to a sample's numbers,
        # would take memory until Python looks for such cycles, which programs that train let it do seldom.
        for part in (*mode.parts, mode):
            vars(part).clear()
