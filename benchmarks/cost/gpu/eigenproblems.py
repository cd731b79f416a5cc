"""Routes to the eigenvalues and eigenvectors of many small symmetric matrices, over their number and size."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnmonitor.parallel.workers import map_on_cores, split_for_cores
from benchmarks.cost.gpu.clock import host_and_device, wait_for
from benchmarks.cost.gpu.session import Rows

__all__ = ["eigenproblems"]

SIZES = (64, 128, 32, 256)
BATCHES = (36, 144, 1024, 4096)
SMOKE = ((8, 16), (4, 12))
LARGEST = 2**30  # bytes of matrices
LONGEST = 4.0  # seconds of one call; longer ones are estimated from a part of the matrices


def eigenproblems(device: str, rows: Rows) -> None:
    """Time each route; a row for each size, number and type of the matrices."""
    sizes, batches = SMOKE if device == "cpu" else (SIZES, BATCHES)
    for batch in batches:
        for size in sizes:
            for dtype in (torch.float64, torch.float32):
                if rows.time_left < 0:
                    return
                if batch * size**2 * dtype.itemsize <= LARGEST:
                    rows.add(**_row(device, batch, size, dtype, rows))


def _row(device: str, batch: int, size: int, dtype: torch.dtype, rows: Rows) -> dict[str, Any]:
    matrices = _gram_matrices(batch, size, dtype, device)
    row: dict[str, Any] = {"matrices": batch, "size": size, "dtype": str(dtype).removeprefix("torch.")}
    for name, solve in _routes(device).items():
        row[f"{name} ms"], row[f"{name} part"] = _milliseconds(solve, matrices, device, rows)
    row["backend"] = os.environ.get("TORCH_LINALG_EIGH_BACKEND", "")
    row["worst error"] = _worst_error(matrices)
    return row


def _gram_matrices(batch: int, size: int, dtype: torch.dtype, device: str) -> Tensor:
    """Gram matrices whose directions decay as those of trained keys do."""
    decay = torch.arange(1, size + 1, device=device) ** -0.6
    heads = torch.randn(batch, 2 * size, size, device=device, dtype=dtype) * decay.to(dtype)
    return heads.mT @ heads


def _routes(device: str) -> dict[str, Callable[[Tensor], Any]]:
    return {
        "eigh": torch.linalg.eigh,
        "eigvalsh": torch.linalg.eigvalsh,
        "host eigh": lambda matrices: _on_host(torch.linalg.eigh, matrices, device),
        "host eigvalsh": lambda matrices: _on_host(lambda part: (torch.linalg.eigvalsh(part),), matrices, device),
    }


def _on_host(solve: Callable[[Tensor], Any], matrices: Tensor, device: str) -> list[Tensor]:
    """Send the matrices to the host, solve them by LAPACK, a core for each part, and send the results back."""
    on_host = torch.empty(matrices.shape, dtype=matrices.dtype, pin_memory=device == "cuda")
    on_host.copy_(matrices, non_blocking=True)
    wait_for(device)
    parts = split_for_cores(len(on_host), on_host.numel() * on_host.shape[-1], torch.device("cpu"))
    found = map_on_cores(lambda part: solve(on_host[part]), parts)
    return [torch.cat(part).to(device, non_blocking=True) for part in zip(*found, strict=True)]


def _milliseconds(
    solve: Callable[[Tensor], Any], matrices: Tensor, device: str, rows: Rows
) -> tuple[float | None, float]:
    """Return milliseconds for all matrices, and the share of them that was timed; None where the time is over."""
    few = matrices[:4]
    solve(few)  # makes the library's handles
    _, seconds = host_and_device(lambda: solve(few), device)
    longest = min(LONGEST, rows.time_left / 4)
    if longest <= 0:
        return None, 0.0
    # From a few matrices the time of all can only be overestimated: a call that solves all at once grows more slowly.
    part = matrices[: max(4, int(len(matrices) * min(1, longest / (seconds * len(matrices) / 4))))]
    times = [host_and_device(lambda: solve(part), device)[1] for _ in range(2)]
    return 1e3 * min(times) * len(matrices) / len(part), len(part) / len(matrices)


def _worst_error(matrices: Tensor) -> float:
    """The largest error of eigenvalues, relative to the largest of them, beside LAPACK in float64."""
    some = matrices[:: max(1, len(matrices) // 16)]
    expected = torch.linalg.eigvalsh(some.cpu().double())
    found = torch.linalg.eigh(some).eigenvalues.cpu().double()
    return float(((found - expected).abs().amax(-1) / expected.amax(-1)).amax())
