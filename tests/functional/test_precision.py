"""Long tensors are read a block of positions at a time, and inputs of any size and type are measured."""

from __future__ import annotations

import pytest
import torch
from drawn_layers import draw
from metric_case import CLASS_CASES, POWERS, MetricCase
from reference import Layer

from attnmonitor.functional import (
    key_incoherence,
    key_leverage_max,
    key_norm_participation,
    key_participation_ratio,
    key_rank,
)
from attnmonitor.functional.key_basis import key_gram
from attnmonitor.functional.precision import position_blocks


@pytest.mark.parametrize(("shape", "blocks"), [((2, 3, 50, 8), 1), ((1, 8, 4097, 32), 5), ((8, 64, 130, 64), 3)])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_hold_each_position_once_in_order(shape, blocks, masked):
    """A block holds 2^18 numbers, or 64 positions where those are more."""
    heads = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    valid = torch.rand(shape[0], shape[2]) < 0.8 if masked else None
    expected = heads.double()
    if valid is not None:
        expected = torch.where(valid[:, None, :, None], expected, 0)
        heads = torch.where(valid[:, None, :, None], heads, torch.nan)
    read = [(positions, block.clone()) for positions, block in position_blocks(heads, valid)]
    assert torch.equal(torch.cat([block for _, block in read], 2), expected)
    assert [position for where, _ in read for position in range(shape[2])[where]] == list(range(shape[2]))
    lengths = [block.shape[2] for _, block in read]
    assert len(lengths) == blocks
    assert max(lengths) - min(lengths) < blocks


@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.float16, 6e3), (torch.bfloat16, 1e30), (torch.float32, 1e18), (torch.float32, 1e-25)],
)
@pytest.mark.parametrize("case", [case for case in CLASS_CASES if case.source_is_field], ids=str)
def test_inputs_that_overflow_when_squared_are_measured(case: MetricCase, dtype: torch.dtype, size: float):
    query, key = draw((1, 2, 2, 40, 8), torch.float64, key_offset=0.0)
    query, key = (size * query).to(dtype), (size * key).to(dtype)
    found, expected = (
        case.per_sequence(Layer(q, k, 8**-0.5)).double()
        for q, k in ((query, key), (query.double() / size, key.double() / size))
    )
    if case.name in POWERS:
        expected = expected * torch.tensor(size, dtype=torch.float64) ** sum(POWERS[case.name])
        expected = expected.float().double()  # a size that float32 cannot hold is infinite in it
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * (case.name not in POWERS))


@pytest.mark.parametrize("size", [1e-12, 1e12])
@pytest.mark.parametrize(
    "statistic", [key_incoherence, key_leverage_max, key_norm_participation, key_participation_ratio, key_rank]
)
def test_size_of_float32_keys_does_not_matter(statistic, size):
    _, key = draw((1, 2, 2, 40, 8))
    torch.testing.assert_close(statistic(size * key), statistic(key), rtol=1e-4, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_float32_cannot_hold_are_read_in_float64(masked):
    """Too small, too large, and keys that differ by little more than the rounding of their mean."""
    key = torch.randn(2, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    key[0, 0] *= 1e-15
    key[1, 1] *= 1e25
    key[1, 2] = 100 + 1e-5 * key[1, 2]
    mask = torch.arange(40) < torch.tensor([30, 20])[:, None] if masked else None
    found, exact = key_gram(key, mask, dtype=torch.float32), key_gram(key, mask)
    for sequence, head in ((0, 0), (1, 1), (1, 2)):
        for name in ("gram", "energy", "mean"):
            assert torch.equal(getattr(found, name)[sequence, head], getattr(exact, name)[sequence, head])
    torch.testing.assert_close(found.gram[0, 1], exact.gram[0, 1], rtol=1e-4, atol=1e-4)
