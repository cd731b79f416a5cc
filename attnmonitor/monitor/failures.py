"""Failures of one monitor: counted, warned about once, contained; too many in a row pause it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attnmonitor.measurement import Measured
from attnmonitor.messages import error_text, warn
from attnmonitor.sample import LayerCoverage

__all__ = ["Failures"]

_PAUSE_AFTER = 5  # samples in a row that measured nothing


class Failures:
    """Counts failures, warns about each kind once, and says when to pause.

    Args:
        name: The monitor's, for its warnings.
        strict: Raise failures instead of containing them.
        silent: Do not warn, because another process gives the same warnings.

    Attributes:
        count: Failures so far.
        silent: As given; may be set.
    """

    def __init__(self, name: str | None, *, strict: bool, silent: bool) -> None:
        self.count = 0
        self._prefix = f"attnmonitor {name!r}" if name else "attnmonitor"
        self._strict = strict
        self.silent = silent
        self._warned: set[str] = set()
        self._num_empty_in_row = 0
        self._must_not_retry = False

    @property
    def paused(self) -> bool:
        """Whether several samples in a row measured nothing, or one must not be tried again."""
        return self._must_not_retry or self._num_empty_in_row >= _PAUSE_AFTER

    def pause(self, reason: str) -> None:
        """Pause at once: another try would make training wait again. Each process says so, also a silent one."""
        self._must_not_retry = True
        warn(f"{self._prefix}: {reason}: no more samples are taken until monitor.resume() on all processes")

    def resume(self) -> None:
        """End a pause."""
        self._num_empty_in_row = 0
        self._must_not_retry = False

    @contextmanager
    def contained(self, what: str) -> Iterator[None]:
        """Keep an exception in this context out of the training loop."""
        try:
            yield
        except Exception as error:
            self.contain(what, error)

    def contain(self, what: str, error: Exception) -> None:
        """Count an exception and warn about it once; raise it if strict."""
        if self._strict:
            raise error
        self.count += 1
        self._warn_once(what, f"{what} failed and was ignored: {error_text(error)}")

    def note_sample(
        self, measured: Measured, at_attach: Mapping[str, LayerCoverage], failure: str | None, global_step: int
    ) -> None:
        """Count and report what failed in a sample; pause after too many samples without any value.

        Args:
            measured: What was measured.
            at_attach: How each layer was captured at attach.
            failure: Why the whole sample failed; None if it did not.
            global_step: Optimizer steps done.
        """
        lost = [layer for name, layer in at_attach.items() if layer.measured and not measured.coverage[name].measured]
        self.count += bool(lost)
        is_empty = not any(layer.measured for layer in measured.coverage.values())
        if is_empty:
            self._num_empty_in_row += 1
        else:
            self.resume()
        if failure is not None:
            self._warn_once("sample", f"the sample at step {global_step} failed and its values are NaN: {failure}")
        elif new := [layer.layer for layer in lost if layer.layer not in self._warned]:
            self._warned.update(new)
            reason = measured.coverage[new[0]].reason
            self.warn(f"not measured at step {global_step}, and NaN: {', '.join(new)} ({reason})")
        if late := [name for name in measured.coverage if name not in at_attach]:
            self._warn_once(
                "late layers",
                f"layers at step {global_step} that were not there at attach are not measured: {', '.join(late)}; to "
                "measure them, close this monitor and attach another",
            )
        if "halved_probe" in measured.diagnostics:
            self._warn_once(
                "memory",
                f"the sample at step {global_step} ran out of memory and measured the first half of the probe's "
                "sequences; give a smaller probe",
            )
        if self._num_empty_in_row == _PAUSE_AFTER:
            self.warn(
                f"nothing was measured in {_PAUSE_AFTER} samples in a row, the last at step {global_step}: no "
                "more are taken until monitor.resume()"
            )

    def warn_of_graph(self) -> None:
        """Warn once that a step which is captured in a CUDA graph is not sampled."""
        self._warn_once(
            "graph",
            "a CUDA graph is captured in this step, and no sample is taken in it; replays call no hooks: call "
            "monitor.on_step(step) yourself after each replay",
        )

    def warn(self, message: str) -> None:
        """Warn the user, in the monitor's name."""
        if not self.silent:
            warn(f"{self._prefix}: {message}")

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            self.warn(message)
