"""`key_condition_number`: opt-in, recorded, and open to rules by its name alone."""

from __future__ import annotations

from pathlib import Path

import torch
from models import TinyGPT, token_batch

from attnmonitor import DEFAULT_METRICS, OPT_IN_METRICS, AttentionMonitor
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.functional import key_condition_number
from attnmonitor.loggers.keys import summary_scalars
from attnmonitor.metrics import METRIC_CLASSES, KeyConditionNumber
from attnmonitor.record import RunRecord

RULE = Rule(
    "stretched_keys",
    "stretched_keys",
    "kv_head",
    Threshold("key_condition_number", "value", "identity", fire_above=100.0, clear_below=50.0),
    patience=1,
    grace=0,
    optional=True,
)


def test_condition_number_is_opt_in() -> None:
    assert "key_condition_number" in OPT_IN_METRICS
    assert "key_condition_number" not in DEFAULT_METRICS
    assert METRIC_CLASSES["key_condition_number"] is KeyConditionNumber


def test_condition_number_is_nan_without_a_direction() -> None:
    key = torch.randn(2, 3, 20, 4, generator=torch.Generator().manual_seed(0))
    key[0, 1] = 0.1
    key[1, 2, 5] = torch.inf
    found = key_condition_number(key)
    assert found.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert (found[~found.isnan()] >= 1).all()


def test_user_rule_on_condition_number_fires(tmp_path: Path) -> None:
    model, path = TinyGPT(num_kv_heads=2), tmp_path / "run.sqlite"
    metrics = [*DEFAULT_METRICS, "key_condition_number"]
    with AttentionMonitor(model, token_batch(), metrics=metrics, alerts=[RULE], record=path, strict=True) as monitor:
        assert monitor.sample(0).events == []
        with torch.no_grad():
            model.blocks[1].attn.k_proj.weight[:8] *= torch.logspace(0, -4, 8)[:, None]  # the first KV head
        sample = monitor.sample(1)
    events = sample.events
    assert any("key_condition_number" in key for key in summary_scalars(sample))
    assert [(event.rule, event.layer, event.head) for event in events] == [("stretched_keys", "blocks.1.attn", 0)]
    assert RunRecord.open(path).trajectories("key_condition_number")["blocks.1.attn"].shape == (2, 2)


def test_optional_rule_is_skipped_without_its_metric() -> None:
    with AttentionMonitor(TinyGPT(), token_batch(), alerts=[RULE], record=None, strict=True) as monitor:
        assert monitor.sample(0).events == []
