"""A metric that is not asked for costs nothing: no kernel of its summary runs."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import permutations
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import DEFAULT_METRICS, METRICS, OPT_IN_METRICS, WEIGHT_METRICS
from attnmonitor.capture import Layouts, capture_attention
from attnmonitor.measurement.reduction import Reduction

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 24
OF_PROBE = [name for name in METRICS if name not in WEIGHT_METRICS]
OVER_POSITIONS = ("key_incoherence", "key_leverage_max", "key_norm_participation", "energy_delocalization")

KERNELS: dict[str, set[str]] = {
    "queries": set(),
    "keys": set(),
    "key_spectrum": {"eigenvalues"},
    "leading_leverage": {"eigenvectors", "projection"},
    "leverage": {"eigenvectors", "projection"},
    "norm_shares": {"eigenvectors", "projection"},
    "energy_shares": {"eigenvectors", "projection"},
    "field_moments": {"cholesky"},
    "energy_spectrum": {"cholesky", "eigenvalues"},
    "values": set(),
    "checked_rows": set(),
    "rows": {"softmax"},
    "max_logit": set(),
}
"""Expensive kernels of each summary; of a metric by its name where it takes others than its summary's."""

FACTORIZATIONS = {
    "linalg_eigh": ("eigenvectors", 9.0),
    "linalg_eigvalsh": ("eigenvalues", 3.0),
    "linalg_cholesky_ex": ("cholesky", 1 / 3),
}
"""Kernels by function name, and their multiplications as a multiple of n³."""


class Counted(TorchDispatchMode):
    """Counts expensive kernels, and the work of all operations: multiplications, or the entries of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.work = 0.0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "baddbmm_", "baddbmm"):
            left, right = args[-2:]
            self.work += left.numel() * right.shape[-1]
            if name == "bmm" and left.shape[-2:] == (LENGTH, right.shape[-1]):
                self.kernels["projection"] += 1
        elif name == "_softmax":
            self.kernels["softmax"] += 1
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self.work += 1 + math.prod(made.shape)
        return result


class CountedFactorizations(TorchFunctionMode):
    """Counts factorizations where they are called: under a dispatch mode torch computes eigenvectors in any case."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in FACTORIZATIONS:
            kernel, multiplications = FACTORIZATIONS[name]
            self.counted.kernels[kernel] += 1
            self.counted.work += multiplications * args[0].numel() * args[0].shape[-1]
        return function(*args, **(kwargs or {}))


@cache
def counted(*metrics: str) -> Counted:
    """What one forward of the probe, reduced to ``metrics``, runs."""
    torch.manual_seed(0)  # the same heads each time: one that is near the mark is computed again
    model, batch = TinyGPT(num_layers=1, num_kv_heads=2), token_batch(length=LENGTH)
    layouts: Layouts = {}
    for measure in (Counted(), Counted()):  # the first forward finds what is around the softmax
        reduction = Reduction(metrics, {}, strict=True)
        with torch.no_grad(), measure, CountedFactorizations(measure):
            with capture_attention(model, reduction.take, layouts=layouts):
                model(batch)
            reduction.finish()
    values = {**reduction.statistics["blocks.0.attn"].values, **reduction.layers["blocks.0.attn"].at_once}
    assert set(values) == set(metrics)
    return measure


def in_table_order(*metrics: str) -> list[str]:
    return [name for name in METRICS if name in metrics]


@pytest.mark.parametrize("metric", OF_PROBE)
def test_metric_alone_runs_only_its_own_kernels(metric: str) -> None:
    found = counted(metric).kernels - counted().kernels
    assert set(found) == KERNELS.get(metric, KERNELS[METRICS[metric].summary])


@pytest.mark.parametrize("metric", OF_PROBE)
def test_another_metric_costs_more(metric: str) -> None:
    assert counted().work < counted(metric).work
    for other in set(OF_PROBE) - {metric}:
        assert counted(metric).work < counted(*in_table_order(metric, other)).work, other
    without = [name for name in OF_PROBE if name != metric]
    assert counted(*without).work < counted(*OF_PROBE).work


@pytest.mark.parametrize("pair", list(permutations(OVER_POSITIONS, 2)), ids="-".join)
def test_position_metrics_share_one_pass(pair: tuple[str, str]) -> None:
    alone, joined = counted(pair[0]), counted(*in_table_order(*pair))
    assert joined.kernels == alone.kernels
    everything = counted(*in_table_order(*OVER_POSITIONS))
    assert everything.kernels == alone.kernels


@pytest.mark.parametrize("metric", OPT_IN_METRICS)
def test_defaults_do_not_pay_for_opt_in(metric: str) -> None:
    assert METRICS[metric].opt_in
    assert metric not in DEFAULT_METRICS
    extra = counted(*in_table_order(*DEFAULT_METRICS, metric))
    assert counted(*DEFAULT_METRICS).work < extra.work
    assert "softmax" not in counted(*DEFAULT_METRICS).kernels - counted().kernels


def test_no_metric_runs_no_kernel_but_verification() -> None:
    assert counted().kernels.keys() <= {"softmax"}
