"""The monitor decides when to sample and what; `Delivery` hands the sample out.

Two rules shape it. A step that is not sampled costs one call of the schedule. And after attach nothing the monitor
does may harm the run: a failure while sampling becomes NaN, a counter and one warning. A monitor that measures nothing
any more pauses itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed, nn

from attnmonitor.alerts import Rule
from attnmonitor.alerts.actions import Action, check_actions
from attnmonitor.measurement.probe import ForwardFunction, HookFilter, Probe
from attnmonitor.measurement.quiet import default_torch_state, not_compiled
from attnmonitor.measurement.ranks import NoMeasurement, RankMeasurement
from attnmonitor.measurement.tokens import ProbeTokens, checked_decode
from attnmonitor.monitor import clock
from attnmonitor.monitor.delivery import Delivery
from attnmonitor.monitor.evidence import EvidenceTaker
from attnmonitor.monitor.failures import Failures
from attnmonitor.monitor.late import LateSample, is_captured_in_a_graph, with_requests_of
from attnmonitor.monitor.run_alerts import RunAlerts
from attnmonitor.monitor.sampling import MonitorSampling
from attnmonitor.monitor.saved_state import STATE_FORMAT, changes_since, check_state, continue_curves
from attnmonitor.monitor.schedules import Schedule, as_schedule, is_due, never, whole_number
from attnmonitor.monitor.settings import (
    alerts_on,
    check_metrics,
    check_name,
    check_processes,
    check_weights_every,
    idle_rules,
)
from attnmonitor.parallel.sharding import check_known_sharding
from attnmonitor.parallel.wrappers import unwrap
from attnmonitor.record.history import History
from attnmonitor.record.training_log import TrainingLog
from attnmonitor.sample import ByLayer, LayerCoverage, Sample
from attnmonitor.summary.structure import grouped_lines, likely_mistakes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AttentionMonitor"]


class AttentionMonitor(MonitorSampling):
    """Watches every attention head of a model on a fixed probe batch while the model trains.

    Args:
        model: The model; DDP and compile wrappers are removed.
        probe: The batch that is run each time: a tensor, mapping, tuple, list or object on the model's device, or a
            ``DataLoader`` whose first batch is taken, from a copy or, where none is safe, as training reads it.
        schedule: When to sample: every so many optimizer steps, a list of steps, or any function of the step
            (`attnmonitor.monitor.schedules`). Asked at 0 and after every optimizer step.
        metrics: Names from `attnmonitor.metrics.catalog.METRICS`; by default those that need no L×L matrix.
        alerts: True for the default rules, a list of rules, or False for none.
        loggers: Objects with ``log_sample(sample)`` or ``log_metrics(dict, step)``, or W&B runs.
        record: The run's local file: a path ending in ``.sqlite``; a folder, for a new file ``<run id>.sqlite`` in it
            (or the one a loaded state names); True for the folder ``attnmonitor_runs``; None for no record.
        name: Needed where several monitors run side by side: keys become ``attention/<name>/…``.
        strict: Raise failures instead of containing them; for tests.
        forward: ``forward(model, batch)``, where the default call of the model does not fit.
        skip_hooks: Selects forward hooks of the model that the probe's forward skips; called with each hook function.
            For hooks of your own that count forwards or collect outputs: ``lambda hook: hook is count``. Hooks that
            the model needs to run (FSDP's, a parametrization's) must stay. By default none is skipped.
        packed: How rows of several documents are measured, as sequence packing makes them: ``"documents"``, each
            document by itself, or ``"one"``, the row as a whole.
        processes: Where each process holds the whole model (DDP): ``"first"``, the first measures for all, or
            ``"all"``, each runs the same probe and finishes some of the layers, so that a sample takes less time.
        weights_every: Weight metrics, where ``metrics`` names some, are measured with every n-th sample.
        actions: What to do when an alert begins or becomes critical: maps a rule's name, a fault kind or
            ``"critical"`` to ``"stop"``, ``"checkpoint"`` or a function ``action(event, sample)``, or several of
            them. Requests reach the training loop in ``sample.requests``; the adapters carry them out.
        decode: A tokenizer, or a function from a token id to its text: names the tokens at the key positions that
            stand out when a head alarms, where the probe holds token ids.

    A copy of a monitor, as EMA or pickle of what holds it makes one, is closed: it has the results, but no model,
    record or loggers, and takes no samples.

    Attributes:
        model: The unwrapped model.
        probe: The fixed batch with its fingerprint.
        history: Trajectories per metric and layer; ``history.steps``.
        coverage: How each attention layer is captured, verified to what error, or why it is not measured;
            ``print(monitor)`` shows it as a table.
        summary: Counts of samples and alarms, and the alarms that fire: what the verdict is made from.
        should_stop: Whether an alert has asked to stop; for training loops of your own.
        global_step: The latest optimizer step passed to `on_step`; -1 before the first.
        last_sample: The latest sample, on the process that writes; None before the first.
        attached_at: ``time.perf_counter()`` when the monitor was made.
        seconds: Cost of all samples since then, in seconds.

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
        packed: str = "documents",
        processes: str = "first",
        weights_every: int = 10,
        actions: Mapping[str, Action | Sequence[Action]] | None = None,
        decode: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model={type(model).__name__} is not a torch.nn.Module")
        self.model = unwrap(model)
        self.name, self.strict = check_name(name), strict
        self.should_stop, self.global_step = False, -1
        self.last_sample: Sample | None = None
        self.seconds = 0.0
        self._schedule, self._schedule_text = as_schedule(schedule), repr(schedule)
        self._metrics = check_metrics(metrics)
        self._weights_every, self._processes = check_weights_every(weights_every), check_processes(processes)
        rules = alerts_on(alerts, self._metrics)
        checked_actions = check_actions(actions or {}, rules.rules)
        tokens = ProbeTokens(checked_decode(decode))
        check_known_sharding(self.model)
        self.probe = Probe(self.model, probe, forward=forward, skip_hooks=skip_hooks, packed=packed)
        self._measurement = RankMeasurement(
            self.model, self.probe, self._metrics, strict=strict, processes=self._processes
        )
        self._failures = Failures(name, strict=strict, silent=not self._measurement.is_main)
        evidence = EvidenceTaker(self.probe, tokens, self._failures.contained)
        idle = idle_rules(alerts, rules, self._metrics)
        self._alerts = RunAlerts(rules, checked_actions, evidence, self._failures, idle)
        self._state: Mapping[str, Any] | None = None  # loaded before the probe had a batch
        self._late: LateSample | None = None
        self._log = TrainingLog()
        self._delivery = Delivery(self._failures, loggers=loggers, record=record, name=name, log=self._log)
        self._delivery.on_close(self.probe.close)
        if self._measurement.is_main:
            self._delivery.begin()
        self._attach()

    def _attach(self) -> None:
        """Measure once to find the layers, and begin with them."""
        coverage = {} if self.probe.batch is None else self._measurement.attach().coverage
        self._identity = {"probe_fingerprint": self.probe.fingerprint, "model_signature": self._measurement.signature}
        self.history = History(self._measurement.num_heads, self._metrics)
        self.attached_at = self._last_sample_ended = clock.now()
        self._begin_with(coverage if self._measurement.measures else {})

    def _begin_with(self, layers: Mapping[str, LayerCoverage]) -> None:
        """Warn about the layers that cannot be measured, and start the loggers."""
        self.coverage: Mapping[str, LayerCoverage] = ByLayer(layers)
        self.summary = self._alerts.summary(layers)
        for layer in layers.values():
            if not layer.measured:
                self._failures.warn(f"{layer.layer} is not measured: {layer.reason}")
        for line in grouped_lines(likely_mistakes(layers)):
            self._failures.warn(line)
        if self.probe.batch is not None:
            self._delivery.connect_loggers(self.history, self.describe())

    def _has_probe(self, *, is_needed: bool) -> bool:
        """Return whether the probe has a batch; attach once it has, count a failure where it is needed and missing."""
        with self._failures.contained("attach"):
            if self.probe.batch is None and self.probe.take_passing_batch(self.model):
                self._attach()
                if self._state is not None:
                    self.load_state_dict({**self._state, "global_step": self.global_step})
            if is_needed and self.probe.batch is None:
                raise RuntimeError(self.probe.missing)
        return self.probe.batch is not None

    @not_compiled
    def on_step(self, global_step: int) -> Sample | None:
        """Sample if the schedule asks for it after ``global_step`` optimizer steps; return what is delivered, or None.

        Where the host's cores solve the eigenproblems of a GPU, a sample is delivered four steps later, or by the next
        sample, `state_dict` or `close` before.

        A step that was already passed, as after a resume, is not sampled again. If the count moved by more than one,
        the schedule is asked for the steps between as well. While `paused`, no sample is taken.
        """
        try:
            if global_step <= self.global_step:
                return None
            step = whole_number(global_step)
            try:
                due = self.is_due(step)
            finally:
                self.global_step = step
        except Exception as error:
            self._failures.contain("the schedule", error)
            return None
        if not due and self._late is None:
            return None
        if is_captured_in_a_graph():
            self._failures.warn_of_graph()
            return None
        delivered = self._deliver_late(step, due=due)
        if not due:
            return delivered
        has_probe = self._has_probe(is_needed=step > 0)
        if self.paused or not has_probe:
            # Adapters broadcast a sample's requests to all processes, so each process needs a sample.
            return self._no_sample(step) if distributed.is_initialized() else delivered
        return with_requests_of(delivered, self._sample(step, may_be_late=True))

    def log(self, *, step: int | None = None, **values: Any) -> None:
        """Keep what training logs, to be shown beside the heads: ``monitor.log(loss=loss, lr=1e-3)``.

        Args:
            step: Optimizer steps done; by default those that the monitor has counted.
            values: Numbers, or tensors of one element, which are read later: training does not wait for the device.
        """
        with self._failures.contained("monitor.log"):
            if self._measurement.is_main:
                self._log.add(max(0, self.global_step) if step is None else whole_number(step), values)

    def is_due(self, global_step: int) -> bool:
        """Return whether the schedule asks for a sample since the step before, up to ``global_step``."""
        first = self.global_step + 1 if self.global_step >= 0 else global_step
        return is_due(self._schedule, first, global_step)

    def resume(self) -> None:
        """End a pause."""
        self._failures.resume()

    @not_compiled
    def sample(self, global_step: int) -> Sample:
        """Take a sample now, whatever the schedule says, and hand it to history, record, loggers and alerts.

        Only the first of the processes that share the model writes and logs; on others the sample has no values.
        """
        self._deliver_late()
        if not self._has_probe(is_needed=True):
            return self._no_sample(global_step, self.probe.missing)
        sample = self._sample(global_step, may_be_late=False)
        assert sample is not None
        return sample

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain containers and tensors that load with ``weights_only=True``."""
        if self.probe.batch is None and self._state is not None:
            return {**self._state, "global_step": self.global_step}
        self._deliver_late()
        return {
            "format": STATE_FORMAT,
            "global_step": self.global_step,
            "failures": self.failures,
            "summary": self.summary.state_dict(),
            **self._identity,
            "probe": self.probe.saved_batch(),
            "record": self._delivery.record_to_continue(),
            "history": self.history.state_dict(),
            "logged": self._log.state_dict(),
            **self._alerts.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue the saved run: steps, history, alert baselines, and the same record file if it exists.

        History and baselines of another probe or of other layers cannot be compared with new ones: they are not
        loaded, and a warning says what changed.

        Raises:
            ValueError: ``state`` was not made by `state_dict` of this version.
        """
        check_state(state)
        self._deliver_late()
        self.global_step = state["global_step"]
        if self.probe.batch is None:
            if state.get("probe") is None:
                self._state = state
                return
            self.probe.keep(self.model, state["probe"])
            self._attach()
        if not self._measurement.measures:
            return
        self._failures.count = state["failures"]
        self.summary.load_state_dict(state.get("summary", state))  # older states hold the counts themselves
        self._alerts.evidence.num_taken = state.get("evidence", 0)
        self._delivery.continue_record(state["record"])
        if changed := changes_since(state, self._identity):
            self._failures.warn(f"{changed}: history and alert baselines begin anew")
            return
        with default_torch_state():
            for unreadable in continue_curves(state, self.history, self._log):
                self._failures.warn(unreadable)
            if reason := self._alerts.continue_from(state):
                self._failures.warn(f"the state of alerts cannot be read ({reason}): alert baselines begin anew")

    def on_close(self, action: Callable[[], object]) -> None:
        """Call ``action()`` once when the monitor closes; what was added last is called first."""
        self._delivery.on_close(action)

    def close(self) -> None:
        """Close loggers and record, and remove what was attached; a second call does nothing."""
        self._deliver_late()
        self._delivery.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Make every copy (deepcopy, EMA, pickle) a closed monitor: the results, and nothing that samples or writes."""
        results = {name: value for name, value in vars(self).items() if name != "model"}
        results["probe"] = self.probe.batch_only()
        results |= {
            "_schedule": never,
            "_measurement": NoMeasurement(self._measurement.after_last_attention),
            "_alerts": self._alerts.without_functions(results["probe"]),
            "_delivery": Delivery(self._failures, loggers=(), record=None, name=self.name, log=self._log),
            "_late": None,
        }
        return object.__new__, (type(self),), results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
