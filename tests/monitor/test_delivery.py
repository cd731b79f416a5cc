"""What follows from a sample: alerts, actions and requests; opt-in and weight metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import wandb
from lightning_run import HELD_OUT, LIGHTNING_WARNINGS, Module, fit
from models import TinyGPT, token_batch, train
from wandb_files import curve, offline_run

from attnmonitor import OPT_IN_METRICS, WEIGHT_METRICS, AlertEvent, AttentionMonitor, Sample
from attnmonitor.alerts import DEFAULT_RULES, Rule, Threshold
from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.loggers import WandbLogger

pytestmark = LIGHTNING_WARNINGS

FAINT = Rule(
    "faint_query",
    "dead_head",
    "query_head",
    Threshold("query_rms", signal="value", fire_below=-7.0, clear_above=-6.0),
    patience=1,
    grace=0,
)


def kill_head(model: TinyGPT, head: int = 2) -> None:
    """Scale the queries of one head of the last layer to nearly zero."""
    attention = model.blocks[-1].attn
    rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
    with torch.no_grad():
        attention.q_proj.weight[rows] *= 1e-5
        attention.q_proj.bias[rows] *= 1e-5


def test_opt_in_metrics_equal_the_dense_softmax() -> None:
    model = TinyGPT(num_kv_heads=2)
    inputs: dict[str, Any] = {}
    attention = model.blocks[1].attn
    attention.register_forward_pre_hook(lambda module, args: inputs.__setitem__("x", args[0]))
    sample = AttentionMonitor(model, token_batch(), metrics=OPT_IN_METRICS, record=None, strict=True).sample(0)
    query, key, _ = (heads.double() for heads in attention.heads(inputs["x"]))
    logits = query @ key.repeat_interleave(2, 1).mT * 8**-0.5
    visible = torch.ones(24, 24, dtype=torch.bool).tril()
    probability = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = {
        "attention_entropy": torch.special.entr(probability).sum(-1).mean((0, 2)),
        "max_logit": logits.masked_fill(~visible, -torch.inf).amax((-1, -2)).mean(0),
        "sink_mass": probability[..., 0].mean((0, 2)),
    }
    for metric, values in expected.items():
        torch.testing.assert_close(sample.values[metric]["blocks.1.attn"].double(), values, rtol=1e-5, atol=1e-6)


def test_weight_metrics_equal_a_dense_svd_every_n_samples() -> None:
    model = TinyGPT(num_kv_heads=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    metrics = ["energy_effective_rank", *WEIGHT_METRICS]
    monitor = attach(
        model, optimizer, token_batch(), every_n_steps=1, metrics=metrics, weights_every=3, record=None, strict=True
    )
    train(model, optimizer, 6)
    ranks = monitor.history["interaction_effective_rank"]["blocks.0.attn"]
    assert ranks.isnan().all(1).tolist() == [False, True, True, False, True, True, False]
    attention = model.blocks[0].attn
    gain = model.blocks[0].norm1.weight.double()
    for head in range(4):
        w_q = attention.q_proj.weight.double().unflatten(0, (4, 8))[head] * gain
        w_k = attention.k_proj.weight.double().unflatten(0, (2, 8))[head // 2] * gain
        variances = torch.linalg.svdvals(w_q.T @ w_k) ** 2
        assert ranks[-1, head] == 1 + (variances.cumsum(0) < 0.9 * variances.sum()).sum()
        participation = variances.sum() ** 2 / (variances**2).sum()
        found = monitor.history["interaction_participation_ratio"]["blocks.0.attn"][-1, head].double()
        torch.testing.assert_close(found, participation.detach(), rtol=1e-5, atol=0)
    gap = ranks[-1] / monitor.history["energy_effective_rank"]["blocks.0.attn"][-1]
    assert torch.equal(monitor.history["spectral_gap"]["blocks.0.attn"][-1], gap)
    monitor.close()


def test_undecided_sketch_grows_in_the_next_sample() -> None:
    torch.manual_seed(0)
    model = TinyGPT(width=1024, num_query_heads=2, max_length=600)  # d = 512: sketched on a CPU, too
    with torch.no_grad():  # flat spectra are the hardest to decide from a few columns
        model.tokens.weight.normal_(), model.positions.weight.normal_()
    monitor = AttentionMonitor(model, token_batch(batch=1, length=600), record=None, strict=True)
    fractions = [monitor.sample(step).diagnostics["decided_fraction"] for step in range(4)]
    assert fractions[0] < 1
    assert fractions[-1] == 1


def test_alert_reaches_sample_record_and_wandb_once(in_own_folder: Path) -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with wandb.init(project="test", dir=in_own_folder) as run:
        monitor = attach(
            model, optimizer, token_batch(), every_n_steps=1, alerts=[FAINT], loggers=WandbLogger(run, image_share=0)
        )
        train(model, optimizer, 1)
        kill_head(model)
        train(model, optimizer, 3)
        monitor.close()
    from attnmonitor.record import RunRecord

    [event] = RunRecord.open(monitor.record_path).events
    assert (event.rule, event.layer, event.head, event.global_step, event.state) == (
        "faint_query",
        "blocks.1.attn",
        2,
        2,
        "firing",
    )
    assert [(firing.rule, firing.head) for firing in monitor.firing] == [("faint_query", 2)]
    logged = offline_run(in_own_folder)
    [(title, text, _)] = logged["alerts"]
    assert "faint_query" in title
    assert "blocks.1.attn head 2" in text
    assert curve(logged, "attention/alerts/firing") == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert curve(logged, "attention/alerts/new") == {0: 0, 1: 0, 2: 1, 3: 0, 4: 0}


def test_actions_run_once_and_their_failure_is_contained() -> None:
    calls: list[tuple[AlertEvent, Sample]] = []

    def broken(event: AlertEvent, sample: Sample) -> None:
        raise RuntimeError("pager is down")

    model = TinyGPT()
    actions = {"dead_head": ["stop", broken], "faint_query": lambda event, sample: calls.append((event, sample))}
    monitor = AttentionMonitor(model, token_batch(), alerts=[FAINT], actions=actions, record=None)
    assert monitor.sample(0).requests == ()
    kill_head(model)
    with pytest.warns(UserWarning, match="broken failed and was ignored: RuntimeError: pager is down"):
        sample = monitor.sample(1)
    assert sample.requests == ("stop",)
    assert monitor.should_stop
    [(event, given)] = calls
    assert (event.head, given.global_step) == (2, 1)
    assert monitor.sample(2).requests == ()


def test_alerts_and_recoveries_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="attnmonitor")
    model = TinyGPT()
    healthy = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monitor = AttentionMonitor(model, token_batch(), alerts=[FAINT], record=None)
    kill_head(model)
    monitor.sample(0), monitor.sample(1)
    model.load_state_dict(healthy)
    monitor.sample(2)
    assert [(entry.levelname, entry.name) for entry in caplog.records] == [
        ("WARNING", "attnmonitor.alerts.notifications"),
        ("INFO", "attnmonitor.alerts.notifications"),
    ]
    assert "blocks.1.attn head 2: alarm" in caplog.text
    assert "recovered" in caplog.records[1].getMessage()


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (
            {"no_such_rule": "stop"},
            "actions: 'no_such_rule' is no rule and no fault kind; there are critical, dead_head",
        ),
        ({"dead_head": "halt"}, r"actions\['dead_head'\]: 'halt' is none of"),
    ],
)
def test_bad_actions_are_refused_at_construction(actions: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionMonitor(TinyGPT(), token_batch(), alerts=[FAINT], actions=actions, record=None)


def test_rule_on_an_unmeasured_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="rule 'faint_query' watches 'query_rms', which is not measured"):
        AttentionMonitor(TinyGPT(), token_batch(), alerts=[FAINT], metrics=["key_rank"], record=None)
    AttentionMonitor(TinyGPT(), token_batch(), metrics=["key_rank"], record=None).sample(0)
    # An optional rule is off where its metric is not measured.
    AttentionMonitor(TinyGPT(), token_batch(), alerts=[*DEFAULT_RULES, FAINT], record=None).sample(0)


def test_lightning_stops_and_saves_on_an_alert(tmp_path: Path) -> None:
    class DyingHead(Module):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            if self.global_step >= 2:
                kill_head(self.gpt)

    watcher = AttentionMonitorCallback(
        HELD_OUT, every_n_steps=1, alerts=[FAINT], actions={"dead_head": ["checkpoint", "stop"]}
    )
    trainer: lightning.Trainer = fit(DyingHead(), watcher, default_root_dir=tmp_path)
    assert trainer.global_step == 3
    assert (tmp_path / "attention-alert-step-3.ckpt").exists()
