"""How an attempt to measure ended on each of several processes, and what it comes to for all of them.

What failed on one process counts as failed on all, so that none waits for another, in this sample or the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnmonitor.measurement.measured import Measured
from attnmonitor.measurement.shares import Share, joined_shares
from attnmonitor.parallel.exchange import Exchange

__all__ = ["Outcome", "take_together"]

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


def take_together(
    measure: Callable[[], Measured],
    exchange: Exchange,
    ranks: Sequence[int],
    share: Share,
    after_failure: Callable[[], object] = lambda: None,
) -> tuple[Measured, list[Mapping[str, str]]]:
    """Measure with all processes; return the joined numbers, and of each process the reasons for what it misses.

    Args:
        measure: The attempt of this process.
        exchange: That of the processes.
        ranks: The processes, in its order.
        share: The layers that this process finishes.
        after_failure: Called where the attempt of this process failed, before the others are told.

    Raises:
        torch.OutOfMemoryError: One process ran out of memory; raised on all of them, so that all try again.
        RuntimeError: It failed on another process.
        MissingProcessError: A process did not come in time; raised on all that came or come later.
    """
    result: Measured | Exception
    try:
        result = measure()
    except Exception as error:
        result = error
    try:
        if isinstance(result, Exception):
            if isinstance(result, torch.OutOfMemoryError):
                _free_frames(result)
            after_failure()
        outcomes = exchange.gather(Outcome.of(result, with_part=share.count > 1))
        if isinstance(result, Exception) or any(each.failure for each in outcomes):
            raise _common_failure(dict(zip(ranks, outcomes, strict=True)), result)
        parts = [each.part for each in outcomes if each.part is not None]
        return joined_shares(share, parts) if parts else result, [each.missing for each in outcomes]
    finally:
        del result  # else the frame of what is raised here would keep the tensors of the failed forward alive


def _common_failure(outcomes: Mapping[int, Outcome], result: Measured | Exception) -> Exception:
    """Return what to raise here after a failure on any process; out of memory counts for all."""
    out_of_memory = any(each.out_of_memory for each in outcomes.values())
    kind = torch.OutOfMemoryError if out_of_memory else RuntimeError
    if isinstance(result, kind if out_of_memory else Exception):
        return result
    rank = next(rank for rank, each in outcomes.items() if each.failure and each.out_of_memory is out_of_memory)
    failure = kind(f"process {rank}: {outcomes[rank].failure}")
    failure.__cause__ = result if isinstance(result, Exception) else None
    return failure


def _free_frames(failure: Exception) -> None:
    """Drop the frames of an exception that is kept, and with them the tensors of the failed forward."""
    visited = {id(None), id(sys.exc_info()[1])}  # the exception that the caller is handling keeps its frames
    pending: list[Any] = [failure]
    while pending:
        error = pending.pop()
        if id(error) not in visited:
            visited.add(id(error))
            error.__traceback__ = None
            pending += [error.__cause__, error.__context__]
