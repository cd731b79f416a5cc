"""Every statistic the obvious way: the dense L×L field in float64, a full SVD, loops over heads.

Slow, and written without a look at the fast route: tests compare the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def field(query: Tensor, key: Tensor, scale: float, query_valid: Tensor | None = None, key_valid: Tensor | None = None):
    """The energy field of one head: ``(Lq, d), (Lk, d) -> (n, m)``, padding left out, rows centred."""
    query, key = query.double(), key.double()
    if query_valid is not None:
        query = query[query_valid]
    if key_valid is not None:
        key = key[key_valid]
    return centred(scale * query @ key.T, -1)


def centred(x: Tensor, axis: int) -> Tensor:
    """Less the mean along an axis; exactly zero where all are equal, whose mean rounding would put beside them."""
    x = x - x.narrow(axis, 0, 1)
    return x - x.mean(axis, keepdim=True)


def effective_rank(matrix: Tensor, fraction: float = 0.9) -> int:
    variances = torch.linalg.svdvals(matrix) ** 2
    total = variances.sum()
    if total == 0:
        return 0
    reached = variances.cumsum(0) >= fraction * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def spectrum_statistics(matrix: Tensor) -> dict[str, float]:
    variances = torch.linalg.svdvals(matrix) ** 2
    total = variances.sum()
    shares = (matrix**2).sum(0) / total
    return {
        "energy_effective_rank": effective_rank(matrix),
        "energy_participation_ratio": float(total**2 / (variances**2).sum()) if total > 0 else 0.0,
        "energy_stable_rank": float(total / variances[0]) if total > 0 else 0.0,
        "energy_rms": float((matrix**2).mean().sqrt()),
        "energy_delocalization": float(1 / (len(shares) * (shares**2).sum())),
    }


def leverage(key: Tensor, energy: float = 1.0, valid: Tensor | None = None) -> tuple[Tensor, int]:
    """Leverage of each valid position and the rank of the subspace it is taken in."""
    key = key.double() if valid is None else key.double()[valid]
    centered = centred(key, 0)
    left, singular, _ = torch.linalg.svd(centered, full_matrices=False)
    if energy == 1:
        rank = int((singular > max(key.shape) * torch.finfo(torch.float32).eps * singular[0]).sum())
    else:
        rank = effective_rank(centered, energy)
    return (left[:, :rank] ** 2).sum(-1), rank


def key_statistics(key: Tensor, valid: Tensor | None = None) -> dict[str, float]:
    cut, rank = leverage(key, 0.9, valid)
    full, _ = leverage(key, 1.0, valid)
    key = key.double() if valid is None else key.double()[valid]
    centered = centred(key, 0)
    variances = torch.linalg.svdvals(centered) ** 2
    weight = (centered**2).sum(-1) / (centered**2).sum()
    return {
        "key_incoherence": float(len(key) / rank * cut.max()) if rank else float("nan"),
        "key_rank": rank,
        "key_leverage_max": float(full.max()),
        "key_participation_ratio": float(variances.sum() ** 2 / (variances**2).sum()) if variances.sum() > 0 else 0.0,
        "key_norm_participation": float(1 / (len(key) * (weight**2).sum())),
        "key_rms": float((centered**2).mean().sqrt()),
    }


def layer_statistics(
    query: Tensor, key: Tensor, scale: float, query_mask: Tensor | None = None, key_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Every default metric of a layer, ``(B, Hq)`` or ``(B, Hkv)`` float64."""
    group = query.shape[1] // key.shape[1]
    rows: dict[str, list[list[float]]] = {}
    for sequence in range(query.shape[0]):
        query_valid = None if query_mask is None else query_mask[sequence]
        key_valid = None if key_mask is None else key_mask[sequence]
        found: dict[str, list[float]] = {}
        for head in range(query.shape[1]):
            matrix = field(query[sequence, head], key[sequence, head // group], scale, query_valid, key_valid)
            valid_queries = (
                query[sequence, head].double() if query_valid is None else query[sequence, head].double()[query_valid]
            )
            for name, value in spectrum_statistics(matrix).items():
                found.setdefault(name, []).append(value)
            found.setdefault("query_rms", []).append(float((valid_queries**2).mean().sqrt()))
        for head in range(key.shape[1]):
            for name, value in key_statistics(key[sequence, head], key_valid).items():
                found.setdefault(name, []).append(value)
        for name, values in found.items():
            rows.setdefault(name, []).append(values)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in rows.items()}


def row_statistics(
    query: Tensor, key: Tensor, scale: float, visible: Tensor | None = None, query_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """What softmax attention makes of its rows, ``(B, Hq)`` float64; ``visible`` is ``(B, Lq, Lk)``."""
    logits = scale * query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT
    rows: dict[str, list[Tensor]] = {"attention_entropy": [], "max_logit": [], "sink_mass": []}
    for sequence, heads in enumerate(logits):
        seen = torch.ones(heads.shape[1:], dtype=torch.bool) if visible is None else visible[sequence]
        looked_at = seen.any(-1) if query_mask is None else seen.any(-1) & query_mask[sequence]
        heads, seen = heads[:, looked_at], seen[looked_at]
        probability = heads.masked_fill(~seen, -torch.inf).softmax(-1)
        first = int((seen.any(0) if visible is None else visible[sequence].any(0)).int().argmax())
        rows["attention_entropy"].append(torch.special.entr(probability).sum(-1).mean(-1))
        rows["max_logit"].append(heads.masked_fill(~seen, -torch.inf).amax((-2, -1)))
        rows["sink_mass"].append(probability[..., first].mean(-1))
    return {name: torch.stack(values) for name, values in rows.items()}
