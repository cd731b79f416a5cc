"""One entry of the metric table, its class and its dense twin: what the properties of every metric are tried on.

A new line in the table needs its twin in `reference.TWINS` and nothing here, unless it is no function of the field
alone: `POWERS` and `CHANGES_WITH` say how the sizes of queries and keys and the other transformations change it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import reference
import torch
from drawn_layers import Shape, draw
from reference import Layer
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from attnmonitor import METRICS, AttentionMonitor
from attnmonitor.functional.summaries import FROM_ATTENTION
from attnmonitor.metrics import METRIC_CLASSES, HeadMetric
from attnmonitor.sample import Sample

POWERS = {
    "energy_rms": (1, 1, 0),
    "query_rms": (1, 0, 0),
    "key_rms": (0, 1, 0),
    "max_logit": (1, 1, 0),
    "attention_tau": (1, 1, 0),
    "value_rms": (0, 0, 1),
}
"""Powers of the size of the queries, the keys and the values that a metric grows with; (0, 0, 0) for the others."""

CHANGES_WITH = {
    "size": {"attention_entropy", "sink_mass", "output_rms", "output_share"},  # by no power of it
    "order": {"sink_mass"},
    "offset": {"max_logit"},
    "other heads": {"head_similarity", "output_share"},
}
"""Metrics that something changes: sizes, the order of positions, one vector added to all keys, the layer's heads."""


@dataclass(frozen=True)
class MetricCase:
    """A metric of the table.

    Attributes:
        name: Its name in the table.
    """

    name: str

    def __str__(self) -> str:
        return self.name

    @property
    def twin(self) -> reference.Twin:
        if self.name not in reference.TWINS:
            pytest.fail(
                f"the metric table has {self.name!r}, which has no dense twin: add TWINS[{self.name!r}] to "
                "tests/reference.py, and to POWERS or CHANGES_WITH in tests/metric_case.py what changes it"
            )
        return reference.TWINS[self.name]

    @property
    def inputs(self) -> set[str]:
        """Tensors that its class is updated with."""
        given = {"query", "key", "value", "projection", "w_q", "w_k"}
        return set(inspect.signature(METRIC_CLASSES[self.name].update).parameters) & given

    @property
    def sees_positions(self) -> bool:
        return METRICS[self.name].summary != "weights"

    @property
    def source_is_field(self) -> bool:
        """Whether it is a statistic of queries and keys, without rows of the logits."""
        return METRICS[self.name].summary not in ("weights", *FROM_ATTENTION)

    @property
    def reads_rows(self) -> bool:
        """Whether it is computed from rows of the logits."""
        return METRICS[self.name].summary in ("rows", "checked_rows")

    def num_heads(self, layer: Layer) -> int:
        return (layer.query if METRICS[self.name].scope == "query_head" else layer.key).shape[1]

    def metric(self, layer: Layer) -> HeadMetric:
        """A new metric for the heads of ``layer``, over all of its rows."""
        settings = {"num_rows": layer.query.shape[2]} if self.reads_rows else {}
        return METRIC_CLASSES[self.name](self.num_heads(layer), **settings)

    def updated(self, *layers: Layer) -> HeadMetric:
        """A new metric that has seen some layers."""
        metric = self.metric(layers[0])
        for layer in layers:
            metric.update(**self.arguments(layer))
        return metric

    def arguments(self, layer: Layer) -> dict[str, Any]:
        """What its class is updated with; the twin's scale is the default one."""
        assert layer.scale == layer.query.shape[-1] ** -0.5
        given = {"query": layer.query, "key": layer.key, "value": layer.value, "mask": layer.key_mask}
        given |= {"projection": layer.projection}
        given |= {"causal": layer.visible is not None}
        if layer.w_q is not None and layer.w_k is not None:
            group = len(layer.w_q) // len(layer.w_k)
            given |= {"w_q": layer.w_q, "w_k": layer.w_k.repeat_interleave(group, 0)}
        taken = inspect.signature(METRIC_CLASSES[self.name].update).parameters
        return {name: value for name, value in given.items() if name in taken}

    def per_sequence(self, layer: Layer) -> Tensor:
        """``(B, H)``: what the class computes for each sequence alone; ``(1, H)`` of the weights."""
        return torch.stack([self.updated(one).compute() for one in self.sequences(layer)])

    def sequences(self, layer: Layer) -> list[Layer]:
        """The layer's sequences, one at a time; the layer as it is for a metric of the weights."""
        if not self.sees_positions:
            return [layer]
        return [some_sequences(layer, slice(index, index + 1)) for index in range(len(layer.query))]

    def assert_equal(self, found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=1e-6, equal_nan=True)


CASES = [MetricCase(name) for name in METRICS]
CLASS_CASES = [MetricCase(name) for name in METRIC_CLASSES]


def some_sequences(layer: Layer, chosen: slice) -> Layer:
    """The layer with some of its sequences."""
    cut = {
        name: None if (value := getattr(layer, name)) is None else value[chosen]
        for name in ("query", "key", "value", "query_mask", "key_mask", "visible")
    }
    return replace(layer, **cut)


def causal_layer(
    shape: Shape, dtype: torch.dtype = torch.float32, mask: Tensor | None = None, seed: int = 0, **keywords: Any
) -> Layer:
    """A drawn layer of causal attention, with projections."""
    query, key = draw(shape, dtype, seed, **keywords)
    _, num_query_heads, num_kv_heads, length, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    w_q, w_k = (
        (torch.randn(heads, head_dim, 3 * head_dim, generator=generator) * torch.logspace(0, -1, head_dim)[:, None])
        for heads in (num_query_heads, num_kv_heads)
    )
    visible = torch.ones(length, length, dtype=torch.bool).tril().expand(len(query), -1, -1)
    value = torch.randn(key.shape, generator=generator).to(dtype)
    projection = torch.randn(3 * head_dim, num_query_heads * head_dim, generator=generator).to(dtype)
    scale = head_dim**-0.5
    return Layer(query, key, scale, mask, mask, visible, w_q.to(dtype), w_k.to(dtype), value, projection=projection)


# Models for the monitor.


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    mask = None if visible is None else visible[:, None]
    return scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


class GivenHeads(nn.Module):
    """Attention with the queries and keys of a layer that is given."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, visible: Tensor) -> Tensor:
        assert self.layer.value is not None
        mixed = attend(self.layer.query, self.layer.key, self.layer.value, visible, self.layer.scale)
        return (
            mixed if self.layer.projection is None else linear(mixed.transpose(1, 2).flatten(2), self.layer.projection)
        )


def sample_of_heads(layer: Layer, metrics: Iterable[str]) -> Sample:
    """The monitor's sample of one layer with these queries and keys, under the name ``"GivenHeads"``."""
    assert layer.visible is not None
    visible = layer.visible if layer.key_mask is None else layer.visible & layer.key_mask[:, None]
    return sample_of(GivenHeads(layer), visible, metrics)


def sample_of(model: nn.Module, probe: Any, metrics: Iterable[str]) -> Sample:
    with AttentionMonitor(model, probe, metrics=metrics, alerts=False, record=None, strict=True) as monitor:
        return monitor.sample(0)


class Attention(nn.Module):
    """Grouped-query causal attention that leaves padding out."""

    def __init__(self, width: int, num_query_heads: int, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(width, num_query_heads * head_dim)
        self.k_proj = nn.Linear(width, num_kv_heads * head_dim)
        self.v_proj = nn.Linear(width, num_kv_heads * head_dim)
        self.o_proj = nn.Linear(num_query_heads * head_dim, width)
        with torch.no_grad():
            for projection in (self.q_proj, self.k_proj):  # directions that decay, as training makes them
                projection.weight *= (
                    3 * torch.logspace(0, -1, head_dim).repeat(len(projection.weight) // head_dim)[:, None]
                )
                projection.bias += 1

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        query, key, value = self.heads(x)
        mixed = attend(query, key, value, self.visible(x, valid), self.head_dim**-0.5)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> list[Tensor]:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        return [y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected]

    def visible(self, x: Tensor, valid: Tensor | None) -> Tensor:
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().expand(len(x), -1, -1)
        return causal if valid is None else causal & valid[:, None]

    def layer(self, x: Tensor, valid: Tensor | None) -> Layer:
        """What the dense twins need of it."""
        with torch.no_grad():
            query, key, value = self.heads(x)
        w_q, w_k = (each.weight.detach().unflatten(0, (-1, self.head_dim)) for each in (self.q_proj, self.k_proj))
        visible, checked = self.visible(x, valid), reference.checked_rows(x.shape[1])
        scale, projection = self.head_dim**-0.5, self.o_proj.weight.detach()
        return Layer(query, key, scale, valid, valid, visible, w_q, w_k, value, checked, projection)


class TwoLayers(nn.Module):
    """Two attention layers that read the same input and differ in their heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Attention(width, 6, 2, 8), Attention(width, 4, 4, 16)])

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, valid)
        return x


def sample_of_model(padding: Tensor | None) -> tuple[Sample, dict[str, Layer]]:
    """A sample of every metric of a small model on 3 sequences of 40, and what its layers attended with, by name."""
    torch.manual_seed(0)
    model, x = TwoLayers(24), torch.randn(3, 40, 24)
    sample = sample_of(model, {"x": x} if padding is None else {"x": x, "valid": padding}, METRICS)
    layers = {}
    for index, layer in enumerate(model.layers):
        layers[f"layers.{index}"] = layer.layer(x, padding)
        with torch.no_grad():
            x = x + layer(x, padding)
    return sample, layers
