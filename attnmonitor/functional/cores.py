r"""One pass over the queries and keys of a layer, which leaves a d×d core per head.

Row-centring the logits *is* centring the keys, so the energy field of a head is :math:`\tilde E = s\,q\,\tilde k^\top` and
everything about its spectrum sits in two d×d matrices: :math:`A = s^2 q^\top q` and :math:`B = \tilde k^\top \tilde k`. With
:math:`B = W \Lambda W^\top` and :math:`C = W \Lambda^{1/2}`, the field core :math:`M = C^\top A\, C` has the squared singular values of
:math:`\tilde E` as its eigenvalues, and the columns of :math:`U = \tilde k\, W \Lambda^{-1/2}` are the left singular vectors of the keys.
No L×L matrix is formed, and q and k may go as soon as `head_cores` returns.

Letters: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv query heads that share a key head, Lq and Lk positions,
d head size.

Numerics. Products of float32 entries are exact in float64, so the cores carry only float64 summation error, and nothing
that float16 or float32 can hold overflows or underflows in them. Squaring halves the digits, which is why they are not
float32: a float32 Gram matrix loses singular values below :math:`3\cdot10^{-4}\,\sigma_1`, and full-rank leverage with them. A
float64 one keeps them to :math:`10^{-8}\,\sigma_1`, past what float32 keys can mean. The keys are centred before the product: the
shortcut :math:`k^\top k - n\,\bar k \bar k^\top` cancels when the mean dominates, as it does in trained models.
Per-position numbers (leverage, shares) are float32 products of orthonormal coordinates, which are of order one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnmonitor.functional.incoherence import KeyBasis, incoherence, key_basis, spread_over_positions
from attnmonitor.functional.precision import full_precision

__all__ = ["HeadCores", "energy_shares", "field_cores", "head_cores"]

POSITION_METRICS = ("energy_delocalization", "key_incoherence", "key_leverage_max", "key_norm_participation")


def field_cores(
    query: Tensor, basis: KeyBasis, *, scale: float, query_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Field cores :math:`M = s^2\, \Lambda^{1/2} W^\top q^\top q\, W \Lambda^{1/2}` and query energies :math:`\|q\|_F^2`.

    Args:
        query: ``(B, Hq, Lq, d)``.
        basis: The keys' basis; query head h shares key head ``h // G``.
        scale: The softmax scale s.
        query_mask: ``(B, Lq)`` bool, True where the position is not padding; None where all are.

    Returns:
        ``(B, Hq, d, d)`` and ``(B, Hq)``, float64; NaN for heads whose queries or keys are not finite.
    """
    num_sequences, num_query_heads, _, head_dim = query.shape
    num_kv_heads = basis.eigenvalues.shape[1]
    if query_mask is not None:
        query = torch.where(query_mask[:, None, :, None], query, 0)
    wide = query.to(torch.float64, memory_format=torch.contiguous_format)
    gram = wide.mT @ wide
    energy = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    root = (basis.eigenvectors * (scale * basis.eigenvalues.sqrt())[..., None, :])[:, :, None]
    core = root.mT @ gram.unflatten(1, (num_kv_heads, -1)) @ root
    core = torch.where(basis.finite[:, :, None, None, None], core, torch.nan)
    return core.reshape(num_sequences, num_query_heads, head_dim, head_dim), energy


@dataclass(frozen=True, eq=False)
class HeadCores:
    """What is kept of one layer: everything its statistics need, nothing that grows with its length.

    Attributes:
        field_core: M, ``(B, Hq, d, d)`` float64, in the keys' sorted eigenbasis; NaN for a head that is not finite.
        key_eigenvalues: Λ, ``(B, Hkv, d)`` float64, descending; NaN for a head that is not finite.
        query_energy: ``‖q‖_F²``, ``(B, Hq)`` float64.
        num_queries: ``(B, 1)`` float64, positions that are not padding.
        num_keys: ``(B, 1)`` float64.
        per_position: The statistics that had to see positions, by name, ``(B, H)``.
        share_excess: 0-dim: the most by which a position's share exceeds its leverage (it never may), else 0.
    """

    field_core: Tensor
    key_eigenvalues: Tensor
    query_energy: Tensor
    num_queries: Tensor
    num_keys: Tensor
    per_position: dict[str, Tensor]
    share_excess: Tensor


def head_cores(
    query: Tensor,  # (B, Hq, Lq, d)
    key: Tensor,  # (B, Hkv, Lk, d)
    *,
    scale: float,
    query_mask: Tensor | None = None,  # (B, Lq)
    key_mask: Tensor | None = None,  # (B, Lk)
    metrics: Sequence[str],
) -> HeadCores:
    """Reduce one layer's queries and keys to the cores that ``metrics`` need.

    Keeps no reference to q or k and never waits for the device.

    Args:
        query: ``(B, Hq, Lq, d)``, as softmax sees it.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head.
        scale: The softmax scale s.
        query_mask: ``(B, Lq)`` bool, True where valid.
        key_mask: ``(B, Lk)`` bool, True where valid.
        metrics: Names from the catalog; per-position work is done only for those asked for.
    """
    with full_precision(query.device):
        basis = key_basis(key, key_mask)
        core, query_energy = field_cores(query, basis, scale=scale, query_mask=query_mask)
        if query_mask is None:
            num_queries = torch.full(
                (query.shape[0], 1), float(query.shape[2]), dtype=torch.float64, device=query.device
            )
        else:
            num_queries = query_mask.sum(-1, keepdim=True, dtype=torch.float64)
        per_position, share_excess = _per_position(core, basis, metrics)
        return HeadCores(
            core,
            torch.where(basis.finite[..., None], basis.eigenvalues, torch.nan),
            query_energy,
            num_queries,
            basis.num_keys,
            per_position,
            share_excess,
        )


def _per_position(core: Tensor, basis: KeyBasis, metrics: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics of leverage and shares, and how far any share exceeds its leverage."""
    values: dict[str, Tensor] = {}
    excess = torch.zeros((), device=core.device)
    if not any(name in metrics for name in POSITION_METRICS):
        return values, excess
    if "key_norm_participation" in metrics:
        values["key_norm_participation"] = spread_over_positions(
            torch.linalg.vecdot(basis.centered, basis.centered), basis.num_keys
        )
    left = basis.left_singular_vectors()
    squared = left.square()
    leverage = squared.sum(-1)
    if "key_leverage_max" in metrics:
        values["key_leverage_max"] = leverage.amax(-1)
    if "key_incoherence" in metrics:
        values["key_incoherence"] = incoherence(left, basis.energy_mask(0.9), basis.num_keys)
    if "energy_delocalization" in metrics:
        shares = energy_shares(core, left)
        values["energy_delocalization"] = spread_over_positions(shares, basis.num_keys)
        excess = (shares - leverage.repeat_interleave(shares.shape[1] // leverage.shape[1], 1)).nan_to_num(0).amax()
    return values, excess.clamp_min(0)


def energy_shares(core: Tensor, left: Tensor) -> Tensor:
    r"""Share of the field's energy that falls on each key position, :math:`u_j^\top M u_j / \operatorname{tr} M`.

    Args:
        core: M, ``(B, Hq, d, d)``.
        left: U, ``(B, Hkv, Lk, d)``.

    Returns:
        ``(B, Hq, Lk)``; NaN where the field is zero.
    """
    num_kv_heads, head_dim = left.shape[1], left.shape[-1]
    energy = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    relative = (core / energy[..., None, None]).to(left.dtype).unflatten(1, (num_kv_heads, -1))
    stacked = relative.transpose(2, 3).flatten(3)  # (B, Hkv, d, G·d): one product for the heads that share a key head
    images = (left @ stacked).unflatten(-1, (-1, head_dim))  # (B, Hkv, Lk, G, d)
    return torch.linalg.vecdot(images, left[..., None, :]).transpose(2, 3).flatten(1, 2)
