"""What one tensor is made of: the sequences of its positions, and which of its axes count features.

Whether attention is self or cross, and which leading axes of its operands count heads, cannot be read off shapes: two
sequences may have one length, and heads and windows one count. It follows from what queries and keys are made of.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnmonitor.capture.axes import Axes

__all__ = ["UNKNOWN", "Ancestry", "same_sequence"]

UNKNOWN = 0
"""The source of a tensor that no seen function made."""


@dataclass(frozen=True)
class Ancestry:
    """What one tensor is made of.

    Attributes:
        sources: The tensors whose positions it has: above 0 for those that follow from the model's inputs, below 0 for
            parameters, buffers and new tensors, 0 where it is unknown.
        attended: The attentions it went through as their query.
        axes: Factors of every axis; None for an axis, or for all, where they are unknown.
        projected: Whether a weight was applied on the way, so that all feature axes are known.
        rankings: The functions that found which computed numbers are the largest, from which it follows: the choice of
            the best keys, for one.
    """

    sources: frozenset[int]
    attended: frozenset[int] = frozenset()
    axes: Axes | None = None
    projected: bool = False
    rankings: frozenset[int] = frozenset()

    @property
    def inputs(self) -> frozenset[int]:
        """The sources that follow from the model's inputs."""
        return frozenset(source for source in self.sources if source > 0)


def same_sequence(query: Ancestry, key: Ancestry) -> bool | None:
    """Return whether queries and keys have the positions of one sequence; None where that is unknown."""
    ours, theirs = query.inputs, key.inputs
    if not ours and not theirs:
        ours, theirs = query.sources - {UNKNOWN}, key.sources - {UNKNOWN}
    if not ours or not theirs:
        return None if UNKNOWN in query.sources | key.sources else False
    if not ours & theirs:
        return None if UNKNOWN in query.sources & key.sources else False
    # An encoder's output as the keys of a decoder that was given the same tokens: each went through its own layers.
    return not (query.attended - key.attended and key.attended - query.attended)
