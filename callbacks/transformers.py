"""transformers: ``Trainer(callbacks=[AttentionMonitorCallback(every_n_steps=100)])``.

Translates the Trainer's events: train begin and every optimizer step become `AttentionMonitor.on_step`, its checkpoints
hold the monitor's state, what it logs goes to `AttentionMonitor.log`, and whole-model summaries of each sample go
through ``Trainer.log`` to ``state.log_history`` and to the trackers in ``report_to``.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from attnmonitor.callbacks.framework import FrameworkCallback, drawn
from attnmonitor.loggers import SampleLogger, WandbLogger, as_logger, summary_scalars
from attnmonitor.measurement.batches import copied
from attnmonitor.messages import needed
from attnmonitor.monitor.final_report import print_final_report
from attnmonitor.sample import Sample

with needed(by="attnmonitor.callbacks.transformers", extra="transformers"):
    from accelerate.utils import send_to_device  # type: ignore[import-untyped]
    from transformers import (
        PrinterCallback,
        ProgressCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.integrations.integration_utils import WandbCallback

__all__ = ["AttentionMonitorCallback"]

_logger = logging.getLogger(__name__)


class AttentionMonitorCallback(FrameworkCallback, TrainerCallback):
    """Monitors every attention head of the model that is trained.

    Args:
        probe: The probe batch, as `AttentionMonitor` takes it, moved to the trainer's device; by default the first
            rows of the evaluation (else training) dataset, batched by the trainer's collator; where these cannot be
            copied, the first training batch.
        every_n_steps: Optimizer steps between two samples, 100 by default. Accumulated gradients count as one step.
        schedule: Instead of ``every_n_steps``: any schedule `AttentionMonitor` takes.
        loggers: As in `AttentionMonitor`, besides the trainer's own reporting; by default Weights & Biases in full
            where a run is live.
        record: As in `AttentionMonitor`; by default a folder under ``args.output_dir``.
        forward: ``forward(model, batch)``, where ``model(**batch)`` does not fit.
        name: Needed where several monitors run side by side.
        settings: Every other keyword of `AttentionMonitor`.

    Attributes:
        monitor: The `AttentionMonitor`, once training has begun.

    Raises:
        ValueError: Both ``every_n_steps`` and ``schedule`` are given; at train begin, whatever `AttentionMonitor`
            refuses. A default probe that the model does not take is a warning, and an error if ``strict``.
    """

    _loaded: dict[str, Any] | None = None
    _seeks_probe = False
    state_key, on_exception = "attnmonitor", None  # Lightning's Trainer looks for them before and after `setup`

    def setup(self, *_: Any, **__: Any) -> None:
        """Refuse Lightning's Trainer, which calls this on its callbacks."""
        raise TypeError(
            "attnmonitor.callbacks.transformers.AttentionMonitorCallback is the one for transformers' Trainer; with "
            "Lightning's Trainer use attnmonitor.callbacks.lightning.AttentionMonitorCallback"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, load the state from the resumed checkpoint, and take the baseline sample."""
        if self.monitor is not None:  # `train` was called before, or restarts with a smaller batch
            self.monitor.close()
        trainer, checkpoint = _train_call()
        self._begin_run()
        self._checkpoint = checkpoint or Path()
        self._loaded = None if checkpoint is None else self._read_state(state.is_world_process_zero)
        batch = self._loaded and self._loaded.get("probe")
        if self._probe is not None:
            self._begin(trainer, state, kwargs["model"], [self._probe])
        elif batch is not None:
            self._begin(trainer, state, kwargs["model"], [batch], in_state=True)
        else:
            batches = drawn(_first_rows(trainer, kwargs["train_dataloader"]))
            self._begin(trainer, state, kwargs["model"], _as_the_model_takes_it(trainer, batches))
        self._seeks_probe = self.monitor is None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the first training batch where no other probe was found."""
        if self._seeks_probe:
            self._seeks_probe = False
            trainer, batch = _training_batch()
            batches = _as_the_model_takes_it(trainer, [copied(batch)])
            self._begin(trainer, state, kwargs["model"], batches, in_state=True)
            if self.monitor is None:
                self._give_up()
        elif self.monitor is not None and self.monitor.probe.batch is None:
            self._on_step(state, control, kwargs["model"])

    def _begin(
        self, trainer: Trainer, state: TrainerState, model: nn.Module, probes: Iterable[Any], *, in_state: bool = False
    ) -> None:
        """Attach to the first probe the model takes, load the state, and take the baseline sample."""

        def in_training_precision(model: nn.Module, batch: Any) -> Any:
            with trainer.compute_loss_context_manager():
                return self._forward(model, batch)

        device = trainer.args.device
        monitor = self._attach(
            model,
            (probe if isinstance(probe, DataLoader) else send_to_device(probe, device) for probe in probes),
            loggers=self._all_loggers(trainer),
            folder=str(trainer.args.output_dir),
            forward=in_training_precision,
        )
        if monitor is None:
            return
        monitor.probe.in_state |= in_state
        if self._loaded is not None:
            try:
                monitor.load_state_dict(self._loaded)
            except Exception as error:  # an unreadable state must not stop an unattended run
                _warn_of(self._checkpoint / self._state_file, error)
        self._loaded = None
        if monitor.probe.batch is not None:
            monitor.on_step(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Sample if the schedule asks for it after this optimizer step, and pass on the requests of alerts."""
        self._on_step(state, control, kwargs["model"])

    def _on_step(self, state: TrainerState, control: TrainerControl, model: nn.Module) -> None:
        sample = None if self.monitor is None else self.monitor.on_step(state.global_step)
        if sample is not None:
            self._warn_of_other_model(model)
            # Only the main process has the sample, but all must stop or save at the same step.
            requests = self._from_first(sample.requests, ())
            control.should_training_stop |= "stop" in requests
            control.should_save |= "checkpoint" in requests

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep what the trainer logs beside the heads."""
        if self.monitor is not None and logs:
            numbers = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            own = {name: value for name, value in numbers.items() if not name.startswith("attention/")}
            self.monitor.log(step=state.global_step, **own)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the monitor's state into the checkpoint that was just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.monitor is None or not state.is_world_process_zero or not folder.is_dir():
            return
        try:
            unfinished = folder / f"{self._state_file}.unfinished"
            torch.save(self.monitor.state_dict(), unfinished)
            unfinished.replace(folder / self._state_file)  # atomic: a kill leaves the complete state or none
        except (OSError, RuntimeError) as error:  # a full disk must not end the run
            _logger.warning("the monitor's state is not in %s: %s", folder, error)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the monitor and print the final report."""
        if self.monitor is not None:
            self.monitor.close()
            print_final_report(self.monitor)

    @property
    def _state_file(self) -> str:
        # A separate file: in trainer_state.json trajectories would have to be text.
        return f"attnmonitor-{self._name}.pt" if self._name else "attnmonitor.pt"

    def _read_state(self, reads: bool) -> dict[str, Any] | None:
        # Perhaps only the process that saved it has the file; all must know which steps were sampled.
        own = _read(self._checkpoint / self._state_file) if reads else None
        state: dict[str, Any] | None = self._from_first(own, None)
        return state

    def _all_loggers(self, trainer: Trainer) -> list[SampleLogger]:
        chosen = self._loggers
        if chosen is None:
            wandb = sys.modules.get("wandb")
            chosen = [] if getattr(wandb, "run", None) is None else [WandbLogger()]
        loggers = [as_logger(logger) for logger in (chosen if isinstance(chosen, (list, tuple)) else [chosen])]
        return [_TrainerReporting(trainer, to_wandb=not any(isinstance(to, WandbLogger) for to in loggers)), *loggers]


class _TrainerReporting:
    """A logger that sends whole-model summaries through ``Trainer.log``, like the trainer's own values.

    Not to the console, where seventy values would hide the loss, and not to Weights & Biases if its own logger already
    sends them.
    """

    def __init__(self, trainer: Trainer, *, to_wandb: bool) -> None:
        self._trainer = trainer
        self._excluded = (ProgressCallback, PrinterCallback, *([] if to_wandb else [WandbCallback]))

    def log_sample(self, sample: Sample) -> None:
        handler, control = self._trainer.callback_handler, self._trainer.control
        callbacks, should_log = handler.callbacks, control.should_log
        handler.callbacks = [callback for callback in callbacks if not isinstance(callback, self._excluded)]
        try:
            # Not the method of a subclass: TRL's adds its averaged metrics to whatever is logged next, and clears them.
            Trainer.log(self._trainer, summary_scalars(sample))
        finally:
            handler.callbacks = callbacks
            # `Trainer.log` clears this flag, and the loss of this step would not be logged.
            control.should_log = should_log


def _read(saved: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = torch.load(saved, map_location="cpu", weights_only=True)
    except Exception as error:
        _warn_of(saved, error)
        return None
    return state


def _warn_of(saved: Path, error: Exception) -> None:
    _logger.warning("no monitor state from %s: %s; history and alert baselines begin anew", saved, error)


def _train_call() -> tuple[Trainer, Path | None]:
    """Return the trainer whose event is handled, and the checkpoint folder it resumes from or None.

    A Trainer gives its callbacks neither itself nor ``resume_from_checkpoint``, so both are read from the frame of the
    running ``train`` call. The alternative, a second line in which the user passes the trainer, would be forgotten.
    """
    trainer, checkpoint = _from_trainer("resume_from_checkpoint")
    return trainer, None if checkpoint is None else Path(checkpoint)


def _training_batch() -> tuple[Trainer, Any]:
    """Return the trainer whose event is handled, and the batch of the step that begins: no event carries it."""
    return _from_trainer("inputs")


def _from_trainer(name: str) -> tuple[Trainer, Any]:
    frame = inspect.currentframe()
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and name in frame.f_locals:
            return trainer, frame.f_locals[name]
        frame = frame.f_back
    raise ValueError(
        "AttentionMonitorCallback: on_train_begin was not called from transformers.Trainer.train(); in a loop of your "
        "own use attnmonitor.callbacks.pytorch.attach(model, optimizer, probe)"
    )


def _as_the_model_takes_it(trainer: Trainer, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield each batch, and what a trainer of another library makes of it before it calls the model.

    The columns of sentence-transformers are prefixed (``anchor_input_ids``), and its trainer takes them apart. The
    batches of TRL's online trainers are texts.
    """
    for batch in batches:
        yield batch
        with suppress(Exception):  # a method of the same name that takes something else
            features, *_ = getattr(trainer, "collect_features", tuple)(dict(batch))
            yield from features
        with suppress(Exception):
            yield _tokenized(trainer, [row["prompt"] for row in batch])


def _tokenized(trainer: Trainer, prompts: list[Any]) -> dict[str, Any]:
    """Return prompts, texts or messages of a chat, as the trainer's tokenizer encodes them."""
    tokenizer: Any = deepcopy(trainer.processing_class)  # padding is kept in it
    if not all(isinstance(prompt, str) for prompt in prompts):
        prompts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in prompts]
    return dict(tokenizer(text=prompts, padding=True, return_tensors="pt"))


def _first_rows(trainer: Trainer, train_dataloader: DataLoader[Any]) -> Iterator[DataLoader[Any]]:
    """Yield loaders over the evaluation and the training dataset in order, so that a resumed run draws the same."""
    datasets = trainer.eval_dataset
    loaders = [train_dataloader]
    if datasets is not None:
        name = next(iter(datasets)) if isinstance(datasets, dict) else None
        if getattr(trainer.get_eval_dataloader, "__func__", None) is Trainer.get_eval_dataloader:
            loaders.insert(0, trainer.get_eval_dataloader(name))
        else:  # of a subclass: one more call could count, draw or read on
            held_out: Any = datasets if name is None else datasets[name]
            loaders.insert(0, DataLoader(held_out, collate_fn=train_dataloader.collate_fn))
    for loader in loaders:
        yield DataLoader(loader.dataset, batch_size=trainer.args.eval_batch_size, collate_fn=loader.collate_fn)
