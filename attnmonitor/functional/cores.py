r"""The d×d core of each head's energy field, which stands for the L×L field in everything but positions.

Row-centering the logits *is* centering the keys, so the energy field of a head is
:math:`\tilde E = s\,q\,\tilde k^\top`, and everything about its spectrum follows from :math:`A = s^2 q^\top q` and
:math:`B = \tilde k^\top \tilde k`: for any C with :math:`C C^\top = B`, the field core

.. math:: M = C^\top A\, C

has the squared singular values of :math:`\tilde E` as its eigenvalues. With :math:`B = W \Lambda W^\top` and
:math:`C = W \Lambda^{1/2}` it is expressed in the keys' sorted singular basis, where it is graded (large entries lead)
and where a key position is a row u of U, with share :math:`u^\top M u / \operatorname{tr} M` of the field's energy.

Letters: B sequences, Hq query heads, Hkv key heads, G = Hq / Hkv query heads that share a key head, Lq and Lk
positions, d head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_query_and_key
from attnmonitor.functional.key_basis import KeyGram
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.ranks import participation_from_moments

__all__ = ["FieldCores", "FieldMoments", "field_cores", "field_moments"]


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


@dataclass(frozen=True, eq=False)
class FieldMoments:
    r"""The sums over each head's energy field that are traces of its core and need no eigenvalues.

    Attributes:
        energy: :math:`T = \|\tilde E\|_F^2`, ``(...)``. 0 is a dead head, NaN one that is not finite.
        energy_squared: :math:`\sum \sigma^4`, ``(...)``.
        num_entries: Valid entries of the field, queries times keys, broadcastable to ``(...)``.
    """

    energy: Tensor
    energy_squared: Tensor
    num_entries: Tensor

    @cached_property
    def participation_ratio(self) -> Tensor:
        r"""Smooth effective rank, :math:`(\sum\sigma^2)^2 / \sum\sigma^4`, ``(...)``; 0 for a zero field."""
        return participation_from_moments(self.energy, self.energy_squared)

    @property
    def energy_rms(self) -> Tensor:
        """Root mean square of the field's valid entries, in logit units, ``(...)``."""
        return (self.energy / self.num_entries).sqrt()


def field_cores(queries: QueryGram, keys: KeyGram, root: Tensor, *, scale: float) -> FieldCores:
    r"""Cores :math:`M = s^2\, C^\top q^\top q\, C` of a layer's energy fields.

    Rounding. A float64 product of n terms errs by at most :math:`n u / (1 - n u)` of the product of absolute values,
    :math:`u = 2^{-53}`. So :math:`\|\Delta A\|_2 \le 2 L u\,\|q\|_F^2` and
    :math:`\|\Delta B\|_2 \le 2 L u\,\|\tilde k\|_F^2`; centering moves k̃ by at most :math:`2 L u\,\|k\|_F`; the
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


def field_moments(fields: FieldCores) -> FieldMoments:
    """Total energy and its square sum of each field, from its core."""
    return FieldMoments(
        energy=fields.core.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0),
        energy_squared=torch.linalg.matrix_norm(fields.core).square(),
        num_entries=fields.num_queries * fields.num_keys,
    )
