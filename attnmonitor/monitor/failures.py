"""What goes wrong while a run is watched: counted, told once, kept from the training step, and in the end a pause."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from attnmonitor.measurement import Measured
from attnmonitor.messages import warn
from attnmonitor.sample import LayerCoverage

__all__ = ["Failures"]

_PAUSE_AFTER = 5  # samples in a row that measured nothing


class Failures:
    """The failures of one monitor.

    Args:
        name: The monitor's, for its warnings.
        strict: Raise what goes wrong instead of passing it over.
        silent: Warn of nothing, where another process says the same.

    Attributes:
        count: How often something failed and was passed over so far.
    """

    def __init__(self, name: str | None, *, strict: bool, silent: bool) -> None:
        self.count = 0
        self._speaker = f"attnmonitor {name!r}" if name else "attnmonitor"
        self._strict = strict
        self._silent = silent
        self._told: set[str] = set()
        self._in_a_row = 0

    @property
    def paused(self) -> bool:
        """Whether several samples in a row measured nothing."""
        return self._in_a_row >= _PAUSE_AFTER

    def resume(self) -> None:
        """End a pause."""
        self._in_a_row = 0

    @contextmanager
    def contained(self, what: str) -> Iterator[None]:
        """Keep what goes wrong in a consumer of samples from the training loop."""
        try:
            yield
        except Exception as error:
            self.pass_over(what, error)

    def pass_over(self, what: str, error: Exception) -> None:
        """Count an exception and tell of it once."""
        if self._strict:
            raise error
        self.count += 1
        self._tell_once(what, f"{what} failed and is passed over: {type(error).__name__}: {error}")

    def of_a_sample(
        self, measured: Measured, at_attach: Mapping[str, LayerCoverage], failure: str | None, global_step: int
    ) -> None:
        """Count and tell what failed in a sample; begin a pause where nothing was measured for too long."""
        lost = [layer for name, layer in at_attach.items() if layer.measured and not measured.coverage[name].measured]
        self.count += bool(lost)
        anything = any(layer.measured for layer in measured.coverage.values())
        self._in_a_row = 0 if anything else self._in_a_row + 1
        if failure is not None:
            self._tell_once("sample", f"the sample at step {global_step} failed and its values are NaN: {failure}")
        elif new := [layer.layer for layer in lost if layer.layer not in self._told]:
            self._told.update(new)
            reason = measured.coverage[new[0]].reason
            self.tell(f"not measured at step {global_step}, and NaN: {', '.join(new)} ({reason})")
        if "halved_probe" in measured.diagnostics:
            self._tell_once(
                "memory",
                f"the sample at step {global_step} ran out of memory and measured the first half of the probe's "
                "sequences; give a smaller probe",
            )
        if self._in_a_row == _PAUSE_AFTER:
            self.tell(
                f"nothing was measured in {_PAUSE_AFTER} samples in a row, the last at step {global_step}: no "
                "more are taken until monitor.resume()"
            )

    def tell(self, message: str) -> None:
        """Warn the user."""
        if not self._silent:
            warn(f"{self._speaker}: {message}")

    def _tell_once(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            self.tell(message)
