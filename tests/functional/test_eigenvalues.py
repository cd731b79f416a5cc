"""Eigenvalues of small symmetric matrices without waiting for the device, and a bound on the error of their sums."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor.functional.eigenvalues import jacobi_eigenvalues, symmetric_eigenvalues


def test_eigenvalues_are_descending_bounded_or_nan():
    rows = torch.randn(5, 12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices = rows.mT @ rows
    expected = torch.linalg.eigvalsh(matrices).flip(-1)
    matrices[1, 2, 3], matrices[3, 0, 0] = torch.nan, torch.inf
    found, error = symmetric_eigenvalues(matrices)
    sound = torch.tensor([True, False, True, False, True])
    assert found.isnan().all(-1).tolist() == error.isnan().tolist() == (~sound).tolist()
    torch.testing.assert_close(found[sound], expected[sound])
    assert ((found - expected).abs().sum(-1) <= error)[sound].all()
    assert (error < 1e-12 * expected[:, 0])[sound].all()


@pytest.mark.parametrize("size", [2, 8, 32])
def test_jacobi_equals_lapack_within_its_error(size):
    generator = torch.Generator().manual_seed(0)
    draws = {
        "flat": torch.randn(20, 4 * size, size, generator=generator, dtype=torch.float64),
        "rank one": torch.randn(20, 1, size, generator=generator, dtype=torch.float64),
        "graded to 1e-12": torch.randn(20, 2 * size, size, generator=generator, dtype=torch.float64)
        * torch.logspace(0, -6, size, dtype=torch.float64),
        "zero": torch.zeros(20, 2, size, dtype=torch.float64),
        "equal": torch.ones(20, 2, size, dtype=torch.float64),
    }
    for name, rows in draws.items():
        matrices = rows.mT @ rows
        expected = torch.linalg.eigvalsh(matrices).flip(-1)
        found, error = jacobi_eigenvalues(matrices)
        assert ((found - expected).abs().sum(-1) <= error).all(), name
        assert (error <= 1e-11 * expected[:, 0]).all(), name
    unfinished, error = jacobi_eigenvalues(matrices := draws["flat"].mT @ draws["flat"], num_sweeps=1)
    actual = (unfinished - torch.linalg.eigvalsh(matrices).flip(-1)).abs().sum(-1)
    assert (actual <= error).all(), "the bound must cover the remainder"


def known_spectra(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Matrices whose entries and eigenvalues are small whole numbers, so that neither holds any rounding."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    spectrum = torch.randint(0, 1000, (number, size), generator=torch.Generator().manual_seed(0)).double() * size
    spectrum = spectrum.sort(-1, descending=True).values
    return hadamard * spectrum[:, None] @ hadamard.T / size, spectrum


@pytest.mark.parametrize("solve", [symmetric_eigenvalues, jacobi_eigenvalues])
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_bound_holds_on_exact_spectra_and_is_tight(solve, size, unit):
    matrices, expected = known_spectra(40, size)
    found, error = solve(unit * matrices)
    actual = (found / unit - expected).abs().sum(-1)
    assert (actual <= error / unit).all()
    assert (error / unit < 3e4 * torch.finfo(torch.float64).eps * expected[:, 0]).all()


def test_zero_sweeps_state_the_off_diagonal_norm():
    """By Lidskii's theorem with the trace norm bounded by √n times the Frobenius norm."""
    matrices, _ = known_spectra(5, 16)
    found, error = jacobi_eigenvalues(matrices, num_sweeps=0)
    off = matrices - torch.diag_embed(matrices.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(found, matrices.diagonal(dim1=-2, dim2=-1).sort(-1, descending=True).values)
    torch.testing.assert_close(error, 4 * torch.linalg.matrix_norm(off))


def test_one_rotation_diagonalizes_two_by_two():
    for matrix in ([[2.0, 1.0], [1.0, 5.0]], [[5.0, 1.0], [1.0, 2.0]], [[3.0, -2.0], [-2.0, 3.0]]):
        matrices = torch.tensor([matrix], dtype=torch.float64)
        found, error = jacobi_eigenvalues(matrices, num_sweeps=1)
        torch.testing.assert_close(found, torch.linalg.eigvalsh(matrices).flip(-1), rtol=1e-14, atol=0)
        assert error < 1e-13


@pytest.mark.parametrize("size", [2, 6, 16])
def test_a_sweep_rotates_every_pair_once(size):
    """One matrix for each pair, with nothing else off the diagonal: a rotation of the pair finishes it."""
    pairs = list(combinations(range(size), 2))
    matrices = torch.diag_embed(torch.arange(size, dtype=torch.float64).expand(len(pairs), size))
    for index, (first, second) in enumerate(pairs):
        matrices[index, first, second] = matrices[index, second, first] = 1.0
    with CountProducts() as count:
        found, _ = jacobi_eigenvalues(matrices, num_sweeps=1)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(matrices).flip(-1), rtol=1e-13, atol=1e-13)
    # Each round rotates size / 2 disjoint pairs by two products, so this many rounds rotate as many pairs as there are.
    assert count.products == 2 * (size - 1)


class CountProducts(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.products += operation.overloadpacket.__name__ == "bmm"
        return operation(*args, **(kwargs or {}))
