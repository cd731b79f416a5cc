"""Which way the eigenproblems of a sample go, decided by timing both on the device at hand.

On a GPU there are two. In some versions of torch and cuSOLVER one call solves all matrices at once; in others it solves
one after the other, and the host's cores are faster, which also do it while training goes on. No table written here
would stay true, so both are timed when a monitor is attached, once per device, version of torch, and number and size
of the matrices.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnmonitor.functional.eigenvalues import Eigenproblem, solve
from attnmonitor.functional.host_solver import OnHost

__all__ = ["Route", "RouteChoice", "choose_route", "timed_routes"]

Route = Literal["cpu", "device", "host"]
"""``"cpu"``: the tensors are there, and so is LAPACK. ``"device"``: in one call on the GPU. ``"host"``: sent to the
host's cores without waiting, and read some steps later."""

_LONGEST = 0.2  # seconds of one timed call; four of them and the warm-up make less than a second
_LARGEST = 2**26  # bytes of matrices that are timed


@dataclass(frozen=True)
class RouteChoice:
    """The route that was chosen, and why.

    Attributes:
        route: The route.
        seconds: Time of all matrices by each route that was timed; empty on a CPU, where there is one.
        count: Number of matrices.
        size: Their size n.
    """

    route: Route
    seconds: tuple[tuple[Route, float], ...] = ()
    count: int = 0
    size: int = 0

    def __str__(self) -> str:
        """The choice in one line; empty where there was none."""
        if not self.seconds:
            return ""
        times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in self.seconds)
        return f"eigenproblems: {self.route} ({self.count} of {self.size} × {self.size}: {times})"


_known: dict[tuple[str, str, int, int], RouteChoice] = {}


def choose_route(device: torch.device, count: int, size: int) -> RouteChoice:
    """Return the faster route for ``count`` matrices of ``size``, timed once in this process.

    Args:
        device: Where the matrices are.
        count: Number of matrices.
        size: n.
    """
    if device.type != "cuda" or not count:
        return RouteChoice("cpu")
    key = (torch.cuda.get_device_name(device), torch.__version__, count, size)
    if key not in _known:
        seconds = timed_routes(device, count, size)
        fastest = min(seconds, key=lambda each: each[1])[0]
        _known[key] = RouteChoice(fastest, seconds, count, size)
    return _known[key]


def timed_routes(device: torch.device, count: int, size: int) -> tuple[tuple[Route, float], ...]:
    """Seconds that ``count`` eigenproblems take by each route, in less than a second; estimated from a part of many."""
    generator = torch.Generator().manual_seed(0)  # the program's own generators stay as they are
    timed = max(4, min(count, _LARGEST // (8 * size**2)))
    rows = torch.randn(timed, 2 * size, size, generator=generator, dtype=torch.float64, device="cpu").to(device)
    matrices = rows.mT @ rows
    routes: dict[Route, Callable[[Eigenproblem], object]] = {
        "device": solve,
        "host": lambda problem: OnHost(problem).result(),
    }
    return tuple((name, _seconds(route, matrices, device) * count) for name, route in routes.items())


def _seconds(route: Callable[[Eigenproblem], object], matrices: Tensor, device: torch.device) -> float:
    """Seconds per matrix."""

    def timed(part: Tensor) -> float:
        _wait_for(device)
        started = time.perf_counter()
        route(Eigenproblem(part, vectors=True))
        _wait_for(device)
        return time.perf_counter() - started

    few = matrices[:4]
    timed(few)  # makes the handles of the library
    # A call that solves all at once takes for many hardly longer than for few: then all of them are timed.
    part = matrices[: max(4, int(_LONGEST / max(timed(few) / 4, 1e-9)))]
    return timed(part) / len(part)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
