"""Training on a GPU with the monitor ends bit-identical to training without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import DEVICE, ForwardWithoutWaits, reproducible
from models import CheckpointedGPT, TinyGPT, language_loss, token_batch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach

STEPS = 8


def batches() -> list[Tensor]:
    return [token_batch(seed=step, batch=4, length=24).to(DEVICE) for step in range(STEPS)]


def step_with(
    forward: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, token_ids: Tensor, cast: Any = None
) -> Tensor:
    with nullcontext() if cast is None else torch.autocast(DEVICE, cast):
        loss = language_loss(forward(token_ids), token_ids)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, cast: Any = None) -> list[Tensor]:
    return [step_with(model, optimizer, each, cast) for each in batches()]


def in_bfloat16(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return plain(model, optimizer, torch.bfloat16)


def with_scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Losses in float16, scaled so far up at first that steps are skipped."""
    scaler, losses = torch.amp.GradScaler(DEVICE, init_scale=2.0**18, growth_interval=2), []
    for token_ids in batches() * 2:
        with torch.autocast(DEVICE, torch.float16):
            loss = language_loss(model(token_ids), token_ids)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def compiled(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    torch._dynamo.reset()
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    return plain(torch.compile(model, backend=backend), optimizer)


def sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return plain(model, optimizer)  # its weights are, see `run`


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[Tensor]]]] = {
    "float32": (lambda: TinyGPT(dropout=0.1, num_kv_heads=2), plain),
    "bfloat16 autocast": (lambda: TinyGPT(dropout=0.1), in_bfloat16),
    "float16 gradient scaler": (lambda: TinyGPT(dropout=0.1), with_scaler),
    "compiled": (lambda: TinyGPT(dropout=0.1), compiled),
    "checkpointing": (lambda: CheckpointedGPT(use_reentrant=False, dropout=0.1), plain),
    "FSDP2 on one rank": (lambda: TinyGPT(dropout=0.1), sharded),
}


def run(kind: str, watched: bool) -> tuple[list[Tensor], list[int]]:
    """Everything that a run leaves behind, and the steps that were sampled."""
    build, steps = RUNS[kind]
    torch.manual_seed(0)
    model = build().to(DEVICE)
    if steps is sharded:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sampled: list[int] = []
    with ExitStack() as stack:
        monitor = None
        if watched:
            forward = None if steps is sharded else ForwardWithoutWaits()
            monitor = attach(
                model, optimizer, token_batch().to(DEVICE), every_n_steps=3, strict=True, record=None, forward=forward
            )
            stack.callback(monitor.close)
        torch.manual_seed(1)
        losses = steps(model, optimizer)
        if monitor is not None:
            monitor.close()
            sampled = monitor.history.steps
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, Tensor)]
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if DEVICE == "cuda" else ())]
    return [*map(_local, (*losses, *model.parameters(), *model.buffers(), *state)), *generators], sampled


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(one, other, strict=True)
    )


@pytest.fixture
def one_rank(tmp_path: Path) -> Any:
    if not distributed.is_initialized():
        backend = "nccl" if DEVICE == "cuda" else "gloo"
        distributed.init_process_group(backend, init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cpu", reason="the CPU's runs are in measurement/test_no_perturbation.py")
@pytest.mark.parametrize("kind", RUNS)
def test_monitored_run_on_gpu_is_bit_identical(kind: str, request: pytest.FixtureRequest) -> None:
    """Runs that are not the same twice by themselves, because a kernel adds in any order, are skipped."""
    if "FSDP2" in kind:
        request.getfixturevalue("one_rank")
    with reproducible():
        bare, again = run(kind, False)[0], run(kind, False)[0]
        if not same_bits(bare, again):
            pytest.skip("two runs without the monitor differ")
        watched, sampled = run(kind, True)
    assert same_bits(bare, watched)
    assert sampled[:3] == [0, 3, 6]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("kind", ["float16 gradient scaler", "FSDP2 on one rank"])
def test_kinds_of_run_are_sampled(kind: str, request: pytest.FixtureRequest) -> None:
    """On the CPU too, so that a mistake in these tests shows before there is a GPU."""
    if "FSDP2" in kind:
        if DEVICE == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            pytest.skip("FSDP2 of this torch needs a GPU")
        request.getfixturevalue("one_rank")
    bare, (watched, sampled) = run(kind, False)[0], run(kind, True)
    assert same_bits(bare, watched) or DEVICE == "cuda"
    assert len(sampled) >= 3


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("whole_step", [False, True])
def test_training_in_cuda_graphs_is_unchanged(whole_step: bool) -> None:
    """A graph of the whole step, and one of the forward and backward; samples are taken between replays."""

    def end(watched: bool) -> tuple[list[Tensor], int]:
        torch.manual_seed(0)
        model = TinyGPT(num_kv_heads=2).to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
        static = token_batch(batch=4).to(DEVICE)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step_with(model, optimizer, static)
        torch.cuda.current_stream().wait_stream(stream)
        monitor = None
        if watched:
            monitor = AttentionMonitor(model, token_batch().to(DEVICE), 2, record=None, strict=True)
            monitor.on_step(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = language_loss(model(static), static)
            loss.backward()
            if whole_step:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        for step, batch in enumerate(batches(), start=1):
            static.copy_(batch)
            graph.replay()
            if not whole_step:
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
            if monitor is not None:
                monitor.on_step(step)
        if monitor is not None:
            monitor.close()
        return [p.detach().clone() for p in model.parameters()], 0 if monitor is None else len(monitor.history.steps)

    with reproducible():
        bare, again = end(False)[0], end(False)[0]
        if not same_bits(bare, again):
            pytest.skip("two runs without the monitor differ")
        watched, count = end(True)
    assert same_bits(bare, watched)
    assert count == 1 + STEPS // 2


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_step_captured_in_a_graph_takes_no_sample() -> None:
    """An attached optimizer whose step is captured: capturing goes on, and no sample is taken in it."""
    model = TinyGPT().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, capturable=True)
    static = token_batch(batch=4).to(DEVICE)
    step_with(model, optimizer, static)
    monitor = attach(model, optimizer, token_batch().to(DEVICE), every_n_steps=1, record=None)
    step_with(model, optimizer, static)
    monitor.close()
    taken = len(monitor.history.steps)
    monitor = attach(model, optimizer, token_batch().to(DEVICE), every_n_steps=1, record=None)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        language_loss(model(static), static).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    graph.replay()
    torch.cuda.synchronize()
    monitor.close()
    assert taken == 2
    assert monitor.history.steps == []
