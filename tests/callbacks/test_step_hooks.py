"""Which optimizer steps are counted: of wrapped optimizers, and inside compiled training steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from models import TinyGPT, language_loss, token_batch, train_step
from torch._dynamo.testing import CompileCounter

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.messages import AttentionMonitorWarning

# Optimizers that wrap another


class Lookahead(torch.optim.Optimizer):
    """As it is commonly written: `Optimizer.__init__` is never called."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class WarmUp:
    """A wrapper that is no optimizer at all."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()


def by_accelerate(optimizer: torch.optim.Optimizer) -> Any:
    return Accelerator(cpu=True).prepare_optimizer(optimizer)


def by_fabric(optimizer: torch.optim.Optimizer) -> Any:
    return Fabric(accelerator="cpu", devices=1).setup_optimizers(optimizer)


WRAPPERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "accelerate": by_accelerate,
    "Fabric": by_fabric,
    "LightningOptimizer": LightningOptimizer,
    "Lookahead": Lookahead,
    "no optimizer": WarmUp,
    "wrapped twice": lambda optimizer: Lookahead(by_accelerate(optimizer)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_steps_of_a_wrapped_optimizer_are_counted_once(wrapper: str) -> None:
    model = TinyGPT()
    optimizer = WRAPPERS[wrapper](torch.optim.SGD(model.parameters(), 0.1))
    if isinstance(optimizer, LightningOptimizer):
        inner: Any = optimizer.optimizer
        step: Callable[[], Any] = lambda: train_step(model, inner, token_batch())  # noqa: E731
    else:
        step = lambda: train_step(model, optimizer, token_batch())  # noqa: E731
    with attach(model, optimizer, token_batch(), every_n_steps=1, record=None) as monitor:
        for _ in range(3):
            step()
        assert monitor.history.steps == [0, 1, 2, 3]
    step()
    assert monitor.history.steps == [0, 1, 2, 3]


def test_accumulated_gradients_count_once_under_accelerate() -> None:
    model = TinyGPT()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    with attach(prepared, optimizer, token_batch(), every_n_steps=1, record=None) as monitor:
        for _ in range(6):
            with accelerator.accumulate(prepared):
                accelerator.backward(language_loss(prepared(token_batch()), token_batch()))
                optimizer.step()
                optimizer.zero_grad()
        assert monitor.global_step == 3


class Cyclic:
    def __init__(self) -> None:
        self.optimizer = self


@pytest.mark.parametrize("wrong", [3, Cyclic(), object()], ids=lambda wrong: type(wrong).__name__)
def test_optimizer_without_step_hooks_is_refused(wrong: Any) -> None:
    expected = rf"optimizer={type(wrong).__name__} is not a torch.optim.Optimizer with step hooks .* give the one whose"
    with pytest.raises(ValueError, match=expected):
        attach(TinyGPT(), wrong, token_batch(), record=None)


# Compiled steps


def compiled_run(what: str, every: int | None, how: str = "attach") -> tuple[int, int, list[torch.Tensor], Any]:
    """Train ten steps, the named part of each compiled; return graphs, operations, weights and the monitor."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True, dropout=0.0)
    optimizer, counter, monitor = torch.optim.SGD(model.parameters(), 0.1), CompileCounter(), None
    probe = torch.randn(2, 12, 16)
    if every and how == "attach":
        monitor = attach(model, optimizer, probe, every_n_steps=every, record=None)
    elif every:
        monitor = AttentionMonitor(model, probe, every, record=None)

    def forward(x: torch.Tensor) -> None:
        model(x).square().mean().backward()

    def step(index: int) -> None:
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None and how == "on_step":
            monitor.on_step(index)

    def whole(x: torch.Tensor, index: int) -> None:
        forward(x)
        step(index)

    compiled = torch.compile(step if what == "optimizer" else whole, backend=counter)
    for index in range(10):
        x = torch.randn(2, 12, 16)
        if what == "optimizer":
            forward(x)
            compiled(index)
        else:
            compiled(x, index)
    if monitor is not None:
        monitor.close()
    return counter.frame_count, counter.op_count, list(model.parameters()), monitor


@pytest.mark.parametrize("what", ["optimizer", "whole step"])
@pytest.mark.parametrize("how", ["attach", "on_step"])
@pytest.mark.parametrize("every", [2, 1000])
def test_compiled_step_is_the_same_with_and_without_monitor(what: str, how: str, every: int) -> None:
    graphs, operations, weights, _ = compiled_run(what, None)
    monitored = compiled_run(what, every, how)
    assert monitored[:2] == (graphs, operations)
    assert all(torch.equal(a, b) for a, b in zip(weights, monitored[2], strict=True))
    monitor = monitored[3]
    assert monitor.failures == 0
    assert not monitor.history["energy_rms"]["self_attn"].isnan().any()
    last = 10 if how == "attach" else 9
    assert monitor.history.steps == ([0] if every > 10 else list(range(0, last + 1, 2)))


# Optimizers that take turns


def step_with(model: TinyGPT, *optimizers: torch.optim.Optimizer) -> None:
    language_loss(model(token_batch()), token_batch()).backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kept", [True, False])
def test_the_optimizer_that_replaces_a_given_one_is_followed(kept: bool) -> None:
    model = TinyGPT()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1)]
    monitor = attach(model, optimizers[0], token_batch(), every_n_steps=1, record=None)
    step_with(model, optimizers[0])
    optimizers.append(torch.optim.AdamW(model.parameters()))
    del optimizers[: not kept]
    for _ in range(3):
        step_with(model, optimizers[-1])
    assert monitor.history.steps == [0, 1, 2, 3, 4]
    monitor.close()


def test_optimizers_side_by_side_give_no_warning() -> None:
    model, other = TinyGPT(), torch.nn.Linear(2, 2)
    half = list(model.parameters())[:4]
    optimizer, beside = torch.optim.SGD(list(model.parameters())[4:], 0.1), torch.optim.SGD(half, 0.1)
    unrelated = torch.optim.SGD(other.parameters(), 0.1)
    monitor = attach(model, optimizer, token_batch(), every_n_steps=1, record=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttentionMonitorWarning)
        for _ in range(6):
            step_with(model, beside, optimizer, unrelated, unrelated, unrelated, unrelated)
    assert monitor.history.steps == [0, 1, 2, 3, 4, 5, 6]
    monitor.close()
