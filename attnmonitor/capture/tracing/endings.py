"""Why hand-written attention of a layer cannot be measured: which operation ended its trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from attnmonitor.capture.ancestries import Ancestries
from attnmonitor.capture.modules import Frames
from attnmonitor.capture.tracing.operations import EXPONENTIALS
from attnmonitor.capture.tracing.trace import Trace

__all__ = ["MIXING", "Endings"]

MIXING = {"linear", "conv1d", "conv2d", "einsum", "matmul", "bmm"}
_UNSEEN = "a function that cannot be seen: a scripted one, or no torch's"


class Endings:
    """The reasons for which traces of one forward ended.

    Args:
        frames: The running module calls.
        ancestries: What tensors are made of; None where it is not followed.
        missed: Called with ``(layer, reason)`` when an attention was recognized but cannot be measured.

    Attributes:
        reasons: By layer.
    """

    def __init__(self, frames: Frames, ancestries: Ancestries | None, missed: Callable[[str, str], None]) -> None:
        self._frames = frames
        self._ancestries = ancestries
        self._missed = missed
        self._num_logits: dict[str, int] = {}  # of each layer's latest product
        self.reasons: dict[str, str] = {}

    def end(self, trace: Trace, name: str) -> None:
        """Note why the attention of a layer cannot be measured, if no other use of the same product is."""
        if trace.origin.values_reached:
            return
        what, when = ("weights", "after") if trace.stage == "after" else ("logits", "before")
        reason = f"its {what} go through {name}, which cannot be followed"
        if name in MIXING:
            reason = (
                f"its heads are mixed by {name} {when} the softmax (talking heads), so no head has a field of its own"
            )
            if when == "before" and trace.origin.frame is not None:
                trace.origin.frame.mixes_heads = True
        self.reasons.setdefault(trace.origin.layer, reason)
        made_of = trace.origin.made_of
        # Random features are exponentials of a product with constants.
        of_constants = made_of is not None and made_of.query.inputs and not made_of.key.inputs
        if name in EXPONENTIALS and when == "before" and not of_constants:
            self._frames.suspect()  # a softmax by hand; other products are no attention

    def note_logits(self, layer: str, logits: Tensor) -> None:
        """Note how many logits the layer has: as many as weights that are made of them unseen."""
        self._num_logits[layer] = logits.numel()

    def note_unseen_logits(self, logits: Any) -> None:
        """Note where the argument of a softmax was made by a function that cannot be seen."""
        if self._is_unseen(logits):
            self.reasons[self._frames.current_layer()[0]] = f"its logits come out of {_UNSEEN}"

    def note_unseen_weights(self, layer: str, operand: Tensor) -> None:
        """Note where an operand of a product may be the softmax of the layer's logits, made unseen."""
        if self._is_unseen(operand) and operand.numel() == self._num_logits.get(layer):
            self.reasons.setdefault(layer, f"its logits go into {_UNSEEN}")

    def note_reuse(self, trace: Trace, output: Tensor) -> None:
        """Note that a layer weights values by what another layer computed from its own queries and keys."""
        origin = trace.origin
        if self._frames.is_of_running_layer(origin.frame):
            return
        if self._ancestries is not None and origin.made_of is not None:
            self._ancestries.attend(output, origin.made_of.query)
        layer = self._frames.current_layer()[0]
        self._missed(layer, f"it attends by the queries and keys of {origin.layer} and has none of its own")

    def _is_unseen(self, x: Any) -> bool:
        return self._ancestries is not None and self._ancestries.is_unseen(x)
