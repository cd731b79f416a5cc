"""All heads of a model in one flat tensor, in forward order: N is their number.

What an alarm can be about (a unit) is a head, a layer or the run; the tensors of a rule have one element per unit.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Heads", "Unit"]

Unit = tuple[str | None, int | None]
"""What one alarm is about: (layer, head), (layer, None), or (None, None) for the run."""


class Heads:
    """The heads of one scope in a fixed order: layers as they first appear, then heads by index.

    Attributes:
        layers: Number of heads of each layer.
    """

    def __init__(self, layers: Mapping[str, int] | None = None) -> None:
        self.layers: dict[str, int] = dict(layers or {})

    def __len__(self) -> int:
        return sum(self.layers.values())

    def add_layers(self, values: Mapping[str, Tensor]) -> None:
        """Add the layers that were not seen before.

        Raises:
            ValueError: A known layer arrives with another number of heads.
        """
        for layer, value in values.items():
            if self.layers.setdefault(layer, len(value)) != len(value):
                raise ValueError(
                    f"alerts: layer {layer!r} arrived with {len(value)} heads but had {self.layers[layer]}; "
                    "a changed model needs new Alerts"
                )

    def flatten(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return (N,) float32, NaN where there is no finite value, and (N,) bool: whether it was measured at all."""
        parts = [values.get(layer, torch.full((count,), torch.nan)) for layer, count in self.layers.items()]
        row = torch.cat([part.detach().to("cpu", torch.float32) for part in parts])
        is_measured = torch.tensor([layer in values for layer in self.layers])
        return torch.where(row.isfinite(), row, torch.nan), self.per_head(is_measured)

    def quantile(self, row: Tensor, q: float, *, per_layer: bool, least: bool) -> Tensor:
        """Return the quantile of an (N,) row over the heads of each layer, (layers,), or over all heads, (1,).

        It is the value of a head: where it falls between two, the lesser (``least``) or the greater. Between the two
        values one head out of four, far away, would move the 75 % quantile of all.
        """
        groups = torch.split(row, list(self.layers.values())) if per_layer else (row,)
        toward = "lower" if least else "higher"
        return torch.stack([group.nanquantile(q, interpolation=toward) for group in groups])

    def minus_layer(self, row: Tensor) -> Tensor:
        """Return an (N,) row minus the 75 % quantile of the layer's other heads; NaN where there is none."""
        groups = torch.split(row, list(self.layers.values()))
        # Not the median: with grouped keys half of a layer's heads go dead together. A head that falls far would pull
        # its own reference down.
        return torch.cat([x - _others(x).nanquantile(0.75, dim=1) for x in groups])

    def per_head(self, row: Tensor) -> Tensor:
        """Return a row of layers, (layers,), or of the run, (1,), repeated for each head, (N,)."""
        counts = list(self.layers.values()) if len(row) == len(self.layers) else [len(self)]
        return row.repeat_interleave(torch.tensor(counts))


def _others(x: Tensor) -> Tensor:
    """Return a row for each of H values, ``(H, H)``: all of them, but NaN in its own place."""
    return x.expand(len(x), -1).clone().fill_diagonal_(torch.nan)
