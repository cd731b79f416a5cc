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
values              `ValueMoments`       two passes over the values
checked_rows        `CheckedRows`        a few passes over rows that verification rebuilds anyway
rows                `AttentionRows`      some rows of the L×L logits
weights             `InteractionSpectrum`  two d×d eigenproblems per head, on a schedule of its own
==================  ===================  ========================================================

Letters: B sequences, Hq query heads, Hkv key heads, L positions, d head size.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, cast, get_args

from attnmonitor.functional.cores import field_moments
from attnmonitor.functional.decisions import Fields
from attnmonitor.functional.eigenvalues import Solvable, Steps
from attnmonitor.functional.key_basis import KeyBasis, KeyGram, KeySpectrum, key_basis, key_spectrum
from attnmonitor.functional.positions import Profile, position_profiles
from attnmonitor.functional.queries import QueryGram
from attnmonitor.functional.spectrum import Method

__all__ = [
    "FROM_ATTENTION",
    "FROM_KEYS",
    "FROM_QUERIES",
    "Summary",
    "layer_summaries",
    "needs_eigenvalues",
    "solved_keys",
]

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
    "values",
    "checked_rows",
    "rows",
    "weights",
]

_PROFILES: frozenset[str] = frozenset(get_args(Profile))
_FROM_FIELD: frozenset[str] = frozenset(("energy_shares", "field_moments", "energy_spectrum"))

FROM_QUERIES: frozenset[str] = _FROM_FIELD | {"queries"}
"""Summaries that read the Gram matrix of the queries."""

FROM_ATTENTION: frozenset[str] = frozenset(("values", "checked_rows", "rows"))
"""Summaries that are read while the layer runs, and not from queries and keys alone."""

FROM_KEYS: frozenset[str] = _FROM_FIELD | _PROFILES | {"keys", "key_spectrum"}
"""Summaries that read the keys."""


def needs_eigenvalues(wanted: Collection[Summary]) -> bool:
    """Whether one of the summaries needs an eigensolver."""
    return not (_PROFILES | {"key_spectrum", "energy_spectrum"}).isdisjoint(wanted)


@Solvable
def layer_summaries(
    queries: QueryGram | None,
    keys: KeyGram | None,
    wanted: Collection[Summary],
    *,
    scale: float,
    spectrum: KeySpectrum | None = None,
    method: Method = "auto",
    target_rank: int | None = None,
) -> Steps[dict[str, Any]]:
    """Compute the wanted summaries of a layer, or of layers of one shape joined as sequences of one layer.

    Args:
        queries: From `query_gram`; None where nothing wanted is in `FROM_QUERIES`.
        keys: From `key_gram`, never repeated per query head; None where nothing wanted is in `FROM_KEYS`.
        wanted: Names of summaries; those that are not made of queries and keys alone are left out.
        scale: The softmax scale s.
        spectrum: From `solved_keys`, which is called where it is None.
        method: See `core_spectrum`.
        target_rank: See `core_spectrum`.

    Returns:
        By name.

    Raises:
        ValueError: The shapes do not fit.
    """
    found: dict[str, Any] = {"queries": queries}
    if keys is None or FROM_KEYS.isdisjoint(wanted):
        return found
    found["keys"] = keys
    found["key_spectrum"] = spectrum = spectrum or (yield from solved_keys.steps(keys, wanted))
    basis = spectrum if isinstance(spectrum, KeyBasis) else None
    fields = None
    if queries is not None and not _FROM_FIELD.isdisjoint(wanted):
        fields = Fields(queries, keys, scale=scale, basis=basis)
    if fields is not None and "energy_spectrum" in wanted:
        found["energy_spectrum"] = yield from fields.spectrum_steps(method=method, target_rank=target_rank)
    if fields is not None and "field_moments" in wanted:  # a spectrum has them
        found["field_moments"] = found.get("energy_spectrum") or field_moments(fields.cores)
    profiles = cast("set[Profile]", _PROFILES.intersection(wanted))
    if basis is not None and profiles:
        found |= position_profiles(basis, profiles, core=None if fields is None else fields.cores.core)
    return found


@Solvable
def solved_keys(keys: KeyGram, wanted: Collection[Summary]) -> Steps[KeySpectrum | None]:
    """The eigenvectors of the keys' Gram matrix, or its eigenvalues, or neither: what the wanted summaries need."""
    if not _PROFILES.isdisjoint(wanted):
        return (yield from key_basis.steps(keys))
    return (yield from key_spectrum.steps(keys)) if "key_spectrum" in wanted else None
