"""What is kept of a head when its alarm begins: from the same forward, bounded, contained, and without a trace."""

from __future__ import annotations

import copy
import io
import math
import random
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import TinyGPT, everything, token_batch, train
from torch import Tensor, nn

from attnmonitor import AttentionMonitor, HeadEvidence
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.record import RunRecord

ABOVE = Threshold("query_rms", "value", "identity", fire_above=5.0, clear_below=5.0)
LARGE = Rule("large", "logit_blowup", "query_head", ABOVE, patience=1, grace=0)
LARGE_KEYS = Rule("large_keys", "logit_blowup", "kv_head", replace(ABOVE, metric="key_rms"), patience=1, grace=0)
LARGE_LATER = Rule("large_later", "logit_blowup", "query_head", ABOVE, patience=2, grace=0)
EVERY_HEAD = Rule(
    "every",
    "logit_blowup",
    "query_head",
    Threshold("query_rms", "value", "identity", fire_above=0.0, clear_below=0.0),
    patience=1,
    grace=0,
)


def watched(model: nn.Module, *, alerts: Any = (LARGE,), **settings: Any) -> AttentionMonitor:
    return AttentionMonitor(model, token_batch(), 1, alerts=alerts, **{"record": None, "strict": True, **settings})


def break_head(model: TinyGPT, layer: int = 1, head: int = 2, factor: float = 100.0) -> None:
    with torch.no_grad():
        model.blocks[layer].attn.q_proj.weight[8 * head : 8 * head + 8] *= factor


def same(one: HeadEvidence, other: HeadEvidence) -> bool:
    tensors = all(
        torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        for a, b in ((one.attention, other.attention), (one.singular_values, other.singular_values))
    )
    parts = ("layer", "head", "num_keys", "rows", "sequence", "group")
    return (
        tensors
        and repr(one.positions) == repr(other.positions)
        and all(getattr(one, part) == getattr(other, part) for part in parts)
    )


@pytest.mark.parametrize(("rule", "steps"), [(LARGE, 1), (LARGE_LATER, 2)])
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_evidence_is_of_the_forward_that_alarmed(num_kv_heads: int, rule: Rule, steps: int) -> None:
    model = TinyGPT(num_kv_heads=num_kv_heads)
    monitor = watched(model, alerts=[rule])
    healthy = monitor.sample(0)
    assert healthy.evidence == []
    before = monitor.inspect("blocks.1.attn", 2)
    break_head(model)
    forwards: list[int] = []
    model.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    samples = [monitor.sample(step) for step in range(1, steps + 2)]
    assert len(forwards) == len(samples), "one forward per sample"
    [evidence] = [each for sample in samples for each in sample.evidence]
    assert (evidence.layer, evidence.head, evidence.rule) == ("blocks.1.attn", 2, rule.name)
    assert evidence.global_step == steps
    assert same(evidence, monitor.inspect("blocks.1.attn", 2))
    assert not same(evidence, before)


def test_evidence_has_the_last_healthy_sample() -> None:
    model = TinyGPT()
    monitor = watched(model)
    for step in range(65):  # each layer is looked at once in 64 samples
        monitor.sample(step)
    before = monitor.inspect("blocks.1.attn", 2)
    break_head(model)
    [evidence] = monitor.sample(65).evidence
    assert evidence.healthy is not None
    assert same(evidence.healthy, before)
    assert evidence.healthy.rule is None
    assert evidence.healthy.global_step < 65
    assert evidence.healthy.healthy is None
    break_head(model, head=1)
    [second] = monitor.sample(66).evidence
    assert second.head == 1


def test_head_in_alarm_is_not_taken_for_healthy() -> None:
    model = TinyGPT(num_layers=1)
    break_head(model, layer=0)
    monitor = watched(model)
    for step in range(130):
        monitor.sample(step)
    break_head(model, layer=0, factor=0.01)
    cleared = monitor.sample(130)
    assert [event.state for event in cleared.events] == ["cleared"]
    assert cleared.evidence == []
    break_head(model, layer=0)
    [evidence] = monitor.sample(131).evidence
    assert evidence.healthy is None, "it was never looked at while it was well"


def test_head_that_may_alarm_next_is_not_taken_for_healthy() -> None:
    model = TinyGPT(num_layers=1)
    break_head(model, layer=0)
    monitor = watched(model, alerts=[replace(LARGE, patience=80)])
    [evidence] = [each for step in range(80) for each in monitor.sample(step).evidence]
    assert evidence.global_step == 79
    assert evidence.healthy is None, "its condition was violated in every sample"


def test_key_head_shared_by_query_heads_has_a_healthy_sample() -> None:
    model = TinyGPT(num_layers=1, num_kv_heads=2)
    monitor = watched(model, alerts=[LARGE_KEYS])
    monitor.sample(0)
    before = monitor.inspect("blocks.0.attn", 1, scope="kv_head")
    with torch.no_grad():
        model.blocks[0].attn.k_proj.weight[8:] *= 100
    [evidence] = monitor.sample(1).evidence
    assert (evidence.scope, evidence.head) == ("kv_head", 1)
    assert evidence.healthy is not None
    assert same(evidence.healthy, before)


def test_evidence_is_bounded_per_sample_and_run(tmp_path: Path) -> None:
    model = TinyGPT(num_layers=4, width=64, num_query_heads=8)
    monitor = watched(model, alerts=[EVERY_HEAD], record=tmp_path / "run.sqlite")
    sample = monitor.sample(0)
    assert len(sample.events) == 32
    assert len(sample.evidence) == 8
    rules = [Rule(f"rule {number}", "dead_head", "query_head", ABOVE, patience=1, grace=0) for number in range(120)]
    monitor = watched(TinyGPT(num_layers=1), alerts=rules)
    break_head(monitor.model, layer=0)  # type: ignore[arg-type]
    first = monitor.sample(0)
    assert len(first.evidence) == 120, "several rules about one head look at it once"
    break_head(monitor.model, layer=0, head=1)  # type: ignore[arg-type]
    assert len(monitor.sample(1).evidence) == 80
    break_head(monitor.model, layer=0, head=0)  # type: ignore[arg-type]
    assert len(monitor.sample(2).evidence) == 0


def test_count_of_evidence_goes_on_after_a_resume() -> None:
    model = TinyGPT(num_layers=1)
    rules = [Rule(f"rule {n}", "dead_head", "query_head", ABOVE, patience=1, grace=0) for n in range(120)]
    monitor = watched(model, alerts=rules)
    break_head(model, layer=0)
    monitor.sample(0)
    buffer = io.BytesIO()
    torch.save(monitor.state_dict(), buffer)
    buffer.seek(0)
    resumed = watched(model, alerts=rules)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    break_head(model, layer=0, head=1)
    assert len(resumed.sample(1).evidence) == 80
    state = monitor.state_dict()
    del state["evidence"]  # of the version before
    watched(model, alerts=rules).load_state_dict(state)


def test_layer_that_was_not_kept_is_looked_at_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one_layer = 2 * 3 * 4 * 24 * 8 * 4 + 2 * 3 * 4 * 8 * 24 * 4
    monkeypatch.setattr("attnmonitor.measurement.kept.MOST_BYTES", one_layer)
    model = TinyGPT(num_layers=3)
    monitor = watched(model)
    monitor.sample(0), monitor.sample(1)
    break_head(model, layer=2)
    assert monitor.sample(2).evidence == [], "the first layer took the room"
    [evidence] = monitor.sample(3).evidence
    assert (evidence.layer, evidence.global_step) == ("blocks.2.attn", 3)
    later = watched(TinyGPT(num_layers=3), alerts=[LARGE_LATER])
    break_head(later.model, layer=2)  # type: ignore[arg-type]
    later.sample(0)
    [evidence] = later.sample(1).evidence  # pending in the sample before: its layer comes first
    assert (evidence.layer, evidence.global_step) == ("blocks.2.attn", 1)


def test_head_that_is_not_finite_names_its_positions() -> None:
    model = TinyGPT()
    monitor = watched(model, alerts=True, decode=str)
    monitor.sample(0)

    def spoil(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, 7, 8:16] = torch.nan
        return output

    model.blocks[1].attn.k_proj.register_forward_hook(spoil)
    [evidence] = monitor.sample(1).evidence
    assert (evidence.rule, evidence.head) == ("non_finite", 1)
    sequence, position, leverage, share, token = evidence.positions[0]
    assert (sequence, position, token) == (1, 7, str(int(token_batch()[1, 7])))
    assert math.isnan(leverage)
    assert math.isnan(share)
    assert evidence.attention.isnan().any()
    assert "nan" in str(evidence)


def test_dead_head_has_no_leading_positions() -> None:
    model = TinyGPT(num_layers=1)
    with torch.no_grad():
        model.blocks[0].attn.k_proj.weight[:8], model.blocks[0].attn.k_proj.bias[:8] = 0, 0
    evidence = watched(model).inspect("blocks.0.attn", 0)
    assert evidence.positions == []
    assert not evidence.singular_values.any()
    assert "keys or queries are zero" in str(evidence)


class Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return f"<{tokens[0]}>"


def only_lists(tokens: Any) -> str:
    return f"<{tokens[0]}>"


def fails(token: int) -> str:
    raise RuntimeError("no such token")


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        (lambda token: f"<{token}>", "<{}>"),
        (Tokenizer(), "<{}>"),
        (Tokenizer().decode, "<{}>"),
        (only_lists, "<{}>"),
        (str, "{}"),
        (lambda token: "\x1b[2J\n", r"\x1b[2J\n"),
        (lambda token: "long" * 1000, "longlonglonglonglonglon…"),
        (lambda token: Text("word"), "word"),
        (None, None),
        (fails, None),
        (lambda token: 3, None),
        (lambda token: b"word", None),
    ],
)
def test_tokens_come_from_any_decoder(decode: Any, expected: str | None) -> None:
    model = TinyGPT()
    monitor = watched(model, decode=decode, strict=False)
    fails_to_decode = expected is None and decode is not None
    with pytest.warns(AttentionMonitorWarning, match="decode") if fails_to_decode else nullcontext():
        evidence, *_ = [monitor.inspect("blocks.0.attn", head) for head in range(2)]
    assert len(evidence.positions) >= 8
    for sequence, position, _, _, token in evidence.positions:
        assert token == (None if expected is None else expected.format(int(token_batch()[sequence, position])))
    assert str(evidence).replace("\n", "").isprintable()
    break_head(model)
    assert len(monitor.sample(0).evidence) == 1, "with one warning for the whole run"


def test_wrong_decoder_is_refused() -> None:
    for decode in ("gpt2", 3, {1: "a"}):
        with pytest.raises(ValueError, match=r"decode=.* is neither a function nor a tokenizer; give decode=tokenizer"):
            watched(TinyGPT(), decode=decode)


def test_failing_evidence_costs_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("attnmonitor.monitor.evidence.evidence_of", broken)
    model = TinyGPT()
    monitor = watched(model, strict=False)
    with pytest.warns(AttentionMonitorWarning, match="the evidence of healthy heads failed and was ignored"):
        monitor.sample(0)
    break_head(model)
    with pytest.warns(AttentionMonitorWarning, match="the evidence of an alarm failed and was ignored: .*out of luck"):
        sample = monitor.sample(1)
    assert sample.evidence == []
    assert [event.rule for event in sample.events] == ["large"]
    assert sample.failure is None
    assert monitor.failures == 2
    with pytest.raises(RuntimeError, match="out of luck"):
        monitor.inspect("blocks.0.attn", 0)


def test_training_with_evidence_is_bit_identical() -> None:
    def draws(token: int) -> str:
        return f"{torch.rand(())}{random.random()}{np.random.random()}"

    ends = []
    for watch in (False, True):
        torch.manual_seed(0)
        model = TinyGPT(dropout=0.2, batch_norm=True)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        if watch:
            monitor = attach(
                model, optimizer, token_batch(), every_n_steps=1, alerts=[EVERY_HEAD], record=None, decode=draws
            )
            optimizer.register_step_post_hook(lambda *_, monitor=monitor: monitor.inspect("blocks.1.attn", 0))
        train(model, optimizer, 3)
        if watch:
            assert len(monitor.firing) == 8
            monitor.close()
        ends.append(everything(model, optimizer))
    assert len(ends[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("blocks.1", 0), r"layer='blocks.1' is not an attention layer of this model; did you mean 'blocks.1.attn'"),
        ((7, 0), "layer=7 is not an attention layer"),
        (("blocks.1.attn", 4), r"head=4: blocks.1.attn has the heads 0 to 3"),
        (("blocks.1.attn", -1), r"head=-1: blocks.1.attn has the heads 0 to 3"),
        (("blocks.1.attn", "first"), r"head='first'"),
        (("blocks.1.attn", True), r"head=True"),
    ],
)
def test_wrong_layer_or_head_is_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        watched(TinyGPT()).inspect(*arguments)
    with pytest.raises(ValueError, match=r"head=2: blocks.0.attn has the KV heads 0 to 1"):
        watched(TinyGPT(num_kv_heads=2)).inspect("blocks.0.attn", 2, scope="kv_head")
    with pytest.raises(ValueError, match="scope='head'; give 'query_head' or 'kv_head'"):
        watched(TinyGPT()).inspect("blocks.0.attn", 2, scope="head")  # type: ignore[arg-type]


def test_copy_of_a_monitor_says_that_it_has_no_model() -> None:
    monitor = copy.deepcopy(watched(TinyGPT(), decode=lambda token: "a"))
    monitor.state_dict()
    with pytest.raises(RuntimeError, match="this monitor is a copy, without a model"):
        monitor.inspect("blocks.0.attn", 0)


def test_evidence_prints_in_80_columns() -> None:
    model = TinyGPT()
    layer = "a" * 90
    evidence = watched(model, decode=lambda token: "\x1b" * 30).inspect("blocks.1.attn", 2)
    text = str(evidence)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert "blocks.1.attn head 2" in text
    assert "sequence" in text
    assert max(map(len, str(replace(evidence, layer=layer, rule="rule", healthy=evidence)).splitlines())) <= 80
    assert len(repr(evidence)) < 120


def test_evidence_of_alarms_is_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    model = TinyGPT()
    monitor = watched(model, record=path, decode=lambda token: f"<{token}>")
    for step in range(65):
        monitor.sample(step)
    assert RunRecord.open(path).evidence == []
    break_head(model)
    [given] = monitor.sample(65).evidence
    monitor.close()
    [found] = RunRecord.open(path).evidence
    assert found.healthy is not None
    assert given.healthy is not None
    for one, other in ((found, given), (found.healthy, given.healthy)):
        assert (one.layer, one.head, one.scope, one.rule, one.global_step, one.rows, one.num_keys) == (
            other.layer, other.head, other.scope, other.rule, other.global_step, other.rows, other.num_keys
        )  # fmt: skip
        torch.testing.assert_close(one.attention, other.attention, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(one.singular_values, other.singular_values)
        for own, its in zip(one.positions, other.positions, strict=True):
            assert own == pytest.approx(its)
