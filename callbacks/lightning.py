"""Lightning: ``Trainer(callbacks=[AttentionMonitorCallback(every_n_steps=100)])``.

Translates Lightning's events: train start and every optimizer step become `AttentionMonitor.on_step`, the trainer's
loggers get the samples, its checkpoints hold the monitor's state, and whole-model summaries go through
``log_dict`` so that ``EarlyStopping`` and ``ModelCheckpoint`` can watch them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from attnmonitor.callbacks.framework import FrameworkCallback
from attnmonitor.loggers import summary_scalars
from attnmonitor.messages import needed
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.monitor.final_report import print_final_report

with needed(by="attnmonitor.callbacks.lightning", extra="lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["AttentionMonitorCallback"]


class AttentionMonitorCallback(FrameworkCallback, Callback):
    """Monitors every attention head of the module that is trained.

    Args:
        probe: The probe batch, as `AttentionMonitor` takes it, moved to the module's device; by default the first
            batch of the validation (else training) loader.
        every_n_steps: Optimizer steps between two samples, 100 by default. Accumulated gradients count as one step.
        schedule: Instead of ``every_n_steps``: any schedule `AttentionMonitor` takes.
        loggers: As in `AttentionMonitor`; by default the trainer's.
        record: As in `AttentionMonitor`; by default a folder under the trainer's root.
        forward: ``forward(module, batch)``, where ``module(batch)`` does not fit.
        name: Needed where several monitors run side by side.
        settings: Every other keyword of `AttentionMonitor`.

    Attributes:
        monitor: The `AttentionMonitor`, once training has begun.

    Raises:
        ValueError: Both ``every_n_steps`` and ``schedule`` are given; at train start, whatever `AttentionMonitor`
            refuses.
    """

    _loaded: dict[str, Any] | None = None
    _summaries: dict[str, float] | None = None

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it contains the monitor's name."""
        return self._generate_state_key(name=self._name)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state."""
        return self.monitor.state_dict() if self.monitor is not None else self._loaded or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the monitor that is made when training begins."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, load the state of a resumed run, and take the baseline sample."""
        probe = self._probe if self._probe is not None else _first_loader(trainer)
        if not isinstance(probe, DataLoader):
            probe = trainer.strategy.batch_to_device(probe, pl_module.device)

        def in_training_precision(model: nn.Module, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return self._forward(model, trainer.precision_plugin.convert_input(batch))

        monitor = self._attach(
            trainer.strategy.model or pl_module,  # with the strategy's wrapper: FSDP must be called through it
            probe,
            loggers=trainer.loggers if self._loggers is None else self._loggers,
            folder=trainer.default_root_dir,
            forward=in_training_precision,
        )
        if self._loaded:
            monitor.load_state_dict(self._loaded)
            self._loaded = None
        self._on_step(trainer, monitor)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sample if the schedule asks for it, and log new summaries in Lightning."""
        if self.monitor is None:
            return
        self._on_step(trainer, self.monitor)
        if self._summaries:
            # Only for callbacks: the loggers have them already, on the monitor's own x-axis.
            pl_module.log_dict(self._summaries, on_step=True, on_epoch=False, logger=False, batch_size=1)
            self._summaries = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the monitor and print the final report."""
        if self.monitor is not None and stage == "fit":
            self._end(trainer, pl_module, self.monitor)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after an exception or interrupt: Lightning does not call `teardown` then."""
        if self.monitor is not None and trainer.state.fn == "fit":
            self._end(trainer, pl_module, self.monitor)

    def _end(self, trainer: Trainer, pl_module: LightningModule, monitor: AttentionMonitor) -> None:
        monitor.close()
        if (bar := trainer.progress_bar_callback) is not None:
            # A running bar would be drawn again below the report. Stopping it twice is harmless.
            bar.teardown(trainer, pl_module, "fit")
        print_final_report(monitor)

    def _on_step(self, trainer: Trainer, monitor: AttentionMonitor) -> None:
        sample = monitor.on_step(trainer.global_step)
        if sample is not None:
            # Only the main process has the sample, but all ranks must stop or save at the same step.
            outcome = (summary_scalars(sample) if sample.values else {}, sample.requests)
            self._summaries, requests = self._from_first(outcome, ({}, ()))
            if "stop" in requests:
                trainer.should_stop = True
            if "checkpoint" in requests:
                trainer.save_checkpoint(
                    Path(trainer.default_root_dir) / f"attention-alert-step-{sample.global_step}.ckpt"
                )


def _first_loader(trainer: Trainer) -> DataLoader[Any]:
    for loaders in (trainer.val_dataloaders, trainer.train_dataloader):
        for loader in tree_leaves(loaders):
            if isinstance(loader, DataLoader):
                return loader
    raise ValueError(
        "AttentionMonitorCallback(probe=None): the trainer has no torch DataLoader to draw a probe from; give one "
        "batch: probe=next(iter(my_data))"
    )
