"""Seconds of the host and of the device that a piece of work takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cost.gpu.session import Rows

__all__ = ["host_and_device", "interleaved", "median_ms", "wait_for"]


def wait_for(device: str) -> None:
    """Wait until the device has done all that was launched."""
    if device == "cuda":
        torch.cuda.synchronize()


def host_and_device(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Return the seconds until ``work`` returns, and until the device has done it."""
    wait_for(device)
    started = time.perf_counter()
    work()
    returned = time.perf_counter()
    wait_for(device)
    return returned - started, time.perf_counter() - started


def interleaved(
    columns: dict[str, Callable[[], Any]], device: str, rows: Rows, *, rounds: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """Time the columns in turn for some rounds, after one that warms up; fewer where the time is over."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in columns}
    end = min(rows.time_left, seconds)
    for turn in range(rounds + 1):
        begun = rows.time_left
        for name, work in columns.items():
            timed = host_and_device(work, device)
            if turn:
                found[name].append(timed)
        end -= begun - rows.time_left
        if turn and end < 0:
            break
    return found


def median_ms(timed: list[tuple[float, float]], which: int) -> float:
    """Return the median milliseconds: which = 0 of the host, 1 of the device."""
    return 1e3 * statistics.median(each[which] for each in timed)
