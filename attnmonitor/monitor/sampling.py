"""How a monitor takes a sample, finishes it at once or later, and hands it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from attnmonitor.measurement import Measured
from attnmonitor.measurement.quiet import default_torch_state, not_compiled
from attnmonitor.measurement.unfinished import Unfinished
from attnmonitor.messages import error_text
from attnmonitor.monitor import clock
from attnmonitor.monitor.evidence import check_head
from attnmonitor.monitor.late import LateSample
from attnmonitor.monitor.schedules import whole_number
from attnmonitor.monitor.views import MonitorViews
from attnmonitor.parallel.exchange import MissingProcessError
from attnmonitor.sample import ByLayer, HeadEvidence, LayerCoverage, Sample, Scope
from attnmonitor.summary.verdict import verdict

__all__ = ["MonitorSampling"]

T = TypeVar("T")


class MonitorSampling(MonitorViews):
    """The part of `AttentionMonitor` that takes a sample when it is told to; the monitor itself decides when."""

    should_stop: bool
    global_step: int
    seconds: float
    _begin_with: Callable[[Mapping[str, LayerCoverage]], None]
    _last_sample_ended: float
    _late: LateSample | None

    def _sample(self, global_step: int, *, may_be_late: bool) -> Sample | None:
        """Take a sample; None where it is late."""
        try:
            self._follow_model()
            if not self._measurement.measures:
                return self._no_sample(global_step)
            return self._take(whole_number(global_step), may_be_late)
        except Exception as error:
            self._failures.contain("the sample", error)
            return self._no_sample(self.global_step, error_text(error))

    def _follow_model(self) -> None:
        """Look how the model is spread now; the first of the processes that share it writes from then on."""
        wrote = self._measurement.is_main
        self._measurement.follow_model()
        if wrote is not self._measurement.is_main:
            self._failures.silent = wrote
            with self._failures.contained("what begins to write"):
                if not wrote:
                    self._delivery.begin()
                    self._begin_with(self._measurement.layers)

    def _take(self, global_step: int, may_be_late: bool) -> Sample | None:
        """Measure; finish the sample or leave it for later."""
        started = clock.now()
        with_weights = self.summary.num_samples % self._weights_every == 0
        measure = self._measurement.begin if may_be_late else self._measurement.take
        begun, failure = self._or_nothing(lambda: self._kept(lambda: measure(with_weights=with_weights)))
        seconds = clock.passed(started, clock.now())
        if isinstance(begun, Unfinished):
            self._late = LateSample(global_step, begun, seconds)
            return None
        return self._finish(global_step, begun, failure, seconds)

    def _deliver_late(self, global_step: int = 0, *, due: bool = True) -> Sample | None:
        """Finish the late sample if it is its time, or another one is due; return it or None."""
        try:
            if self._late is None or not (due or self._late.is_time(global_step)):
                return None
            late, self._late = self._late, None
            started = clock.now()
            measured, failure = self._or_nothing(late.measurement.result)
            return self._finish(late.global_step, measured, failure, late.seconds + clock.passed(started, clock.now()))
        except Exception as error:
            self._late = None
            self._failures.contain("the sample", error)
            return None

    def _finish(self, global_step: int, measured: Measured, failure: str | None, seconds: float) -> Sample:
        """Judge what was measured, and hand it out."""
        started = clock.now()
        self.coverage = ByLayer(measured.coverage)
        self._failures.note_sample(measured, self._measurement.layers, failure, global_step)
        if not self._measurement.is_main:
            sample = self._no_sample(global_step, failure)
            self.summary.add(sample)
            return sample
        events, evidence = self._alerts.judge(measured, self._measurement.keeper, global_step)
        self._measurement.keeper.drop()
        ended = clock.now()
        seconds += clock.passed(started, ended)
        overhead = clock.share(seconds, clock.passed(self._last_sample_ended, ended))
        self._last_sample_ended = ended
        sample = Sample(
            global_step=global_step,
            values=measured.values,
            spread=measured.spread,
            coverage=measured.coverage,
            events=events,
            firing=self._alerts.firing,
            diagnostics={**measured.diagnostics, "overhead": overhead},
            seconds=seconds,
            failures=self.failures,
            failure=failure,
            requests=self._alerts.requests(events),
            name=self.name,
            evidence=evidence,
        )
        return self._hand_out(sample)

    def _hand_out(self, sample: Sample) -> Sample:
        """Add verdict and state, deliver the sample, and call the actions that it triggers."""
        with self._failures.contained("the verdict"):
            self.summary.add(sample)
            sample = replace(sample, verdict=verdict(self.summary), state=self.summary.state)
        self.last_sample = sample
        self.seconds += sample.seconds
        self.should_stop |= "stop" in sample.requests
        self._delivery.deliver(sample, self.history, self.describe)
        self._alerts.call_actions(sample)
        return sample

    def _kept(self, measure: Callable[[], T]) -> T:
        """Measure, and keep what the evidence of an alarm would be taken from."""
        wanted = self._alerts.wanted(self._measurement.layers) if self._measurement.is_main else None
        if wanted is None:
            return measure()
        with self._measurement.keeper.keeping(wanted):
            return measure()

    @not_compiled
    def inspect(self, layer: str, head: int, *, scope: Scope = "query_head") -> HeadEvidence:
        """Return what a head does now, as it is kept for every alarm: runs the probe once, on this process.

        Args:
            layer: Name of the layer.
            head: Index of the head.
            scope: Whether ``head`` counts query heads or KV heads.

        Raises:
            ValueError: There is no such layer or head, or the layer is not measured.
            RuntimeError: Another process measures, the forward needs several processes, or it fails.
        """
        check_head(self.coverage, layer, head, scope)
        with default_torch_state():
            kept = self._measurement.look(layer)
            return self._alerts.evidence.look(kept, layer, scope, head, self.coverage, max(0, self.global_step))

    def _or_nothing(self, measure: Callable[[], T]) -> tuple[T | Measured, str | None]:
        """Measure; return NaN for every head and the reason if that fails."""
        try:
            return measure(), None
        except Exception as error:
            self._measurement.keeper.drop()
            if self.strict:
                raise
            if isinstance(error, MissingProcessError):
                self._failures.pause(str(error))
            failure = error_text(error)
            return self._measurement.nothing(failure), failure

    def _no_sample(self, global_step: int, failure: str | None = None) -> Sample:
        return Sample(global_step, values={}, name=self.name, failure=failure)
