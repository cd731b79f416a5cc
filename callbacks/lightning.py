"""Lightning: ``Trainer(callbacks=[AttentionMonitorCallback(every_n_steps=100)])``.

Translates Lightning's events: train start and every optimizer step become `AttentionMonitor.on_step`, the trainer's
loggers get the samples, its checkpoints hold the monitor's state, what the module logs goes to `AttentionMonitor.log`,
and whole-model summaries go through ``log_dict`` so that ``EarlyStopping`` and ``ModelCheckpoint`` can watch them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from attnmonitor.callbacks.framework import FrameworkCallback, drawn
from attnmonitor.loggers import summary_scalars
from attnmonitor.measurement.batches import copied
from attnmonitor.messages import needed
from attnmonitor.monitor import AttentionMonitor
from attnmonitor.monitor.final_report import print_final_report

with needed(by="attnmonitor.callbacks.lightning", extra="lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
    from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["AttentionMonitorCallback"]


class AttentionMonitorCallback(FrameworkCallback, Callback):
    """Monitors every attention head of the module that is trained.

    Args:
        probe: The probe batch, as `AttentionMonitor` takes it, moved to the module's device; by default the first
            batch of the validation (else training) loader that the module takes. A loader that cannot be copied is not
            drawn from: then it is the first batch that the sanity check, else training, reads.
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
            refuses. A default probe that the module does not take is a warning, and an error if ``strict``.
    """

    _is_fitting = _seeks_probe = False
    _from_checkpoint = False
    _checked: tuple[Any, ...] = ()  # first batches that the sanity check has read
    _loaded: dict[str, Any] | None = None
    _summaries: dict[str, float] | None = None
    _logged: dict[str, Any] | None = None  # by the module, when it was last looked at

    def on_init_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse transformers' Trainer, which calls this on its callbacks."""
        raise TypeError(
            "attnmonitor.callbacks.lightning.AttentionMonitorCallback is Lightning's callback; with transformers' "
            "Trainer use attnmonitor.callbacks.transformers.AttentionMonitorCallback"
        )

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; it contains the monitor's name."""
        return self._generate_state_key(name=self._name)

    def state_dict(self) -> dict[str, Any]:
        """Return the monitor's state."""
        return self._loaded or ({} if self.monitor is None else self.monitor.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the monitor that is made when training begins."""
        self._loaded = state_dict

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the state that is loaded next belongs to the call that is running."""
        self._from_checkpoint = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier call loaded: a run that was only validated or tested is not continued."""
        if self._from_checkpoint:
            self._loaded, self._from_checkpoint = None, False
        self._checked = ()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep each validation loader's first batch of the sanity check: a probe that is not drawn."""
        if trainer.sanity_checking and batch_idx == 0 and self._probe is None:
            self._checked += (copied(batch),)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, continue a resumed run or the one before, and take the baseline sample."""
        self._is_fitting = True
        self._begin_run()
        before = self.monitor
        if self._loaded is None and before is not None and _continues(before, trainer, pl_module):
            self._loaded = {**before.state_dict(), "probe": before.probe.batch}
        batch = self._loaded and self._loaded.get("probe")
        if self._probe is not None:
            self._begin(trainer, pl_module, [self._probe])
        elif batch is not None:
            self._begin(trainer, pl_module, [batch], in_state=True)
        else:
            # Where hooks of the user's change each batch, a drawn one is not what the model is called with.
            draws = not _changes_batches(trainer, pl_module)
            held_out = list(drawn(_loaders(trainer.val_dataloaders))) if draws else []
            training = drawn(_loaders(trainer.train_dataloader)) if draws else ()
            probes = chain(held_out or self._checked, training)
            self._begin(trainer, pl_module, probes, in_state=not held_out)
        self._seeks_probe, self._checked = self.monitor is None, ()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach to the first training batch where no other probe was found."""
        if self._seeks_probe:
            self._seeks_probe = False
            parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
            self._begin(trainer, pl_module, [batch, *parts], in_state=True)
            if self.monitor is None:
                self._give_up()
        elif self.monitor is not None and self.monitor.probe.batch is None:
            self._on_step(trainer, pl_module, self.monitor)
        every_n_steps = max(1, getattr(trainer, "log_every_n_steps", 1))
        if self.monitor is not None and trainer.global_step % every_n_steps == 0:
            self._log(trainer, self.monitor)

    def _begin(
        self, trainer: Trainer, pl_module: LightningModule, probes: Iterable[Any], *, in_state: bool = False
    ) -> None:
        """Attach to the first probe the module takes, load the state, and take the baseline sample."""

        def in_training_precision(model: nn.Module, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return self._forward(model, trainer.precision_plugin.convert_input(batch))

        monitor = self._attach(
            trainer.strategy.model or pl_module,  # with the strategy's wrapper: FSDP must be called through it
            (
                # Not through the strategy: it calls the user's transfer hooks, which may draw random numbers.
                probe if isinstance(probe, DataLoader) else move_data_to_device(probe, pl_module.device)
                for probe in probes
            ),
            loggers=trainer.loggers if self._loggers is None else self._loggers,
            folder=trainer.default_root_dir,
            forward=in_training_precision,
        )
        if monitor is None:
            return
        monitor.probe.in_state |= in_state
        if self._loaded:
            monitor.load_state_dict(self._loaded)
        self._loaded = None
        if monitor.probe.batch is not None:
            self._on_step(trainer, pl_module, monitor)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sample if the schedule asks for it, and log new summaries in Lightning."""
        if self.monitor is None:
            return
        self._on_step(trainer, pl_module, self.monitor)
        if self._summaries:
            # Only for callbacks: the loggers have them already, on the monitor's own x-axis.
            pl_module.log_dict(self._summaries, on_step=True, on_epoch=False, logger=False, batch_size=1)
            self._summaries = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the monitor and print the final report."""
        if stage == "fit":
            self._end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after an exception or interrupt: Lightning does not call `teardown` then."""
        if trainer.state.fn == "fit":
            self._end(trainer, pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_fitting, self._is_fitting = self._is_fitting, False
        if not is_fitting or self.monitor is None:  # the learning rate finder ends a fit that never began
            return
        self._log(trainer, self.monitor)
        self.monitor.close()
        if (bar := trainer.progress_bar_callback) is not None:
            # A running bar would be drawn again below the report. Stopping it twice is harmless.
            bar.teardown(trainer, pl_module, "fit")
        print_final_report(self.monitor)

    def _log(self, trainer: Trainer, monitor: AttentionMonitor) -> None:
        """Keep what the module has logged since the last time, and the learning rate, beside the heads."""
        # Not `trainer.logged_metrics`, which computes metrics: that may communicate, and wait for the device.
        logged = dict(trainer._logger_connector._logged_metrics)
        before, self._logged = self._logged or {}, logged
        new = {name: value for name, value in logged.items() if value is not before.get(name)}
        if trainer.global_step > 0 and trainer.optimizers:
            monitor.log(step=trainer.global_step, **{"lr": trainer.optimizers[0].param_groups[0]["lr"], **new})

    def _on_step(self, trainer: Trainer, pl_module: LightningModule, monitor: AttentionMonitor) -> None:
        sample = monitor.on_step(trainer.global_step)
        if sample is not None:
            self._warn_of_other_model(trainer.strategy.model or pl_module)
            # Only the main process has the sample, but all ranks must stop or save at the same step.
            outcome = (summary_scalars(sample) if sample.values else {}, sample.requests)
            self._summaries, requests = self._from_first(outcome, ({}, ()))
            if "stop" in requests:
                trainer.should_stop = True
            if "checkpoint" in requests:
                trainer.save_checkpoint(
                    Path(trainer.default_root_dir) / f"attention-alert-step-{sample.global_step}.ckpt"
                )


def _continues(monitor: AttentionMonitor, trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether a fit goes on where the monitor's ended: the same module at the same step."""
    is_same_module = any(module is pl_module for module in monitor.model.modules())
    return is_same_module and 0 < trainer.global_step == monitor.global_step


def _changes_batches(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Return whether the module or the data module has hooks of its own that each batch passes on its way."""
    return any(
        is_overridden(hook, owner)
        for owner in (pl_module, getattr(trainer, "datamodule", None))
        if owner is not None
        for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    )


def _loaders(loaders: Any) -> Iterator[Any]:
    for loader in tree_leaves(loaders):
        if isinstance(loader, CombinedLoader):
            yield from loader.flattened
        else:
            yield loader
