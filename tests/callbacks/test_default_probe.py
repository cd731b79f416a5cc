"""The probe a callback finds by itself: training reads the same data, empty loaders are passed over, runs go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning_run import HELD_OUT, LIGHTNING_WARNINGS, TRAIN, Module, fit
from loaders import KINDS, PLAIN, Once, fresh
from torch.utils.data import DataLoader, IterableDataset
from trainer_run import VOCABULARY, texts, trainer_of
from transformers import Trainer

from attnmonitor.callbacks.lightning import AttentionMonitorCallback
from attnmonitor.callbacks.transformers import AttentionMonitorCallback as TrainerCallback
from attnmonitor.record import RunRecord

pytestmark = LIGHTNING_WARNINGS
STEPS = 4


@pytest.mark.parametrize("role", ["train", "val"])
@pytest.mark.parametrize("kind", KINDS)
def test_lightning_default_leaves_the_data_alone(kind: str, role: str) -> None:
    def losses(*callbacks: Any) -> tuple[list[float], list[int]]:
        torch.manual_seed(0)
        module = Module()
        fresh()
        loaders = {"train": DataLoader(TRAIN, 4), "val": None, role: KINDS[kind]()}
        fit(module, *callbacks, max_steps=STEPS, num_sanity_val_steps=1, limit_val_batches=1, **loaders)
        return module.losses, module.seen

    callback = AttentionMonitorCallback(every_n_steps=2, record=None, strict=True)
    assert losses(callback) == losses()
    assert callback.monitor.history.steps == [0, 2, 4]


class Shifting(Module):
    """Adds a random number to each batch's tokens on their way to the device, as augmentations do."""

    def _shifted(self, batch: torch.Tensor) -> torch.Tensor:
        return (batch + torch.randint(5, ())) % 50


class ShiftsBefore(Shifting):
    def on_before_batch_transfer(self, batch: torch.Tensor, dataloader_idx: int) -> torch.Tensor:
        return self._shifted(batch)


class ShiftsInTransfer(Shifting):
    def transfer_batch_to_device(self, batch: torch.Tensor, device: Any, dataloader_idx: int) -> torch.Tensor:
        return self._shifted(batch).to(device)


class ShiftsAfter(Shifting):
    def on_after_batch_transfer(self, batch: torch.Tensor, dataloader_idx: int) -> torch.Tensor:
        return self._shifted(batch)


@pytest.mark.parametrize("probe", [None, HELD_OUT])
@pytest.mark.parametrize("checks", [0, 1])
@pytest.mark.parametrize("kind", [ShiftsBefore, ShiftsInTransfer, ShiftsAfter])
def test_hooks_of_the_transfer_see_only_the_users_batches(kind: type[Module], checks: int, probe: Any) -> None:
    def losses(*callbacks: Any) -> tuple[list[float], list[int]]:
        torch.manual_seed(0)
        module = kind()
        loaders = {"train": DataLoader(TRAIN, 4), "val": DataLoader(HELD_OUT, 2)}
        fit(module, *callbacks, max_steps=STEPS, num_sanity_val_steps=checks, limit_val_batches=1, **loaders)
        return module.losses, module.seen

    callback = AttentionMonitorCallback(probe, every_n_steps=2, record=None, strict=True)
    assert losses(callback) == losses()
    assert callback.monitor.history.steps == [0, 2, 4]


@pytest.mark.parametrize("eager", [True, False])
def test_trainer_default_leaves_the_data_alone(eager: bool, tmp_path: Path) -> None:
    class Drawn(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.generator = torch.Generator().manual_seed(0)

        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(VOCABULARY, (20,), generator=self.generator)
            return {"input_ids": ids, "labels": ids}

    class Stream(IterableDataset[Any]):
        def __init__(self) -> None:
            self.rows = iter(texts(1))

        def __iter__(self) -> Any:
            return self.rows

    def losses(*callbacks: Any) -> list[float]:
        data = Drawn() if eager else Stream()
        trainer = trainer_of(tmp_path, *callbacks, train_dataset=data, eval_dataset=None)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    callback = TrainerCallback(every_n_steps=2, record=None, strict=True)
    assert losses(callback) == losses()
    assert callback.monitor.history.steps == [0, 2, 4]


@pytest.mark.parametrize("how", ["subclass", "attribute"])
def test_eval_loader_of_a_subclass_is_not_called(how: str, tmp_path: Path) -> None:
    made = []

    class Counts(Trainer):
        def get_eval_dataloader(self, *arguments: Any) -> Any:
            made.append(torch.rand(1).item())
            return super().get_eval_dataloader(*arguments)

    callback = TrainerCallback(every_n_steps=2, record=None, strict=True)
    trainer = trainer_of(tmp_path, callback, kind=Counts if how == "subclass" else Trainer)
    if how == "attribute":
        trainer.get_eval_dataloader = made.append
    trainer.train()
    assert made == []
    assert callback.monitor.history.steps == [0, 2, 4]
    ids = [row["input_ids"] for row in trainer.eval_dataset][: trainer.args.eval_batch_size]
    assert torch.equal(callback.monitor.probe.batch["input_ids"], torch.stack(list(map(torch.as_tensor, ids))))


@pytest.mark.parametrize("kind", ["no rows", "stream without rows", "limit"])
def test_empty_validation_loader_is_passed_over(kind: str) -> None:
    val: Any = {
        "no rows": DataLoader(torch.empty(0, 24, dtype=torch.int64), 2),
        "stream without rows": DataLoader(Once([]), 2),
        "limit": DataLoader(HELD_OUT, 2),
    }[kind]
    callback = AttentionMonitorCallback(every_n_steps=2)
    fit(Module(), callback, train=DataLoader(TRAIN, 4), val=val, limit_val_batches=0 if kind == "limit" else 1.0)
    assert torch.equal(callback.monitor.probe.batch, TRAIN[:4])


def test_first_loader_whose_batch_fits_gives_the_probe() -> None:
    class Pairs(Module):
        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return super().training_step(batch["ids"], index)

    train = {"noise": DataLoader(torch.randn(24, 3, 3, 3), 4), "ids": DataLoader(TRAIN, 4)}
    callback = AttentionMonitorCallback(every_n_steps=2)
    fit(Pairs(), callback, train=train)
    assert torch.equal(callback.monitor.probe.batch, TRAIN[:4])


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_checkpoint_that_was_only_read_is_not_continued(call: str, tmp_path: Path) -> None:
    class Tested(Module):
        def test_step(self, token_ids: torch.Tensor, index: int) -> None:
            self(token_ids)

    data, saved = DataLoader(HELD_OUT, 2), tmp_path / "old.ckpt"
    fit(Tested(), AttentionMonitorCallback(every_n_steps=2)).save_checkpoint(saved)
    callback, module = AttentionMonitorCallback(every_n_steps=2), Tested()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=4, callbacks=[callback], enable_checkpointing=False, **quiet)
    getattr(trainer, call)(module, data, ckpt_path=saved)
    trainer.fit(module, DataLoader(TRAIN, 4))
    assert callback.monitor.history.steps == [0, 2, 4]
    trainer.fit_loop.epoch_loop.max_steps = 8
    trainer.fit(module, DataLoader(TRAIN, 4), ckpt_path=saved)
    assert callback.monitor.history.steps == [0, 2, 4, 6, 8]


def test_fits_of_one_trainer_are_one_run() -> None:
    def run(phases: list[int]) -> AttentionMonitorCallback:
        torch.manual_seed(0)
        callback, module = AttentionMonitorCallback(every_n_steps=1), Module()
        trainer = fit(module, callback, train=DataLoader(TRAIN, 8), max_steps=-1, max_epochs=phases[0])
        for epochs in phases[1:]:
            trainer.fit_loop.max_epochs = epochs
            trainer.fit(module, DataLoader(TRAIN, 8))
        return callback

    once, phases = run([9]).monitor, run([1, 5, 9]).monitor
    assert phases.history.steps == once.history.steps == list(range(28))
    assert phases.last_sample.verdict == once.last_sample.verdict
    assert list(RunRecord.open(phases.record_path).steps) == list(range(28))
    for layer, heads in once.history["key_rms"].items():
        # Later fits train with a new optimizer.
        assert torch.equal(phases.history["key_rms"][layer][:4], heads[:4])


def test_new_trainer_or_module_begins_a_new_run() -> None:
    callback = AttentionMonitorCallback(every_n_steps=3)
    for _ in range(2):
        trainer = fit(Module(), callback)
        assert callback.monitor.history.steps == [0, 3, 6]
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(Module(), DataLoader(TRAIN, 4))
    assert callback.monitor.history.steps[0] >= 6


def test_steps_of_the_learning_rate_finder_are_not_samples() -> None:
    class Tuned(Module):
        lr = 1e-2

    callback = AttentionMonitorCallback(every_n_steps=3)
    fit(Tuned(), LearningRateFinder(num_training_steps=10), callback)
    assert callback.monitor.history.steps == [0, 3, 6]


def test_resumed_run_keeps_a_probe_that_was_read(tmp_path: Path) -> None:
    def stream(first: int) -> DataLoader[Any]:
        return DataLoader(Once(PLAIN[first:] * 3), 2)

    first = AttentionMonitorCallback(every_n_steps=2)
    trainer = fit(Module(), first, train=stream(0), max_steps=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = AttentionMonitorCallback(every_n_steps=2)
    fit(Module(), second, train=stream(4), max_steps=8, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(second.monitor.probe.batch, torch.stack(PLAIN[:2]))
    assert second.monitor.history.steps == [0, 2, 4, 6, 8]


class Table(Module):
    """Its forward shows no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table(token_ids)


class TableForTrainer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids)
        return {"loss": logits.square().mean(), "logits": logits}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("adapter", [AttentionMonitorCallback, TrainerCallback])
def test_default_probe_without_attention_is_a_message(
    adapter: Any, strict: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = adapter(every_n_steps=2, record=None, strict=strict)

    def train() -> None:
        if adapter is TrainerCallback:
            trainer_of(tmp_path, callback, model=TableForTrainer()).train()
        else:
            fit(Table(), callback, train=DataLoader(TRAIN, 4), max_steps=STEPS)

    if strict:
        with pytest.raises(ValueError, match="not watched, no default probe fits"):
            train()
        return
    train()
    assert callback.monitor is None
    assert "no attention was seen" in caplog.text
