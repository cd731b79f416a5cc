"""Errors quote the argument, what arrived, and the way out."""

from __future__ import annotations

import math

import pytest
import torch
from drawn_layers import draw

from attnmonitor.functional import (
    attention_row_statistics,
    attention_tau,
    energy_effective_rank,
    energy_spectrum,
    key_incoherence,
    leverage_scores,
    output_rms,
    output_share,
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k: energy_effective_rank(q, k, fraction=0), "fraction=0: must be in"),
        (lambda q, k: energy_effective_rank(q, k, fraction=1.2), "fraction=1.2"),
        (lambda q, k: energy_spectrum(q, k).effective_rank(-1), "fraction=-1"),
        (lambda q, k: key_incoherence(k, energy=1.2), r"energy=1.2: must be in \(0, 1\]"),
        (lambda q, k: leverage_scores(k, energy=math.nan), "energy=nan"),
        (lambda q, k: energy_spectrum(q, k, method="randomized", target_rank=9), r"target_rank=9: must be in \[1, 8\]"),
        (lambda q, k: energy_spectrum(q, k, target_rank=0), "target_rank=0"),
        (lambda q, k: energy_spectrum(q, k, method="fast"), "method='fast'"),
        (lambda q, k: energy_spectrum(q, k, per="layer"), "per='layer'"),
        (lambda q, k: energy_spectrum(q[:, :3], k), "multiple of the key heads"),
        (lambda q, k: energy_spectrum(q, torch.cat([k, k])), "one number of sequences"),
        (lambda q, k: energy_spectrum(q[..., :4], k), "one head size"),
        (lambda q, k: energy_spectrum(q[0], k), "expected floating"),
        (lambda q, k: key_incoherence(k.long()), "got torch.int64"),
        (lambda q, k: key_incoherence(k, mask=torch.ones(1, 19, dtype=torch.bool)), r"expected bool \(1, 20\)"),
        (lambda q, k: key_incoherence(k, mask=torch.ones(1, 20)), "got torch.float32"),
        (lambda q, k: attention_row_statistics(lambda rows: rows, 5, num_rows=0), "num_rows=0"),
        (lambda q, k: attention_tau(q, k, num_rows=0), "num_rows=0: must be at least 1; 8 rows"),
        (lambda q, k: output_rms(q, k, k[:, :1]), r"value \(1, 1, 20, 8\) and key \(1, 2, 20, 8\): expected the same"),
        (lambda q, k: output_share(q, k, k, torch.ones(32, 31)), r"projection \(32, 31\): expected \(D, 32\)"),
        (lambda q, k: output_share(q, k, k, torch.ones(32)), r"projection \(32,\): expected \(D, 32\)"),
    ],
)
def test_errors_quote_argument_and_what_arrived(call, message):
    query, key = draw((1, 4, 2, 20, 8))
    with pytest.raises(ValueError, match=message):
        call(query, key)
