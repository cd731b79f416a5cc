"""Every statistic the obvious way: the dense L×L field in float64, a full SVD, loops over heads.

`TWINS` holds one function for each metric of the table, by its name. They are slow and share no code with the package:
tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor import DEFAULT_METRICS, METRICS
from attnmonitor.functional.summaries import FROM_ATTENTION


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys of one head in one sequence, ``(m, d)`` float64, padding left out."""

    key: Tensor

    @cached_property
    def centered(self) -> Tensor:
        return centered(self.key, 0)

    @cached_property
    def variances(self) -> Tensor:
        return torch.linalg.svdvals(self.centered) ** 2

    def leverage(self, energy: float) -> tuple[Tensor, int]:
        return leverage(self.key, energy)


@dataclass(frozen=True, eq=False)
class Head(Keys):
    """One query head in one sequence in float64, padding left out.

    Attributes:
        query: ``(n, d)``.
        scale: The softmax scale.
        visible: ``(n, m)`` bool, the keys that each query attends to.
        value: ``(m, dv)``.
        checked: ``(n,)`` bool, the rows that verification rebuilds.
    """

    query: Tensor
    scale: float
    visible: Tensor
    value: Tensor
    checked: Tensor

    @cached_property
    def field(self) -> Tensor:
        return field(self.query, self.key, self.scale)

    @cached_property
    def field_variances(self) -> Tensor:
        return torch.linalg.svdvals(self.field) ** 2

    @cached_property
    def logits(self) -> Tensor:
        """The rows of the queries that see a key, -inf where they see none, ``(rows, m)``."""
        rows = self.visible.any(-1)
        logits = self.scale * self.query[rows] @ self.key.T
        return logits.masked_fill(~self.visible[rows], -torch.inf)

    @cached_property
    def written(self) -> Tensor:
        """What the head writes in the checked rows that see a key, ``(rows, dv)``."""
        checked = self.checked[self.visible.any(-1)]
        return self.logits[checked].softmax(-1) @ self.value


@dataclass(frozen=True, eq=False)
class Layer:
    """What one layer attends with.

    Attributes:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        scale: The softmax scale.
        query_mask: ``(B, Lq)`` bool, True where the query is not padding; None where all are.
        key_mask: ``(B, Lk)`` bool, likewise.
        visible: ``(B, Lq, Lk)`` bool, the keys each query attends to; None where it attends to all.
        w_q: ``(Hq, d, D)``; None where no metric of the weights is asked for.
        w_k: ``(Hkv, d, D)``.
        value: ``(B, Hkv, Lk, dv)``; zeros where none is given.
        checked: Indices of the rows that verification rebuilds; None for all rows.
        projection: ``(D, Hq * dv)``, the output projection; None where no metric reads what is written through it.
    """

    query: Tensor
    key: Tensor
    scale: float
    query_mask: Tensor | None = None
    key_mask: Tensor | None = None
    visible: Tensor | None = None
    w_q: Tensor | None = None
    w_k: Tensor | None = None
    value: Tensor | None = None
    checked: Tensor | None = None
    projection: Tensor | None = None

    @cached_property
    def heads(self) -> list[list[Head]]:
        """Query heads of each sequence."""
        group = self.query.shape[1] // self.key.shape[1]
        found = []
        for sequence, (query, keys) in enumerate(zip(self.query, self.keys, strict=True)):
            valid_query, valid_key = (
                torch.ones(x.shape[2], dtype=torch.bool) if mask is None else mask[sequence]
                for x, mask in ((self.query, self.query_mask), (self.key, self.key_mask))
            )
            visible = valid_query[:, None] & valid_key
            if self.visible is not None:
                visible = visible & self.visible[sequence]
            visible = visible[valid_query][:, valid_key]
            checked = torch.ones(query.shape[1], dtype=torch.bool)
            if self.checked is not None:
                checked = torch.zeros_like(checked).index_fill(0, self.checked, True)
            found.append(
                [
                    Head(
                        keys[head // group].key,
                        each.double()[valid_query],
                        self.scale,
                        visible,
                        self.values[sequence][head // group],
                        checked[valid_query],
                    )
                    for head, each in enumerate(query)
                ]
            )
        return found

    @cached_property
    def values(self) -> list[list[Tensor]]:
        """Values of each sequence, ``(m, dv)`` float64 per key head, padding left out."""
        value = torch.zeros_like(self.key) if self.value is None else self.value
        return [
            [each.double() if self.key_mask is None else each.double()[self.key_mask[sequence]] for each in heads]
            for sequence, heads in enumerate(value)
        ]

    @cached_property
    def keys(self) -> list[list[Keys]]:
        """Key heads of each sequence."""
        masks = [None] * len(self.key) if self.key_mask is None else list(self.key_mask)
        return [
            [Keys(each.double() if mask is None else each.double()[mask]) for each in key]
            for key, mask in zip(self.key, masks, strict=True)
        ]

    @cached_property
    def interaction_variances(self) -> list[Tensor]:
        """Squared singular values of W_Qᵀ W_K of each query head."""
        assert self.w_q is not None
        assert self.w_k is not None
        group = len(self.w_q) // len(self.w_k)
        return [
            torch.linalg.svdvals(w_q.double().T @ self.w_k[head // group].double()) ** 2
            for head, w_q in enumerate(self.w_q)
        ]


def field(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The energy field of one head: ``(n, d), (m, d) -> (n, m)``, each row less its mean."""
    # Not by a matrix product: BLAS may round the products with equal keys in different ways.
    return centered(scale * (query.double()[:, None] * key.double()).sum(-1), -1)


def centered(x: Tensor, axis: int) -> Tensor:
    """Less the mean along an axis; exactly zero where all are equal, whose mean is rounded."""
    x = x - x.narrow(axis, 0, 1)
    return x - x.mean(axis, keepdim=True)


def effective_rank(matrix: Tensor, fraction: float = 0.9) -> int:
    return count_to_fraction(torch.linalg.svdvals(matrix) ** 2, fraction)


def count_to_fraction(variances: Tensor, fraction: float = 0.9) -> int:
    total = variances.sum()
    if not total > 0:
        return 0
    reached = variances.cumsum(0) >= fraction * total * (1 - 1e-12)
    return int(reached.int().argmax()) + 1


def participation_ratio(variances: Tensor) -> float:
    return float(variances.sum() ** 2 / (variances**2).sum()) if variances.sum() > 0 else 0.0


def spread_over_positions(weight: Tensor) -> float:
    share = weight / weight.sum()
    return float(1 / (len(share) * (share**2).sum()))


def leverage(key: Tensor, energy: float = 1.0) -> tuple[Tensor, int]:
    """Leverage of each position of ``(m, d)`` and the rank of the subspace it is taken in."""
    matrix = centered(key.double(), 0)
    left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
    rank = int(above_noise(matrix, singular).sum()) if energy == 1 else effective_rank(matrix, energy)
    return (left[:, :rank] ** 2).sum(-1), rank


def above_noise(matrix: Tensor, singular: Tensor) -> Tensor:
    """Which singular values float32 can tell from rounding."""
    return singular > max(matrix.shape) * torch.finfo(torch.float32).eps * singular[0]


def key_incoherence(keys: Keys) -> float:
    cut, rank = keys.leverage(0.9)
    return float(len(keys.key) / rank * cut.max()) if rank else float("nan")


def key_condition_number(keys: Keys) -> float:
    singular = keys.variances.sqrt()
    kept = singular[above_noise(keys.centered, singular)]
    return float(kept[0] / kept[-1]) if len(kept) else float("nan")


def sink_mass(head: Head) -> float:
    return float(head.logits.softmax(-1)[:, 0].mean())


def output_rms(head: Head) -> float:
    return float((head.written**2).mean().sqrt())


def output_share(layer: Layer) -> Tensor:
    assert layer.projection is not None
    columns = layer.projection.double().tensor_split(layer.query.shape[1], 1)
    energy = torch.tensor(
        [
            [
                float(((head.written @ weight.T) ** 2).sum(-1).mean())
                for head, weight in zip(heads, columns, strict=True)
            ]
            for heads in layer.heads
        ]
    ).double()
    return (energy / energy.nansum(1, keepdim=True)).masked_fill(energy == 0, 0)


def similarity(layer: Layer) -> Tensor:
    return torch.tensor([[_largest_cosine(heads, each) for each in heads] for heads in layer.heads]).double()


def _largest_cosine(heads: list[Head], one: Head) -> float:
    fields = {id(head): head.field[head.checked] for head in heads}
    own, others = fields.pop(id(one)), fields.values()
    cosines = [float((own * other).sum().abs() / (own.norm() * other.norm())) for other in others if other.any()]
    return max((cosine for cosine in cosines if cosine == cosine), default=float("nan"))


def tau(head: Head) -> float:
    field = head.scale * (head.query[:, None] * head.key).sum(-1)
    rows = [
        (row[seen], int(seen.sum())) for row, seen in zip(field[head.checked], head.visible[head.checked], strict=True)
    ]
    spreads = [float(row.std(unbiased=False)) / math.sqrt(2 * math.log(n)) for row, n in rows if n >= 8]
    return sum(spreads) / len(spreads) if spreads else float("nan")


Twin = Callable[[Layer], Tensor]


def per_query_head(statistic: Callable[[Head], float]) -> Twin:
    return lambda layer: torch.tensor(
        [[statistic(head) for head in heads] for heads in layer.heads], dtype=torch.float64
    )


def per_key_head(statistic: Callable[[Keys], float]) -> Twin:
    return lambda layer: torch.tensor([[statistic(keys) for keys in heads] for heads in layer.keys]).double()


def of_weights(statistic: Callable[[Tensor], float]) -> Twin:
    return lambda layer: torch.tensor([[statistic(each) for each in layer.interaction_variances]]).double()


TWINS: dict[str, Twin] = {
    "energy_effective_rank": per_query_head(lambda head: count_to_fraction(head.field_variances)),
    "energy_participation_ratio": per_query_head(lambda head: participation_ratio(head.field_variances)),
    "energy_stable_rank": per_query_head(
        lambda head: float(head.field_variances.sum() / head.field_variances[0]) if head.field.any() else 0.0
    ),
    "energy_rms": per_query_head(lambda head: float((head.field**2).mean().sqrt())),
    "energy_delocalization": per_query_head(lambda head: spread_over_positions((head.field**2).sum(0))),
    "key_incoherence": per_key_head(key_incoherence),
    "key_rank": per_key_head(lambda keys: count_to_fraction(keys.variances)),
    "key_leverage_max": per_key_head(lambda keys: float(keys.leverage(1.0)[0].max())),
    "key_participation_ratio": per_key_head(lambda keys: participation_ratio(keys.variances)),
    "key_norm_participation": per_key_head(lambda keys: spread_over_positions((keys.centered**2).sum(-1))),
    "key_condition_number": per_key_head(key_condition_number),
    "query_rms": per_query_head(lambda head: float((head.query**2).mean().sqrt())),
    "key_rms": per_key_head(lambda keys: float((keys.centered**2).mean().sqrt())),
    "value_rms": lambda layer: torch.tensor(
        [[float((value**2).mean().sqrt()) for value in heads] for heads in layer.values]
    ).double(),
    "value_spread": lambda layer: torch.tensor(
        [[float(((value - value.mean(0)) ** 2).sum() / (value**2).sum()) for value in heads] for heads in layer.values]
    ).double(),
    "output_rms": per_query_head(output_rms),
    "output_share": output_share,
    "head_similarity": similarity,
    "attention_tau": per_query_head(tau),
    "attention_entropy": per_query_head(lambda head: float(torch.special.entr(head.logits.softmax(-1)).sum(-1).mean())),
    "max_logit": per_query_head(lambda head: float(head.logits.max())),
    "sink_mass": per_query_head(sink_mass),
    "interaction_effective_rank": of_weights(count_to_fraction),
    "interaction_participation_ratio": of_weights(participation_ratio),
    "spectral_gap": lambda layer: (
        TWINS["interaction_effective_rank"](layer) / TWINS["energy_effective_rank"](layer).mean(0)
    ),
}
"""Each metric of a layer, ``(B, Hq)`` or ``(B, Hkv)`` float64; ``(1, Hq)`` of the weights."""


def checked_rows(num_queries: int) -> Tensor:
    """Indices of the rows that verification rebuilds."""
    count = min(8, num_queries)
    return torch.tensor([(index + 1) * num_queries // count - 1 for index in range(count)])


FIELD_METRICS = tuple(name for name in DEFAULT_METRICS if METRICS[name].summary not in FROM_ATTENTION)
"""The default metrics that are functions of queries and keys alone."""


def layer_statistics(
    query: Tensor,
    key: Tensor,
    scale: float,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    metrics: Iterable[str] = FIELD_METRICS,
) -> dict[str, Tensor]:
    """Some metrics of a layer, the default ones of its queries and keys unless others are named."""
    layer = Layer(query, key, scale, query_mask, key_mask, visible)
    return {name: TWINS[name](layer) for name in metrics}
