"""Statistics of the values alone: how large what the heads can write is, and whether it depends on the position.

Letters: B sequences, Hkv key/value heads, L positions, dv size of a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, num_positions
from attnmonitor.functional.precision import norms_of
from attnmonitor.functional.ranks import nan_unless_finite

__all__ = ["value_rms", "value_spread"]


@dataclass(frozen=True, eq=False)
class Values:
    """The values of one layer.

    Attributes:
        value: ``(B, Hv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding; None where all are.
        num_kv_heads: Hkv; Hv is a multiple of it, or divides it.
        tiled: Whether values h, h + Hkv, … belong to key head h, and not Hv / Hkv values side by side.
    """

    value: Tensor
    mask: Tensor | None
    num_kv_heads: int
    tiled: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds of every sequence, beside the mask."""
        return [self.value]

    def of(self, sequences: slice) -> Values:
        """The values of some of the sequences."""
        mask = None if self.mask is None else self.mask[sequences]
        return replace(self, value=self.value[sequences], mask=mask)

    @staticmethod
    def joined(layers: Sequence[Values]) -> Values:
        """The values of layers of one shape, as those of one layer with all of their sequences."""
        masks = [layer.mask for layer in layers if layer.mask is not None]
        return replace(
            layers[0], value=torch.cat([layer.value for layer in layers]), mask=torch.cat(masks) if masks else None
        )

    def moments(self) -> ValueMoments:
        """The energies of mean and deviations, in two passes over the values."""
        dtype = torch.promote_types(self.value.dtype, torch.float32)
        value, mask, number = self.value.to(dtype), self.mask, num_positions(self.value, self.mask)
        if mask is None:
            mean = value.mean(2, keepdim=True)
        else:
            total = torch.where(mask[:, None, :, None], value, 0).sum(2, keepdim=True)
            mean = (total / number[..., None, None]).to(dtype)
        # A norm per position first: one long sum in float32 would lose digits.
        deviations = norms_of(value - mean).square_()
        if mask is not None:
            deviations = torch.where(mask[:, None], deviations, 0)
        return ValueMoments(
            number * norms_of(mean[:, :, 0]).square_(),
            deviations.sum(-1),
            number * value.shape[-1],
            self.num_kv_heads,
            self.tiled,
        )


@dataclass(frozen=True, eq=False)
class ValueMoments:
    """What the statistics of a layer's values are made of.

    Attributes:
        of_mean: Energy that the values would have if each were their mean, ``(B, Hv)`` float64.
        of_deviations: Energy of their deviations from it, ``(B, Hv)`` float64.
        num_entries: Entries of a head at valid positions, ``(B, 1)`` float64.
        num_kv_heads: As in `Values`.
        tiled: As in `Values`.
    """

    of_mean: Tensor
    of_deviations: Tensor
    num_entries: Tensor
    num_kv_heads: int
    tiled: bool

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds of every sequence."""
        return [self.of_mean, self.of_deviations, self.num_entries]

    def of(self, sequences: slice) -> ValueMoments:
        """The moments of some of the sequences."""
        of_mean, of_deviations, num_entries = (each[sequences] for each in self.tensors)
        return ValueMoments(of_mean, of_deviations, num_entries, self.num_kv_heads, self.tiled)

    @staticmethod
    def joined(layers: Sequence[ValueMoments]) -> ValueMoments:
        """The moments of layers of one shape, as those of one layer with all of their sequences."""
        parts = zip(*(layer.tensors for layer in layers), strict=True)
        of_mean, of_deviations, num_entries = (torch.cat(each) for each in parts)
        return ValueMoments(of_mean, of_deviations, num_entries, layers[0].num_kv_heads, layers[0].tiled)

    @cached_property
    def energy(self) -> Tensor:
        """Sum of squares of each value head over valid positions, ``(B, Hv)`` float64."""
        return self.of_mean + self.of_deviations

    def per_key_head(self, per_value_head: Tensor) -> Tensor:
        """The mean over the values of each key head, ``(B, Hv) -> (B, Hkv)``."""
        ratio = per_value_head.shape[1] // self.num_kv_heads
        if ratio == 1:
            return per_value_head
        if ratio == 0:
            return per_value_head.repeat_interleave(self.num_kv_heads // per_value_head.shape[1], 1)
        shape = (ratio, -1) if self.tiled else (-1, ratio)
        per_key_head: Tensor = per_value_head.unflatten(1, shape).mean(1 if self.tiled else 2)
        return per_key_head


def value_rms_of(moments: ValueMoments) -> Tensor:
    """Root mean square entry of the values of each key head, ``(B, Hkv)``."""
    mean_square = moments.energy / moments.num_entries
    return moments.per_key_head(nan_unless_finite(mean_square)).sqrt()


def value_spread_of(moments: ValueMoments) -> Tensor:
    """Share of the values' energy that differs between positions, for each key head, ``(B, Hkv)``."""
    share = moments.of_deviations / moments.energy  # NaN where the energy is zero or not finite
    return moments.per_key_head(share.clamp_(0, 1))


def value_rms(value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Root mean square entry of the values, in their own unit.

    Args:
        value: ``(B, Hkv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64; NaN for a head that is not finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("value", value, mask)
    return value_rms_of(Values(value, mask, value.shape[1]).moments())


def value_spread(value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Share of the values' energy that differs between positions: ``Σ‖v - v̄‖² / Σ‖v‖²``, with the mean value v̄.

    Near 0 every position has the same value, so attention writes the same whatever it attends to. Where deep layers
    without skip connections make all tokens one vector, this falls to 0 with depth, also under rotary positions.

    Args:
        value: ``(B, Hkv, L, dv)``.
        mask: ``(B, L)`` bool, True where the position is not padding.

    Returns:
        ``(B, Hkv)`` float64 in [0, 1]; NaN for a head whose values are zero or not finite.

    Raises:
        ValueError: The shapes do not fit.

    Source:
        Dong et al., "Attention is not all you need", 2021: the distance from rank one, relative.
    """
    check_heads("value", value, mask)
    return value_spread_of(Values(value, mask, value.shape[1]).moments())
