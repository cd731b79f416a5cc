"""A sample whose forward has run, and which is delivered some optimizer steps later.

Where the host's cores solve the eigenproblems of a GPU, training goes on meanwhile. The delay is a number of steps and
not the time that the cores take, so that two runs alert, log and stop at the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnmonitor.measurement import Measured
from attnmonitor.measurement.unfinished import Unfinished
from attnmonitor.monitor import clock
from attnmonitor.sample import Sample

__all__ = ["LATE_STEPS", "LateSample", "is_captured_in_a_graph", "with_requests_of"]

LATE_STEPS = 4
"""Optimizer steps after which a late sample is delivered, waited for if need be."""


@dataclass
class LateSample:
    """A sample that is not delivered yet.

    Attributes:
        global_step: Optimizer steps done when its forward ran.
        measurement: What is left to do.
        seconds: Time that it has taken of the training loop so far.
    """

    global_step: int
    measurement: Unfinished[Measured]
    seconds: float

    def is_time(self, global_step: int) -> bool:
        """Go on without a wait, and return whether it is to be delivered after ``global_step`` optimizer steps."""
        started = clock.now()
        self.measurement.advance()
        self.seconds += clock.passed(started, clock.now())
        return global_step >= self.global_step + LATE_STEPS


def is_captured_in_a_graph() -> bool:
    """Return whether what is launched now is captured in a CUDA graph: a sample would break it."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def with_requests_of(earlier: Sample | None, sample: Sample | None) -> Sample | None:
    """Return the sample, with the requests of an earlier one that was delivered in the same step."""
    if earlier is None or sample is None:
        return sample or earlier
    return replace(sample, requests=tuple(dict.fromkeys((*earlier.requests, *sample.requests))))
