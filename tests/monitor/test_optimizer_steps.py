"""The optimizers of a model are found by their steps, however they are made, wrapped, combined or replaced."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from models import TinyGPT, language_loss, token_batch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.messages import AttentionMonitorWarning

PROBE = token_batch(seed=7)
Program = Callable[[nn.Module], Iterator[None]]
"""Trains a model and yields after each step that counts."""


def loss_of(model: nn.Module, index: int) -> Tensor:
    return language_loss(model(token_batch(seed=index)), token_batch(seed=index))


def steps(model: nn.Module, step: Callable[[], Any], count: int, *, first: int = 0) -> Iterator[None]:
    for index in range(first, first + count):
        model.zero_grad()
        loss_of(model, index).backward()
        step()
        yield


def plain(model: nn.Module) -> Iterator[None]:
    yield from steps(model, AdamW(model.parameters(), 1e-2).step, 4)


def halves(model: nn.Module) -> tuple[Optimizer, Optimizer]:
    matrices = [each for each in model.parameters() if each.dim() == 2]
    others = [each for each in model.parameters() if each.dim() != 2]
    return SGD(matrices, 0.1, momentum=0.9, nesterov=True), Adam(others, 1e-2)


def two_optimizers(model: nn.Module) -> Iterator[None]:
    muon, adam = halves(model)
    yield from steps(model, lambda: (muon.step(), adam.step()), 4)


def second_rests(model: nn.Module) -> Iterator[None]:
    """The second one steps every third time only."""
    first, second = halves(model)
    for index in range(9):
        yield from steps(model, lambda: (first.step(), index % 3 or second.step()), 1, first=index)  # noqa: B023


def second_joins(model: nn.Module) -> Iterator[None]:
    """Its parameters are frozen in the first steps."""
    first, second = halves(model)
    parameters = second.param_groups[0]["params"]
    for each in parameters:
        each.requires_grad_(False)
    yield from steps(model, first.step, 3)
    for each in parameters:
        each.requires_grad_(True)
    yield from steps(model, lambda: (first.step(), second.step()), 3, first=3)


def replaced(model: nn.Module) -> Iterator[None]:
    optimizer: Optimizer = AdamW(model.parameters(), 1e-2)
    yield from steps(model, optimizer.step, 2)
    optimizer = SGD(model.parameters(), 0.1)
    yield from steps(model, optimizer.step, 3, first=2)


def replaced_and_kept(model: nn.Module) -> Iterator[None]:
    first, second = AdamW(model.parameters(), 1e-2), SGD(model.parameters(), 0.1)
    yield from steps(model, first.step, 2)
    yield from steps(model, second.step, 3, first=2)
    first.zero_grad()


def in_the_backward(model: nn.Module) -> Iterator[None]:
    """One optimizer per parameter, stepped as soon as its gradient is there."""
    optimizers = {parameter: SGD([parameter], 0.1) for parameter in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        parameter.grad = None

    hooks = [each.register_post_accumulate_grad_hook(step) for each in model.parameters()]
    yield from steps(model, lambda: None, 4)
    for hook in hooks:
        hook.remove()


class Lookahead(Optimizer):
    """As it is commonly written: without `Optimizer.__init__`, and the slow weights through ``data``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.param_groups, self.num_steps = optimizer, optimizer.param_groups, 0
        self.slow = {each: each.detach().clone() for group in self.param_groups for each in group["params"]}

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            for fast, slow in self.slow.items():
                slow += 0.5 * (fast.detach() - slow)
                fast.data.copy_(slow)


def lookahead(model: nn.Module) -> Iterator[None]:
    """What is sampled before the slow weights were first seen to move is what the inner optimizer has left."""
    yield from steps(model, Lookahead(AdamW(model.parameters(), 1e-2)).step, 2)


class Nested(Optimizer):
    """A wrapper that is an optimizer like any other."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        with torch.no_grad():
            for group in self.param_groups:
                for each in group["params"]:
                    each *= 0.99


def nested(model: nn.Module) -> Iterator[None]:
    yield from steps(model, Nested(SGD(model.parameters(), 0.1)).step, 4)


class SAM(Optimizer):
    """Sharpness-aware minimization, as its public implementations are written."""

    def __init__(self, parameters: Any, base: type[Optimizer], **settings: Any) -> None:
        super().__init__(parameters, settings)
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                self.state[each]["old"] = each.data.clone()
                each.add_(each.grad, alpha=0.05)

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for each in group["params"]:
                each.data = self.state[each]["old"]
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def sam_in_one_step(model: nn.Module) -> Iterator[None]:
    sam = SAM(model.parameters(), SGD, lr=0.1)
    yield from steps(model, lambda: sam.step(lambda: loss_of(model, 50).backward()), 4)


def sam_in_two_steps(model: nn.Module) -> Iterator[None]:
    sam = SAM(model.parameters(), SGD, lr=0.1)

    def both() -> None:
        sam.first_step()
        loss_of(model, 50).backward()
        sam.second_step()

    yield from steps(model, both, 4)


def line_search(model: nn.Module) -> Iterator[None]:
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)

    def closure() -> Tensor:
        model.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    yield from steps(model, lambda: optimizer.step(closure), 3)


class MasterWeights:
    """Steps copies of the parameters and writes them back, as mixed precision optimizers and DeepSpeed do."""

    def __init__(self, model: nn.Module, *, flat: bool) -> None:
        self.parameters = list(model.parameters())
        copies = [each.detach().clone() for each in self.parameters]
        self.masters = [torch.cat([each.flatten() for each in copies])] if flat else copies
        self.optimizer = AdamW(self.masters, 1e-2)

    def step(self) -> None:
        gradients = [each.grad for each in self.parameters]
        if len(self.masters) == 1:
            gradients = [torch.cat([each.flatten() for each in gradients])]
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        self.optimizer.step()
        new = self.masters
        if len(new) == 1:
            new = new[0].split([each.numel() for each in self.parameters])
        for parameter, master in zip(self.parameters, new, strict=True):
            parameter.data.copy_(master.view_as(parameter))


def master_weights(model: nn.Module) -> Iterator[None]:
    yield from steps(model, MasterWeights(model, flat=False).step, 4)


def flat_master_weights(model: nn.Module) -> Iterator[None]:
    yield from steps(model, MasterWeights(model, flat=True).step, 4)


def skipped(model: nn.Module, **settings: Any) -> Iterator[None]:
    """A gradient scaler leaves out the steps 1 and 3."""
    optimizer = AdamW(model.parameters(), 1e-2, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for index in range(6):
        model.zero_grad()
        scaler.scale(loss_of(model, index)).backward()
        if index in (1, 3):
            next(model.parameters()).grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if index not in (1, 3):
            yield


def skipped_by_the_optimizer(model: nn.Module) -> Iterator[None]:
    yield from skipped(model, fused=True)


def skipped_by_one_of_two(model: nn.Module) -> Iterator[None]:
    first, second = halves(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for index in range(5):
        model.zero_grad()
        scaler.scale(loss_of(model, index)).backward()
        if index == 2:
            first.param_groups[0]["params"][0].grad.fill_(torch.inf)
        scaler.step(first)
        scaler.step(second)
        scaler.update()
        yield


def accumulated(model: nn.Module) -> Iterator[None]:
    optimizer = AdamW(model.parameters(), 1e-2)
    for index in range(8):
        loss_of(model, index).backward()
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()
            yield


def beside_others(model: nn.Module) -> Iterator[None]:
    """Another model of the same shape, and a small one, are trained in between."""
    twin, small = TinyGPT(num_layers=1), nn.Linear(4, 4)
    others = [SGD(twin.parameters(), 0.1), SGD(small.parameters(), 0.1)]
    optimizer = SGD(model.parameters(), 0.1)

    def step() -> None:
        loss_of(twin, 0).backward()
        for other in (*others, *others):
            other.step()
        optimizer.step()

    yield from steps(model, step, 4)


def fails_in_a_step(model: nn.Module) -> Iterator[None]:
    """What raises in a closure is caught, and another optimizer goes on."""

    def closure() -> None:
        raise RuntimeError

    with suppress(RuntimeError):
        SGD(model.parameters(), 0.1).step(closure)
    yield from plain(model)


PROGRAMS: list[Program] = [
    plain,
    two_optimizers,
    second_rests,
    second_joins,
    replaced,
    replaced_and_kept,
    in_the_backward,
    lookahead,
    nested,
    sam_in_one_step,
    sam_in_two_steps,
    line_search,
    master_weights,
    flat_master_weights,
    skipped,
    skipped_by_the_optimizer,
    skipped_by_one_of_two,
    accumulated,
    beside_others,
    fails_in_a_step,
]


def fresh() -> TinyGPT:
    torch.manual_seed(0)
    return TinyGPT(num_layers=1, width=16, num_query_heads=2)


def key_rms(model: nn.Module) -> Tensor:
    with AttentionMonitor(copy.deepcopy(model), PROBE, record=None) as monitor:
        return monitor.sample(0).values["key_rms"]["blocks.0.attn"]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_each_step_is_counted_once_with_its_weights(program: Program) -> None:
    bare, model = fresh(), fresh()
    expected = [key_rms(bare), *(key_rms(bare) for _ in program(bare))]
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttentionMonitorWarning)
        monitor = attach(model, probe=PROBE, every_n_steps=1, record=None)
        for _ in program(model):
            pass
        monitor.close()
    assert monitor.history.steps == list(range(len(expected)))
    assert torch.equal(monitor.history["key_rms"]["blocks.0.attn"], torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))
    assert monitor.failures == 0


def test_a_forgotten_monitor_leaves_nothing_behind() -> None:
    def run(num_steps: int) -> tuple[weakref.ref[Any], ...]:
        model = fresh()
        optimizer = SGD(model.parameters(), 0.1)
        attach(model, probe=PROBE, every_n_steps=1, record=None)  # what it returns is not kept
        for _ in steps(model, optimizer.step, num_steps):
            pass
        copied = pickle.loads(pickle.dumps((copy.deepcopy(model), optimizer)))
        assert not any(isinstance(each, AttentionMonitor) for part in copied for each in vars(part).values())
        return weakref.ref(model), weakref.ref(optimizer)

    before = len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks)
    for num_steps in (0, 2):
        left = run(num_steps)
        gc.collect()
        assert [each() for each in left] == [None, None]
        assert len(_global_optimizer_pre_hooks) + len(_global_optimizer_post_hooks) == before


class Changes:
    """A logger that changes which monitors are attached, in the middle of an optimizer step."""

    def __init__(self, change: Callable[[], object]) -> None:
        self.change = change

    def log_sample(self, sample: Any) -> None:
        if sample.global_step == 1:
            self.change()


def test_monitors_come_and_go_within_a_step() -> None:
    model, other = fresh(), fresh()
    settings: dict[str, Any] = {"probe": PROBE, "every_n_steps": 1, "record": None, "alerts": False}
    new: list[AttentionMonitor] = []
    closed = attach(model, name="closed", loggers=[Changes(lambda: closed.close())], **settings)
    adds = attach(model, name="adds", loggers=[Changes(lambda: new.append(attach(other, **settings)))], **settings)
    for _ in plain(model):
        pass
    for _ in plain(other):
        pass
    assert (closed.history.steps, adds.history.steps) == ([0, 1], [0, 1, 2, 3, 4])
    assert new[0].history.steps == [0, 1, 2, 3, 4]
    for monitor in (adds, *new):
        monitor.close()


def test_samples_go_on_where_nothing_keeps_the_monitor() -> None:
    model, seen = fresh(), list[int]()

    class Steps:
        def log_sample(self, sample: Any) -> None:
            seen.append(sample.global_step)

    attach(model, probe=PROBE, every_n_steps=1, record=None, loggers=Steps())
    gc.collect()
    for _ in range(2):  # each with an optimizer of its own
        for _ in steps(model, SGD(model.parameters(), 0.1).step, 2):
            gc.collect()
    assert seen == [0, 1, 2, 3, 4]


def test_training_that_torch_does_not_see_is_one_warning() -> None:
    model = fresh()
    monitor = attach(model, probe=PROBE, record=None)
    with torch.no_grad():
        for each in model.parameters():
            each -= 0.1
    with pytest.warns(AttentionMonitorWarning, match=r"no step of a torch.optim.Optimizer .* call monitor.on_step"):
        monitor.close()
    attach(model, probe=PROBE, record=None).close()  # nothing was trained: warnings are errors here


def test_attach_without_a_probe_says_how() -> None:
    with pytest.raises(
        ValueError, match=r"probe=None, and optimizer=Tensor came second; .* attach\(model, probe=batch"
    ):
        attach(fresh(), PROBE)
    model = fresh()
    with attach(model, probe=PROBE, record=None):
        with pytest.warns(AttentionMonitorWarning, match="to this model already"):
            attach(model, probe=PROBE, record=None).close()
        attach(fresh(), probe=PROBE, record=None).close()


def test_steps_of_other_models_cost_little() -> None:
    model, other = fresh(), TinyGPT()
    optimizer = AdamW(other.parameters())
    loss_of(other, 0).backward()

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(40):
            optimizer.step()
        return time.perf_counter() - started

    ratios = []
    for _ in range(9):
        alone = seconds()
        with attach(model, probe=PROBE, record=None):
            ratios.append(seconds() / alone)
    assert sorted(ratios)[4] < 1.25
