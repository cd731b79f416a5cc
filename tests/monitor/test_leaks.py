"""Nothing grows with the number of samples, and no tensor of a sample stays alive."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch, train
from torch import Tensor

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.loggers.keys import HeadScalars
from attnmonitor.record import RunRecord

torch.set_num_threads(1)  # as in conftest.py, for the processes that import this file alone


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def num_hooks(model: torch.nn.Module) -> int:
    names = [name for name in vars(model) if name.endswith("hooks")]
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


def counts(model: torch.nn.Module) -> dict[str, int]:
    return {
        "hooks": num_hooks(model),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "buffers": sum(1 for _ in model.buffers()),
        "attributes": sum(len(vars(module)) for module in model.modules()),
    }


class Latest:
    """Counts the keys that a logger of scalars would send; keeps no sample."""

    def __init__(self) -> None:
        self.head_scalars = HeadScalars(2000)
        self.num_keys: list[int] = []

    def log_sample(self, sample: Sample) -> None:
        self.num_keys = [*self.num_keys[-1:], len(self.head_scalars(sample))]


def in_own_process(work: Callable[..., None], *arguments: Any) -> None:
    """In this process, what other tests left behind may be freed at any time and would be counted."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, "see the captured output"


@pytest.mark.parametrize("num_samples", [300, pytest.param(10_000, marks=pytest.mark.soak)])
def test_samples_leak_nothing_and_keep_their_cost(num_samples: int, tmp_path: Path) -> None:
    in_own_process(take_samples, num_samples, tmp_path)


def take_samples(num_samples: int, tmp_path: Path) -> None:
    model, logger = TinyGPT(num_layers=1, width=16, num_query_heads=2), Latest()
    monitor = AttentionMonitor(model, token_batch(batch=1, length=8), 1, record=tmp_path / "run.sqlite", loggers=logger)
    # History keeps the latest 1,000 samples; until it is full it grows by one row per sample.
    warm_up = min(num_samples // 3, 1500)
    for step in range(warm_up):
        monitor.on_step(step)
    before, memory = counts(model), resident_bytes()
    objects, seconds = len(gc.get_objects()), []
    for step in range(warm_up, num_samples):
        started = time.perf_counter()
        monitor.on_step(step)
        seconds.append(time.perf_counter() - started)
    growth = resident_bytes() / memory - 1
    print(f"{num_samples} samples: resident memory grew by {growth:.3%}")
    assert counts(model) == before
    assert growth < 0.01
    num_metrics = len(list(monitor.history))
    new_rows = min(num_samples, 1000) - min(warm_up, 1000)
    # A tensor per metric and sample still in history, and little else.
    assert len(gc.get_objects()) - objects < 2 * num_metrics * new_rows + 2000
    quarter = len(seconds) // 4
    assert sorted(seconds[-quarter:])[quarter // 2] < 2 * sorted(seconds[:quarter])[quarter // 2]
    assert len(monitor.history) == min(num_samples, 1000)
    assert logger.num_keys[0] == logger.num_keys[-1]
    assert len(RunRecord.open(tmp_path / "run.sqlite").steps) == num_samples, "nothing waits in memory"
    monitor.close()
    assert len(RunRecord.open(tmp_path / "run.sqlite").steps) == num_samples


@pytest.mark.parametrize("num_times", [40, pytest.param(1000, marks=pytest.mark.soak)])
def test_repeated_attach_and_close_leaks_nothing(num_times: int, tmp_path: Path) -> None:
    in_own_process(attach_and_close, num_times, tmp_path)


def attach_and_close(num_times: int, tmp_path: Path) -> None:
    os.chdir(tmp_path)
    model = TinyGPT(num_layers=1, width=16, num_query_heads=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitors: list[weakref.ref[AttentionMonitor]] = []

    def once() -> None:
        monitor = attach(model, optimizer, token_batch(batch=1, length=8), every_n_steps=1)
        train(model, optimizer, 1)
        monitor.close()
        monitors.append(weakref.ref(monitor))

    for _ in range(num_times // 4):
        once()
    before, memory = counts(model), resident_bytes()
    for _ in range(num_times - num_times // 4):
        once()
    growth = resident_bytes() / memory - 1
    print(f"attached and closed {num_times} times: resident memory grew by {growth:.3%}")
    assert counts(model) == before
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert growth < 0.01
    assert all(monitor() is None for monitor in monitors)


@pytest.mark.usefixtures("uncollected")
def test_no_activation_is_alive_after_a_sample(recwarn: Any) -> None:
    model = TinyGPT()
    seen: list[weakref.ref[Tensor]] = []
    fails = False

    def watch(module: Any, args: Any, output: Any) -> None:
        seen.extend(weakref.ref(x) for x in (*args, output) if isinstance(x, Tensor))
        if fails and module is model.head:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monitor = AttentionMonitor(model, token_batch(), record=None)
    for module in model.modules():
        module.register_forward_hook(watch)
    for fails in (False, True):
        seen.clear()
        sample = monitor.sample(int(fails))
        assert len(seen) > 20
        # Only the probe itself is alive, and a view of its first half.
        alive = [tensor for reference in seen if (tensor := reference()) is not None]
        probe = monitor.probe.batch.untyped_storage().data_ptr()
        assert all(tensor.untyped_storage().data_ptr() == probe for tensor in alive)
        assert (sample.failure is not None) == fails


class Unprojected(torch.nn.Module):
    """Attention whose output meets no weight, by a kernel or by hand."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.attend = torch.nn.Linear(32, 96), attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4))


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (TinyGPT(), token_batch()),
        (Unprojected(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), torch.randn(2, 12, 32)),
        (Unprojected(torch.nn.functional.scaled_dot_product_attention), torch.randn(2, 12, 32)),
        (torch.nn.TransformerEncoderLayer(32, 2, batch_first=True), torch.randn(2, 12, 32)),
    ],
)
def test_no_tensor_of_a_sample_waits_for_the_garbage_collector(model: torch.nn.Module, batch: Tensor) -> None:
    monitor = AttentionMonitor(model, batch, record=None)
    gc.collect()
    monitor.sample(0)
    left = num_tensors()
    gc.collect()
    assert num_tensors() == left


def num_tensors() -> int:
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def test_dropped_model_is_freed() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = attach(model, optimizer, token_batch(), every_n_steps=1)
    train(model, optimizer, 1)
    gone = weakref.ref(model)
    monitor.close()
    del model, optimizer, monitor
    gc.collect()
    assert gone() is None
