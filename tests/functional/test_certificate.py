"""A certified count is never wrong: adversarial spectra, near-ties, and heads that the certificate must refuse.

The reference counts in extended precision, on the spectrum each core was built from.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attnmonitor.functional import energy_spectrum, sketch
from attnmonitor.functional import spectrum as spectrum_module
from attnmonitor.functional.cores import FieldCores
from attnmonitor.functional.eigenvalues import symmetric_eigenvalues
from attnmonitor.functional.sketch import sketched_spectrum
from attnmonitor.functional.spectrum import core_spectrum

FAMILIES = (
    "flat",
    "clustered",
    "geometric",
    "one dominant",
    "exactly low rank",
    "zero",
    "near tie at the mark",
    "near tie in a cluster",
    "condition number 1e12",
    "random",
)


def spectra(family: str, number: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Adversarial spectra, ``(number, size)`` float64, descending."""

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    rank = torch.randint(1, size, (number, 1), generator=generator)
    place = torch.arange(size).expand(number, size)
    if family == "flat":
        drawn = 1 + 10 ** (-14 * uniform(number, 1)) * uniform(number, size)
    elif family == "clustered":
        level = 10 ** (-6 * uniform(number, 4))
        drawn = level.gather(1, torch.randint(0, 4, (number, size), generator=generator))
        drawn = drawn * (1 + 10 ** (-15 + 12 * uniform(number, 1)) * uniform(number, size))
    elif family == "geometric":
        drawn = (0.2 + 0.799 * uniform(number, 1)) ** place
    elif family == "one dominant":
        drawn = torch.where(place == 0, 1.0, 10 ** (-12 * uniform(number, 1)) * uniform(number, size))
    elif family == "exactly low rank":
        drawn = torch.where(place < rank, uniform(number, size), 0.0)
    elif family == "zero":
        drawn = torch.zeros(number, size, dtype=torch.float64)
    elif family.startswith("near tie"):
        # the leading `rank` hold 90 % to within 1e-2 … 1e-17, from either side
        inside = place < rank
        drawn = uniform(number, size) + (1.0 if family.endswith("cluster") else 0.01)
        offset = 10 ** (-2 - 15 * uniform(number, 1)) * torch.where(uniform(number, 1) < 0.5, -1, 1)
        share = torch.where(inside, drawn, 0).sum(-1, keepdim=True), torch.where(inside, 0, drawn).sum(-1, keepdim=True)
        drawn = torch.where(inside, drawn / share[0] * (0.9 + offset), drawn / share[1] * (0.1 - offset))
    elif family == "condition number 1e12":
        drawn = 10 ** (-12 * uniform(number, size))
    else:
        drawn = uniform(number, size) ** (8 * uniform(number, 1))
    return drawn.sort(-1, descending=True).values * 10 ** (8 * uniform(number, 1) - 4)


def exact_counts(variances: torch.Tensor, fraction: float = 0.9) -> torch.Tensor:
    """The definition, in 64-bit-mantissa arithmetic."""
    wide = variances.numpy().astype(np.longdouble)
    short = wide.cumsum(-1) < np.longdouble(fraction) * wide.sum(-1, keepdims=True)
    count = np.minimum(short.sum(-1) + 1, variances.shape[-1])
    return torch.from_numpy(np.where(wide.sum(-1) > 0, count, 0)).double()


def rotated(variances: torch.Tensor, generator: torch.Generator, *, graded: bool) -> torch.Tensor:
    """Cores with the given eigenvalues: in a basis near the eigenbasis, as the keys' is, or in any basis at all."""
    number, size = variances.shape
    mixing = torch.randn(number, size, size, generator=generator, dtype=torch.float64)
    if graded:
        mixing = torch.eye(size, dtype=torch.float64) + 0.1 * mixing
    basis = torch.linalg.qr(mixing)[0]
    core = basis * variances[:, None] @ basis.mT
    return (core + core.mT) / 2


def fields(core: torch.Tensor) -> FieldCores:
    ones = torch.ones(len(core), dtype=torch.float64)  # cores that are exact
    return FieldCores(core, ones, 0 * ones, 0 * ones, ones, ones)


def check_certificates(number: int, size: int, target_rank: int, method: str, seed: int) -> dict[str, float]:
    """Assert every bound on ``number`` spectra of each family; return each family's certified share."""
    generator = torch.Generator().manual_seed(seed)
    certified_share = {}
    for family in FAMILIES:
        variances = spectra(family, number, size, generator)
        core = rotated(variances, generator, graded=seed % 2 == 0)
        found = core_spectrum(fields(core), method=method, target_rank=target_rank)
        lower, upper = found.effective_rank_bounds()
        certified, exact = found.certified(), exact_counts(variances)
        assert (found.effective_rank()[certified] == exact[certified]).all(), family
        assert ((lower <= exact) & (exact <= upper)).all(), family
        sums = variances.cumsum(-1)[:, : found.variances.shape[-1]]
        slack = (found.error + 1e-12 * found.energy)[:, None]
        assert (found.variances.cumsum(-1) <= sums + slack).all(), family
        assert (sums <= found.sum_bounds + slack).all(), family
        certified_share[family] = certified.double().mean().item()
    return certified_share


@pytest.mark.parametrize("seed", [0, 1], ids=["graded basis", "any basis"])
@pytest.mark.parametrize(
    ("size", "target_rank", "method"), [(8, 3, "randomized"), (24, 12, "randomized"), (24, 24, "exact")]
)
def test_certified_counts_are_right_on_adversarial_spectra(size, target_rank, method, seed):
    share = check_certificates(400, size, target_rank, method, seed)
    assert share["zero"] == 1
    assert share["one dominant"] > 0.8
    if method == "exact":
        assert min(share[family] for family in FAMILIES if "tie" not in family and family != "flat") > 0.99


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_certified_counts_are_right_on_120000_spectra(seed):
    """4 × 10 families × 3,000 = 120,000 spectra."""
    for size, target_rank in ((8, 3), (16, 8), (32, 12)):
        check_certificates(1_000, size, target_rank, "randomized", seed)


def test_trained_like_heads_are_nearly_all_certified():
    """A certificate that always refuses would pass every other test."""
    generator = torch.Generator().manual_seed(0)
    length, head_dim = 256, 64
    decay = torch.arange(1, head_dim + 1) ** -0.7
    key = torch.randn(4, 4, length, head_dim, generator=generator) * decay
    query = torch.randn(4, 16, length, head_dim, generator=generator) * decay
    found = energy_spectrum(query, key, method="randomized", target_rank=32)
    exact = energy_spectrum(query, key, method="exact")
    assert found.certified().double().mean() > 0.95
    assert (found.effective_rank() == exact.effective_rank()).all()
    assert exact.certified().all()


@pytest.mark.parametrize("method", ["exact", "randomized"])
def test_tie_is_refused_only_within_rounding(method):
    generator = torch.Generator().manual_seed(0)
    for gap, expected in ((1e-13, False), (-1e-13, False), (1e-6, True), (-1e-6, True)):
        variances = torch.tensor([[0.5, 0.4 + gap, 0.1 - gap, 0, 0, 0, 0, 0]], dtype=torch.float64)
        found = core_spectrum(fields(rotated(variances, generator, graded=True)), method=method, target_rank=4)
        assert found.certified().item() is expected, gap
        if expected:
            assert found.effective_rank().item() == (2 if gap > 0 else 3)


def test_rounding_of_products_takes_the_certificate_away():
    """Where q and k cancel to 1e-12 of their size the core is rounding noise, and says so."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, 64, 8, generator=generator, dtype=torch.float64) * torch.tensor([1.0] * 4 + [1e-9] * 4)
    key = torch.randn(1, 1, 64, 8, generator=generator, dtype=torch.float64) * torch.tensor([1e-9] * 4 + [1.0] * 4)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    assert energy_spectrum(query, key).certified().item() is False
    assert energy_spectrum(query @ turn, key @ turn).certified().item() is False
    assert energy_spectrum(query + key, key).certified().item() is True


def test_flat_spectrum_past_the_sketch_is_not_certified():
    variances = torch.ones(1, 16, dtype=torch.float64)
    found = core_spectrum(fields(torch.diag_embed(variances)), method="randomized", target_rank=4)
    lower, upper = found.effective_rank_bounds()
    assert upper.item() == 16
    assert lower.item() <= 15
    assert not found.certified().item()
    assert 5 <= found.effective_rank().item() <= 15


def test_short_sketch_gives_the_least_possible_count():
    """Four of six components hold 89.5 %: at least a fifth is needed."""
    variances = torch.tensor([[0.3, 0.25, 0.2, 0.145, 0.1, 0.005, 0.0, 0.0]], dtype=torch.float64)
    found = core_spectrum(fields(torch.diag_embed(variances)), method="randomized", target_rank=4)
    assert found.effective_rank().item() == 5


def test_sketch_may_have_one_column():
    variances = torch.tensor([[0.95, 0.05, 0.0, 0.0]], dtype=torch.float64)
    found = core_spectrum(fields(torch.diag_embed(variances)), method="randomized", target_rank=1)
    assert found.variances.shape == (1, 1)
    assert found.effective_rank().item() == 1
    assert found.certified().item()


def test_energy_outside_leading_coordinates_is_found():
    """The start must not be blind to any direction: all energy in the last three of sixteen coordinates."""
    core = torch.zeros(1, 16, 16, dtype=torch.float64)
    core[0, -3:, -3:] = torch.diag(torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64))
    found = core_spectrum(fields(core), method="randomized", target_rank=4)
    assert found.certified().item()
    assert found.effective_rank().item() == 3


def test_failed_factorization_certifies_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    core = rotated(spectra("geometric", 5, 16, generator), generator, graded=True)
    whole = torch.linalg.cholesky_ex

    def broken(matrices):
        result = whole(matrices)
        result.L[2] = torch.nan
        return result

    monkeypatch.setattr(torch.linalg, "cholesky_ex", broken)
    assert not core_spectrum(fields(core), method="randomized", target_rank=8).certified()[2]


def test_columns_that_are_not_orthonormal_are_noticed(monkeypatch):
    """The proof needs an orthonormal V; how far it is from one is measured, not assumed."""
    orthonormal = sketch.orthonormal_columns
    monkeypatch.setattr(sketch, "orthonormal_columns", lambda columns: 0.999 * orthonormal(columns))
    generator = torch.Generator().manual_seed(0)
    variances = spectra("random", 50, 16, generator)
    core = rotated(variances, generator, graded=True)
    trace = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert (sketched_spectrum(core / trace[:, None, None], 8)[2] > 1e-3).all()
    found = core_spectrum(fields(core), method="randomized", target_rank=8)
    certified = found.certified()
    assert (found.effective_rank()[certified] == exact_counts(variances)[certified]).all()


@pytest.mark.parametrize("family", ["geometric", "random", "condition number 1e12"])
def test_sketch_returns_the_bounds_of_the_proof(monkeypatch, family):
    """θ, and θ₁ + … + θᵢ + ‖R‖² / (θᵢ - γ), written down from the V that the sketch ended with."""
    made = []
    orthonormal = sketch.orthonormal_columns
    monkeypatch.setattr(sketch, "orthonormal_columns", lambda columns: made.append(orthonormal(columns)) or made[-1])
    generator = torch.Generator().manual_seed(0)
    variances = spectra(family, 60, 16, generator)
    core = rotated(variances / variances.sum(-1, keepdim=True), generator, graded=True)
    found, bounds, error = sketched_spectrum(core, 6)
    basis = made[-1]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(6, dtype=torch.float64).expand(60, 6, 6))
    theta = torch.linalg.eigvalsh(basis.mT @ core @ basis).flip(-1)
    residual = core @ basis - basis @ (basis.mT @ core @ basis)
    outside = torch.eye(16, dtype=torch.float64) - basis @ basis.mT
    rest = outside @ core @ outside
    gap = theta - torch.linalg.matrix_norm(rest @ rest).sqrt()[:, None]
    proved = theta.cumsum(-1) + torch.linalg.matrix_norm(residual).square()[:, None] / gap
    clear = gap > 1e-9  # elsewhere rounding decides on which side of γ a θ stands
    torch.testing.assert_close(found, theta.clamp_min(0), rtol=0, atol=1e-13)
    torch.testing.assert_close(bounds[clear], proved.clamp_max(1)[clear], rtol=0, atol=1e-9)
    assert (bounds[gap < -1e-9] == 1).all()
    assert (bounds <= 1).all()
    assert (error < 1e-11).all()


def test_rounding_and_skew_columns_enlarge_every_bound(monkeypatch):
    """Columns a thousandth too short: the error is far above rounding, and every place where it enters can be seen."""
    made = []
    orthonormal = sketch.orthonormal_columns
    monkeypatch.setattr(
        sketch, "orthonormal_columns", lambda columns: made.append(0.999 * orthonormal(columns)) or made[-1]
    )
    generator = torch.Generator().manual_seed(0)
    variances = spectra("geometric", 60, 16, generator)
    core = rotated(variances / variances.sum(-1, keepdim=True), generator, graded=True)
    _, bounds, error = sketched_spectrum(core, 6)
    basis = made[-1]
    inside = basis.mT @ core @ basis
    theta, left_over = symmetric_eigenvalues(inside)
    defect = torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(error, 8 * 16**1.5 * 2.0**-53 + 4 * defect + left_over, rtol=1e-9, atol=0)
    outside = torch.eye(16, dtype=torch.float64) - basis @ basis.mT
    rest = outside @ core @ outside
    gap = theta - torch.linalg.matrix_norm(rest @ rest).sqrt()[:, None] - error[:, None]
    coupling = (torch.linalg.matrix_norm(core @ basis - basis @ inside) + error).square()
    proved = (theta.cumsum(-1) + coupling[:, None] / gap).clamp_max(1)
    assert ((gap > 1e-3) & (proved < 1)).sum() > 30
    torch.testing.assert_close(bounds[gap > 1e-3], proved[gap > 1e-3], rtol=0, atol=1e-9)
    assert (bounds[gap < -1e-3] == 1).all()


def test_exact_columns_leave_only_the_solvers_error(monkeypatch):
    monkeypatch.setattr(sketch, "orthonormal_columns", lambda columns: torch.eye(16, dtype=torch.float64)[None, :, :6])
    variances = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.25] + [0.025] * 10, dtype=torch.float64) / 16
    _, _, error = sketched_spectrum(torch.diag_embed(variances)[None], 6)
    _, of_eigenvalues = symmetric_eigenvalues(torch.diag_embed(variances[:6])[None])
    torch.testing.assert_close(error, 8 * 16**1.5 * 2.0**-53 + of_eigenvalues, rtol=1e-12, atol=0)


def test_ill_conditioned_columns_come_out_orthonormal():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(20, 24, 8, generator=generator, dtype=torch.float64) * torch.logspace(0, -6, 8).double()
    columns = columns @ torch.randn(8, 8, generator=generator, dtype=torch.float64)  # no scaling of columns mends these
    basis = sketch.orthonormal_columns(columns)
    assert torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(8, dtype=torch.float64)).max() < 1e-14
    torch.testing.assert_close(basis @ (basis.mT @ columns), columns, rtol=0, atol=1e-13)


def test_sketch_holds_nearly_all_the_leading_energy():
    """Within 0.7 %; without power iterations 7 % are missed."""
    variances = 1.5 ** -torch.arange(24, dtype=torch.float64).expand(40, 24)
    core = rotated(variances / variances.sum(-1, keepdim=True), torch.Generator().manual_seed(0), graded=False)
    held = sketched_spectrum(core, 8)[0].sum(-1) * variances.sum(-1) / variances[:, :8].sum(-1)
    assert held.min() > 0.98


def test_auto_sketches_large_heads_only():
    for head_dim, dtype, sketched in (
        (64, torch.float64, False),
        (256, torch.float64, True),
        (256, torch.float32, False),
    ):
        core = torch.eye(head_dim, dtype=dtype)[None]
        columns = spectrum_module.DEFAULT_TARGET_RANK if sketched else head_dim
        assert core_spectrum(fields(core)).variances.shape[-1] == columns
