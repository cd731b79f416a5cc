r"""Statistics of a few attention rows that are at hand, because verification rebuilds them in every sample.

Eight rows per sequence are too few for a mean over all queries, and enough for what these statistics ask: how large
what a head writes is, whether two heads have the same field, and how far the logits of a row spread.

A sequence may have no row that counts, for example a short one among long ones. It has no value then, and is left out
of the mean over sequences.

Letters: B sequences, Hq query heads, Lk keys, R rows, dv size of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.precision import fits_float32, full_precision, is_short, norms_of
from attnmonitor.functional.ranks import nan_unless_finite

__all__ = ["CHECKED_STATISTICS", "CheckedRows", "CheckedStatistic"]

_LEAST_KEYS = 8  # of fewer logits the spread says little
_NOISE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, eq=False)
class CheckedRows:
    """Some attention rows of all heads of a layer.

    Attributes:
        logits: s q kᵀ, before masks, biases and soft-caps, ``(B, Hq, R, Lk)``.
        hidden: Keys that a row does not attend to, ``(B, Hq, R, Lk)`` bool.
        output: What the heads write in these rows, before the output projection, ``(B, Hq, R, dv)``; None where that is
            not known.
        written: Norm of what they write in these rows through the output projection, ``(B, Hq, R)``; None likewise.
        query_mask: ``(B, R)`` bool, True where the row is not padding; None where none is.
        key_mask: ``(B, Lk)`` bool, likewise.
    """

    logits: Tensor
    hidden: Tensor
    output: Tensor | None = None
    written: Tensor | None = None
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor | None]:
        """What it holds, in the order of its attributes."""
        return [self.logits, self.hidden, self.output, self.written, self.query_mask, self.key_mask]

    def of(self, sequences: slice) -> CheckedRows:
        """The rows of some of the sequences."""
        return CheckedRows(*(None if each is None else each[sequences] for each in self.tensors))  # type: ignore[arg-type]

    @staticmethod
    def joined(layers: Sequence[CheckedRows]) -> CheckedRows:
        """The rows of layers of one shape, as those of one layer with all of their sequences."""
        parts = zip(*(layer.tensors for layer in layers), strict=True)
        return CheckedRows(*(None if each[0] is None else torch.cat(each) for each in parts))  # type: ignore[arg-type]

    @cached_property
    def unseen(self) -> Tensor:
        """Keys that a row does not attend to, and padding, ``(B, Hq, R, Lk)`` bool."""
        unseen = self.hidden
        if self.key_mask is not None:
            unseen = unseen | self.key_mask.logical_not()[:, None, None]
        if self.query_mask is not None:
            unseen = unseen | self.query_mask.logical_not()[:, None, :, None]
        return unseen

    @cached_property
    def num_seen(self) -> Tensor:
        """Keys that each row sees, ``(B, Hq, R)``."""
        return self.unseen.shape[-1] - self.unseen.sum(-1)

    @cached_property
    def see_enough(self) -> Tensor:
        """Rows that see enough keys for a spread of their logits, ``(B, Hq, R)`` bool."""
        return self.num_seen >= _LEAST_KEYS

    @cached_property
    def num_seeing(self) -> Tensor:
        """Rows that see a key, ``(B, Hq)``."""
        return (self.num_seen > 0).sum(-1)

    @cached_property
    def num_seeing_enough(self) -> Tensor:
        """Rows that see enough keys, ``(B, Hq)``."""
        return self.see_enough.sum(-1)

    @cached_property
    def num_rows(self) -> Tensor:
        """Rows that are no padding, ``(B, Hq)``."""
        num_sequences, num_heads, num_rows, _ = self.logits.shape
        if self.query_mask is None:
            return torch.full((num_sequences, num_heads), num_rows, device=self.logits.device)
        return self.query_mask.sum(-1, keepdim=True).expand(-1, num_heads)

    @cached_property
    def energies(self) -> dict[str, Tensor]:
        """Mean energy of output and of what is written, over rows that see a key, ``(B, Hq)`` each.

        NaN where it is not finite; without one that is not known.
        """
        norms = {"output": None if self.output is None else norms_of(self.output), "written": self.written}
        known = {name: norm for name, norm in norms.items() if norm is not None}
        energies = torch.stack(list(known.values())).square_().masked_fill_(self.num_seen == 0, 0)
        means = nan_unless_finite(energies.sum(-1) / self.num_seeing)
        return dict(zip(known, means.unbind(), strict=True))


@dataclass(frozen=True)
class CheckedStatistic:
    """A statistic of checked rows.

    Attributes:
        formula: One value per head, ``(B, Hq)``; NaN where a sequence has none of the rows.
        num_rows: How many rows it is taken over, ``(B, Hq)``.
        reads: The attribute of the rows that it reads.
    """

    formula: Callable[[CheckedRows], Tensor]
    num_rows: Callable[[CheckedRows], Tensor]
    reads: str = "logits"

    def __call__(self, rows: CheckedRows) -> Tensor:
        """One value per head, ``(B, Hq)`` float64; NaN where a sequence has none of the rows."""
        return self.formula(rows)

    def counted(self, rows: CheckedRows) -> Tensor:
        """Sequences that have a value, ``(B, Hq)`` bool."""
        return self.num_rows(rows) > 0


def _output_rms(rows: CheckedRows) -> Tensor:
    assert rows.output is not None
    return (rows.energies["output"] / rows.output.shape[-1]).sqrt_()


def _output_share(rows: CheckedRows) -> Tensor:
    energy = rows.energies["written"]
    total = energy.nansum(-1, keepdim=True)
    # Where no head writes anything, the share of each is 0.
    return energy / total.clamp_min_(torch.finfo(total.dtype).tiny)


def _head_similarity(rows: CheckedRows) -> Tensor:
    energy, of_mean, products = _field_products(rows)
    # Equal keys give equal logits up to rounding.
    is_zero = energy <= _NOISE**2 * (energy + of_mean)
    size = energy.masked_fill(is_zero, torch.nan).sqrt()
    cosines = products.abs() / (size[..., None] * size[..., None, :])
    # A head is not compared with itself, and one without a field is no twin of another.
    cosines.diagonal(dim1=-2, dim2=-1).fill_(torch.nan)
    largest = cosines.nan_to_num_(nan=-1).amax(-1).clamp_max_(1)
    return largest.masked_fill_(largest < 0, torch.nan)


def _field_products(rows: CheckedRows) -> tuple[Tensor, Tensor, Tensor]:
    """The energy of each head's field, the energy that centering takes, ``(B, Hq)``, and products of fields."""
    logits = rows.logits if is_short(rows.logits) else rows.logits.to(torch.float64)
    field, of_mean = _field(replace(rows, logits=logits))
    with full_precision(field.device):
        products = field @ field.mT
    energy = products.diagonal(dim1=-2, dim2=-1)
    if logits.dtype == torch.float64 or fits_float32(energy).all():
        return energy, of_mean, products
    return _field_products(replace(rows, logits=logits.to(torch.float64)))


def _field(rows: CheckedRows) -> tuple[Tensor, Tensor]:
    """The energy field in the rows, ``(B, Hq, R·Lk)``, and the energy that centering takes, ``(B, Hq)``."""
    logits = rows.logits
    if rows.query_mask is not None:
        logits = torch.where(rows.query_mask[:, None, :, None], logits, 0)
    if rows.key_mask is None:
        number: Tensor | int = logits.shape[-1]
        mean = logits.mean(-1, keepdim=True)
        field = logits - mean
    else:
        is_key = rows.key_mask[:, None, None]
        number = is_key.sum(-1)
        mean = torch.where(is_key, logits, 0).sum(-1, keepdim=True) / number[..., None]
        field = torch.where(is_key, logits - mean, 0)
    return field.flatten(2), (number * mean[..., 0].square()).sum(-1)


def _attention_tau(rows: CheckedRows) -> Tensor:
    number = rows.num_seen.clamp_min(_LEAST_KEYS).to(rows.logits.dtype)
    mean = rows.logits.masked_fill(rows.unseen, 0).sum(-1) / number
    deviations = (rows.logits - mean[..., None]).masked_fill_(rows.unseen, 0)
    spread = norms_of(deviations) / (2 * number * number.log()).sqrt_()
    mean_spread: Tensor = (spread * rows.see_enough).sum(-1) / rows.num_seeing_enough
    return mean_spread


CHECKED_STATISTICS = {
    "output_rms": CheckedStatistic(_output_rms, lambda rows: rows.num_seeing, "output"),
    "output_share": CheckedStatistic(_output_share, lambda rows: rows.num_seeing, "written"),
    "head_similarity": CheckedStatistic(_head_similarity, lambda rows: rows.num_rows),
    "attention_tau": CheckedStatistic(_attention_tau, lambda rows: rows.num_seeing_enough),
}
"""The statistics of checked rows by the name of their metric."""
