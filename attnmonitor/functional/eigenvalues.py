"""Eigenproblems of many small symmetric matrices, stated apart from where they are solved.

A computation that needs one is a generator: it yields an `Eigenproblem` and is sent the solution. So the same formulas
run in one go, with the matrices solved where they are (`Solvable`), and with the matrices sent to the host, where
LAPACK solves them while the caller does something else (`attnmonitor.functional.host_solver`).

On CUDA torch reads a status word after every eigensolver, so solving there makes the host wait for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor

from attnmonitor.functional.ranks import is_unknown

__all__ = [
    "Eigenproblem",
    "Solution",
    "Solvable",
    "Steps",
    "each_step_in",
    "eigenvalues_of",
    "solve",
    "solved",
    "symmetric_eigenvalues",
]

P = ParamSpec("P")
T = TypeVar("T")

Solution: TypeAlias = tuple[Tensor, Tensor | None]
"""Eigenvalues ``(..., n)``, ascending, and eigenvectors ``(..., n, n)``, one per column; None where not asked for."""


@dataclass(frozen=True, eq=False)
class Eigenproblem:
    """Symmetric matrices whose eigenvalues are wanted.

    Attributes:
        matrices: ``(..., n, n)``, finite.
        vectors: Whether the eigenvectors are wanted as well.
    """

    matrices: Tensor
    vectors: bool = False


Steps: TypeAlias = Generator[Eigenproblem, Solution, T]
"""A computation that yields its eigenproblems, is sent their solutions, and returns a result."""


def solve(problem: Eigenproblem) -> Solution:
    """Solve a problem where its matrices are, all of them in one call."""
    if problem.vectors:
        eigenvalues, eigenvectors = torch.linalg.eigh(problem.matrices)
        return eigenvalues, eigenvectors
    return eigenvalues_of(problem.matrices), None


def eigenvalues_of(matrices: Tensor) -> Tensor:
    """Eigenvalues of symmetric matrices, ``(..., n, n) -> (..., n)``, ascending.

    Where eigenvalues fall by a factor of 0.8 to 0.5 from one to the next, LAPACK's float32 solver does not converge, or
    returns NaN, for one in 15 matrices of n = 64 to 256. Its float64 solver finds them.

    Raises:
        torch.linalg.LinAlgError: Float64 matrices without a solution.
    """
    found: Tensor
    try:
        found = torch.linalg.eigvalsh(matrices)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        if matrices.dtype == torch.float64:
            raise
        found = torch.linalg.eigvalsh(matrices.to(torch.float64)).to(matrices.dtype)
    if matrices.dtype == torch.float64 or matrices.device.type != "cpu":  # elsewhere looking would be waiting
        return found
    missed = is_unknown(found).any(-1)
    if missed.any():
        found[missed] = torch.linalg.eigvalsh(matrices[missed].to(torch.float64)).to(found.dtype)
    return found


def solved(steps: Steps[T]) -> T:
    """Run a computation to its end, its eigenproblems solved where they are."""
    resume: Callable[[], Eigenproblem] = functools.partial(next, steps)
    while True:
        try:
            problem = resume()
        except StopIteration as end:
            result: T = end.value
            return result
        resume = answered(steps, functools.partial(solve, problem))


def answered(steps: Steps[T], solution: Callable[[], Solution]) -> Callable[[], Eigenproblem]:
    """Return what resumes the computation with the solution, or with the error that looking for it raised."""
    try:
        return functools.partial(steps.send, solution())
    except Exception as error:
        return functools.partial(steps.throw, error)


class Solvable(Generic[P, T]):
    """A computation with eigenproblems as a plain function: called, it solves them where they are.

    Attributes:
        steps: The same computation as a generator of its eigenproblems.
    """

    def __init__(self, steps: Callable[P, Steps[T]]) -> None:
        self.steps = steps
        functools.update_wrapper(self, steps)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Compute the result."""
        return solved(self.steps(*args, **kwargs))


def each_step_in(context: Callable[[], AbstractContextManager[object]], steps: Steps[T]) -> Steps[T]:
    """Run each step in a context of its own, which is not open while an eigenproblem is solved elsewhere."""
    resume: Callable[[], Eigenproblem] = functools.partial(next, steps)
    while True:
        with context():
            try:
                problem = resume()
            except StopIteration as end:
                result: T = end.value
                return result
        try:
            resume = functools.partial(steps.send, (yield problem))
        except Exception as error:
            resume = functools.partial(steps.throw, error)


@Solvable
def symmetric_eigenvalues(matrices: Tensor) -> Steps[tuple[Tensor, Tensor]]:
    """Eigenvalues of symmetric matrices and how far the sum of their errors may reach.

    Args:
        matrices: ``(N, n, n)`` float64.

    Returns:
        ``(N, n)``, descending, and ``(N,)``; NaN for a matrix that is not finite.
    """
    unknown = is_unknown(matrices).flatten(1).any(-1)
    matrices = matrices.masked_fill(unknown[:, None, None], 0)
    eigenvalues, _ = yield Eigenproblem(matrices)
    size = matrices.shape[-1]
    error = 8 * size**1.5 * torch.finfo(matrices.dtype).eps * torch.linalg.matrix_norm(matrices)
    return eigenvalues.flip(-1).masked_fill_(unknown[:, None], torch.nan), error.masked_fill_(unknown, torch.nan)
