"""The way of the data: schedule → quiet probe forward → numbers per head → sample → record, loggers, alerts.

Two rules shape everything here. A step that is not sampled pays for one call of the schedule and nothing else. And
after attach nothing the monitor does may hurt the run: whatever goes wrong while sampling becomes NaN, a counter and
one warning, and goes no further. A monitor that measures nothing any more pauses itself.
"""

from __future__ import annotations

import string
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from attnmonitor._version import __version__
from attnmonitor.alerts import DEFAULT_RULES, Alerts, Rule, log_events
from attnmonitor.alerts.actions import Action, calls_of, check_actions, requests_of
from attnmonitor.loggers import SampleLogger, as_logger
from attnmonitor.measurement import Measurement
from attnmonitor.measurement.distributed import DistributedMeasurement
from attnmonitor.measurement.probe import ForwardFunction, HookFilter, Probe, unwrap
from attnmonitor.measurement.quiet import default_torch_state
from attnmonitor.metrics.catalog import DEFAULT_METRICS, check_metric_names
from attnmonitor.monitor.failures import Failures
from attnmonitor.monitor.schedules import Schedule, as_schedule
from attnmonitor.parallel.sharding import check_known_sharding, is_sharded
from attnmonitor.record.history import History
from attnmonitor.record.writer import RecordWriter
from attnmonitor.sample import AlertEvent, ByLayer, LayerCoverage, Sample
from attnmonitor.summary.tables import coverage_table
from attnmonitor.summary.verdict import verdict

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionMonitor"]

_STATE_FORMAT = 1
_NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.")


class AttentionMonitor:
    """Watches every attention head of a model on a fixed probe batch while the model trains.

    Args:
        model: The model; DDP and compile wrappers are looked through.
        probe: The batch that is run each time: a tensor, mapping, tuple or list on the model's device, or a
            ``DataLoader`` whose first batch is taken.
        schedule: When to sample: every so many optimizer steps, a list of steps, or any function of the step
            (`attnmonitor.monitor.schedules`). Asked at 0 and after every optimizer step.
        metrics: Names out of `attnmonitor.metrics.catalog.METRICS`; by default those that need no L×L matrix.
        alerts: True for the default rules, a list of rules, or False for none.
        loggers: Objects with ``log_sample(sample)`` or ``log_metrics(dict, step)``, or W&B runs.
        record: The run's local file: a path ending in ``.sqlite``; a folder, for a new file ``<run id>.sqlite`` in it
            (or the one a loaded state names); True for the folder ``attnmonitor_runs``; None for no record.
        name: Set it when several monitors watch side by side: keys become ``attention/<name>/…``.
        strict: Raise what goes wrong while sampling instead of containing it; for tests.
        forward: ``forward(model, batch)``, where the default call of the model does not fit.
        skip_hooks: Which of the model's forward hooks the probe's forward leaves out, asked of each hook function: for
            hooks of your own that count forwards or collect outputs, ``lambda hook: hook is count``. Hooks that a
            model needs to run (FSDP's, a parametrization's) have to stay. By default none is left out.
        weights_every: The metrics of the weights, where ``metrics`` names some, are measured with every so many-th
            sample.
        actions: What to do when an alert begins or grows critical: from a rule's name, a fault kind or
            ``"critical"`` to ``"stop"``, ``"checkpoint"`` or a function ``action(event, sample)``, or several of
            them. The training loop is told through ``sample.requests``, which the adapters carry out.

    Attributes:
        model: The unwrapped model.
        history: Trajectories per metric and layer; ``history.steps``.
        coverage: How each attention layer is captured, verified to what error, or why it is not measured;
            ``print(monitor)`` shows it as a table.
        should_stop: Whether an alert has asked to stop; a loop of your own looks at it.
        global_step: The optimizer step last heard of; -1 before the first.
        last_sample: The latest sample, on the process that writes; None before the first.
        attached_at: ``time.perf_counter()`` when the monitor was made.
        seconds: What all samples since then cost together, in seconds.

    Raises:
        ValueError: An argument is wrong, the model rejects the probe, or no attention was seen in its forward. The
            message quotes the argument, what arrived and the way out.

    Example:
        >>> import torch
        >>> layer = torch.nn.TransformerEncoderLayer(16, nhead=2, batch_first=True)
        >>> with AttentionMonitor(layer, torch.randn(2, 12, 16), record=None) as monitor:
        ...     sample = monitor.sample(global_step=0)
        >>> sample.values["energy_effective_rank"]["self_attn"].shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        schedule: int | Schedule | Iterable[int] = 100,
        *,
        metrics: Iterable[str] | None = None,
        alerts: bool | Iterable[Rule] | None = True,
        loggers: Any = (),
        record: bool | str | Path | None = True,
        name: str | None = None,
        strict: bool = False,
        forward: ForwardFunction | None = None,
        skip_hooks: HookFilter | None = None,
        weights_every: int = 10,
        actions: Mapping[str, Action | Sequence[Action]] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={type(model).__name__} is not a torch.nn.Module")
        if name is not None and (not name or not set(name) <= _NAME_CHARACTERS):
            raise ValueError(
                f"name={name!r} becomes part of keys and file names: letters, digits, '-', '_' and '.' only"
            )
        self.model = unwrap(model)
        self.name = name
        self.strict = strict
        self.should_stop = False
        self.global_step = -1
        self.last_sample: Sample | None = None
        self.seconds = 0.0
        self._schedule = as_schedule(schedule)
        self._schedule_text = repr(schedule)
        self._metrics = check_metric_names(DEFAULT_METRICS if metrics is None else metrics)
        if not self._metrics:
            raise ValueError("metrics=[] names no metric; leave it out for the defaults")
        if weights_every < 1:
            raise ValueError(f"weights_every={weights_every} must be 1 or more samples")
        self._weights_every = weights_every
        self._num_samples = 0
        self._num_cleared = self._num_failed = 0
        with default_torch_state():
            self._alerts = _alerts(alerts, self._metrics)
        self._actions = check_actions(actions or {}, self._alerts.rules)
        check_known_sharding(self.model)
        self._probe = Probe(self.model, probe, forward=forward, skip_hooks=skip_hooks)
        # Under data parallelism every process has the same weights: the first one measures, writes and logs for all.
        # Where weights are sharded a forward needs every process, so all measure, and the first writes and logs.
        self._is_main = not distributed.is_initialized() or distributed.get_rank() == 0
        shares_forward = is_sharded(self.model)
        self._measures = self._is_main or shares_forward
        measurement = DistributedMeasurement if shares_forward else Measurement
        self._measurement = measurement(self.model, self._probe, self._metrics, strict=strict)
        self._failures = Failures(name, strict=strict, silent=not self._is_main)
        if not self._is_main:
            loggers, record = [], None
        self._loggers = [as_logger(logger) for logger in (loggers if isinstance(loggers, (list, tuple)) else [loggers])]
        self.coverage: Mapping[str, LayerCoverage] = ByLayer(
            self._measurement.attach().coverage if self._measures else {}
        )
        self.history = History(self._measurement.num_heads, self._metrics)
        self._record_path, self._record_in_folder = _record_path(record, name)
        self._record: RecordWriter | None = None
        self.attached_at = self._last_sample_ended = time.perf_counter()
        self._on_close = ExitStack()
        for layer in self.coverage.values():
            if not layer.measured:
                self._failures.tell(f"{layer.layer} is not measured: {layer.reason}")
        for logger in self._loggers:
            self._introduce(logger)

    def __str__(self) -> str:
        """A table of the layers: how each is captured and verified, or why it is not measured."""
        return coverage_table(self.coverage)

    def on_step(self, global_step: int) -> Sample | None:
        """Tell the monitor how many optimizer steps are done; sample if the schedule says so.

        A step that was already answered, as after a resume, is not sampled again. Where the count moved by more than
        one, the steps between are asked for as well. A monitor that is `paused` takes no sample.
        """
        if global_step <= self.global_step:
            return None
        first = self.global_step + 1 if self.global_step >= 0 else global_step
        self.global_step = global_step
        try:
            if not any(map(self._schedule, range(first, global_step + 1))):
                return None
        except Exception as error:
            self._failures.pass_over("the schedule", error)
            return None
        if self.paused:
            # Where several processes train, adapters tell all of them what a sample asks for: each has to have one.
            return self._no_sample(global_step) if distributed.is_initialized() else None
        return self.sample(global_step)

    @property
    def failures(self) -> int:
        """How often something failed and was passed over so far.

        A sample, as a whole or in layers that were measured at attach, and what is done with samples (alerts, record,
        loggers, actions).
        """
        return self._failures.count

    @property
    def paused(self) -> bool:
        """Whether `on_step` takes no samples: several in a row measured nothing. `sample` still tries."""
        return self._failures.paused

    def resume(self) -> None:
        """End a pause."""
        self._failures.resume()

    def sample(self, global_step: int) -> Sample:
        """Take a sample now, whatever the schedule says, and hand it to history, record, loggers and alerts.

        On processes other than the first, the sample has no values: they need not wait, and have nothing to log.
        """
        if not self._measures:
            return self._no_sample(global_step)
        started = time.perf_counter()
        failure = None
        with_weights = self._num_samples % self._weights_every == 0
        self._num_samples += 1
        try:
            measured = self._measurement.take(with_weights=with_weights)
        except Exception as error:
            if self.strict:
                raise
            failure = f"{type(error).__name__}: {error}"
            measured = self._measurement.nothing(failure)
        self.coverage = ByLayer(measured.coverage)
        self._failures.of_a_sample(measured, self._measurement.layers, failure, global_step)
        if not self._is_main:
            return Sample(global_step, values={}, failure=failure, name=self.name)
        events: list[AlertEvent] = []
        with self._failures.contained("alerts"), default_torch_state():
            events = self._alerts.observe(measured.trusted_values(), global_step)
        self._num_cleared += sum(event.state == "cleared" for event in events)
        self._num_failed += failure is not None
        ended = time.perf_counter()
        overhead = (ended - started) / (ended - self._last_sample_ended)
        self._last_sample_ended = ended
        sample = Sample(
            global_step=global_step,
            values=measured.values,
            spread=measured.spread,
            coverage=measured.coverage,
            events=events,
            firing=self._alerts.firing,
            diagnostics={**measured.diagnostics, "overhead": overhead},
            seconds=ended - started,
            failures=self.failures,
            failure=failure,
            requests=requests_of(events, self._actions),
            verdict=verdict(
                self.coverage,
                num_samples=self._num_samples,
                firing=self.firing,
                num_cleared=self._num_cleared,
                num_failed=self._num_failed,
                failure=failure,
                watched=bool(self._alerts.rules),
                grace=self._alerts.grace,
            ),
            name=self.name,
        )
        self.last_sample = sample
        self.seconds += sample.seconds
        self._hand_out(sample)
        self.should_stop |= "stop" in sample.requests
        for event, action in calls_of(events, self._actions):
            with self._failures.contained(f"action {getattr(action, '__qualname__', action)}"):
                action(event, sample)
        return sample

    def describe(self) -> dict[str, Any]:
        """Return the run's settings in plain words and numbers: what a tracker's configuration and the record hold."""
        return {
            "attnmonitor_version": __version__,
            "model": type(self.model).__qualname__,
            "model_signature": self._measurement.signature,
            "name": self.name,
            "probe": self._probe.describe(),
            "probe_fingerprint": self._probe.fingerprint,
            "schedule": self._schedule_text,
            "metrics": list(self._metrics),
            "weights_every": self._weights_every,
            "strict": self.strict,
            "alerts": [rule.name for rule in self._alerts.rules],
            "alerts_grace": self._alerts.grace,
            "actions": {
                key: [
                    action if isinstance(action, str) else getattr(action, "__qualname__", repr(action))
                    for action in due
                ]
                for key, due in self._actions.items()
            },
            "layers": [asdict(layer) for layer in self.coverage.values()],
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain containers and tensors, loadable with ``weights_only=True``."""
        return {
            "format": _STATE_FORMAT,
            "global_step": self.global_step,
            "failures": self.failures,
            "num_samples": self._num_samples,
            "num_cleared": self._num_cleared,
            "num_failed": self._num_failed,
            "probe_fingerprint": self._probe.fingerprint,
            "model_signature": self._measurement.signature,
            "record": None if self._record_path is None else str(self._record_path),
            "history": self.history.state_dict(),
            "alerts": self._alerts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the saved monitor was: steps, history, alert baselines, and the same record file if it is there.

        History and baselines of another probe or other layers say nothing about this one: they are left out, with a
        warning that says what changed.

        Raises:
            ValueError: ``state`` was not made by `state_dict` of this version.
        """
        if state.get("format") != _STATE_FORMAT:
            raise ValueError(
                f"state: format {state.get('format')!r} is not {_STATE_FORMAT}, the one this version reads"
            )
        self.global_step = state["global_step"]
        if not self._measures:
            return
        self._failures.count = state["failures"]
        self._num_samples = state["num_samples"]
        self._num_cleared, self._num_failed = state["num_cleared"], state["num_failed"]
        if self._record_in_folder and state["record"] is not None and Path(state["record"]).exists():
            self._record_path = Path(state["record"])
        changed = [
            f"{what} was {state[key]}, is {now}"
            for what, key, now in (
                ("the probe", "probe_fingerprint", self._probe.fingerprint),
                ("the model's attention", "model_signature", self._measurement.signature),
            )
            if state[key] != now
        ]
        if changed:
            self._failures.tell(f"{'; '.join(changed)}: history and alert baselines begin anew")
            return
        with default_torch_state():
            self.history.load_state_dict(state["history"])
            self._alerts.load_state_dict(state["alerts"])

    def on_close(self, action: Callable[[], object]) -> None:
        """Have ``action()`` called once when the monitor closes; what was added last is called first."""
        self._on_close.callback(self._quietly, action)

    def close(self) -> None:
        """Finish the loggers and the record and take off what was attached. Closing twice is harmless."""
        self._on_close.close()
        self._record = None

    @property
    def firing(self) -> list[AlertEvent]:
        """Alerts that are firing now."""
        return self._alerts.firing

    @property
    def record_path(self) -> Path | None:
        """Where this run's samples are kept; None without a record."""
        return self._record.path if self._record is not None else self._record_path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _introduce(self, logger: SampleLogger) -> None:
        """Give a logger what it asks for beside samples: the run's settings, its trajectories, a word at the end."""
        if callable(log_run := getattr(logger, "log_run", None)):
            log_run(self.describe())
        if callable(follow := getattr(logger, "follow", None)):
            follow(self.history)
        if callable(close := getattr(logger, "close", None)):
            self.on_close(close)

    def _no_sample(self, global_step: int) -> Sample:
        return Sample(global_step, values={}, name=self.name)

    def _hand_out(self, sample: Sample) -> None:
        with default_torch_state():
            self.history.append(sample)
        with self._failures.contained("record"):
            if self._record is None and self._record_path is not None:
                self._record = RecordWriter(self._record_path, run=self.describe())
                self.on_close(self._record.close)
            if self._record is not None:
                self._record.append(sample)
        with self._failures.contained("logging of alerts"):
            log_events(sample.events)
        for logger in self._loggers:
            with self._failures.contained(type(logger).__name__):
                logger.log_sample(sample)

    def _quietly(self, action: Callable[[], object]) -> None:
        with self._failures.contained(getattr(action, "__qualname__", "closing")):
            action()


def _alerts(alerts: bool | Iterable[Rule] | None, metrics: tuple[str, ...]) -> Alerts:
    if alerts is True:
        alerts = [rule for rule in DEFAULT_RULES if rule.metrics <= set(metrics)]
    if not alerts:
        return Alerts(())
    chosen = Alerts(alerts)
    for rule in chosen.rules:
        missing = sorted(rule.metrics - set(metrics))
        if missing and not rule.optional:
            raise ValueError(
                f"alerts: rule {rule.name!r} watches {missing[0]!r}, which is not measured; add it: "
                f"metrics=[..., {missing[0]!r}]"
            )
    return chosen


def _record_path(record: bool | str | Path | None, name: str | None) -> tuple[Path | None, bool]:
    """Return the path of the record, and whether it was made up here in a folder."""
    if record is None or record is False:
        return None, False
    path = Path("attnmonitor_runs" if record is True else record)
    if path.suffix:
        return path, False
    # Not from `random`: naming a file must not move the user's generators.
    run_id = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    return path / f"{run_id}{f'-{name}' if name else ''}.sqlite", True
