"""The Lightning callback: same numbers, bit-identical training, resumes, loggers, and a final report."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning_run import HELD_OUT, LIGHTNING_WARNINGS, TRAIN, Module, fit
from models import TinyGPT, everything, language_loss
from torch import Tensor
from torch.utils.data import DataLoader
from wandb_files import curve, offline_run

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.record import RunRecord

pytestmark = LIGHTNING_WARNINGS


def test_lightning_raw_and_direct_sample_are_identical() -> None:
    torch.manual_seed(0)
    module = Module()
    start = {name: value.clone() for name, value in module.gpt.state_dict().items()}
    watcher = AttentionMonitorCallback(HELD_OUT, every_n_steps=3, strict=True)
    fit(module, watcher, train=DataLoader(TRAIN, batch_size=4))

    model = TinyGPT()
    model.load_state_dict(start)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    raw = attach(model, optimizer, HELD_OUT, every_n_steps=3, strict=True)
    for batch in TRAIN.split(4):
        optimizer.zero_grad()
        language_loss(model(batch), batch).backward()
        optimizer.step()
    direct = AttentionMonitor(model, HELD_OUT, record=None).sample(6)

    assert watcher.monitor.history.steps == raw.history.steps == [0, 3, 6]
    for metric in raw.history:
        for layer, trajectory in raw.history[metric].items():
            assert torch.equal(watcher.monitor.history[metric][f"gpt.{layer}"], trajectory)
            assert torch.equal(direct.values[metric][layer], trajectory[-1])
    raw.close()


def float16_with_a_scaler() -> dict[str, Any]:
    """Float16 on a CPU with an initial scale so large that steps are skipped; Lightning offers it only on CUDA."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def compiled() -> Module:
    module = Module(dropout=0.2)
    module.gpt = torch.compile(module.gpt, backend="aot_eager")
    return module


FITS: dict[str, tuple[Callable[[], Module], Callable[[], dict[str, Any]]]] = {
    "float32": (lambda: Module(dropout=0.2, batch_norm=True), lambda: {"precision": "32-true"}),
    "bfloat16": (lambda: Module(dropout=0.2, batch_norm=True), lambda: {"precision": "bf16-mixed"}),
    "float16 gradient scaler": (lambda: Module(dropout=0.2), float16_with_a_scaler),
    "compiled": (compiled, dict),
}


@pytest.mark.parametrize("kind", FITS)
def test_seeded_run_is_bit_identical_with_callback(kind: str) -> None:
    build, settings = FITS[kind]

    def end(*callbacks: Callback) -> tuple[list[float], list[Tensor]]:
        torch._dynamo.reset()
        lightning.seed_everything(0, verbose=False)
        module = build()
        trainer = fit(
            module,
            *callbacks,
            val=DataLoader(HELD_OUT, batch_size=2),
            accumulate_grad_batches=2,
            max_epochs=3,
            max_steps=-1,
            **settings(),
        )
        return [*module.losses, *module.seen], everything(module, trainer.optimizers[0])

    alone = end()
    assert len(set(alone[0])) > 18  # losses and batches; the order differs in every epoch
    for every_n_steps in (1, 3):
        watcher = AttentionMonitorCallback(every_n_steps=every_n_steps, strict=True)
        watched = end(watcher)
        assert watched[0] == alone[0]
        assert all(torch.equal(a, b) for a, b in zip(alone[1], watched[1], strict=True))
        assert watcher.monitor.history.steps == list(range(0, 10, every_n_steps))


def test_accumulated_gradients_count_as_one_step() -> None:
    watcher = AttentionMonitorCallback(every_n_steps=1)
    fit(Module(), watcher, max_steps=3, accumulate_grad_batches=2)
    assert watcher.monitor.history.steps == [0, 1, 2, 3]


def test_probe_defaults_to_first_validation_else_train_batch() -> None:
    for val, expected in ((DataLoader(HELD_OUT, batch_size=2), HELD_OUT[:2]), (None, TRAIN[:4])):
        watcher = AttentionMonitorCallback(every_n_steps=3)
        fit(Module(), watcher, train=DataLoader(TRAIN, batch_size=4), val=val)
        assert torch.equal(watcher.monitor.probe.batch, expected)


def test_default_probe_that_does_not_fit_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def loaders_of_rows() -> list[Tensor]:
        return list(TRAIN.split(4))  # Lightning reads each tensor as a loader of its rows

    class Rows(Module):
        def training_step(self, rows: list[Tensor], index: int) -> Tensor:
            return super().training_step(torch.stack(rows), index)

    watcher = AttentionMonitorCallback()
    trainer = fit(Rows(), watcher, train=loaders_of_rows())
    assert "not watched, no default probe fits the model" in caplog.text
    assert "forward=lambda model, batch" in caplog.text
    assert trainer.global_step == 6
    assert watcher.monitor is None
    with pytest.raises(ValueError, match="not watched, no default probe fits"):
        fit(Rows(), AttentionMonitorCallback(strict=True), train=loaders_of_rows())


def test_early_stopping_and_checkpoint_watch_summaries(tmp_path: Path) -> None:
    key = "attention/energy_rms/max"
    stopping = EarlyStopping(key, mode="min", patience=0, check_on_train_epoch_end=True)
    keeping = ModelCheckpoint(tmp_path, monitor=key, mode="max", save_on_train_epoch_end=True, filename="best")
    watcher = AttentionMonitorCallback(every_n_steps=2)
    trainer = fit(Module(), watcher, stopping, keeping, max_steps=-1, max_epochs=8)
    logged = trainer.callback_metrics
    assert logged[key].item() == pytest.approx(
        max(values[-1].max().item() for values in watcher.monitor.history["energy_rms"].values())
    )
    assert trainer.current_epoch < 7  # logits grow during training, so the minimum is the first value
    assert keeping.best_model_score is not None


def test_resumed_lightning_run_has_no_gap_or_duplicate(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_last=True)
    first = AttentionMonitorCallback(every_n_steps=2)
    fit(Module(), first, saving, max_steps=4, default_root_dir=tmp_path)
    second = AttentionMonitorCallback(every_n_steps=2)
    fit(Module(), second, max_steps=8, max_epochs=5, default_root_dir=tmp_path, ckpt_path=tmp_path / "ckpt/last.ckpt")
    assert second.monitor.history.steps == [0, 2, 4, 6, 8]
    assert second.monitor.record_path == first.monitor.record_path
    assert list(RunRecord.open(second.monitor.record_path).steps) == [0, 2, 4, 6, 8]
    state = torch.load(tmp_path / "ckpt/last.ckpt", weights_only=True)
    assert first.state_key in state["callbacks"]


def test_two_named_callbacks_have_separate_states(tmp_path: Path) -> None:
    watchers = [
        AttentionMonitorCallback(HELD_OUT[:, :length], every_n_steps=every, name=name)
        for length, every, name in ((8, 2, "short"), (24, 3, "long"))
    ]
    assert len({watcher.state_key for watcher in watchers}) == 2
    trainer = fit(Module(), *watchers)
    assert [watcher.monitor.history.steps for watcher in watchers] == [[0, 2, 4, 6], [0, 3, 6]]
    assert {"attention/short/energy_rms/max", "attention/long/energy_rms/max"} <= trainer.callback_metrics.keys()


def test_every_lightning_logger_gets_the_samples(tmp_path: Path) -> None:
    loggers = [
        WandbLogger(save_dir=tmp_path, offline=True),
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="board"),
    ]
    watcher = AttentionMonitorCallback(every_n_steps=3)
    fit(Module(), watcher, logger=loggers)
    loggers[0].experiment.finish()
    key, trajectory = "attention/key_incoherence/layer_01/head_02", watcher.monitor.history["key_incoherence"]
    expected = dict(zip([0, 3, 6], trajectory["gpt.blocks.1.attn"][:, 2].tolist(), strict=True))
    assert curve(offline_run(tmp_path), key) == pytest.approx(expected)
    with open(tmp_path / "csv/version_0/metrics.csv") as file:
        rows = {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row[key]}
    assert rows == pytest.approx(expected, rel=1e-5)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "board/version_0"))
    board.Reload()
    scalars = board.Scalars("attention.key_incoherence/layer_01/head_02")
    assert {event.step: event.value for event in scalars} == pytest.approx(expected)


def test_forward_that_does_not_fit_is_explained() -> None:
    class NoForward(Module):
        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            raise NotImplementedError

        def training_step(self, token_ids: Tensor, index: int) -> Tensor:
            return language_loss(self.gpt(token_ids), token_ids)

    with pytest.raises(ValueError, match=r"rejects this batch.*forward=lambda model, batch"):
        fit(NoForward(), AttentionMonitorCallback(HELD_OUT))
    with pytest.raises(ValueError, match=r"rejects this batch.*forward=lambda model, batch"):
        fit(NoForward(), AttentionMonitorCallback(strict=True))
    assert fit(NoForward(), AttentionMonitorCallback()).global_step == 6
    watcher = AttentionMonitorCallback(every_n_steps=3, forward=lambda module, batch: module.gpt(batch))
    fit(NoForward(), watcher)
    assert watcher.monitor.history.steps == [0, 3, 6]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
@pytest.mark.parametrize("interrupted", [False, True])
def test_no_progress_bar_below_the_final_report(
    bar: type[Callback], interrupted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupt(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if interrupted and trainer.global_step == 3:
                raise RuntimeError("power failure")

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(RuntimeError) if interrupted else contextlib.nullcontext():
        callbacks = (AttentionMonitorCallback(every_n_steps=2, record=None), Interrupt(), bar())
        fit(Module(), *callbacks, enable_progress_bar=True)
    before, marker, after = terminal.getvalue().rpartition("attnmonitor: ")
    assert "Epoch" in before, "a bar was drawn"
    assert marker, "the final report was printed"
    assert after.startswith("unknown: 8 heads in 2 layers watched over")
    assert "of the time since attach" in after
    assert "Epoch" not in after


def test_record_is_complete_after_an_exception() -> None:
    class Failing(Module):
        def training_step(self, token_ids: Tensor, index: int) -> Tensor:
            if self.global_step == 4:
                raise ArithmeticError("diverged")
            return super().training_step(token_ids, index)

    watcher = AttentionMonitorCallback(every_n_steps=2)
    with pytest.raises(ArithmeticError):
        fit(Failing(), watcher)
    assert list(RunRecord.open(watcher.monitor.record_path).steps) == [0, 2, 4]
