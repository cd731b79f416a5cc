"""Work on one core per part gives the numbers of one core, and leaves no thread behind."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.functional import query_gram
from attnmonitor.functional.key_basis import key_gram
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import HeadStatistics, LayerHeads, head_statistics
from attnmonitor.parallel.workers import (
    MIN_ENTRIES_PER_THREAD,
    MIN_WORK_PER_THREAD,
    few_cores,
    map_on_cores,
    split_for_cores,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 100])
def test_parts_cover_all_items_once_in_order(count: int) -> None:
    cut = split_for_cores(count, 100 * MIN_WORK_PER_THREAD, CPU)
    assert [item for part in cut for item in range(count)[part]] == list(range(count))
    assert 1 <= len(cut) <= 3


def test_little_work_and_gpu_work_stay_in_one_part() -> None:
    assert split_for_cores(0, 0, CPU) == [slice(0, 0)]
    assert split_for_cores(4, 2 * MIN_WORK_PER_THREAD - 1, CPU) == [slice(0, 4)]
    assert split_for_cores(4, 2 * MIN_WORK_PER_THREAD, CPU) == [slice(0, 2), slice(2, 4)]
    assert split_for_cores(4, 100 * MIN_WORK_PER_THREAD, torch.device("cuda")) == [slice(0, 4)]


def test_results_keep_order_and_grad_mode() -> None:
    def work(part: int) -> tuple[int, int, bool, bool]:
        return part, torch.get_num_threads(), torch.is_grad_enabled(), threading.current_thread().name == "MainThread"

    with torch.no_grad():
        assert map_on_cores(work, range(5)) == [(part, 1, False, False) for part in range(5)]
    assert map_on_cores(work, range(5)) == [(part, 1, True, False) for part in range(5)]


def test_two_cores_work_at_the_same_time() -> None:
    torch.set_num_threads(2)
    both = threading.Barrier(2, timeout=30)
    assert sorted(map_on_cores(lambda _: both.wait(), range(2))) == [0, 1]


def test_one_part_runs_in_the_calling_thread() -> None:
    assert map_on_cores(lambda _: (torch.get_num_threads(), threading.get_ident()), [0]) == [(3, threading.get_ident())]


def test_error_in_a_part_is_raised_and_threads_are_freed() -> None:
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        map_on_cores(lambda part: 1 / part, [1, 0, 1])
    assert torch.get_num_threads() == 3
    assert threading.active_count() == before


def test_forked_process_can_use_its_cores() -> None:
    map_on_cores(lambda part: part, range(3))
    child = os.fork()
    if not child:  # no torch operation here: its own threads do not survive a fork
        os._exit(0 if map_on_cores(lambda part: part, range(3)) == [0, 1, 2] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_each_core_gets_as_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[int] = Counter()

    def counted(key: torch.Tensor, *mask: Any) -> Any:
        found[threading.get_ident()] += len(key)
        return key_gram(key, *mask)

    monkeypatch.setattr("attnmonitor.metrics.statistics.key_gram", counted)
    heads = torch.randn(4, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    head_statistics([LayerHeads(heads, heads)] * 10, ["key_rms"])
    assert sorted(found.values()) == [12, 14, 14]


def test_small_operations_use_few_cores() -> None:
    def cores(entries: int, device: torch.device = CPU) -> int:
        with few_cores(entries, device):
            return torch.get_num_threads()

    sizes = (0, 2 * MIN_ENTRIES_PER_THREAD - 1, 2 * MIN_ENTRIES_PER_THREAD, 100 * MIN_ENTRIES_PER_THREAD)
    assert [cores(size) for size in sizes] == [1, 1, 2, 3]
    assert cores(0, torch.device("cuda")) == 3
    with pytest.raises(ZeroDivisionError), few_cores(0, CPU):
        _ = 1 / 0
    assert torch.get_num_threads() == 3


def test_rows_of_a_small_layer_are_verified_on_one_core() -> None:
    used: dict[str, int] = {}

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            used[str(func)] = torch.get_num_threads()
            return func(*args, **(kwargs or {}))

    class Layer(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.scaled_dot_product_attention(x, x, x).exp()

    found: list[AttentionCall] = []
    with Watched(), capture_attention(model := Layer(), found.append):
        model(torch.randn(1, 2, 16, 8))
    assert found[0].error is not None
    assert used["aten._softmax.default"] == 1
    assert used["aten.exp.default"] == 3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_sequences", "num_parts"), [(2, 2), (5, 3)])
def test_several_cores_give_the_numbers_of_one(num_sequences: int, num_parts: int, padded: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(num_sequences, 8, 256, 64, generator=generator)
    key = torch.randn(num_sequences, 2, 256, 64, generator=generator)
    mask = torch.arange(256) < 256 - 20 * torch.arange(num_sequences)[:, None] if padded else None

    def measured() -> HeadStatistics:
        return head_statistics([LayerHeads(query_gram(query, mask), key, 0.125, mask)] * 4, DEFAULT_METRICS)[-1]

    assert len(split_for_cores(num_sequences, query.numel() * 64, CPU)) == num_parts, "too little work to be split"
    found = measured()
    torch.set_num_threads(1)
    expected = measured()
    torch.testing.assert_close(found.invariant_residual, expected.invariant_residual, rtol=0, atol=1e-6)
    for name, values in expected.values.items():
        torch.testing.assert_close(found.values[name], values, rtol=1e-6, atol=0)
    assert torch.equal(found.certified, expected.certified)
