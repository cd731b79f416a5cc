"""A run with the monitor ends bit-identical to one without, for every kind of run.

What ``test_monitor``, ``test_lightning_callback``, ``test_transformers_callback`` and ``test_distributed`` show for
their kinds of run (dropout, layer drop, BatchNorm, Lightning, DDP, FSDP2) is not repeated here.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import CheckpointedGPT, TinyGPT, everything, language_loss, token_batch, train
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.capture import AttentionCall, capture, capture_attention
from attnmonitor.functional.precision import full_precision
from attnmonitor.measurement.quiet import quiet
from attnmonitor.record import RunRecord
from attnmonitor.summary.tables import print_layer_table

NUM_STEPS = 6
LENGTH = 16
EVERY = pytest.mark.parametrize("every_n_steps", [1, 3])


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def llama() -> PreTrainedModel:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, attention_dropout=0.1, **size))


def checkpointed(build: Callable[[], PreTrainedModel], *, use_reentrant: bool) -> PreTrainedModel:
    model = build()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


def half_frozen() -> TinyGPT:
    """BatchNorm that learns its statistics, beside modules the user has put in eval mode."""
    model = TinyGPT(dropout=0.2, batch_norm=True)
    model.blocks[0].eval()
    model.blocks[1].dropout.eval()
    return model


def loss_of(model: nn.Module, token_ids: Tensor) -> Tensor:
    output = model(token_ids)
    return language_loss(getattr(output, "logits", output), token_ids)


def seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def plain_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    return steps_under(nullcontext, model, optimizer)


def steps_under(context: Callable[[], Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(NUM_STEPS):
        token_ids = torch.randint(50, (3, LENGTH))
        with context():
            loss = loss_of(model, token_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def steps_in_bfloat16(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    return steps_under(lambda: torch.autocast("cpu", dtype=torch.bfloat16), model, optimizer)


def steps_inside_one_autocast(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The whole loop in one region, so that samples are taken where casts of the weights are cached."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return plain_steps(model, optimizer)


def steps_with_scaler(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Losses in float16, scaled so far up at first that the scaler skips steps."""
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2), []
    for _ in range(NUM_STEPS + 6):
        token_ids = torch.randint(50, (3, LENGTH))
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, token_ids)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses += [loss.item(), scaler.get_scale()]
    return losses


def accumulated_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for index in range(2 * NUM_STEPS):
        loss = loss_of(model, torch.randint(50, (3, LENGTH)))
        (loss / 2).backward()
        if index % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def steps_over_shuffled_data(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """The order of the data depends on the global generator, and is compared as well."""
    losses = []
    for _ in range(2):
        for (token_ids,) in DataLoader(TensorDataset(token_batch(batch=9, length=LENGTH)), batch_size=3, shuffle=True):
            loss = loss_of(model, token_ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item(), float(token_ids.sum())]
    return losses


def compiled_steps(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    torch._dynamo.reset()
    return plain_steps(torch.compile(model, backend="aot_eager"), optimizer)


RUNS: dict[str, tuple[Callable[[], nn.Module], Callable[..., list[float]]]] = {
    "gpt2": (gpt2, plain_steps),
    "llama": (llama, plain_steps),
    "batch norm, train and eval modules mixed": (half_frozen, plain_steps),
    "checkpointing with reentry": (lambda: CheckpointedGPT(use_reentrant=True, dropout=0.2), plain_steps),
    "checkpointing without reentry": (lambda: CheckpointedGPT(use_reentrant=False, dropout=0.2), plain_steps),
    "gpt2 checkpointing with reentry": (lambda: checkpointed(gpt2, use_reentrant=True), plain_steps),
    "llama checkpointing without reentry": (lambda: checkpointed(llama, use_reentrant=False), plain_steps),
    "bfloat16 autocast": (llama, steps_in_bfloat16),
    "bfloat16 autocast around the loop": (lambda: TinyGPT(dropout=0.2), steps_inside_one_autocast),
    "float16 gradient scaler": (lambda: TinyGPT(dropout=0.2), steps_with_scaler),
    "gradient accumulation": (gpt2, accumulated_steps),
    "shuffled data": (lambda: TinyGPT(dropout=0.2), steps_over_shuffled_data),
    "compiled": (lambda: TinyGPT(dropout=0.2), compiled_steps),
}


def end_of(run: str, every_n_steps: int | None, **settings: Any) -> tuple[list[float], list[Tensor], list[int]]:
    """Losses, everything that a run leaves behind, and the steps sampled."""
    build, steps = RUNS[run]
    torch.manual_seed(0)
    model = build().train() if run != "batch norm, train and eval modules mixed" else build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    watch: Any = nullcontext()
    if every_n_steps is not None:
        probe = token_batch(batch=2, length=LENGTH)
        watch = attach(model, optimizer, probe, every_n_steps=every_n_steps, strict=True, record=None, **settings)
    seed()
    with watch as monitor:
        losses = steps(model, optimizer)
        sampled = [] if monitor is None else monitor.history.steps
    return losses, [*everything(model, optimizer), *gradients(model)], sampled


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """Also where a gradient has overflowed: NaN equals NaN."""
    pairs = list(zip(one, other, strict=True))
    return len(pairs) > 0 and all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def assert_identical(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0] == other[0]
    assert same_bits(one[1], other[1])


@pytest.fixture(scope="module")
def unmonitored() -> dict[str, Any]:
    return {}


@EVERY
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")  # renamed in later versions of transformers
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # what reentry says to any eval forward
@pytest.mark.parametrize("run", RUNS)
def test_run_is_bit_identical_with_and_without_monitor(
    run: str, every_n_steps: int, unmonitored: dict[str, Any]
) -> None:
    if run not in unmonitored:
        unmonitored[run] = end_of(run, None)
    monitored = end_of(run, every_n_steps)
    assert_identical(unmonitored[run], monitored)
    assert monitored[2] == list(range(0, monitored[2][-1] + 1, every_n_steps))
    assert len(monitored[2]) > 2


def test_one_random_number_drawn_changes_the_run() -> None:
    """The comparison above can fail: one random number drawn is found."""
    still = end_of("gpt2", None)
    drawn = end_of("gpt2", 1, loggers=[Disturbing(lambda: torch.rand(1))])
    assert drawn[0] != still[0]


def test_printing_the_summary_advances_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """``rich`` draws a number from ``random`` when it is imported, which is when the first run ends."""
    pytest.importorskip("rich")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    before = random.getstate()
    print_layer_table({"energy_rms": {"layer": [1.0, 2.0]}})
    assert "rich.style" in sys.modules
    assert random.getstate() == before


class Disturbing:
    def __init__(self, disturb: Callable[[], object]) -> None:
        self.disturb = disturb

    def log_sample(self, sample: Any) -> None:
        self.disturb()


def test_opt_in_metrics_and_alerts_leave_the_run_identical() -> None:
    metrics = ["energy_effective_rank", "attention_entropy", "max_logit", "sink_mass", "interaction_effective_rank"]
    assert_identical(end_of("llama", None), end_of("llama", 1, metrics=metrics, weights_every=1, alerts=False))


def test_probe_adds_no_graph_to_a_compiled_run() -> None:
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    counts = []
    for monitored in (False, True):
        torch._dynamo.reset()
        graphs.clear()
        model = TinyGPT(dropout=0.2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        probe = token_batch(batch=2, length=11)  # of a shape the training never has
        with attach(model, optimizer, probe, every_n_steps=1, record=None) if monitored else nullcontext():
            train(torch.compile(model, backend=counting), optimizer, 4)
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


# Torch state of the caller


@contextmanager
def default_device_elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        # torch 2.6 keeps this None and then fails in get_default_device, in every later test that loads a checkpoint.
        with suppress(AttributeError):
            del torch._GLOBAL_DEVICE_CONTEXT.device_context


@contextmanager
def default_dtype_elsewhere() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "torch_state",
    [torch.inference_mode, torch.no_grad, torch.enable_grad, default_device_elsewhere, default_dtype_elsewhere],
)
def test_torch_state_of_the_caller_changes_no_number(torch_state: Any) -> None:
    model, probe = TinyGPT(), token_batch()
    outside = AttentionMonitor(model, probe, record=None, strict=True).sample(0)
    with torch_state():
        before = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device())
        monitor = AttentionMonitor(model, probe, record=None, strict=True)
        samples = [monitor.sample(0)]
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()) == before
    samples.append(monitor.sample(1))
    with torch_state():
        samples.append(monitor.sample(2))
    for sample in samples:
        for metric, layers in outside.values.items():
            for layer, values in layers.items():
                found = sample.values[metric][layer]
                assert torch.equal(found, values)
                assert not found.is_inference()
    assert monitor.history["energy_rms"]["blocks.0.attn"].shape == (3, 4)


class Caching(TinyGPT):
    """Fills a cache of positions on first use and trains on what it holds, as rotary embeddings do."""

    cache: Tensor | None = None

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.linspace(0, 1, 32)[:, None].repeat(1, 32)
        x = self.tokens(token_ids) * self.cache[: token_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_cache_filled_under_inference_mode_is_trainable() -> None:
    model = Caching()
    with torch.inference_mode():
        AttentionMonitor(model, token_batch(), record=None)
    loss_of(model, token_batch()).backward()
    assert model.tokens.weight.grad is not None


def test_outer_function_mode_stays_active() -> None:
    from torch.overrides import TorchFunctionMode

    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.nn.functional.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    monitor = AttentionMonitor(TinyGPT(), token_batch(), record=None, strict=True)
    with Counting() as counting:
        sample = monitor.sample(0)
        assert counting.calls == 2
        torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 4, 4).unbind())
    assert counting.calls == 3
    assert not sample.values["energy_rms"]["blocks.0.attn"].isnan().any()


# Several at once


def test_two_models_are_monitored_independently() -> None:
    def run(watch_which: tuple[bool, bool]) -> tuple[list[list[Tensor]], list[AttentionMonitor | None]]:
        torch.manual_seed(0)
        models = [TinyGPT(dropout=0.1), TinyGPT(num_layers=1, num_query_heads=2)]  # student and teacher, or a GAN
        optimizers = [torch.optim.AdamW(models[0].parameters(), 1e-2), torch.optim.SGD(models[1].parameters(), 0.1)]
        monitors = [
            attach(model, optimizer, token_batch(), every_n_steps=every, record=None, name=f"model{every}")
            if monitored
            else None
            for model, optimizer, every, monitored in zip(models, optimizers, (1, 2), watch_which, strict=True)
        ]
        for step in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, 1, seed=step)
        return [everything(m, o) for m, o in zip(models, optimizers, strict=True)], monitors

    ends, _ = run((False, False))
    both_ends, both = run((True, True))
    _, first = run((True, False))
    _, second = run((False, True))
    for end, monitored_end in zip(ends, both_ends, strict=True):
        assert same_bits(end, monitored_end)
    for together, alone in zip(both, (first[0], second[1]), strict=True):
        assert_same_history(together, alone)


def assert_same_history(one: AttentionMonitor | None, other: AttentionMonitor | None) -> None:
    assert one is not None
    assert other is not None
    assert one.history.steps == other.history.steps
    for metric in one.history:
        for layer, trajectory in one.history[metric].items():
            assert torch.equal(trajectory, other.history[metric][layer])


def test_threads_measure_the_same_numbers_as_alone() -> None:
    models = [TinyGPT() for _ in range(3)]
    monitors = [AttentionMonitor(model, token_batch(), record=None, strict=True) for model in models]
    alone = [monitor.sample(0) for monitor in monitors]
    found: dict[int, list[Any]] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [monitors[i].sample(step) for step in range(1, 6)]}))
        for i in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        for sample in found[index]:
            for metric, layers in expected.values.items():
                for layer, values in layers.items():
                    assert torch.equal(sample.values[metric][layer], values)


def test_overlapping_samples_restore_process_global_settings() -> None:
    """The second begins inside the first, and ends after it."""
    from torch._dynamo import eval_frame  # with dynamo loaded there is a stance to keep

    def settings() -> dict[str, Any]:
        return {
            "stance": eval_frame._stance.stance,
            "matmul precision": torch.get_float32_matmul_precision(),
            "kernels of transformers": "__getitem__" in vars(AttentionInterface),
        }

    @contextmanager
    def sampling(model: TinyGPT) -> Iterator[None]:
        seen: list[AttentionCall] = []
        with quiet(model), capture_attention(model, seen.append), full_precision(torch.device("cpu")):
            yield
            model(token_batch())
        assert {call.layer for call in seen} == {f"blocks.{i}.attn" for i in range(len(model.blocks))}

    models = TinyGPT(), TinyGPT()
    begun, may_end = threading.Event(), threading.Event()

    def second() -> None:
        with sampling(models[1]):
            begun.set()
            may_end.wait(60)

    torch.set_float32_matmul_precision("high")
    try:
        before = settings()
        with ThreadPoolExecutor(1) as other:
            with sampling(models[0]):
                done = other.submit(second)
                assert begun.wait(60)
            still_inside = settings()
            may_end.set()
            done.result()
        assert settings() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert still_inside["stance"] == "force_eager"
    assert still_inside["matmul precision"] == "highest"


def test_explicit_call_reaches_the_capture_of_its_thread_only() -> None:
    class Explicit(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            query = x.unflatten(-1, (2, 4)).transpose(1, 2)
            capture(self, query, query)
            return x

    model, x, seen = Explicit(), torch.randn(2, 9, 8), []
    with ThreadPoolExecutor(1) as other, capture_attention(model, seen.append):
        other.submit(Explicit(), x).result()
        assert not seen
        model(x)
    assert len(seen) == 1


def test_forked_loader_workers_change_neither_run_nor_record(tmp_path: Path) -> None:
    """The workers inherit the monitor, its hooks and the open record, and end before the run does."""

    def run(monitored: bool) -> tuple[list[Tensor], AttentionMonitor | None]:
        torch.manual_seed(0)
        model = TinyGPT(dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        data = TensorDataset(token_batch(batch=8, length=LENGTH))
        loader = DataLoader(data, batch_size=2, shuffle=True, num_workers=2, multiprocessing_context="fork")
        monitor = (
            attach(model, optimizer, loader, every_n_steps=1, record=tmp_path / "run.sqlite") if monitored else None
        )
        seed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in forked children
            for _ in range(2):
                for (token_ids,) in loader:
                    loss_of(model, token_ids).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return everything(model, optimizer), monitor

    (alone, _), (monitored, monitor) = run(False), run(True)
    assert same_bits(alone, monitored)
    assert monitor is not None
    monitor.close()
    assert RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == list(range(9))


def test_cell_run_again_monitors_the_new_run_and_frees_the_old(tmp_path: Path) -> None:
    names, before = {}, []
    for _ in range(3):
        torch.manual_seed(0)
        names["model"] = TinyGPT()
        names["optimizer"] = torch.optim.SGD(names["model"].parameters(), 0.1)
        names["monitor"] = attach(names["model"], names["optimizer"], token_batch(), every_n_steps=1, record=tmp_path)
        train(names["model"], names["optimizer"], 2)
        gc.collect()
        assert all(model() is None for model in before)
        before.append(weakref.ref(names["model"]))
    names["monitor"].close()
    records = [RunRecord.open(path) for path in tmp_path.glob("*.sqlite")]
    assert [record.steps.tolist() for record in records] == [[0, 1, 2]] * 3
    assert not list(tmp_path.glob("*-lock"))


def test_attaching_twice_changes_no_number() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitors = [attach(model, optimizer, token_batch(), every_n_steps=1, record=None) for _ in range(2)]
    train(model, optimizer, 2)
    assert_same_history(*monitors)


def test_monitors_nest_in_forwards_and_loggers() -> None:
    """A teacher that is sampled while its student's probe runs, and again when the student's sample is logged."""
    student, teacher = TinyGPT(), TinyGPT(num_layers=1, num_query_heads=2)
    inner = AttentionMonitor(teacher, token_batch(), record=None, strict=True)
    alone = [AttentionMonitor(model, token_batch(), record=None).sample(0) for model in (student, teacher)]
    logger = Disturbing(lambda: inner.sample(1))
    outer = AttentionMonitor(student, token_batch(), record=None, strict=True, loggers=[logger])
    handle = student.blocks[0].register_forward_hook(lambda *_: inner.sample(0) and None)
    found = outer.sample(0)
    handle.remove()
    for sample, expected in ((found, alone[0]), (inner.last_sample, alone[1])):
        assert sample is not None
        for metric, layers in expected.values.items():
            for layer, values in layers.items():
                assert torch.equal(sample.values[metric][layer], values)
    assert inner.history.steps == [0, 1]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # what torch says of attention under vmap
def test_run_of_torch_func_transforms_is_bit_identical() -> None:
    """Gradients per example by ``vmap`` over ``grad``; the weights live in the model between the steps."""

    def run(every_n_steps: int | None) -> tuple[list[Tensor], Any]:
        torch.manual_seed(0)
        model, token_ids = TinyGPT(num_layers=1), token_batch(length=LENGTH)
        monitor = (
            AttentionMonitor(model, token_batch(), every_n_steps, record=None, strict=True) if every_n_steps else None
        )

        def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
            return language_loss(torch.func.functional_call(model, weights, row[None]), row[None])

        for step in range(4):
            weights = dict(model.named_parameters())
            per_example = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, token_ids)
            with torch.no_grad():
                for name, weight in weights.items():
                    weight -= 0.1 * per_example[name].mean(0)
            if monitor is not None:
                monitor.on_step(step + 1)
        return list(model.state_dict().values()), monitor

    (alone, _), (monitored, monitor) = run(None), run(1)
    assert same_bits(alone, monitored)
    assert monitor.history.steps == [1, 2, 3, 4]
    assert not any(values.isnan().any() for values in monitor.history["energy_rms"].values())


def test_user_hooks_see_the_probe_forward() -> None:
    """Documented: a hook that counts forwards counts the probe's too, and is called under ``no_grad`` in eval mode."""
    model, seen = TinyGPT(), []
    model.register_forward_hook(lambda module, args, output: seen.append((module.training, output.requires_grad)))
    AttentionMonitor(model, token_batch(), record=None).sample(0)
    assert seen == [(False, False)] * 2


@pytest.mark.parametrize("around_step", [False, True], ids=["forward and backward", "the whole step"])
def test_flops_of_forward_and_backward_are_the_users(around_step: bool) -> None:
    """Documented: a mode of the user that is active while a sample is taken counts the probe's forward as well."""

    def flops(*, monitored: bool) -> list[int]:
        model = TinyGPT()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if monitored:
            attach(model, optimizer, token_batch(), every_n_steps=1, record=None)
        counted = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                loss_of(model, token_batch()).backward()
                if around_step:
                    optimizer.step()
            counted.append(counter.get_total_flops())
            if not around_step:
                optimizer.step()
        return counted

    assert (flops(monitored=True) == flops(monitored=False)) is not around_step


def test_skipped_hooks_are_not_called_and_stay_registered() -> None:
    model, called = TinyGPT(), []

    def count(*_: Any) -> None:
        called.append("count")

    def also(*_: Any) -> None:
        called.append("also")

    modules = (model, model.blocks[0].attn)
    handles = [module.register_forward_hook(hook) for module in modules for hook in (count, also)]
    handles += [module.register_forward_pre_hook(count) for module in modules]
    expected = AttentionMonitor(model, token_batch(), record=None).sample(0)
    monitor = AttentionMonitor(model, token_batch(), record=None, skip_hooks=lambda hook: hook is count)
    called.clear()
    sample = monitor.sample(0)
    assert called == ["also"] * 2
    assert torch.equal(sample.values["energy_rms"]["blocks.0.attn"], expected.values["energy_rms"]["blocks.0.attn"])
    called.clear()
    model(token_batch())
    assert called == ["count", "count", "count", "also", "count", "also"]
    for handle in handles:
        handle.remove()
    called.clear()
    model(token_batch())
    assert called == []
    with pytest.raises(ValueError, match=r"skip_hooks=\[\].*lambda hook"):
        AttentionMonitor(model, token_batch(), record=None, skip_hooks=[])
