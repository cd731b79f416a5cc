"""Eigenproblems where they are and on the host's cores, the choice between the two, and a bound on their errors."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from attnmonitor.functional.eigenvalues import (
    Eigenproblem,
    Solvable,
    Steps,
    each_step_in,
    eigenvalues_of,
    solved,
    symmetric_eigenvalues,
)
from attnmonitor.functional.host_solver import HostSolver
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.routes import RouteChoice, choose_route, timed_routes


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


def known_spectra(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Matrices whose entries and eigenvalues are small whole numbers, so that neither holds any rounding."""
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    spectrum = torch.randint(0, 1000, (number, size), generator=torch.Generator().manual_seed(0)).double() * size
    spectrum = spectrum.sort(-1, descending=True).values
    return hadamard * spectrum[:, None] @ hadamard.T / size, spectrum


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("unit", [1.0, 1e-9, 1e9])
def test_bound_holds_on_exact_spectra_and_is_tight(size, unit):
    matrices, expected = known_spectra(40, size)
    found, error = symmetric_eigenvalues(unit * matrices)
    actual = (found / unit - expected).abs().sum(-1)
    assert (actual <= error / unit).all()
    assert (error / unit < 3e4 * torch.finfo(torch.float64).eps * expected[:, 0]).all()


@Solvable
def leading(matrices: Tensor, seen: list[str]) -> Steps[Tensor]:
    """The largest eigenvalue of the matrices, then that of their largest eigenvectors' outer products."""
    values, vectors = yield Eigenproblem(matrices, vectors=True)
    seen.append(torch.get_float32_matmul_precision())
    last = vectors[..., -1]
    try:
        again, none = yield Eigenproblem(last[..., None] * last[..., None, :])
    except torch.linalg.LinAlgError:
        return values[..., -1]
    assert none is None
    return values[..., -1] * again[..., -1]


@pytest.fixture
def many_parts(monkeypatch):
    monkeypatch.setattr("attnmonitor.parallel.workers.MIN_WORK_PER_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def wait_for(solver: HostSolver) -> Tensor:
    """Advance until it has ended, as steps of training do."""
    deadline = time.monotonic() + 30
    while not solver.advance():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return solver.result()


@pytest.mark.parametrize("finish", [HostSolver.result, wait_for])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1,)])
def test_host_solver_has_the_bits_of_solving_in_place(finish, shape, many_parts):
    rows = torch.randn(*shape, 40, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.set_num_threads(1)
    in_place = leading(rows.mT @ rows, [])
    torch.set_num_threads(3)
    steps = leading.steps(rows.mT @ rows, [])
    assert torch.equal(finish(HostSolver(steps)), in_place)
    assert torch.get_num_threads() == 3


def test_settings_of_a_step_are_not_kept_between_steps(monkeypatch):
    """The caller's products have the caller's precision while LAPACK works."""
    torch.set_float32_matmul_precision("medium")
    try:
        seen: list[str] = []
        matrices = torch.eye(4, dtype=torch.float64)[None]
        solver = HostSolver(each_step_in(lambda: full_precision(torch.device("cpu")), leading.steps(matrices, seen)))
        assert torch.get_float32_matmul_precision() == "medium"
        solver.result()
        assert seen == ["highest"]
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("drive", [solved, lambda steps: HostSolver(steps).result()])
def test_error_of_the_solver_reaches_the_computation(drive, monkeypatch):
    def fails(_: Tensor) -> Tensor:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigvalsh", fails)
    matrices = 3 * torch.eye(4, dtype=torch.float64)[None]
    for steps in (leading.steps(matrices, []), each_step_in(nullcontext, leading.steps(matrices, []))):
        assert drive(steps).tolist() == [3.0], "the computation may go on without it"
    with pytest.raises(torch.linalg.LinAlgError):
        drive(symmetric_eigenvalues.steps(matrices))


def test_lapack_works_in_this_thread_where_none_can_be_started(monkeypatch):
    """As at the end of the program."""

    def refuses(*_: object) -> None:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr("attnmonitor.functional.host_solver.start_on_cores", refuses)
    matrices = 3 * torch.eye(4, dtype=torch.float64)[None]
    assert HostSolver(leading.steps(matrices, [])).result().tolist() == [3.0]


def test_route_is_the_faster_one_and_timed_once(monkeypatch):
    times = {("device", 8): 0.5, ("host", 8): 0.1, ("device", 16): 0.1, ("host", 16): 0.5}
    asked = []

    def timed(device, count, size):
        asked.append((count, size))
        return tuple((name, times[name, size]) for name in ("device", "host"))

    monkeypatch.setattr("attnmonitor.functional.routes.timed_routes", timed)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device of the tests")
    device = torch.device("cuda")
    assert [choose_route(device, 1000003, size).route for size in (8, 16, 8, 16)] == [
        "host",
        "device",
        "host",
        "device",
    ]
    assert asked == [(1000003, 8), (1000003, 16)]
    assert choose_route(torch.device("cpu"), 10, 8) == RouteChoice("cpu")
    assert str(choose_route(device, 1000003, 8)) == (
        "eigenproblems: host (1000003 of 8 × 8: device 500 ms, host 100 ms)"
    )


def test_timing_the_routes_is_short_and_draws_no_random_number():
    state = torch.get_rng_state()
    started = time.monotonic()
    seconds = dict(timed_routes(torch.device("cpu"), 50, 16))
    assert time.monotonic() - started < 5
    assert set(seconds) == {"device", "host"}
    assert all(each > 0 for each in seconds.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_decaying_float32_eigenvalues_are_found():
    """Of one in 15 such matrices LAPACK's float32 solver finds none, or not all."""
    generator = torch.Generator().manual_seed(0)
    missed = 0
    for decay in (0.8, 0.7, 0.6, 0.5) * 20:
        factors = torch.randn(2, 200, 96, generator=generator, dtype=torch.float64) * decay ** torch.arange(96)
        queries, keys = factors.mT @ factors
        root = torch.linalg.cholesky_ex(keys).L.nan_to_num_()
        core = root.mT @ queries @ root
        core = (core / core.trace()).float()
        try:
            missed += bool(torch.linalg.eigvalsh(core).isnan().any())
        except torch.linalg.LinAlgError:
            missed += 1
        expected = torch.linalg.eigvalsh(core.double())
        for found in (eigenvalues_of(core), eigenvalues_of(core.expand(3, -1, -1))[2]):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    print(f"{missed} of 80 were missed")
