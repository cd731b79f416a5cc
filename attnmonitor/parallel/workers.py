"""Independent pieces of work on a CPU's cores, each piece on one core from beginning to end.

The measurement of a layer is a chain of some hundred small operations and LAPACK's small eigenproblems. A team of
threads that meets at a barrier inside each of them gains little, and where the machine is busy (data loaders, other
runs) every barrier waits for a thread that is not running: 12 eigenproblems of 64 × 64 then take a hundred times as
long. A core per piece has one barrier, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

__all__ = ["map_on_cores", "split_for_cores"]

MIN_WORK_PER_THREAD = 2**22
"""Multiplications below which a piece does not repay the tenth of a millisecond that its thread takes to start."""

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


def split_for_cores(count: int, multiplications: int, device: torch.device) -> list[slice]:
    """Cut ``count`` independent items into one piece per core; into one piece elsewhere, or if there is little to do.

    Args:
        count: How many items there are.
        multiplications: What they take together.
        device: Where their tensors are.
    """
    cores = min(torch.get_num_threads(), count, multiplications // MIN_WORK_PER_THREAD) if device.type == "cpu" else 1
    size = -(-count // max(cores, 1))
    return [slice(start, start + size) for start in range(0, count, max(size, 1))] or [slice(0, 0)]


def map_on_cores(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> list[_Result]:
    """Do ``work`` on every piece, as many at a time as torch may use threads, and return the results in order.

    The threads end with the call: a pool that outlived it would be dead, and hang, in a process forked later.
    """
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(pieces) == 1:
        return [work(piece) for piece in pieces]
    with_gradients = torch.is_grad_enabled()  # a thread starts with its own, switched on

    def alone(piece: _Piece) -> _Result:
        with torch.set_grad_enabled(with_gradients):
            return work(piece)

    try:
        with ThreadPoolExecutor(
            min(num_threads, len(pieces)), thread_name_prefix="attnmonitor", initializer=_take_one_core
        ) as cores:
            return list(cores.map(alone, pieces))
    finally:
        torch.set_num_threads(num_threads)


def _take_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread keeps the number it finds when it first looks, and that is the process' own
