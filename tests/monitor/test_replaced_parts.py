"""What is trained changes after attach: one warning with the way out."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from models import TinyGPT, token_batch
from trainer_run import trainer_of
from transformers import TrainerCallback

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.transformers import AttentionMonitorCallback


def test_layers_after_attach_lead_to_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    model = TinyGPT()
    with AttentionMonitor(model, token_batch(), record=None) as monitor:
        model.blocks.append(copy.deepcopy(model.blocks[0]))
        monitor.sample(1), monitor.sample(2)
    assert caplog.text.count("not there at attach are not measured: blocks.2") == 1


def test_replaced_model_leads_to_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Replace(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                trainer.callback_handler.model = copy.deepcopy(kwargs["model"])

    trainer = trainer_of(tmp_path, Replace(), AttentionMonitorCallback(every_n_steps=1, record=None))
    trainer.train()
    assert caplog.text.count("the model that is trained was replaced") == 1
