r"""One pass over the queries and keys of a layer, which leaves a d×d core per head.

Row-centring the logits *is* centring the keys, so the energy field of a head is
:math:`\tilde E = s\,q\,\tilde k^\top`, and everything about its spectrum sits in :math:`A = s^2 q^\top q` and
:math:`B = \tilde k^\top \tilde k`: for any C with :math:`C C^\top = B`, the field core

.. math:: M = C^\top A\, C

has the squared singular values of :math:`\tilde E` as its eigenvalues. With :math:`B = W \Lambda W^\top` and
:math:`C = W \Lambda^{1/2}` it lives in the keys' sorted singular basis, where it is graded (large entries lead) and
where a key position is a row u of U, with share :math:`u^\top M u / \operatorname{tr} M` of the field's energy. No
L×L matrix is formed. q may go as soon as `query_gram` returns, and k when `head_cores` does.

Letters: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv query heads that share a key head, Lq and Lk
positions, d head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key
from attnmonitor.functional.key_basis import KeyBasis, KeyGram, key_basis
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.ranks import spread_over_positions
from attnmonitor.parallel.workers import map_on_cores, split_for_cores

__all__ = ["FieldCores", "HeadCores", "energy_shares", "field_cores", "head_cores"]

_PER_POSITION = ("energy_delocalization", "key_incoherence", "key_leverage_max", "key_norm_participation")


@dataclass(frozen=True, eq=False)
class FieldCores:
    """The cores of the energy fields of one layer.

    Attributes:
        core: M, ``(B, Hq, d, d)`` float64; NaN for a head whose queries or keys are not finite.
        error: ``(B, Hq)`` float64: bound on the sum of absolute eigenvalue errors of M that rounding can have caused.
        query_energy: ‖q‖_F², ``(B, Hq)`` float64.
        num_queries: Queries that are not padding, ``(B, 1)`` float64.
        num_keys: Keys that are not padding, ``(B, 1)`` float64.
    """

    core: Tensor
    error: Tensor
    query_energy: Tensor
    num_queries: Tensor
    num_keys: Tensor

    def stacked_per_key_head(self, num_kv_heads: int) -> FieldCores:
        """The fields of the stacked queries of each group that shares a key head: stacking rows sums Gram matrices."""
        shape = (self.core.shape[0], num_kv_heads, -1)
        group = self.core.shape[1] // num_kv_heads
        return FieldCores(
            self.core.reshape(*shape, *self.core.shape[2:]).sum(2),
            self.error.reshape(shape).sum(2),
            self.query_energy.reshape(shape).sum(2),
            self.num_queries * group,
            self.num_keys,
        )


def field_cores(queries: QueryGram, keys: KeyGram, root: Tensor, *, scale: float) -> FieldCores:
    r"""Cores :math:`M = s^2\, C^\top q^\top q\, C` of a layer's energy fields.

    Rounding. A float64 product of n terms errs by at most :math:`n u / (1 - n u)` of the product of absolute values,
    :math:`u = 2^{-53}`. So :math:`\|\Delta A\|_2 \le 2 L u\,\|q\|_F^2` and
    :math:`\|\Delta B\|_2 \le 2 L u\,\|\tilde k\|_F^2`; centring moves k̃ by at most :math:`2 L u\,\|k\|_F`; the
    eigensolver is backward stable and the products with C add a modest multiple of :math:`d u`. Each perturbs the
    eigenvalues of M by at most its trace norm in total (Lidskii), which is the bound

    .. math:: 16\,u\,(L + d^2)\; s^2 \|q\|_F^2\, \|\tilde k\|_F \|k\|_F .

    Args:
        queries: q; query head h shares key head ``h // G``.
        keys: The keys.
        root: C with :math:`C C^\top = \tilde k^\top \tilde k`, ``(B, Hkv, d, d)``: of `KeyBasis` or `KeyGram`.
        scale: The softmax scale s.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_query_and_key(queries.shape, keys.key.shape)
    num_sequences, num_heads, length, head_dim = queries.shape
    num_kv_heads = keys.key.shape[1]
    root = (scale * root)[:, :, None]
    core = root.mT @ queries.gram.view(num_sequences, num_kv_heads, -1, head_dim, head_dim) @ root
    key_energy = keys.energy + keys.num_keys * keys.mean.square().sum((-2, -1))
    size = (keys.energy * key_energy).sqrt().repeat_interleave(num_heads // num_kv_heads, 1)
    unit_roundoff = torch.finfo(torch.float64).eps / 2
    terms = max(length, keys.key.shape[2]) + head_dim**2
    return FieldCores(
        core.view(num_sequences, num_heads, head_dim, head_dim),
        16 * unit_roundoff * terms * scale**2 * queries.energy * size,
        queries.energy,
        queries.num_queries,
        keys.num_keys,
    )


@dataclass(frozen=True, eq=False)
class HeadCores:
    """What is kept of one layer: everything its statistics need, nothing that grows with its length.

    Attributes:
        fields: The cores of its energy fields.
        key_variances: Squared singular values of k̃, ``(B, Hkv, d)`` float64, descending; NaN where not finite.
        per_position: The statistics that had to see positions, by name, ``(B, H)``.
        share_excess: 0-dim: the most by which a position's share of the energy exceeds its leverage. Rounding noise
            unless something is wrong: the theorem of `incoherence` forbids it.
    """

    fields: FieldCores
    key_variances: Tensor
    per_position: dict[str, Tensor]
    share_excess: Tensor


def head_cores(
    queries: QueryGram, key: Tensor, *, scale: float, key_mask: Tensor | None = None, metrics: Sequence[str]
) -> HeadCores:
    """Reduce one layer's queries and keys to what ``metrics`` need of them.

    Keeps no reference to k, and beside it needs memory for one block of positions.

    Args:
        queries: Of q as softmax sees it, from `query_gram`.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head.
        scale: The softmax scale s.
        key_mask: ``(B, Lk)`` bool, True where valid.
        metrics: Names from the catalog; work per position is done only for those asked for. What follows from the cores
            alone is there whatever they are.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_heads("key", key, key_mask)
    check_query_and_key(queries.shape, key.shape)
    wanted = [name for name in _PER_POSITION if name in metrics]

    def of(sequences: slice) -> HeadCores:
        basis = key_basis(key[sequences], None if key_mask is None else key_mask[sequences])
        energy = field_cores(queries.of(sequences), basis.keys, basis.root(), scale=scale)
        return HeadCores(energy, basis.eigenvalues, *_per_position(energy.core, basis, wanted))

    with full_precision(key.device):
        return _joined(map_on_cores(of, split_for_cores(len(key), queries.shape.numel() * key.shape[-1], key.device)))


def _joined(parts: Sequence[HeadCores]) -> HeadCores:
    """The sequences' cores as those of one layer."""
    if len(parts) == 1:
        return parts[0]
    return HeadCores(
        **{each.name: _end_to_end([getattr(part, each.name) for part in parts]) for each in fields(HeadCores)}
    )


def _end_to_end(parts: list[Any]) -> Any:
    """What is known of some sequences after what is known of others; the greatest of what has no sequences."""
    first = parts[0]
    if isinstance(first, FieldCores):
        return FieldCores(*(_end_to_end([getattr(part, each.name) for part in parts]) for each in fields(first)))
    if isinstance(first, dict):
        return {name: _end_to_end([part[name] for part in parts]) for name in first}
    return torch.cat(parts) if first.dim() else torch.stack(parts).amax()


def _per_position(core: Tensor, basis: KeyBasis, wanted: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
    """The statistics that see positions, and how far any share exceeds its leverage."""
    excess = torch.zeros((), device=core.device)
    if not wanted:
        return {}, excess
    rank = basis.energy_rank(0.9)
    weights = torch.stack([basis.leading(basis.numerical_rank()), basis.leading(rank), basis.relative_variances()], -1)
    relative = _relative_cores(core, basis.keys.key.dtype)
    weighted, shares = [], []
    for left in basis.left_blocks():
        if "energy_delocalization" in wanted:
            shares.append(_shares(relative, left))
        weighted.append(left.square_() @ weights.to(left.dtype))
    full, cut, norms = torch.cat(weighted, 2).unbind(-1)  # (B, Hkv, Lk) each
    values = {
        "key_incoherence": cut.amax(-1) * basis.keys.num_keys / rank,
        "key_leverage_max": full.amax(-1),
        "key_norm_participation": spread_over_positions(norms, basis.keys.num_keys),
    }
    if shares:
        share = torch.cat(shares, -1)
        values["energy_delocalization"] = spread_over_positions(share, basis.keys.num_keys)
        over = share.unflatten(1, (full.shape[1], -1)) - full[:, :, None]
        excess = torch.where(over.isfinite(), over, 0).amax().clamp_min(0)
    return {name: values[name] for name in wanted}, excess


def _relative_cores(core: Tensor, dtype: torch.dtype) -> Tensor:
    """M / tr M in the type positions are read in; NaN where the field is zero."""
    energy = core.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (core / energy[..., None, None]).to(torch.promote_types(dtype, torch.float32))


def _shares(relative: Tensor, left: Tensor) -> Tensor:
    """u_jᵀ (M / tr M) u_j, ``(B, Hq, d, d), (B, Hkv, block, d) -> (B, Hq, block)``."""
    num_sequences, num_kv_heads, _, head_dim = left.shape
    left = left.to(relative.dtype)
    stacked = relative.view(num_sequences, num_kv_heads, -1, head_dim, head_dim).transpose(2, 3).flatten(3)
    images = (left @ stacked).unflatten(-1, (-1, head_dim))  # (B, Hkv, block, G, d): one product per key head
    shares: Tensor = images.mul_(left[..., None, :]).sum(-1)
    return shares.transpose(2, 3).flatten(1, 2)


def energy_shares(core: Tensor, basis: KeyBasis) -> Tensor:
    r"""Share of the field's energy that falls on each key position, :math:`\|\tilde E e_j\|^2 / \|\tilde E\|_F^2`.

    Args:
        core: M, ``(B, Hq, d, d)``.
        basis: The keys' basis.

    Returns:
        ``(B, Hq, Lk)``, 0 at padding; NaN where the field is zero.
    """
    relative = _relative_cores(core, basis.keys.key.dtype)
    return torch.cat([_shares(relative, left) for left in basis.left_blocks()], -1)
