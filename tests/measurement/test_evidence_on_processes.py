"""The evidence of an alarm where several processes share a model: one of them has it, and none waits for another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, token_batch
from processes import ON_TWO, on_processes, spread, tell

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold

LARGE = Rule(
    "large",
    "logit_blowup",
    "query_head",
    Threshold("query_rms", "value", "identity", fire_above=5.0, clear_below=5.0),
    patience=1,
    grace=0,
)


def _one_alarm(rank: int, how: str) -> dict[str, Any]:
    tell(how)
    torch.manual_seed(0)
    model = TinyGPT()
    with torch.no_grad():
        model.blocks[1].attn.q_proj.weight[16:24] *= 100
    monitor = AttentionMonitor(spread(model, how), token_batch(), alerts=[LARGE], record=None, strict=True)
    samples = [monitor.sample(step) for step in range(2)]
    try:
        asked = repr(monitor.inspect("blocks.1.attn", 2))
    except RuntimeError as error:
        asked = str(error)
    return {
        "taken": [(each.layer, each.head, each.positions) for sample in samples for each in sample.evidence],
        "events": [len(sample.events) for sample in samples],
        "asked": asked,
    }


def _everything(rank: int) -> dict[str, Any]:
    return {how: _one_alarm(rank, how) for how in ON_TWO}


def test_one_process_has_the_evidence_and_none_waits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    with torch.no_grad():
        model.blocks[1].attn.q_proj.weight[16:24] *= 100
    alone = AttentionMonitor(model, token_batch(), record=None, alerts=False).inspect("blocks.1.attn", 2)
    first, second = on_processes(tmp_path, _everything)
    for how in ON_TWO:
        assert first[how]["events"] == [1, 0]
        assert second[how]["taken"] == []
        if how == "tp":
            assert first[how]["taken"] == [], "the heads of the layer are divided over processes"
        else:
            [(layer, head, positions)] = first[how]["taken"]
            assert (layer, head) == ("blocks.1.attn", 2)
            for found, expected in zip(positions, alone.positions, strict=True):
                assert found == pytest.approx(expected)
        assert ("head 2 at step" if how == "ddp" else "needs all processes") in first[how]["asked"]
        assert ("measures nothing" if how == "ddp" else "needs all processes") in second[how]["asked"]
