r"""Statistics of the energy field of each query head, :math:`\tilde E = s\,q\,\tilde k^\top`, without forming it.

The rows of the field sum to zero, so it has the same softmax as the logits, and its rank is at most
:math:`\min(d, L - 1)`. Its spectrum is that of a d×d core (`cores`, `spectrum`), its spread over key positions one pass
over the keys (`positions`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, query_padding
from attnmonitor.functional.cores import field_cores
from attnmonitor.functional.decisions import effective_ranks, product_type
from attnmonitor.functional.key_basis import key_gram
from attnmonitor.functional.positions import PositionProfile
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.queries import query_gram
from attnmonitor.functional.ranks import check_fraction
from attnmonitor.functional.spectrum import EnergySpectrum, Method, core_spectrum
from attnmonitor.functional.summaries import layer_summaries

__all__ = ["energy_delocalization", "energy_effective_rank", "energy_spectrum"]

Per = Literal["query_head", "kv_head"]


def energy_spectrum(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    per: Per = "query_head",
    method: Method = "auto",
    target_rank: int | None = None,
) -> EnergySpectrum:
    r"""Spectrum of the energy field :math:`\tilde E = s\,q\,\tilde k^\top` of every head, without forming it.

    Args:
        query: ``(B, Hq, Lq, d)``, as softmax sees it (after RoPE, QK-norm, biases; before the mask).
        key: ``(B, Hkv, Lk, d)``; Hkv divides Hq.
        scale: Softmax scale s; ``d ** -0.5`` by default.
        mask: ``(B, Lk)`` bool, True where the position is not padding; for the queries too unless they have their own.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys' (cross attention).
        per: One spectrum per ``"query_head"``, or per ``"kv_head"``: the queries that share a key head stacked.
        method: See `core_spectrum`.
        target_rank: See `core_spectrum`.

    Returns:
        Spectra of shape ``(B, H, ...)``, H being Hq or Hkv. NaN for a head that is not finite, the others untouched.

    Raises:
        ValueError: Shapes that do not fit, ``target_rank`` out of range, an unknown ``per`` or ``method``.

    >>> import torch
    >>> query, key = torch.eye(4)[None, None], torch.eye(4)[None, None]
    >>> energy_spectrum(query, key, scale=1.0).effective_rank()
    tensor([[3.]], dtype=torch.float64)
    """
    if per not in ("query_head", "kv_head"):
        raise ValueError(f"per={per!r}: must be 'query_head' or 'kv_head'")
    check_heads("query", query, None)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query_mask = query_padding(query, mask, query_mask)
    with full_precision(query.device):
        keys = key_gram(key, mask)
        fields = field_cores(query_gram(query, query_mask), keys, keys.cholesky_root(), scale=scale)
        if per == "kv_head":
            fields = fields.stacked_per_key_head(key.shape[1])
        return core_spectrum(fields, method=method, target_rank=target_rank)


def energy_effective_rank(
    query: Tensor,
    key: Tensor,
    *,
    fraction: float = 0.9,
    scale: float | None = None,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    per: Per = "query_head",
    method: Method = "auto",
    target_rank: int | None = None,
) -> Tensor:
    """Fewest singular components that hold ``fraction`` of the variance of each head's energy field.

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        fraction: Share of the variance (σ²) to hold, in (0, 1].
        scale: Softmax scale; scaling a field does not change its rank.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.
        per: ``"query_head"`` or ``"kv_head"``.
        method: See `core_spectrum`.
        target_rank: See `core_spectrum`.

    Returns:
        ``(B, H)`` float64, in [0, d]; see `EnergySpectrum.effective_rank`.

    Raises:
        ValueError: As `energy_spectrum`, or ``fraction`` is not in (0, 1].
    """
    check_fraction("fraction", fraction)
    dtype = product_type(query, method)
    if per != "query_head" or dtype == torch.float64 or target_rank is not None or scale == 0:
        spectrum = energy_spectrum(
            query, key, scale=scale, mask=mask, query_mask=query_mask, per=per, method=method, target_rank=target_rank
        )
        return spectrum.effective_rank(fraction)
    check_heads("query", query, None)
    query_mask = query_padding(query, mask, query_mask)
    return effective_ranks(query, key, query_mask, mask, fraction)


def energy_delocalization_of(energy_shares: PositionProfile) -> Tensor:
    """Fraction of key positions that carry the field's energy, ``(B, Hq)``."""
    return energy_shares.participation()


def energy_delocalization(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, query_mask: Tensor | None = None
) -> Tensor:
    r"""Fraction of key positions that carry the field's energy.

    .. math:: \frac{1}{n \sum_j \mathrm{share}_j^2}, \qquad \mathrm{share}_j = \|\tilde E e_j\|^2 / \|\tilde E\|_F^2

    Args:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        mask: ``(B, Lk)`` bool, True where the position is not padding.
        query_mask: ``(B, Lq)`` bool, where the queries' padding is not the keys'.

    Returns:
        ``(B, Hq)`` in [1/n, 1]; NaN for a zero field or a head that is not finite.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("query", query, None)
    query_mask = query_padding(query, mask, query_mask)
    summaries = layer_summaries(query_gram(query, query_mask), key_gram(key, mask), {"energy_shares"}, scale=1.0)
    return energy_delocalization_of(summaries["energy_shares"])
