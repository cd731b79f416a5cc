"""What is read of a layer while it runs: its values, its output and some of its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from reference import TWINS, Layer, checked_rows
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from attnmonitor import AttentionMonitor, Sample
from attnmonitor.capture import capture

NEW = ("value_rms", "output_rms", "output_share", "head_similarity", "attention_tau")


class Heads(nn.Module):
    """Attention on given queries, keys and values, called in one of several ways."""

    def __init__(self, way: str, num_kv_heads: int = 2) -> None:
        super().__init__()
        self.way, self.weight = way, nn.Parameter(torch.ones(1, 1))
        generator = torch.Generator().manual_seed(0)
        self.q, self.k, self.v = (
            torch.randn(3, heads, 40, 8, generator=generator) for heads in (4, num_kv_heads, num_kv_heads)
        )
        self.projection = torch.randn(12, 32, generator=generator)

    def forward(self, valid: Tensor) -> Tensor:
        return linear(self.mixed(valid).transpose(1, 2).flatten(2), self.projection)

    def mixed(self, valid: Tensor) -> Tensor:
        mask = valid[:, None, None] & torch.ones(40, 40, dtype=torch.bool).tril()
        if self.way.startswith("explicit"):
            with torch._C.DisableTorchFunction():
                output = scaled_dot_product_attention(self.q, self.k, self.v, mask, enable_gqa=True)
            known: dict[str, Any] = {"value": self.v, "output": output} if self.way == "explicit" else {}
            capture(self, self.q, self.k, mask=mask, **known)
            return output
        copies = 4 // self.k.shape[1]
        if self.way == "tiled":
            k, v = (each.repeat(1, copies, 1, 1) for each in (self.k, self.v))
        else:
            k, v = (each.repeat_interleave(copies, 1) for each in (self.k, self.v))
        if self.way == "written":
            return (self.q @ k.mT * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return scaled_dot_product_attention(self.q, k, v, mask)


def sample_of(model: Heads, valid: Tensor | None = None, metrics: tuple[str, ...] = NEW) -> Sample:
    valid = torch.ones(3, 40, dtype=torch.bool) if valid is None else valid
    with AttentionMonitor(model, valid, metrics=metrics, alerts=False, record=None, strict=True) as monitor:
        return monitor.sample(0)


def layer_of(model: Heads, valid: Tensor | None = None) -> Layer:
    visible = torch.ones(3, 40, 40, dtype=torch.bool).tril()
    given = {"value": model.v, "checked": checked_rows(40), "projection": model.projection}
    return Layer(model.q, model.k, 8**-0.5, valid, valid, visible, **given)


@pytest.mark.parametrize("way", ["fused", "written", "tiled", "explicit"])
def test_every_way_of_attention_gives_the_twins(way: str) -> None:
    model = Heads(way)
    sample = sample_of(model)
    layer = layer_of(model)
    order = [0, 2, 1, 3] if way == "tiled" else [0, 1, 2, 3]  # heads that share a key head side by side, and back
    if way == "tiled":
        columns = model.projection.unflatten(1, (4, 8))[:, order].flatten(1)
        layer = replace(layer, query=model.q[:, order], projection=columns)
    for metric in NEW:
        expected = TWINS[metric](layer).mean(0)
        found = sample.values[metric]["Heads"].double()
        torch.testing.assert_close(found, expected if len(expected) == 2 else expected[order], rtol=1e-4, atol=1e-6)
    assert sample.coverage["Heads"].values_reason == ""


def test_layer_without_values_is_nan_with_a_reason() -> None:
    sample = sample_of(Heads("explicit without values"))
    for metric in NEW:
        unknown = metric in ("value_rms", "output_rms", "output_share")
        assert sample.values[metric]["Heads"].isnan().all() == unknown, metric
    assert "capture(..., value=..., output=...)" in sample.coverage["Heads"].values_reason


@pytest.mark.parametrize(("metric", "is_said"), [("energy_rms", False), ("value_rms", True), ("output_rms", True)])
def test_unknown_values_are_named_where_a_metric_reads_them(metric: str, is_said: bool) -> None:
    sample = sample_of(Heads("explicit without values"), metrics=(metric,))
    assert bool(sample.coverage["Heads"].values_reason) == is_said


@pytest.mark.parametrize("way", ["fused", "written"])
def test_only_the_head_with_infinite_values_is_unknown(way: str) -> None:
    model, spoiled = Heads(way, num_kv_heads=4), Heads(way, num_kv_heads=4)
    spoiled.v[:, 1, 3] = torch.inf
    values = ("value_rms", "output_rms")
    expected, found = sample_of(model, metrics=values), sample_of(spoiled, metrics=values)
    for metric in values:
        assert found.values[metric]["Heads"].isnan().tolist() == [False, True, False, False]
        others = [0, 2, 3]
        assert torch.equal(found.values[metric]["Heads"][others], expected.values[metric]["Heads"][others])


def test_nan_of_a_key_makes_its_head_unknown_alone() -> None:
    """A kernel that adds its mask spreads it over all rows of the head, also those that do not see the key."""
    q, k, v = torch.randn(3, 2, 4, 40, 8, generator=torch.Generator().manual_seed(0))
    k[:, 1, 20] = torch.nan
    factors = [1.0]

    class Added(nn.Module):
        def forward(self, key: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction(), sdpa_kernel(SDPBackend.MATH):
                output = scaled_dot_product_attention(q, key, v, is_causal=True) * factors[0]
            capture(self, q, key, value=v, output=output, causal=True)
            return output

    with AttentionMonitor(Added(), k, metrics=["energy_rms"], alerts=False, record=None) as monitor:
        assert monitor.sample(0).values["energy_rms"]["Added"].isnan().tolist() == [False, True, False, False]
        for factors[0] in (1.01, torch.nan):
            assert "differs from the layer's output" in monitor.sample(1).coverage["Added"].reason


def test_short_sequences_are_left_out() -> None:
    """A sequence of 3 among 40 has none of the rows that are verified."""
    valid = torch.arange(40) < torch.tensor([40, 3, 40])[:, None]
    model = Heads("fused")
    sample, layer = sample_of(model, valid), layer_of(model, valid)
    for metric in ("output_rms", "head_similarity", "attention_tau"):
        per_sequence = TWINS[metric](layer)
        assert per_sequence.isnan().any(1).tolist() == [False, True, False]
        torch.testing.assert_close(
            sample.values[metric]["Heads"].double(), per_sequence[[0, 2]].mean(0), rtol=1e-4, atol=1e-6
        )


def test_twins_silent_heads_and_frozen_softmax_are_told() -> None:
    model = Heads("fused", num_kv_heads=4)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))[0]
    model.q[:, 1], model.k[:, 1] = model.q[:, 0] @ rotation, model.k[:, 0] @ rotation
    model.v[:, 2] *= 0.04
    model.q[:, 3] *= 10
    values = {metric: sample_of(model).values[metric]["Heads"] for metric in NEW}
    assert values["head_similarity"][:2].tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (values["head_similarity"][2:] < 0.5).all()
    assert values["value_rms"][2] < 0.05
    assert values["output_rms"][2] < 0.1 * values["output_rms"][:2].min()
    assert values["output_share"].sum() == pytest.approx(1)
    assert values["attention_tau"][3] > 1 > values["attention_tau"][:3].max()


class Explicit(nn.Module):
    """Attention that registers itself, with a value of its own for the output that it claims."""

    def __init__(self, claim: float) -> None:
        super().__init__()
        self.claim = claim

    def forward(self, q: Tensor) -> None:
        with torch._C.DisableTorchFunction():
            output = scaled_dot_product_attention(q, q, q, is_causal=True)
        capture(self, q, q, value=q, output=output * self.claim, causal=True)


class Claims(nn.ModuleList):
    def forward(self, x: Tensor) -> None:
        for layer in self:
            layer(x)


def test_layers_are_verified_each_by_itself() -> None:
    model = Claims([Explicit(claim) for claim in (1, 1.01, float("nan"), 1, 0)])
    q = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0))
    with AttentionMonitor(
        model, q, metrics=("value_rms", "output_rms", "head_similarity", "key_rank"), alerts=False, record=None
    ) as monitor:
        sample = monitor.sample(0)
    assert [layer.measured for layer in sample.coverage.values()] == [True, False, False, True, False]
    assert all("differs from the layer's output" in sample.coverage[name].reason for name in "124")
    for metric in sample.values:
        assert [bool(heads.isnan().all()) for heads in sample.values[metric].values()] == [
            False,
            True,
            True,
            False,
            True,
        ]
