"""A monitor's numbers, what it leaves untouched, its failures, its arguments and its state."""

from __future__ import annotations

import gc
import io
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
from kept_samples import KeptSamples
from models import CausalSelfAttention, TinyGPT, everything, token_batch, train
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import DEFAULT_METRICS, METRICS, AttentionMonitor, Sample
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.metrics.statistics import head_statistics
from attnmonitor.record import RunRecord


def monitor_of(model: nn.Module, **settings: Any) -> AttentionMonitor:
    return AttentionMonitor(model, settings.pop("probe", token_batch()), **{"record": None, "strict": True, **settings})


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# What is measured


def test_rules_that_cannot_fire_are_named(tmp_path: Path) -> None:
    """Whoever measures some metrics only learns which default rules these turn off, and what they need."""
    keys = ["key_rms", "key_leverage_max", "key_incoherence"]
    with monitor_of(TinyGPT(), metrics=keys, record=tmp_path) as monitor:
        last = str(monitor).splitlines()[-1]
        assert "rules cannot fire (dead, " in last
        assert all(f"{rule}, " in last for rule in ("key_faded", "key_sink", "key_rank"))
        assert "key_grown" not in last
        assert "as metrics= leaves out " in last
        assert "energy_rms" in last.split("leaves out ")[1]
        assert "rules cannot fire without " in monitor.sample(0).verdict
        record = RunRecord.open(monitor.record_path)
    assert record.counts.idle_rules == monitor.summary.idle_rules
    assert str(monitor_of(TinyGPT())).endswith(
        "1 rule cannot fire (learned_rank), as metrics= leaves out interaction_participation_ratio"
    )
    assert "cannot fire" not in str(monitor_of(TinyGPT(), metrics=keys, alerts=False))


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_default_metrics_equal_the_dense_float64_field(
    num_kv_heads: int,
) -> None:
    model = TinyGPT(num_kv_heads=num_kv_heads)
    inputs: dict[str, Tensor] = {}
    for name, block in model.named_modules():
        if name.endswith(".attn"):
            block.register_forward_pre_hook(lambda module, args, name=name: inputs.__setitem__(name, args[0]))
    sample = monitor_of(model).sample(0)
    assert tuple(sample.values) == DEFAULT_METRICS
    for name, x in inputs.items():
        query, key, value = (each.detach() for each in model.get_submodule(name).heads(x))
        length, scale = query.shape[2], query.shape[-1] ** -0.5
        visible = torch.ones(length, length, dtype=torch.bool).tril().expand(len(query), -1, -1)
        given = {"value": value, "checked": reference.checked_rows(length)}
        given["projection"] = model.get_submodule(name).o_proj.weight.detach()
        layer = reference.Layer(query, key, scale, visible=visible, **given)
        for metric in DEFAULT_METRICS:
            per_sequence = reference.TWINS[metric](layer)
            found, spread = sample.values[metric][name], sample.spread[metric][name]
            assert found.shape == (4 if METRICS[metric].scope == "query_head" else num_kv_heads,)
            torch.testing.assert_close(found.double(), per_sequence.mean(0), rtol=2e-4, atol=1e-5, msg=metric)
            torch.testing.assert_close(
                spread.double(), per_sequence.std(0, unbiased=False), rtol=1e-2, atol=1e-4, msg=metric
            )


def test_coverage_names_capture_and_verified_error() -> None:
    coverage = monitor_of(TinyGPT(num_kv_heads=2)).coverage
    assert list(coverage) == ["blocks.0.attn", "blocks.1.attn"]
    for layer in coverage.values():
        assert layer.measured
        assert layer.heads == (4, 2, 8)
        assert layer.how == "sdpa"
        assert layer.scale == pytest.approx(8**-0.5)
        assert layer.error is not None
        assert layer.error < 1e-5


def test_repeated_samples_are_bit_identical() -> None:
    model = TinyGPT(dropout=0.3)
    monitor = monitor_of(model)
    first, second = monitor.sample(0), monitor.sample(7)
    other = monitor_of(model).sample(0)
    for metric, layers in first.values.items():
        for layer, values in layers.items():
            assert torch.equal(values, second.values[metric][layer])
            assert torch.equal(values, other.values[metric][layer])


def test_pending_layers_are_bounded_and_values_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of(TinyGPT(num_layers=5))
    together = monitor.sample(0)
    batches: list[int] = []

    def counted(layers: list[Any], *settings: Any, **more: Any) -> Any:
        batches.append(len(layers))
        return head_statistics.steps(layers, *settings, **more)

    # float32 queries, keys and values of 3 sequences, 4 heads and 24 positions; the rebuilt rows are less
    one_layer = 3 * 3 * 4 * 24 * 8 * 4 * 2
    monkeypatch.setattr("attnmonitor.measurement.reduction.LARGEST_BATCH", one_layer)
    monkeypatch.setattr("attnmonitor.measurement.reduction.head_statistics", SimpleNamespace(steps=counted))
    in_batches = monitor.sample(1)
    assert batches == [2, 2, 1]
    for metric, layers in together.values.items():
        for name, values in layers.items():
            assert torch.equal(values, in_batches.values[metric][name])


class Overwriting(nn.Module):
    """Attention that overwrites its queries and keys when it is done with them."""

    def __init__(self, *, overwrites: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.overwrites = overwrites

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        if self.overwrites:
            query.zero_(), key.fill_(torch.nan)
        return self.out(mixed.transpose(1, 2).flatten(2))


def test_model_may_overwrite_q_and_k_after_attention() -> None:
    model, overwriting = Overwriting(overwrites=False), Overwriting(overwrites=True)
    overwriting.load_state_dict(model.state_dict())
    probe = torch.randn(2, 20, 16)
    expected, found = (AttentionMonitor(each, probe, record=None).sample(0) for each in (model, overwriting))
    for metric, layers in expected.values.items():
        for name, values in layers.items():
            assert torch.equal(found.values[metric][name], values)


def test_only_the_head_with_nan_weights_is_nan() -> None:
    model = TinyGPT()
    before = monitor_of(model).sample(0)
    with torch.no_grad():
        model.blocks[1].attn.k_proj.bias[:8] = torch.nan
    after = monitor_of(model).sample(0)
    for metric in ("energy_effective_rank", "key_incoherence", "energy_rms"):
        assert torch.equal(before.values[metric]["blocks.0.attn"], after.values[metric]["blocks.0.attn"])
        assert after.values[metric]["blocks.1.attn"].isnan().tolist() == [True, False, False, False]
        torch.testing.assert_close(
            after.values[metric]["blocks.1.attn"][1:], before.values[metric]["blocks.1.attn"][1:]
        )


class WrongKernel(TorchDispatchMode):
    """A kernel that does not compute attention, as in a broken build or with a bad quantizer."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in str(func):
            result[0].add_(0.3)
        return result


class AttentionOnWrongKernel(CausalSelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        with WrongKernel():
            return super().forward(x)


def test_unverified_layer_is_nan() -> None:
    model = TinyGPT()
    model.blocks[0].attn = AttentionOnWrongKernel(32, 4, 4)
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn is not measured: attention rebuilt"):
        monitor = monitor_of(model, strict=False)
    sample = monitor.sample(0)
    assert sample.values["energy_rms"]["blocks.0.attn"].isnan().all()
    assert not sample.values["energy_rms"]["blocks.1.attn"].isnan().any()
    assert "differs from the layer's output" in sample.coverage["blocks.0.attn"].reason
    assert sample.failures == 0
    assert not sample.events


# No perturbation


@pytest.mark.parametrize("every_n_steps", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2},
        {"dropout": 0.1, "batch_norm": True},
        {"layer_drop": "python"},
        {"layer_drop": "numpy"},
        {"dropout": 0.2, "num_kv_heads": 1},
    ],
    ids=str,
)
def test_seeded_run_is_bit_identical_with_monitor(settings: dict[str, Any], every_n_steps: int) -> None:
    ends = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = TinyGPT(**settings)
        model.blocks[0].norm1.eval()  # a module that the user froze stays frozen
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        if watched:
            monitor = attach(model, optimizer, token_batch(), every_n_steps=every_n_steps, strict=True)
        losses = train(model, optimizer, 10)
        ends.append((losses, everything(model, optimizer)))
    assert ends[0][0] == ends[1][0]
    assert equal(ends[0][1], ends[1][1])
    assert monitor.history.steps == list(range(0, 11, every_n_steps))
    monitor.close()


def test_no_hook_and_no_activation_is_left() -> None:
    model = TinyGPT()
    kept: list[weakref.ref[Tensor]] = []
    model.blocks[0].attn.q_proj.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out)))
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    monitor = monitor_of(model)
    monitor.sample(0)
    gc.collect()
    assert kept
    assert all(reference() is None for reference in kept)
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()] == hooks


# Failure


class Failing(TinyGPT):
    fails = False

    def forward(self, token_ids: Tensor) -> Tensor:
        if self.fails and not self.training:
            raise RuntimeError("out of luck")
        return super().forward(token_ids)


def test_failed_sample_is_nan_counted_and_warned_once() -> None:
    model = Failing(dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = attach(model, optimizer, token_batch(), every_n_steps=1)
    train(model, optimizer, 2)
    model.fails = True
    with pytest.warns(UserWarning, match="sample at step 3 failed.*out of luck") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1
    model.fails = False
    train(model, optimizer, 1)
    assert monitor.failures == 3
    assert monitor.history.steps == list(range(7))
    trajectory = monitor.history["energy_rms"]["blocks.0.attn"]
    assert trajectory.isnan().all(1).tolist() == [False] * 3 + [True] * 3 + [False]
    assert model.training
    monitor.close()
    record = RunRecord.open(monitor.record_path)
    assert list(record.steps) == list(range(7))


def test_warnings_as_errors_do_not_reach_training() -> None:
    model = Failing()
    monitor = monitor_of(model, strict=False)
    model.fails = True
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = monitor.sample(1)
    assert sample.failures == 1
    assert "out of luck" in (sample.failure or "")
    assert sample.values["energy_rms"]["blocks.0.attn"].isnan().all()


def test_strict_raises_a_failed_sample() -> None:
    model = Failing()
    monitor = monitor_of(model)
    model.fails = True
    with pytest.raises(RuntimeError, match="out of luck"):
        monitor.sample(1)


def test_failing_logger_does_not_affect_the_others() -> None:
    class Broken:
        def log_sample(self, sample: Sample) -> None:
            raise OSError("tracker is gone")

    kept = KeptSamples()
    monitor = monitor_of(TinyGPT(), strict=False, loggers=[Broken(), kept])
    with pytest.warns(UserWarning, match="Broken failed and was ignored: OSError: tracker is gone") as caught:
        monitor.sample(0), monitor.sample(1)
    assert len(caught) == 1
    assert [sample.global_step for sample in kept.samples] == [0, 1]


def test_layer_with_changed_heads_is_nan_with_reason() -> None:
    model = TinyGPT()
    monitor = monitor_of(model)
    for attention in (model.blocks[1].attn,):
        attention.num_query_heads = attention.num_kv_heads = 2
        attention.head_dim = 16
    sample = monitor.sample(1)
    assert sample.values["energy_rms"]["blocks.1.attn"].isnan().all()
    assert sample.values["energy_rms"]["blocks.1.attn"].shape == (4,)
    assert not sample.values["energy_rms"]["blocks.0.attn"].isnan().any()
    assert "was (4, 4, 8) at attach, is (2, 2, 16)" in sample.coverage["blocks.1.attn"].reason


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"probe": torch.zeros(2, 1, dtype=torch.long)}, "fewer than 2 tokens"),
        ({"probe": token_batch().float()}, r"probe=tensor \(3, 24\) float32: TinyGPT rejects this batch"),
        ({"probe": token_batch(length=33)}, r"rejects this batch: IndexError.*longer than the model's positions"),
        ({"schedule": 0}, r"every\(0\) needs a whole number"),
        ({"metrics": ["key_incoherance"]}, "unknown metric 'key_incoherance'; did you mean 'key_incoherence'"),
        ({"metrics": []}, r"metrics=\[\] names no metric"),
        ({"loggers": [object()]}, "loggers: object has neither log_sample"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"model": nn.Linear(4, 4), "probe": torch.randn(2, 4)}, "model=Linear: no attention was seen"),
        ({"model": "gpt2"}, "model=str is not a torch.nn.Module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_and_quoted(arguments: dict[str, Any], message: str) -> None:
    arguments = {"model": TinyGPT(), "probe": token_batch(), **arguments}
    with pytest.raises(ValueError, match=message):
        AttentionMonitor(arguments.pop("model"), arguments.pop("probe"), **arguments)


# State


def test_unknown_partitioning_is_refused() -> None:
    model = TinyGPT()
    model.head.weight.ds_id = 7  # as DeepSpeed ZeRO-3 marks them
    with pytest.raises(ValueError, match=r"model=TinyGPT: head.weight is partitioned by DeepSpeed ZeRO-3"):
        monitor_of(model)


def test_resumed_run_has_no_gap_and_no_duplicate() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = attach(model, optimizer, token_batch(), every_n_steps=2)
    train(model, optimizer, 4)
    state = saved_and_loaded(first.state_dict())
    first.close()

    second = attach(model, optimizer, token_batch(), every_n_steps=2)
    second.load_state_dict(state)
    train(model, optimizer, 4)
    second.close()
    assert second.history.steps == [0, 2, 4, 6, 8]
    assert second.history["key_incoherence"]["blocks.0.attn"].shape == (5, 4)
    assert second.record_path == first.record_path
    record = RunRecord.open(second.record_path)
    assert list(record.steps) == [0, 2, 4, 6, 8]
    for metric in DEFAULT_METRICS:
        for layer, trajectory in record.trajectories(metric).items():
            torch.testing.assert_close(torch.from_numpy(trajectory), second.history[metric][layer], rtol=0, atol=0)


def test_history_of_another_probe_is_not_loaded() -> None:
    model = TinyGPT()
    state = monitor_of(model).state_dict()
    other = monitor_of(model, probe=token_batch(seed=5))
    with pytest.warns(UserWarning, match="the probe was .* history and alert baselines begin anew"):
        other.load_state_dict(state)
    assert len(other.history) == 0


def test_state_of_the_previous_version_is_loaded() -> None:
    first = monitor_of(TinyGPT())
    first.sample(0), first.sample(1)
    state = first.state_dict()
    counts = state.pop("summary")
    older = {**state, **{name: counts[name] for name in ("num_samples", "num_cleared", "num_failed")}}
    second = monitor_of(TinyGPT())
    second.load_state_dict(saved_and_loaded(older))
    assert second.summary.num_samples == 2
    assert second.sample(2).verdict.startswith("unknown: 8 heads in 2 layers watched over 3 samples")


@pytest.mark.parametrize("alerts", [{}, {"recent": {}, "rules": {}}, {"past": {"heads": {}}, "rules": 3}, None])
def test_unreadable_alert_state_begins_anew(alerts: Any) -> None:
    first = monitor_of(TinyGPT(), alerts=True)
    first.sample(0), first.sample(1)
    second = monitor_of(TinyGPT(), alerts=True)
    with pytest.warns(UserWarning, match="alert baselines begin anew") as caught:
        second.load_state_dict({**first.state_dict(), "alerts": alerts})
    assert len(caught) == 1
    assert second.history.steps == [0, 1]
    assert second.sample(2).failure is None
    assert second.failures == 0


def test_state_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="state: format None is not 1"):
        monitor_of(TinyGPT()).load_state_dict({})


@pytest.mark.parametrize(
    ("changed", "quoted"),
    [
        (lambda state: None, "state=None is a NoneType"),
        (lambda state: list(state), r"state=\['format', .* is a list"),
        (lambda state: {"format": 1, "step": 7}, "state holds format, step, and no global_step, failures, "),
        (lambda state: {**state, "global_step": "7"}, r"state\['global_step'\]='7' is a str"),
        (lambda state: {**state, "history": [1]}, r"state\['history'\]=\[1\] is a list"),
    ],
)
def test_changed_state_is_refused_with_what_arrived(changed: Callable[[dict[str, Any]], Any], quoted: str) -> None:
    monitor = monitor_of(TinyGPT())
    with pytest.raises(ValueError, match=rf"^{quoted}.*; give what `state_dict\(\)` returned"):
        monitor.load_state_dict(changed(monitor.state_dict()))
    assert monitor.global_step == -1


@pytest.mark.parametrize(("part", "value"), [("history", {}), ("history", {"steps": [0, 1]}), ("logged", {"loss": 3})])
def test_unreadable_part_of_a_state_begins_anew(part: str, value: Any) -> None:
    monitor, other = monitor_of(TinyGPT()), monitor_of(TinyGPT())
    monitor.sample(0)
    with pytest.warns(UserWarning, match=f"the state of '{part}' cannot be read .*: it begins anew"):
        other.load_state_dict({**monitor.state_dict(), part: value})
    other.sample(1)
    assert other.history.steps == ([1] if part == "history" else [0, 1])
    assert other.failures == 0


def test_steps_are_asked_once_and_skipped_ones_too() -> None:
    monitor = monitor_of(TinyGPT(), schedule=[0, 5])
    assert monitor.on_step(0) is not None
    assert monitor.on_step(0) is None
    assert monitor.on_step(4) is None
    assert monitor.on_step(6).global_step == 6
    assert monitor.history.steps == [0, 6]


def test_two_named_monitors_run_side_by_side() -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    short = attach(model, optimizer, token_batch(length=8), every_n_steps=1, name="short")
    long = attach(model, optimizer, token_batch(length=32), every_n_steps=2, name="long")
    train(model, optimizer, 4)
    assert short.history.steps == [0, 1, 2, 3, 4]
    assert long.history.steps == [0, 2, 4]
    assert short.record_path != long.record_path
    short.close()
    train(model, optimizer, 2)
    assert short.history.steps[-1] == 4
    assert long.history.steps[-1] == 6
    long.close()
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_record_path_is_kept_and_none_writes_nothing(tmp_path: Any) -> None:
    with monitor_of(TinyGPT(), record=tmp_path / "mine.sqlite") as monitor:
        monitor.sample(3)
    assert list(RunRecord.open(tmp_path / "mine.sqlite").steps) == [3]
    with monitor_of(TinyGPT()) as monitor:
        monitor.sample(3)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.sqlite"]


def test_seconds_are_those_of_all_samples() -> None:
    monitor = AttentionMonitor(TinyGPT(), token_batch(), record=None)
    samples = [monitor.sample(step) for step in range(3)]
    assert all(sample.seconds > 0 for sample in samples)
    assert monitor.seconds == pytest.approx(sum(sample.seconds for sample in samples))
    assert all(0 < sample.diagnostics["overhead"] <= 1 for sample in samples)


def test_history_is_bounded() -> None:
    from attnmonitor.record.history import History

    monitor = monitor_of(TinyGPT(), metrics=["energy_rms"])
    history = History(monitor.history.num_heads, ("energy_rms",), max_samples=3)
    for step in range(5):
        history.append(monitor.sample(step))
    assert history.steps == [2, 3, 4]
    assert history["energy_rms"]["blocks.0.attn"].shape == (3, 4)
    with pytest.raises(KeyError, match="key_rank"):
        history["key_rank"]


def test_history_in_a_checkpoint_is_bounded_in_bytes() -> None:
    from attnmonitor.record.history import History

    num_heads = {f"layers.{i}": {"query_head": 128, "kv_head": 8} for i in range(126)}  # of a model of 405B parameters
    metrics = ("energy_rms", "energy_effective_rank", "key_rms")
    sample_bytes = 4 * 126 * (128 + 128 + 8)
    history = History(num_heads, metrics, max_state_bytes=20 * sample_bytes + 1)
    nothing = {"energy_rms": {layer: torch.ones(128) for layer in num_heads}}
    for step in range(50):
        history.append(Sample(step, nothing))
    state = history.state_dict()
    assert state["steps"] == list(range(30, 50))
    assert sum(table.nbytes for table in state["values"].values()) == 20 * sample_bytes
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 21 * sample_bytes
    assert len(history) == 50
    resumed = History(num_heads, metrics)
    resumed.load_state_dict(state)
    assert resumed.steps == list(range(30, 50))
    assert resumed["energy_rms"]["layers.7"].shape == (20, 128)
    assert History(num_heads, metrics, max_state_bytes=1).state_dict()["steps"] == []
    tiny = History(num_heads, metrics, max_state_bytes=1)
    tiny.append(Sample(3, nothing))
    assert tiny.state_dict()["steps"] == [3]
