"""Float32 decides the effective rank of nearly all heads, and float64 that of the others: no count is wrong.

The reference is the route through float64, whose own proof `test_certificate` tries; where that has a tie to its last
digits, either count is right.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attnmonitor.functional import energy_effective_rank
from attnmonitor.functional.counts import decided_ranks
from attnmonitor.functional.decisions import Fields
from attnmonitor.functional.key_basis import key_basis, key_gram
from attnmonitor.functional.queries import query_gram
from attnmonitor.functional.ranks import effective_rank, participation_ratio
from attnmonitor.functional.spectrum import core_spectrum

LENGTH, HEAD_DIM = 48, 16


def uniform(generator, *shape):
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def near_the_mark(number: int, generator: torch.Generator) -> torch.Tensor:
    """Spectra whose leading part holds 90 % to within 1e-3 … 1e-8, from either side, ``(number, d)``."""
    rank = torch.randint(1, HEAD_DIM, (number, 1), generator=generator)
    inside = torch.arange(HEAD_DIM) < rank
    drawn = uniform(generator, number, HEAD_DIM) + torch.where(uniform(generator, number, 1) < 0.5, 1.0, 0.01)
    offset = 10 ** (-3 - 5 * uniform(generator, number, 1)) * torch.where(uniform(generator, number, 1) < 0.5, -1, 1)
    parts = (torch.where(which, drawn, 0) for which in (inside, ~inside))
    leading, rest = (part / part.sum(-1, keepdim=True) for part in parts)
    return leading * (0.9 + offset) + rest * (0.1 - offset)


def orthonormal(number: int, generator: torch.Generator) -> torch.Tensor:
    """Columns orthonormal to each other and to the constant, ``(number, L, d)``."""
    drawn = torch.randn(number, LENGTH, HEAD_DIM, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn - drawn.mean(1, keepdim=True)).Q


def heads(family: str, number: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys whose field is near the 90 % mark, made hard for float32 in one more way."""
    spectrum = near_the_mark(number, generator)
    if family == "nearly equal eigenvalues":
        spectrum = (spectrum * 1e6).round() / 1e6 * (1 + 1e-7 * uniform(generator, number, HEAD_DIM))
    left, right = orthonormal(number, generator), orthonormal(number, generator)
    split = uniform(generator, number, HEAD_DIM) if family != "condition number 1e6" else torch.tensor(1.0)
    turn = torch.linalg.qr(torch.randn(number, HEAD_DIM, HEAD_DIM, generator=generator, dtype=torch.float64)).Q
    weight = (
        10 ** (3 * (2 * uniform(generator, number, HEAD_DIM) - 1)) if family == "condition number 1e6" else 1 + split
    )
    query = left * (spectrum.sqrt() * weight)[:, None] @ turn
    key = right / (weight * torch.ones(HEAD_DIM))[:, None] @ turn
    if family == "a common key 1e3 times as large":
        key = key + 1e3 * key.square().mean().sqrt() * torch.randn(HEAD_DIM, generator=generator, dtype=torch.float64)
    if family == "outlying positions":
        query[:, 3] *= 1e4
        key[:, 7] *= 1e4
    if family == "an outlying channel":
        query[..., 2] *= 1e4
        key[..., 2] /= 1e4
    if family == "queries nearly orthogonal to keys":
        apart = 1e3 * torch.randn(number, LENGTH, 1, generator=generator, dtype=torch.float64)
        query = torch.cat([query[..., 1:], apart], -1)
        key = torch.cat([key[..., 1:], 1e-4 * key[..., :1]], -1)
    if family == "equal positions":
        query, key = query[:, :4].repeat(1, LENGTH // 4, 1), key[:, :6].repeat(1, LENGTH // 6, 1)
    if family == "the range of float16":
        query, key = 3e4 * query / query.abs().amax(), 1e-4 * key / key.abs().amax()
    return query[:, None], key[:, None]


FAMILIES = (
    "near the mark",
    "nearly equal eigenvalues",
    "condition number 1e6",
    "a common key 1e3 times as large",
    "outlying positions",
    "an outlying channel",
    "queries nearly orthogonal to keys",
    "equal positions",
    "the range of float16",
    "padding",
)
TYPES = {"the range of float16": torch.float16, "nearly equal eigenvalues": torch.bfloat16}


def fields_of(query, key, mask, basis: bool) -> Fields:
    """As a measurement makes them, in the keys' basis; or as `energy_effective_rank` does, all in float32."""
    queries = query_gram(query, mask, dtype=torch.float32)
    if not basis:
        return Fields(queries, key_gram(key, mask, dtype=torch.float32), scale=0.25)
    keys = key_gram(key, mask)
    return Fields(queries, keys, scale=0.25, basis=key_basis(keys))


def reference_variances(query, key, mask) -> torch.Tensor:
    """Squared singular values of each field, from triangular factors of the tall matrices: no square loses digits."""
    query, key = query[:, 0].double(), key[:, 0].double()
    valid = torch.ones(*key.shape[:2], 1) if mask is None else mask[..., None]
    query, key = (torch.where(valid > 0, each, 0) for each in (query, key))
    key = torch.where(valid > 0, key - key.sum(1, keepdim=True) / valid.sum(1, keepdim=True), 0)
    return torch.linalg.svdvals(0.25 * torch.linalg.qr(query).R @ torch.linalg.qr(key).R.mT).square()


def check_decisions(family: str, number: int, seed: int, *, padded: bool = False) -> Counter[str]:
    """Assert that no count is wrong and no error as large as its margin; return how many there were of what."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (each.to(TYPES.get(family, torch.float32)) for each in heads(family, number, generator))
    mask = None
    if padded or family == "padding":
        mask = torch.arange(LENGTH) < LENGTH - torch.randint(0, 30, (number, 1), generator=generator)
        query, key = (torch.where(mask[:, None, :, None], each, torch.inf) for each in (query, key))
    exact = reference_variances(query, key, mask)
    energy = exact.sum(-1)
    lower, upper = (effective_rank(exact, 0.9 + sign * 1e-11) for sign in (-1, 1))
    seen: Counter[str] = Counter(heads=number)
    for basis in (True, False):
        fields = fields_of(query, key, mask, basis)
        coarse, found = core_spectrum(fields.cores), fields.spectrum()
        shift = coarse.variances[:, 0].cumsum(-1) - exact.cumsum(-1) + 0.9 * (energy - coarse.energy[:, 0])[:, None]
        assert (shift.abs().amax(-1) <= coarse.margin[:, 0] + 1e-13 * energy).all(), family
        count, decided = found.effective_rank()[:, 0], found.decided()
        assert ((lower <= count) & (count <= upper)).all(), family
        distance = (exact.cumsum(-1) - 0.9 * energy[:, None]).abs().amin(-1)
        assert (decided[:, 0] | (distance <= 1e-6 * energy)).all(), family
        assert decided.double().mean() > 0.99, family
        # Where queries and keys are of condition 1e6 each, float64 keeps fewer digits of their product, and says so.
        tolerance = 1e-5 + (2 * found.margin[:, 0] / exact[:, 0] if family == "condition number 1e6" else 0)
        for name, expected in {
            "energy": energy,
            "participation_ratio": participation_ratio(exact),
            "stable_rank": energy / exact[:, 0],
        }.items():
            assert ((getattr(found, name)[:, 0] / expected - 1).abs() <= tolerance).all(), (family, name)
        seen["in float64"] += int((~coarse.decided()).sum())
        seen["certified"] += int(found.certified().sum())
    ranks = energy_effective_rank(query, key, mask=mask)[:, 0]
    assert ((lower <= ranks) & (ranks <= upper)).all(), family
    grams = query_gram(query, mask, dtype=torch.float32), key_gram(key, mask, dtype=torch.float32)
    for wide in (0, HEAD_DIM + 1):
        ranks, decided = (each[:, 0] for each in decided_ranks(*grams, 0.9, wide=wide))
        assert ((lower <= ranks) & (ranks <= upper))[decided].all(), (family, wide)
        seen["from leading components" if wide == 0 else "from all"] += int(decided.sum())
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_no_count_is_wrong(family):
    seen = check_decisions(family, 300, 0)
    if family in {"near the mark", "nearly equal eigenvalues", "condition number 1e6", "an outlying channel"}:
        assert seen["in float64"] > 200, "these spectra are made to need it"
    if family in {"queries nearly orthogonal to keys", "padding"}:
        assert seen["from all"] > 250, "float32 decides these"
    if family in {"outlying positions", "equal positions", "padding"}:
        assert seen["certified"] > 550, "float32 certifies these"


@pytest.mark.parametrize("family", ["condition number 1e6", "an outlying channel"])
def test_no_count_of_padded_heads_is_wrong(family):
    """Also where float64 Gram matrices do not decide, and triangular factors are read."""
    check_decisions(family, 100, 1, padded=True)


@pytest.mark.parametrize("decay", [0.6, 0.0])
def test_ranks_of_wide_heads_are_exact(decay):
    """Those of decaying heads from their leading components; of flat ones, whose rank is past them, from all."""
    generator = torch.Generator().manual_seed(0)
    size = torch.arange(1, 129) ** -decay
    query, key = (torch.randn(2, heads, 160, 128, generator=generator) * size for heads in (4, 2))
    exact = [reference_variances(query[:, [head]], key[:, [head // 2]] + 0.5, None) for head in range(4)]
    expected = torch.stack([effective_rank(variances, 0.9) for variances in exact], 1)
    assert torch.equal(energy_effective_rank(query, key + 0.5), expected.double())
    _, decided = decided_ranks(
        *(gram(x, dtype=torch.float32) for gram, x in ((query_gram, query), (key_gram, key))), 0.9
    )
    assert decided.all() if decay else not decided.any()


@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_ranks_of_decaying_components_are_exact(head_dim):
    """Queries and keys along the same axes, or one where the other is not: down to 1e-60 of the product of their sizes.

    Eigenvalues of such fields fall fast, so triangular roots are near singular, and LAPACK's float32 solver gives up.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(head_dim, dtype=torch.float64)
    for decay in (0.9, 0.7, 0.5, 0.3):
        for at, mean in ((steps, 0.0), (steps.flip(0), 0.0), (steps, 10.0)):
            query, key = (
                (torch.randn(1, 2, 2 * head_dim, head_dim, generator=generator) * decay**power).float()
                for power in (steps, at)
            )
            key = key + mean * torch.randn(1, 2, 1, head_dim, generator=generator)
            centered = key.double() - key.double().mean(2, keepdim=True)
            variances = torch.linalg.svdvals(query.double() @ centered.mT).square()
            for fraction in (0.5, 0.9, 0.99):
                expected = effective_rank(variances, fraction).double()
                found = energy_effective_rank(query, key, fraction=fraction)
                assert torch.equal(found, expected), (decay, mean, fraction)


@pytest.mark.soak
@pytest.mark.parametrize("family", FAMILIES)
def test_no_count_of_120000_is_wrong(family):
    for seed in range(12):
        check_decisions(family, 1_000, seed + 1)
