"""How an attempt to measure ended on each of several processes, and what it comes to for all of them.

What failed on one process counts as failed on all, so that none waits for another, in this sample or the next.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnmonitor.measurement.measured import Measured

__all__ = ["Outcome", "common_failure", "free_frames"]

_REASON_LENGTH = 300  # characters of a reason that are sent to the other processes


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended on one process, as it is sent to the others.

    Attributes:
        missing: Reason for each layer without numbers.
        failure: Why the whole attempt failed; ``""`` where it did not.
        out_of_memory: Whether the failure was memory, so that half of the probe may work.
        part: What this process has finished; None where each finishes all layers.
    """

    missing: Mapping[str, str]
    failure: str = ""
    out_of_memory: bool = False
    part: Measured | None = None

    @classmethod
    def of(cls, result: Measured | Exception, *, with_part: bool = False) -> Outcome:
        """What is sent of a result; the numbers only ``with_part``."""
        if isinstance(result, Exception):
            failure = f"{type(result).__name__}: {result}"[:_REASON_LENGTH]
            return cls({}, failure, isinstance(result, torch.OutOfMemoryError))
        missing = {name: layer for name, layer in result.coverage.items() if not layer.measured}
        reasons = {name: layer.reason[:_REASON_LENGTH] for name, layer in missing.items()}
        return cls(reasons, part=result if with_part else None)


def common_failure(outcomes: Mapping[int, Outcome], result: Measured | Exception) -> Exception:
    """Return what to raise here after a failure on any process; out of memory counts for all."""
    out_of_memory = any(each.out_of_memory for each in outcomes.values())
    kind = torch.OutOfMemoryError if out_of_memory else RuntimeError
    if isinstance(result, kind if out_of_memory else Exception):
        return result
    rank = next(rank for rank, each in outcomes.items() if each.failure and each.out_of_memory is out_of_memory)
    failure = kind(f"process {rank}: {outcomes[rank].failure}")
    failure.__cause__ = result if isinstance(result, Exception) else None
    return failure


def free_frames(failure: Exception) -> None:
    """Drop the frames of an exception that is kept, and with them the tensors of the failed forward."""
    visited = {id(None), id(sys.exc_info()[1])}  # the exception that the caller is handling keeps its frames
    pending: list[Any] = [failure]
    while pending:
        error = pending.pop()
        if id(error) not in visited:
            visited.add(id(error))
            error.__traceback__ = None
            pending += [error.__cause__, error.__context__]
