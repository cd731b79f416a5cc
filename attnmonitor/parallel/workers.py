"""Independent parts of work on a CPU's cores, each part on one core from beginning to end.

The measurement of a layer is a chain of about a hundred small operations and small LAPACK eigenproblems. Threads that
synchronize inside each operation gain little, and on a busy machine (data loaders, other runs) each synchronization
waits for a thread that is not running: 12 eigenproblems of 64 × 64 then take a hundred times as long. With one core per
part there is one synchronization, at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["few_cores", "map_on_cores", "split_for_cores", "start_on_cores"]

MIN_WORK_PER_THREAD = 2**22
"""Multiplications below which a part is not worth the 0.1 ms that its thread takes to start."""

MIN_ENTRIES_PER_THREAD = 2**18
"""Entries of an operation below which sharing it is not worth waiting for another thread: a tenth of a millisecond."""

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")


def split_for_cores(count: int, multiplications: int, device: torch.device) -> list[slice]:
    """Split ``count`` independent items into one part per core; one part on a GPU or for little work.

    Args:
        count: Number of items.
        multiplications: Multiplications that all items take together.
        device: The device of their tensors.
    """
    cores = min(torch.get_num_threads(), count, multiplications // MIN_WORK_PER_THREAD) if device.type == "cpu" else 1
    size = -(-count // max(cores, 1))
    return [slice(start, start + size) for start in range(0, count, max(size, 1))] or [slice(0, 0)]


@contextmanager
def few_cores(entries: int, device: torch.device) -> Iterator[None]:
    """Let this thread's operations on ``entries`` numbers each use no more cores than they repay.

    Every operation that is shared waits for its slowest thread. While other programs keep the cores busy that is one
    that does not run: eight verified rows of a small layer then took a hundred times as long on two cores as on one.
    """
    num_threads = torch.get_num_threads()
    fewer = min(num_threads, max(1, entries // MIN_ENTRIES_PER_THREAD))
    if device.type != "cpu" or fewer == num_threads:
        yield
        return
    torch.set_num_threads(fewer)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def map_on_cores(work: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[_Result]:
    """Run ``work`` on every part, in as many threads as torch may use; return the results in order."""
    num_threads = torch.get_num_threads()
    if num_threads == 1 or len(parts) == 1:
        return [work(part) for part in parts]
    with_gradients = torch.is_grad_enabled()  # per thread, and on in a new one

    def work_in_thread(part: _Part) -> _Result:
        with torch.set_grad_enabled(with_gradients):
            return work(part)

    # The pool ends with the call: one kept longer would have no threads in a process forked later, and hang.
    try:
        with ThreadPoolExecutor(
            min(num_threads, len(parts)), thread_name_prefix="attnmonitor", initializer=_use_one_core
        ) as cores:
            return list(cores.map(work_in_thread, parts))
    finally:
        torch.set_num_threads(num_threads)


def start_on_cores(work: Callable[[_Part], _Result], parts: Sequence[_Part]) -> list[Future[_Result]]:
    """Start ``work`` on every part and return at once.

    In threads of one core each, at most as many as torch may use; they end with their work. ``work`` runs without
    gradients and must not change settings of the process.
    """
    num_threads = torch.get_num_threads()
    ready = threading.Barrier(min(num_threads, len(parts)) + 1)

    def work_in_thread(part: _Part) -> _Result:
        with torch.no_grad():
            return work(part)

    def begin() -> None:
        _use_one_core()
        ready.wait()

    pool = ThreadPoolExecutor(ready.parties - 1, thread_name_prefix="attnmonitor", initializer=begin)
    try:
        futures = [pool.submit(work_in_thread, part) for part in parts]
        ready.wait()  # the pool starts a thread for each part, up to its limit
    except BaseException:  # no thread could be started
        ready.abort()
        raise
    finally:
        torch.set_num_threads(num_threads)  # threads that the program starts from now on take the number set last
        pool.shutdown(wait=False)
    return futures


def _use_one_core() -> None:
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread fixes its number at the first look; a later look finds that of the process
