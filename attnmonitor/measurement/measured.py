"""What one measurement found: plain data on the host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from attnmonitor.sample import LayerCoverage

__all__ = ["LayerValues", "Measured"]

LayerValues = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Measured:
    """What one measurement found, on the host.

    Attributes:
        values: ``values[metric][layer]``: float32 ``(num_heads,)``, mean over the probe's sequences.
        spread: The same shape: standard deviation over the sequences.
        coverage: Every layer, measured or not.
        diagnostics: ``certified_fraction``, ``decided_fraction`` and ``invariant_residual``, NaN where no metric needed
            what they are computed from; ``route``, which way its eigenproblems went; ``halved_probe`` where memory did
            not suffice for the whole probe; ``after_last_attention``: ``"skipped"``, or why the forward ran in full.
    """

    values: LayerValues
    spread: LayerValues
    coverage: Mapping[str, LayerCoverage]
    diagnostics: Mapping[str, float | str]

    def numbers(self) -> object:
        """Every number and reason of the layers, bit by bit, for a comparison."""
        tables = [
            {
                (metric, name): heads.numpy().tobytes()
                for metric, layers in table.items()
                for name, heads in layers.items()
            }
            for table in (self.values, self.spread)
        ]
        return tables, {name: (repr(layer.error), layer.reason) for name, layer in self.coverage.items()}

    def trusted_values(self) -> LayerValues:
        """The values without the layers that may not be shown."""
        return {
            metric: trusted
            for metric, layers in self.values.items()
            if (trusted := {name: heads for name, heads in layers.items() if self.coverage[name].measured})
        }
