"""Computations whose eigenproblems LAPACK solves on the host's cores, while the caller goes on.

The matrices are sent to the host without waiting for them, solved by threads of their own once they have arrived, and
the solutions are sent back. The caller resumes the computation when it has time: only it talks to the device, so no
other thread can disturb what it captures, and no setting of the process changes under it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

from attnmonitor.functional.eigenvalues import Eigenproblem, Solution, Steps, answered, solve
from attnmonitor.parallel.workers import split_for_cores, start_on_cores

__all__ = ["HostCopy", "HostSolver", "OnHost"]

T = TypeVar("T")


class HostCopy:
    """A copy of a tensor that is on its way to the host.

    Args:
        tensor: On any device; from a GPU it is copied in the order of the current stream, and nothing waits for it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor, non_blocking=True)
        self._arrived: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def has_arrived(self) -> bool:
        """Whether `result` returns at once."""
        return self._arrived is None or self._arrived.query()

    def result(self) -> Tensor:
        """The copy, waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy


class OnHost:
    """One eigenproblem that is being solved on the host.

    Args:
        problem: The eigenproblem, on any device.
    """

    def __init__(self, problem: Eigenproblem) -> None:
        self._problem = problem
        self._matrices = HostCopy(problem.matrices.flatten(0, -3))
        self._parts: list[Future[Solution]] | None = None

    def is_solved(self) -> bool:
        """Whether `result` returns at once; starts LAPACK once the matrices have arrived."""
        if self._parts is None and self._matrices.has_arrived():
            self._start()
        return self._parts is not None and all(part.done() for part in self._parts)

    def result(self) -> Solution:
        """The solution on the problem's device, waited for."""
        if self._parts is None:
            self._start()
        assert self._parts is not None
        values, vectors = zip(*(part.result() for part in self._parts), strict=True)
        shape, device = self._problem.matrices.shape, self._problem.matrices.device
        eigenvalues = _sent_to(device, torch.cat(values).view(shape[:-1]))
        if not self._problem.vectors:
            return eigenvalues, None
        # Column by column in memory, as the solver gives them: products with other strides round differently.
        return eigenvalues, _sent_to(device, torch.cat([part.mT for part in vectors]).view(shape)).mT

    def _start(self) -> None:
        matrices, vectors = self._matrices.result(), self._problem.vectors
        parts = split_for_cores(len(matrices), matrices.numel() * matrices.shape[-1], matrices.device)
        try:
            self._parts = start_on_cores(lambda part: solve(Eigenproblem(matrices[part], vectors)), parts)
        except RuntimeError:  # no thread can be started, as at the end of the program
            self._parts = [Future()]
            try:
                self._parts[0].set_result(solve(Eigenproblem(matrices, vectors)))
            except Exception as error:
                self._parts[0].set_exception(error)


def _sent_to(device: torch.device, solution: Tensor) -> Tensor:
    """The tensor on the device; from pinned memory, because a copy from other memory waits for the stream."""
    return solution.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else solution


class HostSolver(Generic[T]):
    """A computation whose eigenproblems are solved on the host, driven on by whoever holds it.

    Args:
        steps: The computation; what it does before its first eigenproblem is done at once.

    Attributes:
        done: Whether it has ended.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self.done = False
        self._steps = steps
        self._pending: OnHost | None = None
        self._result: T | None = None
        self._error: Exception | None = None
        self._resume(functools.partial(next, steps))

    def advance(self) -> bool:
        """Go on as far as no wait is needed; return whether it has ended."""
        while self._pending is not None and self._pending.is_solved():
            self._resume(answered(self._steps, self._pending.result))
        return self.done

    def result(self) -> T:
        """Go on to the end, and return the result.

        Raises:
            Exception: Whatever ended the computation.
        """
        while self._pending is not None:
            self._resume(answered(self._steps, self._pending.result))
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]  # None only where the computation returns it

    def _resume(self, resume: Callable[[], Eigenproblem]) -> None:
        self._pending = None
        try:
            self._pending = OnHost(resume())
        except StopIteration as end:
            self.done, self._result = True, end.value
        except Exception as error:
            self.done, self._error = True, error
