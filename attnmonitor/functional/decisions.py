r"""Effective ranks from float32, and float64 for the heads that float32 cannot decide.

Whether a count is 7 or 8 is decided by how far the running sums of the spectrum are from 90 % of the energy. Of the
heads of a trained model few are within a thousandth of it, so the seven digits of float32 decide nearly all of them.
The others, and those whose field is small beside the product of its queries and keys, are computed once more, from
their queries and keys in float64; and what that leaves undecided a third time, without squaring.

`FieldCores.margin` says what is too near. It is not a proof, which `EnergySpectrum.certified` stays for: it is what
rounding errors do not reach unless they conspire. `tests/functional/test_decisions.py` tries it on spectra made to
break it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnmonitor.functional.checks import check_heads, check_query_and_key
from attnmonitor.functional.cores import CAUTION, FieldCores, field_cores
from attnmonitor.functional.counts import decided_ranks
from attnmonitor.functional.eigenvalues import Steps, solved
from attnmonitor.functional.key_basis import KeyBasis, KeyGram, key_gram
from attnmonitor.functional.precision import full_precision, is_short
from attnmonitor.functional.queries import QueryGram, query_gram
from attnmonitor.functional.spectrum import EnergySpectrum, Method, core_spectrum
from attnmonitor.parallel.workers import map_on_cores, split_for_cores

__all__ = ["Fields", "effective_ranks", "product_type"]

LARGEST_MARGIN = 5e-4
"""Margin, as a share of the energy, from which on float32 does not give the energy to five digits."""


def product_type(heads: Tensor, method: Method) -> torch.dtype:
    """The type of products with ``heads``: float32 where a decision can be taken and all eigenvalues are wanted."""
    return torch.float32 if method == "auto" and is_short(heads) else torch.float64


def effective_ranks(
    query: Tensor, key: Tensor, query_mask: Tensor | None, key_mask: Tensor | None, fraction: float
) -> Tensor:
    """Effective ranks of the energy fields, ``(B, Hq)`` float64, each core of the machine computing some of the heads.

    Args:
        query: ``(B, Hq, Lq, d)``, of a type of which `product_type` is float32.
        key: ``(B, Hkv, Lk, d)``.
        query_mask: ``(B, Lq)`` bool, True where the position is not padding.
        key_mask: ``(B, Lk)`` bool, likewise.
        fraction: The share of the variance that the effective rank is to hold.
    """
    check_heads("key", key, key_mask)
    check_query_and_key(query.shape, key.shape)
    num_kv_heads = key.shape[1]
    group = query.shape[1] // num_kv_heads

    def of_key_heads(some: slice) -> Tensor:
        with full_precision(query.device):
            queries = query_gram(query[:, some.start * group : some.stop * group], query_mask, dtype=torch.float32)
            keys = key_gram(key[:, some], key_mask, dtype=torch.float32)
            ranks, decided = decided_ranks(queries, keys, fraction)
            heads = (~decided).nonzero()
            if len(heads):
                sequence, head = heads.unbind(-1)
                left = Fields(queries.of_heads(sequence, head), keys.of_heads(sequence, head // group), scale=1.0)
                ranks[sequence, head] = left.spectrum(fraction=fraction).effective_rank(fraction)[:, 0]
            return ranks

    # A part with fewer than 2^26 multiplications takes longer in a thread of its own: the threads of whatever torch ran
    # before still spin on the cores.
    multiplications = query.numel() * query.shape[-1] // 16
    parts = split_for_cores(num_kv_heads, multiplications, query.device)
    return torch.cat(map_on_cores(of_key_heads, parts), 1)


class Fields:
    """The energy fields of one layer, by their cores.

    Args:
        queries: q; kept in it where its products are in float32.
        keys: The keys.
        scale: The softmax scale s.
        basis: The keys' basis, in which the cores are expressed; that of a triangular root where it is None.

    Attributes:
        cores: The cores. Those that float32 cannot hold are in float64.
    """

    def __init__(self, queries: QueryGram, keys: KeyGram, *, scale: float, basis: KeyBasis | None = None) -> None:
        self._queries, self._keys, self._scale, self._basis = queries, keys, scale, basis
        root = keys.cholesky_root() if basis is None else basis.root()
        self.cores = field_cores(queries, keys, root, scale=scale)
        if queries.query is not None:
            precise = self.cores.margin <= LARGEST_MARGIN * self.cores.energy
            heads = (~precise & (self.cores.size != 0)).nonzero()
            if len(heads):
                self.cores = self.cores.replaced(heads, self._in_float64(heads))

    def spectrum_steps(
        self, *, fraction: float = 0.9, method: Method = "auto", target_rank: int | None = None
    ) -> Steps[EnergySpectrum]:
        """Compute their spectra; those whose effective rank float32 does not decide, from float64.

        Args:
            fraction: The share of the variance that the effective rank is to hold.
            method: See `core_spectrum`.
            target_rank: See `core_spectrum`.
        """
        found = yield from core_spectrum.steps(self.cores, method=method, target_rank=target_rank)
        if self._queries.query is None:
            return found
        again = partial(core_spectrum, method="exact")  # of the same number of components as what was found
        for compute in (lambda heads: again(self._in_float64(heads)), self._from_factors):
            heads = (~found.decided(fraction) & found.energy.isfinite()).nonzero()
            if not len(heads) or found.max_rank > found.variances.shape[-1]:
                break
            found = found.replaced(heads, compute(heads))
        return found

    def spectrum(
        self, *, fraction: float = 0.9, method: Method = "auto", target_rank: int | None = None
    ) -> EnergySpectrum:
        """`spectrum_steps`, with the eigenproblems solved where they are."""
        return solved(self.spectrum_steps(fraction=fraction, method=method, target_rank=target_rank))

    def _in_float64(self, heads: Tensor) -> FieldCores:
        """The cores of some heads, ``(N, 2)``, as those of one head in N sequences."""
        queries, keys = self._heads(heads)
        root = keys.cholesky_root() if self._basis is None else self._root(self._basis, heads)
        return field_cores(queries, keys, root, scale=self._scale)

    def _from_factors(self, heads: Tensor) -> EnergySpectrum:
        r"""The spectra of some heads, ``(N, 2)``, from triangular factors of their queries and keys.

        With :math:`q = Q_q R_q` and :math:`\tilde k = Q_k R_k` the field's singular values are those of
        :math:`s R_q R_k^\top`. They err by :math:`u\,s \|q\| \|k\|`, where a Gram matrix errs by its square: what is
        left undecided here is a tie. Ten times as long as `_in_float64`; needed for condition numbers above 10⁴ only.
        """
        queries, keys = self._heads(heads)
        query, mask = queries.query, queries.query_mask
        assert query is not None
        if mask is not None:
            query = torch.where(mask[:, None, :, None], query, 0)
        triangles = [torch.linalg.qr(each).R for each in (query.to(torch.float64), keys.centered())]
        values = torch.linalg.svdvals(self._scale * triangles[0] @ triangles[1].mT)
        variances = torch.nn.functional.pad(values.square(), (0, queries.shape[-1] - values.shape[-1]))
        energy = variances.sum(-1)
        size = (self._scale**2 * queries.energy * (keys.energy + keys.energy_of_mean)).sqrt()
        unit, (_, _, length, head_dim) = torch.finfo(torch.float64).eps / 2, queries.shape
        longest = max(length, keys.key.shape[2])
        error, margin = (
            2 * energy.sqrt() * each * unit * size
            for each in (16 * (longest + head_dim**2), CAUTION * (longest**0.5 + 3 * head_dim**0.5))
        )
        return EnergySpectrum(
            variances=variances,
            sum_bounds=variances.cumsum(-1),
            energy=energy,
            energy_squared=variances.square().sum(-1),
            num_entries=queries.num_queries * keys.num_keys,
            error=error,
            margin=margin,
            max_rank=head_dim,
        )

    def _heads(self, heads: Tensor) -> tuple[QueryGram, KeyGram]:
        """The queries and keys of some heads, ``(N, 2)``, in float64, as those of one head in N sequences."""
        query, mask = self._queries.query, self._queries.query_mask
        assert query is not None
        sequence, head = heads.unbind(-1)
        query, mask = query[sequence, head][:, None], None if mask is None else mask[sequence]
        keys = self._keys.of_heads(sequence, self._key_head(head))
        if keys.rounding.dtype != torch.float64:
            keys = key_gram(keys.key, keys.key_mask)
        return replace(query_gram(query, mask), query=query, query_mask=mask), keys

    def _root(self, basis: KeyBasis, heads: Tensor) -> Tensor:
        sequence, head = heads.unbind(-1)
        return basis.root()[sequence, self._key_head(head)][:, None]

    def _key_head(self, head: Tensor) -> Tensor:
        """The key heads of query heads."""
        return head // (self._queries.shape[1] // self._keys.key.shape[1])
