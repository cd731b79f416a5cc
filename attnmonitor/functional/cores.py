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

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_query_and_key
from attnmonitor.functional.key_basis import KeyGram
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.ranks import participation_from_moments

__all__ = ["FieldCores", "FieldMoments", "field_cores", "field_moments"]

CAUTION = 25
"""λ², five standard deviations twice; see `_largest_error`. No error of SmolLM2's heads was above a 70th of that."""


@dataclass(frozen=True, eq=False)
class FieldCores:
    r"""The cores of the energy fields of one layer.

    Attributes:
        core: M / size, ``(B, Hq, d, d)`` float32 or float64, its trace at most 1; NaN for a head whose queries or keys
            are not finite.
        size: ``(B, Hq)`` float64: :math:`s^2 \|q\|_F^2 \|\tilde k\|_F^2`, or the trace of M where M was `rounded`.
        error: ``(B, Hq)`` float64: bound on the sum of absolute eigenvalue errors of M that rounding can have caused.
        margin: ``(B, Hq)`` float64: what rounding does not reach unless its errors conspire; at most ``error``.
        num_queries: Queries that are not padding, ``(B, 1)`` float64.
        num_keys: Keys that are not padding, ``(B, 1)`` float64.
    """

    core: Tensor
    size: Tensor
    error: Tensor
    margin: Tensor
    num_queries: Tensor
    num_keys: Tensor

    @cached_property
    def energy(self) -> Tensor:
        """The trace of M, ``(B, Hq)`` float64."""
        return self.size * self.core.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64).clamp_min(0)

    def stacked_per_key_head(self, num_kv_heads: int) -> FieldCores:
        """The fields of the stacked queries of each group that shares a key head: stacking rows sums Gram matrices."""
        shape = (self.core.shape[0], num_kv_heads, -1)
        group = self.core.shape[1] // num_kv_heads
        size = self.size.reshape(shape).sum(2)
        share = (self.size.reshape(shape) / torch.where(size > 0, size, 1)[..., None])[..., None, None]
        return FieldCores(
            (self.core.reshape(*shape, *self.core.shape[2:]) * share).sum(2),
            size,
            self.error.reshape(shape).sum(2),
            self.margin.reshape(shape).sum(2),
            self.num_queries * group,
            self.num_keys,
        )

    def rounded(self, dtype: torch.dtype) -> FieldCores:
        """These float64 cores in another type, in which their eigenvalues will be computed."""
        unit, head_dim = torch.finfo(dtype).eps / 2, self.core.shape[-1]
        # Beside |q| |k| a field may be smaller than float32 can hold; beside its own energy none is.
        trace = self.core.diagonal(dim1=-2, dim2=-1).sum(-1)
        trace = torch.where(trace > 0, trace, 1)
        of_core = self.size * torch.linalg.matrix_norm(self.core)
        return replace(
            self,
            core=(self.core / trace[..., None, None]).to(dtype),
            size=self.size * trace,
            error=self.error + 17 * unit * head_dim**1.5 * of_core,
            margin=self.margin + CAUTION * unit * head_dim**0.5 * self.energy,
        )

    def replaced(self, heads: Tensor, others: FieldCores) -> FieldCores:
        """These cores with those of some heads, ``(N, 2)``, taken from ``others``, ``(N, 1)``."""
        index, others = heads.unbind(-1), others.rounded(self.core.dtype)
        return replace(
            self,
            **{
                name: getattr(self, name).index_put(index, getattr(others, name)[:, 0])
                for name in ("core", "size", "error", "margin")
            },
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


def field_cores(
    queries: QueryGram, keys: KeyGram, root: Tensor, *, scale: float, with_bound: bool = True
) -> FieldCores:
    r"""Cores :math:`M = s^2\, C^\top q^\top q\, C` of a layer's energy fields, in the type of the queries' products.

    They are taken from :math:`A / \|q\|_F^2` and :math:`C / \|\tilde k\|_F`, so nothing overflows in float32.
    `_largest_error` says how far rounding can have moved their eigenvalues.

    Args:
        queries: q; query head h shares key head ``h // G``.
        keys: The keys.
        root: C with :math:`C C^\top = \tilde k^\top \tilde k`, ``(B, Hkv, d, d)``: of `KeyBasis` or `KeyGram`.
        scale: The softmax scale s.
        with_bound: False leaves ``error`` at ``margin``, for those who read the latter alone.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_query_and_key(queries.shape, keys.key.shape)
    num_sequences, num_heads, _, head_dim = queries.shape
    grouped = (num_sequences, keys.key.shape[1], -1)
    dtype = queries.rounding.dtype
    query_size = queries.energy.masked_fill(queries.energy == 0, 1)
    # Divided and converted in one pass.
    unit_root = torch.empty_like(root, dtype=dtype)
    torch.div(root, keys.size.sqrt()[..., None, None], out=unit_root)
    unit_root = unit_root[:, :, None]
    gram = torch.empty_like(queries.gram, dtype=dtype)
    gram = torch.div(queries.gram, query_size[..., None, None], out=gram).view(*grouped, head_dim, head_dim)
    image = gram @ unit_root
    core = unit_root.mT @ image
    size = scale**2 * queries.energy * keys.energy.repeat_interleave(num_heads // grouped[1], 1)
    if not _float32_terms(queries, keys):
        error = margin = size * _largest_error(queries, keys, gram, image, core)
    else:
        energy = size * core.diagonal(dim1=-2, dim2=-1).sum(-1).flatten(1)
        error = margin = likely_error(queries, keys, energy, scale=scale, cores_too=True)
        # An entry below the least normal number may become 0; of both factors, and of d terms in each product.
        margin.add_(size, alpha=queries.shape[-1] ** 4 * torch.finfo(torch.float32).tiny)
        if with_bound:
            error = size * _largest_error(queries, keys, gram, image, core)
            margin = torch.minimum(error, margin)
    return FieldCores(core.flatten(1, 2), size, error, margin, queries.num_queries, keys.num_keys)


def likely_error(
    queries: QueryGram, keys: KeyGram, energy: Tensor, *, scale: float = 1.0, cores_too: bool = False
) -> Tensor:
    """How far rounding to float32 moves a sum of leading eigenvalues of M, nearly always, ``(B, Hq)``.

    See `_largest_error`.

    Args:
        queries: q.
        keys: The keys.
        energy: The trace of M, ``(B, Hq)``.
        scale: The softmax scale s.
        cores_too: Whether the cores are computed from the Gram matrices in float32 as well.
    """
    roots = sum(each**0.5 for each in _float32_terms(queries, keys)) + 3 * queries.shape[-1] ** 0.5 * cores_too
    of_terms = CAUTION * queries.rounding.unit * roots
    error: Tensor = of_terms * torch.add(energy, _alignment(queries, keys), alpha=scale**2)
    return error


def _float32_terms(queries: QueryGram, keys: KeyGram) -> list[int]:
    return [each.terms for each in (queries.rounding, keys.rounding) if each.dtype == torch.float32]


def _alignment(queries: QueryGram, keys: KeyGram) -> Tensor:
    """P, the sum of the products of both diagonals, ``(B, Hq)``."""
    diagonals = [each.gram.diagonal(dim1=-2, dim2=-1) for each in (queries, keys)]
    alignment: Tensor = (diagonals[0].unflatten(1, (keys.key.shape[1], -1)) @ diagonals[1][..., None]).flatten(1)
    return alignment


def _largest_error(queries: QueryGram, keys: KeyGram, gram: Tensor, image: Tensor, core: Tensor) -> Tensor:
    r"""How far rounding moves a sum of leading eigenvalues of the relative core at most; and `likely_error`.

    Let u be the unit roundoff, A and C the relative Gram matrix and root, :math:`P = \sum_i A_{ii} (C C^\top)_{ii}`.
    Sums of eigenvalues move by at most the trace norm of what is added to M (Lidskii).

    *At most.* The sum of n products errs by at most :math:`n u` of the sum of their absolute values, which is at most
    :math:`n u \sqrt{A_{ii} A_{jj}}` for an entry of A. So :math:`\Delta A` moves M by at most
    :math:`n u \min(1, d P)` in trace norm, and the keys' likewise (n + 4: centering rounds twice); the two products
    with C by :math:`d u \|A\|_F` and :math:`d^{3/2} u \|A C\|_F`; rounding A and C to the type by
    :math:`3 u \|A\|_F`; the eigensolver, backward stable, by :math:`16\, d^{3/2} u \|M\|_F`. In float64 all this is
    below :math:`16\, u\,(L + d^2) \|k\|_F / \|\tilde k\|_F`, centering included, and that simpler bound is taken.

    *Nearly always.* Rounding errors are as good as independent of each other and of mean 0, and a sum of n of them is
    then larger than :math:`\lambda \sqrt n\, u` of its terms with a probability below
    :math:`2 e^{-\lambda^2 / 2}` (Higham & Mary 2019). A sum of eigenvalues moves by
    :math:`\langle \Delta A, H \rangle` with :math:`H = C V V^\top C^\top`. If the entries of :math:`\Delta A` err
    independently, this is :math:`\lambda` times
    :math:`(\sum_{ij} \Delta A_{ij}^2 H_{ij}^2)^{1/2} \le \max_{ij} |\Delta A_{ij}| / \sqrt{A_{ii} A_{jj}} \cdot P`,
    because :math:`H_{ij}^2 \le H_{ii} H_{jj}` and :math:`H_{ii} \le (C C^\top)_{ii}`. The products with C, of d terms,
    give the same with d for n, the eigensolver :math:`\lambda \sqrt d\, u \operatorname{tr} M`. With
    :math:`\lambda = 5` twice (once for the terms, once for the entries):

    .. math:: 25\, u\, (\sqrt{n} + 3 \sqrt d)\, (P + \operatorname{tr} M)

    with one :math:`\sqrt n` for the queries and one for the keys, of those that are in float32. Where none is, the
    first bound is small enough to serve as the second.

    References:
        N. Higham, T. Mary, *A new approach to probabilistic rounding error analysis*, SIAM J. Sci. Comput. 41, 2019.
    """
    head_dim, group = queries.shape[-1], queries.shape[1] // keys.key.shape[1]
    exact = torch.finfo(torch.float64).eps / 2
    with_mean = keys.energy + keys.energy_of_mean
    centering = (with_mean / keys.size).sqrt_().repeat_interleave(group, 1)
    error = 16 * exact * (max(queries.shape[2], keys.key.shape[2]) + head_dim**2) * centering
    terms = _float32_terms(queries, keys)
    if not terms:
        return error
    sizes = queries.energy * keys.size.repeat_interleave(group, 1)
    alignment = _alignment(queries, keys) / sizes.masked_fill(sizes == 0, 1)
    of_gram, of_image, of_core = (torch.linalg.matrix_norm(each).flatten(1) for each in (gram, image, core))
    products = (head_dim + 3) * of_gram + head_dim**1.5 * (of_image + 16 * of_core)
    of_grams = sum(each + 4 for each in terms) * (head_dim * alignment).clamp_max(1)
    return error.add_(of_grams + products, alpha=1.01 * queries.rounding.unit)


def field_moments(fields: FieldCores) -> FieldMoments:
    """Total energy and its square sum of each field, from its core."""
    return FieldMoments(
        energy=fields.energy,
        energy_squared=(fields.size * torch.linalg.matrix_norm(fields.core)).square(),
        num_entries=fields.num_queries * fields.num_keys,
    )
