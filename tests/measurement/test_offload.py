"""Weights that accelerate keeps elsewhere: between forwards they are on `meta`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from models import TinyGPT, token_batch

from attnmonitor import AttentionMonitor


def offloaded(model: TinyGPT, how: str, folder: Path) -> TinyGPT:
    if how == "all":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        places = {"tokens": "cpu", "positions": "cpu", "blocks.0": "disk", "blocks.1": "cpu", "head": "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


@pytest.mark.parametrize("how", ["all", "some to disk"])
@pytest.mark.parametrize("attached", ["before", "after"])
def test_offloaded_model_has_the_numbers_of_the_whole_one(how: str, attached: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TinyGPT()
    expected = AttentionMonitor(model, token_batch(), record=None).sample(0)
    monitor = AttentionMonitor(model, token_batch(), record=None, strict=True) if attached == "before" else None
    offloaded(model, how, tmp_path)
    monitor = monitor or AttentionMonitor(model, token_batch(), record=None, strict=True)
    sample = monitor.sample(0)
    assert any(parameter.is_meta for parameter in model.parameters())
    for metric, layers in expected.values.items():
        for layer, values in layers.items():
            assert torch.equal(sample.values[metric][layer], values)


def test_model_whose_weights_hold_no_numbers_is_refused() -> None:
    with torch.device("meta"):
        model = TinyGPT()
    with pytest.raises(ValueError, match=r"model=TinyGPT: its weights are on 'meta', without numbers; load them"):
        AttentionMonitor(model, token_batch(), record=None)
