"""Summaries of one layer: the few quantities that all its statistics are functions of.

A summary is expensive and a statistic of it is cheap. So each metric names the one summary that its formula reads, and
of a layer only the summaries that the asked-for metrics name are computed:

==================  ===================  ========================================================
summary             type                 costs, beside what it is made of
==================  ===================  ========================================================
queries             `QueryGram`          one product of the queries with themselves
keys                `KeyGram`            one product of the keys with themselves
key_spectrum        `KeySpectrum`        d×d eigenvalues
leverage, …         `PositionProfile`    d×d eigenvectors, one pass over positions for all of them
field_moments       `FieldMoments`       two d×d products per head
energy_spectrum     `EnergySpectrum`     d×d eigenvalues per head, or a sketch
rows                `AttentionRows`      some rows of the L×L logits
weights             `InteractionSpectrum`  two d×d eigenproblems per head, on a schedule of its own
==================  ===================  ========================================================

Letters: B sequences, Hq query heads, Hkv key heads, L positions, d head size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, cast, get_args

from torch import Tensor

from attnmonitor.functional.cores import FieldCores, field_cores, field_moments
from attnmonitor.functional.key_basis import KeyBasis, KeyGram, key_basis, key_gram, key_spectrum
from attnmonitor.functional.positions import Profile, position_profiles
from attnmonitor.functional.queries import QueryGram

__all__ = ["FROM_KEYS", "FROM_QUERIES", "Summary", "layer_summaries"]

Summary = Literal[
    "queries",
    "keys",
    "key_spectrum",
    "leverage",
    "leading_leverage",
    "norm_shares",
    "energy_shares",
    "field_moments",
    "energy_spectrum",
    "rows",
    "weights",
]

_PROFILES: frozenset[str] = frozenset(get_args(Profile))
_FROM_FIELD: frozenset[str] = frozenset(("energy_shares", "field_moments", "energy_spectrum"))

FROM_QUERIES: frozenset[str] = _FROM_FIELD | {"queries"}
"""Summaries that read the Gram matrix of the queries."""

FROM_KEYS: frozenset[str] = _FROM_FIELD | _PROFILES | {"keys", "key_spectrum"}
"""Summaries that read the keys."""


def layer_summaries(
    queries: QueryGram | None,
    key: Tensor | None,
    wanted: Collection[Summary],
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> dict[str, Any]:
    """Compute the wanted summaries of one layer's queries and keys.

    Args:
        queries: From `query_gram`; None where nothing wanted is in `FROM_QUERIES`.
        key: ``(B, Hkv, Lk, d)``, never repeated per query head; None where nothing wanted is in `FROM_KEYS`.
        wanted: Names of summaries. ``"rows"`` and ``"weights"`` are not made of queries and keys and are left out.
        scale: The softmax scale s.
        key_mask: ``(B, Lk)`` bool, True where valid.

    Returns:
        By name. ``"energy_spectrum"`` is not among them: the `FieldCores` it is computed from are, as ``"cores"``, so
        that several layers can go through one eigensolver.

    Raises:
        ValueError: The shapes do not fit.
    """
    found: dict[str, Any] = {"queries": queries}
    if key is None or FROM_KEYS.isdisjoint(wanted):
        return found
    found["keys"] = keys = key_gram(key, key_mask)
    profiles = cast("set[Profile]", _PROFILES.intersection(wanted))
    basis = key_basis(keys) if profiles else None
    if basis is not None:
        found["key_spectrum"] = basis
    elif "key_spectrum" in wanted:
        found["key_spectrum"] = key_spectrum(keys)
    fields = None
    if queries is not None and not _FROM_FIELD.isdisjoint(wanted):
        fields = _fields(queries, keys, basis, scale)
    if fields is not None and "field_moments" in wanted:
        found["field_moments"] = field_moments(fields)
    if fields is not None and "energy_spectrum" in wanted:
        found["cores"] = fields
    if basis is not None:
        found |= position_profiles(basis, profiles, core=None if fields is None else fields.core)
    return found


def _fields(queries: QueryGram, keys: KeyGram, basis: KeyBasis | None, scale: float) -> FieldCores:
    # Any root gives the spectrum. The eigenbasis gives a better sketch and the shares of positions, where it is there.
    root = keys.cholesky_root() if basis is None else basis.root()
    return field_cores(queries, keys, root, scale=scale)
