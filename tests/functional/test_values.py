"""Values may have other heads than the keys: each key head has the mean over its own."""

from __future__ import annotations

import pytest
import torch

from attnmonitor.functional.values import Values, value_rms_of, value_spread_of


@pytest.mark.parametrize(
    ("num_values", "tiled", "owners"),
    [
        (4, False, [[0, 1], [2, 3]]),
        (6, True, [[0, 2, 4], [1, 3, 5]]),
        (1, False, [[0], [0]]),  # all key heads read one value head
    ],
)
def test_key_head_has_the_mean_of_its_values(num_values: int, tiled: bool, owners: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(num_values)
    value = torch.randn(3, num_values, 20, 5, generator=generator) * torch.arange(1, num_values + 1)[:, None, None]
    value += torch.rand(num_values, 1, 5, generator=generator)
    mask = torch.arange(20) < torch.tensor([20, 7, 13])[:, None]
    moments = Values(value, mask, 2, tiled).moments()
    for sequence, valid in enumerate(mask.sum(1).tolist()):
        kept = value[sequence, :, :valid].double()
        energies = kept.square().sum((1, 2))
        spreads = (kept - kept.mean(1, keepdim=True)).square().sum((1, 2)) / energies
        for head, owned in enumerate(owners):
            size = (energies[owned].mean() / (valid * 5)).sqrt()
            torch.testing.assert_close(value_rms_of(moments)[sequence, head], size, rtol=1e-5, atol=0)
            spread = spreads[owned].mean()
            torch.testing.assert_close(value_spread_of(moments)[sequence, head], spread, rtol=1e-5, atol=0)
