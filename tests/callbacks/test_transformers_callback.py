"""The Trainer callback: same numbers, bit-identical training, resumes, reporting, and a probe by default."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch import LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from models import everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer_run import gpt2, llama, texts, trainer_of
from transformers import (
    TrainerCallback,
    default_data_collator,
)
from wandb_files import curve, offline_run

from attnmonitor import DEFAULT_METRICS, AttentionMonitor
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.lightning import AttentionMonitorCallback as LightningCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.callbacks.transformers import AttentionMonitorCallback
from attnmonitor.record import RunRecord


def numbers(values: Any) -> list[Tensor]:
    return [heads for layers in values.values() for heads in layers.values()]


def identical(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# Same names, same numbers


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # Lightning's own use of a torch API
@pytest.mark.parametrize("build", [llama, gpt2])
def test_trainer_lightning_and_raw_loop_are_identical(build: Any, tmp_path: Path) -> None:
    model, probe = build(), default_data_collator(texts(2)[:3])
    raw = attach(copy.deepcopy(model), torch.optim.SGD(model.parameters(), 0.1), probe, record=None).sample(0)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(model)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return self.net(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    # Without a cache, as the monitor calls a model: with one, transformers 4 builds another mask.
    in_lightning = LightningCallback(
        probe, record=None, forward=lambda module, batch: module.net(**batch, use_cache=False)
    )
    LightningTrainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[in_lightning], default_root_dir=tmp_path,
    ).fit(Module(), DataLoader(texts(1), batch_size=2, num_workers=0))  # fmt: skip
    in_trainer = AttentionMonitorCallback(probe, every_n_steps=2)
    trainer = trainer_of(tmp_path, in_trainer, model=copy.deepcopy(model))
    trainer.train()

    assert in_trainer.monitor is not None
    assert in_lightning.monitor is not None
    first = {
        metric: {layer: rows[0] for layer, rows in in_trainer.monitor.history[metric].items()} for metric in raw.values
    }
    assert tuple(first) == DEFAULT_METRICS
    assert list(first["energy_rms"]) == list(raw.values["energy_rms"])
    assert identical(numbers(first), numbers(raw.values))
    in_lightning_first = [[rows[0] for rows in in_lightning.monitor.history[m].values()] for m in raw.values]
    assert identical([heads for rows in in_lightning_first for heads in rows], numbers(raw.values))

    after = AttentionMonitor(trainer.model, probe, record=None).sample(4)
    last = {
        metric: {layer: rows[-1] for layer, rows in in_trainer.monitor.history[metric].items()} for metric in raw.values
    }
    assert identical(numbers(last), numbers(after.values))
    assert not identical(numbers(last), numbers(first))


def test_log_history_has_summaries_at_sampled_steps(tmp_path: Path) -> None:
    callback = AttentionMonitorCallback(every_n_steps=2)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    assert callback.monitor is not None
    rows = [row for row in trainer.state.log_history if "attention/energy_rms/median" in row]
    assert [row["step"] for row in rows] == [row["attention/global_step"] for row in rows] == [0, 2, 4]
    for row, index in zip(rows, range(3), strict=True):
        for metric in DEFAULT_METRICS:
            heads = torch.cat([values[index] for values in callback.monitor.history[metric].values()])
            assert row[f"attention/{metric}/min"] == heads.min()
            assert row[f"attention/{metric}/median"] == pytest.approx(float(heads.quantile(0.5)), rel=1e-6)
            assert row[f"attention/{metric}/max"] == heads.max()
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4]


def test_reporters_get_summaries_and_the_console_does_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Tracker(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[int] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "attention/key_rank/max" in logs:
                self.steps.append(state.global_step)

    tracker = Tracker()
    trainer_of(tmp_path, tracker, AttentionMonitorCallback(every_n_steps=2)).train()
    assert tracker.steps == [0, 2, 4]
    printed = capsys.readouterr().out
    assert "loss" in printed
    assert "attention/" not in printed


def test_tensorboard_gets_summaries_by_report_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))  # transformers 4 writes below output_dir
    trainer_of(tmp_path, AttentionMonitorCallback(every_n_steps=2), report_to="tensorboard").train()
    board = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    assert [event.step for event in board.Scalars("train/attention/energy_rms/median")] == [0, 2, 4]


# Where the probe comes from


def test_probe_defaults_to_first_evaluation_rows(tmp_path: Path) -> None:
    def padded(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        ids = nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}

    rows = [{"input_ids": row["input_ids"][: 20 - 3 * index].clamp_min(1)} for index, row in enumerate(texts(2)[:6])]
    for eval_dataset in (rows, {"own": rows, "other": texts(5)}):
        callback = AttentionMonitorCallback(record=None)
        trainer_of(tmp_path, callback, eval_dataset=eval_dataset, max_steps=1, data_collator=padded).train()
        assert callback.monitor is not None
        batch = callback.monitor.probe.batch
        assert batch["input_ids"].shape == (3, 20)
        assert batch["attention_mask"].sum(1).tolist() == [20, 17, 14]


def test_probe_without_evaluation_is_first_training_rows(tmp_path: Path) -> None:
    callback = AttentionMonitorCallback(record=None)
    trainer_of(tmp_path, callback, eval_dataset=None, max_steps=1).train()
    assert callback.monitor is not None
    assert torch.equal(callback.monitor.probe.batch["input_ids"], default_data_collator(texts(1)[:3])["input_ids"])


def test_float_probe_uses_the_given_forward(tmp_path: Path) -> None:
    seen = []

    def forward(model: nn.Module, batch: Tensor) -> None:
        seen.append(tuple(batch.shape))
        model(inputs_embeds=batch)

    trainer_of(tmp_path, AttentionMonitorCallback(torch.randn(2, 9, 32), forward=forward), max_steps=1).train()
    assert set(seen) == {(2, 9, 32)}


# Training is unchanged


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing. is deprecated:FutureWarning")  # in later versions
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "bf16": True},
        {"gradient_checkpointing": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_monitored_trainer_run_is_bit_identical(settings: dict[str, Any], tmp_path: Path) -> None:
    def end(*callbacks: TrainerCallback) -> tuple[list[float], list[Tensor]]:
        torch._dynamo.reset()
        model, seen = llama(), []
        model.model.embed_tokens.register_forward_pre_hook(
            lambda module, args: seen.append(int(args[0].sum())) if module.training else None
        )
        trainer = trainer_of(tmp_path, *callbacks, model=model, **settings)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        return [*losses, *seen], everything(trainer.model, trainer.optimizer.optimizer)

    alone = end()
    assert len(set(alone[0])) >= 8  # losses and batches
    for every_n_steps in (1, 3):
        callback = AttentionMonitorCallback(every_n_steps=every_n_steps)
        watched = end(callback)
        assert watched[0] == alone[0]
        assert identical(watched[1], alone[1])
        assert callback.monitor is not None
        assert callback.monitor.history.steps == list(range(0, 5, every_n_steps))


def test_accumulation_counts_optimizer_steps(tmp_path: Path) -> None:
    callback = AttentionMonitorCallback(every_n_steps=2)
    trainer_of(tmp_path, callback, gradient_accumulation_steps=3, max_steps=5).train()
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [0, 2, 4]


def test_probe_runs_in_training_precision(tmp_path: Path) -> None:
    dtypes: dict[str, torch.dtype] = {}
    model = gpt2()
    model.transformer.h[0].attn.c_attn.register_forward_hook(
        lambda module, args, output: dtypes.__setitem__("training" if module.training else "probe", output.dtype)
    )
    trainer_of(tmp_path, AttentionMonitorCallback(), model=model, bf16=True, max_steps=1).train()
    assert dtypes == {"training": torch.bfloat16, "probe": torch.bfloat16}


# Stop, resume, run again


def test_run_stopped_by_another_callback_is_finished(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    closed = []
    callback = AttentionMonitorCallback(every_n_steps=1)
    trainer = trainer_of(tmp_path, Stop(), callback)
    trainer.add_callback(type("Last", (TrainerCallback,), {
        "on_train_begin": lambda *_, **__: callback.monitor.on_close(lambda: closed.append(True)),
    })())  # fmt: skip
    trainer.train()
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [0, 1, 2]
    assert closed == [True]
    assert callback.monitor.record_path is not None
    assert callback.monitor.record_path.parent == tmp_path / "attnmonitor_runs"
    assert list(RunRecord.open(callback.monitor.record_path).steps) == [0, 1, 2]


@pytest.mark.parametrize("action", ["stop", "checkpoint"])
def test_alert_stops_or_saves_in_the_trainer(action: str, tmp_path: Path) -> None:
    always = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0)
    rule = Rule("always", "test", "query_head", always, patience=3, grace=0)
    callback = AttentionMonitorCallback(every_n_steps=1, alerts=[rule], actions={"always": action})
    trainer = trainer_of(tmp_path, callback, max_steps=4)
    trainer.train()
    assert callback.monitor is not None
    [begun] = {event.global_step for event in callback.monitor.firing}
    assert trainer.state.global_step == (begun if action == "stop" else 4)
    assert begun < 4
    assert (tmp_path / f"checkpoint-{begun}" / "attnmonitor.pt").exists() == (action == "checkpoint")


@pytest.mark.parametrize("name", [None, "first"])
def test_resumed_trainer_run_equals_uninterrupted_one(name: str | None, tmp_path: Path) -> None:
    def run(folder: Path, max_steps: int, **resume: Any) -> AttentionMonitor:
        callback = AttentionMonitorCallback(every_n_steps=1, name=name)
        settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer_of(folder, callback, max_steps=max_steps, **settings).train(**resume)
        assert callback.monitor is not None
        return callback.monitor

    whole = run(tmp_path / "whole", 4)
    part = run(tmp_path / "parts", 2)
    # A checkpoint may be resumed from another folder than the one it was written to.
    moved = tmp_path / "elsewhere" / "kept"
    shutil.move(tmp_path / "parts" / "checkpoint-2", moved)
    resumed = run(tmp_path / "parts", 4, resume_from_checkpoint=str(moved))

    assert whole.history.steps == resumed.history.steps == [0, 1, 2, 3, 4]
    assert identical(
        numbers({m: whole.history[m] for m in DEFAULT_METRICS}),
        numbers({m: resumed.history[m] for m in DEFAULT_METRICS}),
    )
    assert resumed.record_path == part.record_path
    assert len(list((tmp_path / "parts" / "attnmonitor_runs").glob("*.sqlite"))) == 1
    state = torch.load(next(moved.glob("attnmonitor*.pt")), weights_only=True)
    assert state["global_step"] == 2
    json.loads((tmp_path / "whole" / "checkpoint-4" / "trainer_state.json").read_text())


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_unreadable_state_resumes_with_a_warning(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tmp_path, AttentionMonitorCallback(every_n_steps=1), max_steps=2, **settings).train()
    saved = tmp_path / "checkpoint-2" / "attnmonitor.pt"
    if damage == "missing":
        saved.unlink()
    else:
        saved.write_bytes(saved.read_bytes()[:200])
    callback = AttentionMonitorCallback(every_n_steps=1)
    trainer_of(tmp_path, callback, max_steps=3, **settings).train(resume_from_checkpoint=True)
    assert callback.monitor is not None
    assert callback.monitor.history.steps == [2, 3]
    assert "begin anew" in caplog.text
    assert str(saved) in caplog.text


def test_training_again_begins_a_new_run(tmp_path: Path) -> None:
    callback = AttentionMonitorCallback(every_n_steps=2)
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    first = callback.monitor
    trainer.train()
    assert callback.monitor is not None
    assert callback.monitor is not first
    assert callback.monitor.history.steps == [0, 2, 4]


# Weights & Biases


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Any]:
    with wandb.init(project="test", dir=tmp_path) as run:
        yield run


def finished(run: Any, folder: Path) -> dict[str, Any]:
    run.finish()
    wandb.teardown()  # the client's own process writes the last rows some time after `finish` has returned
    return offline_run(folder)


def test_wandb_gets_every_value_once(run: Any, tmp_path: Path) -> None:
    callback = AttentionMonitorCallback(every_n_steps=2)
    trainer_of(tmp_path, callback, report_to="wandb").train()
    logged = finished(run, tmp_path)
    assert callback.monitor is not None
    layer = list(callback.monitor.history["energy_rms"].values())[1]
    assert curve(logged, "attention/energy_rms/layer_01/head_03") == pytest.approx(
        dict(zip([0, 2, 4], layer[:, 3].tolist(), strict=True))
    )
    assert list(curve(logged, "attention/energy_rms/median")) == [0, 2, 4]
    assert list(curve(logged, "train/loss", x="train/global_step")) == [1, 2, 3, 4]
    assert not [key for row in logged["history"] for key in row if key.startswith("train/attention")]
    assert logged["config"]["attention"]["default"]["probe_fingerprint"]


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # wandb 0.21 leaves those of the run before
def test_wandb_run_without_logger_gets_summaries(run: Any, tmp_path: Path) -> None:
    trainer_of(tmp_path, AttentionMonitorCallback(every_n_steps=2, loggers=[]), report_to="wandb").train()
    logged = finished(run, tmp_path)
    assert list(curve(logged, "train/attention/energy_rms/median", x="train/global_step")) == [0, 2, 4]
    assert not [key for row in logged["history"] for key in row if key.startswith("attention/")]


# Bad use


def test_other_loops_are_pointed_to_attach() -> None:
    callback = AttentionMonitorCallback()
    with pytest.raises(ValueError, match=r"not called from transformers\.Trainer.*attach\(model"):
        callback.on_train_begin(None, None, None, model=llama())


def test_two_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps=5 and schedule=7"):
        AttentionMonitorCallback(every_n_steps=5, schedule=7)


# Several processes

TWO_PROCESSES = """
import json, os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.transformers import AttentionMonitorCallback
from trainer_run import trainer_of

folder = Path(sys.argv[2])
always = Threshold("query_rms", "value", fire_above=-20.0, clear_below=-21.0)
rule = Rule("always", "test", "query_head", always, patience=4, grace=0)
seen = {}
for name, actions, resume in (("stopped", {"always": "stop"}, None), ("resumed", {}, str(folder / "checkpoint-2"))):
    callback = AttentionMonitorCallback(every_n_steps=1, alerts=[rule], actions=actions)
    trainer = trainer_of(folder, callback, max_steps=5, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=resume)
    seen[name] = [trainer.state.global_step, callback.monitor.history.steps, len(trainer.state.log_history)]
    seen[name].append(sum(weight.double().sum().item() for weight in trainer.model.parameters()))
(folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


@pytest.mark.soak
def test_two_processes_stop_and_resume_at_the_same_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, "script.py", str(Path(__file__).parents[1]), str(tmp_path)], check=True, timeout=300)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["stopped"][:2] == [3, [0, 1, 2, 3]]
    assert second["stopped"][:2] == [3, []]
    assert first["resumed"][:2] == [5, [0, 1, 2, 3, 4, 5]]
    assert second["resumed"][:2] == [5, []]
    assert first["resumed"][2] > second["resumed"][2]
    assert [run[3] for run in first.values()] == [run[3] for run in second.values()]
    assert len(list(tmp_path.glob("attnmonitor_runs/*.sqlite"))) == 1
