"""What each head writes through its output projection, however a model applies that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from reference import TWINS, Layer, checked_rows
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from attnmonitor import AttentionMonitor, Sample

B, H, L, D = 3, 4, 40, 8  # sequences, heads, positions, head size; as wide as they are together
WIDTH = H * D


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as PEFT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        result = result + self.up(self.down(self.dropout(x.to(self.down.weight.dtype)))) * 3.0
        return result.to(x.dtype)


class Rotated(nn.Module):
    """A linear layer that rotates its input and scales its output, as PEFT's BOFT writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.rotation = nn.Parameter(torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x @ self.rotation)
        return (result - self.base.bias) * self.scale.squeeze(-1) + self.base.bias


def by_conv1d(model: Model, x: Tensor) -> Tensor:
    return torch.addmm(model.bias, x.reshape(-1, WIDTH), model.weight.mT).view(x.shape)


def by_einsum(model: Model, x: Tensor) -> Tensor:
    return torch.einsum("blhd,nhd->bln", x.unflatten(-1, (H, D)), model.weight.unflatten(1, (H, D))) + model.bias


def positions_first(model: Model, x: Tensor) -> Tensor:
    return linear(x.transpose(0, 1).reshape(-1, WIDTH), model.weight, model.bias).view(L, B, -1).transpose(0, 1)


def heads_last(model: Model, x: Tensor) -> Tensor:
    return linear(x.unflatten(-1, (H, D)).mT.flatten(2), model.weight.unflatten(1, (H, D)).mT.flatten(1))


def by_convolution(model: Model, x: Tensor) -> Tensor:
    image = x.mT.unflatten(-1, (5, 8))
    return torch.conv2d(image, model.weight[..., None, None], model.bias).flatten(2).mT


def scaled_after_a_convolution(model: Model, x: Tensor) -> Tensor:
    return (torch.conv1d(x.mT, model.weight[..., None]) * model.scale[:, None] + model.bias[None, :, None]).mT


def after_others(model: Model, x: Tensor) -> Tensor:
    return linear(torch.randn_like(x), model.weight) + linear(x, model.weight)


WAYS: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "linear": lambda model, x: linear(x, model.weight, model.bias),
    "matmul": lambda model, x: x @ model.weight.mT + model.bias,
    "addmm": by_conv1d,
    "einsum": by_einsum,
    "positions first": positions_first,
    "heads last": heads_last,
    "convolution": by_convolution,
    "scaled after a convolution": scaled_after_a_convolution,
    "scaled behind a convolution": lambda model, x: by_convolution(model, x) * model.scale,
    "after a weight on something else": after_others,
    "scaled by feature": lambda model, x: (linear(x, model.weight) * model.scale).mul_(2.0),
    "with an adapter": lambda model, x: model.adapted(x),
    "rotated before": lambda model, x: model.rotated(x),
    "in two factors": lambda model, x: model.factors(x),
    "scaled in a sum": lambda model, x: torch.addcmul(x, linear(x, model.weight), model.scale),
    "then a further weight": lambda model, x: linear(linear(x, model.weight, model.bias), model.adapted.base.weight),
}
OTHER_WEIGHTS: dict[str, Callable[[Model], Tensor]] = {
    "scaled by feature": lambda model: model.weight * model.scale[:, None],
    "scaled after a convolution": lambda model: model.weight * model.scale[:, None],
    "scaled behind a convolution": lambda model: model.weight * model.scale[:, None],
    "with an adapter": lambda model: (
        model.adapted.base.weight + 3 * model.adapted.up.weight @ model.adapted.down.weight
    ),
    "rotated before": lambda model: model.rotated.scale * model.rotated.base.weight @ model.rotated.rotation.mT,
    "in two factors": lambda model: model.factors[1].weight @ model.factors[0].weight,
    "scaled in a sum": lambda model: model.weight * model.scale[:, None],
}
UNREADABLE: dict[str, Callable[[Model, Tensor], Tensor]] = {
    "gated": lambda model, x: linear(x * torch.sigmoid(x), model.weight),
    "joined": lambda model, x: linear(torch.cat([x, x], -1), torch.cat([model.weight, model.weight], -1)),
    "by an adapter that is not added": lambda model, x: linear(x, model.weight).relu() + linear(x, model.weight).tanh(),
    "no weight": lambda model, x: x,
}


class Model(nn.Module):
    """Attention on given queries, keys and values, and an output projection."""

    def __init__(self, project: Callable[[Model, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = project
        self.q, self.k, self.v = (torch.randn(B, H, L, D) for _ in range(3))
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH))
        self.scale, self.adapted = nn.Parameter(torch.rand(WIDTH)), Adapted()
        self.rotated = Rotated()
        self.factors = nn.Sequential(nn.Linear(WIDTH, 6, bias=False), nn.Linear(6, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        mixed = scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True)
        written = self.project(self, mixed.transpose(1, 2).reshape(B, L, WIDTH))
        return self.head(x + written).square()

    def layer(self, projection: Tensor) -> Layer:
        visible = torch.ones(B, L, L, dtype=torch.bool).tril()
        given = {"value": self.v, "checked": checked_rows(L), "projection": projection.detach()}
        return Layer(self.q, self.k, D**-0.5, visible=visible, **given)


def num_products(measure: Callable[[], object]) -> int:
    """Products of a matrix with rows, as projections compute them, that an operation of torch makes."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        measure()
    return sum(event.count for event in profiled.key_averages() if event.key in ("aten::mm", "aten::addmm"))


def samples_of(model: nn.Module, probe: Tensor) -> list[Sample]:
    with AttentionMonitor(model, probe, metrics=["output_share"], alerts=False, record=None, strict=True) as monitor:
        return [monitor.sample(step) for step in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_share_of_heads_is_that_of_the_twin(way: str) -> None:
    model = Model(WAYS[way])
    weight = OTHER_WEIGHTS.get(way, lambda model: model.weight)(model)
    expected = TWINS["output_share"](model.layer(weight)).mean(0)
    for sample in samples_of(model, torch.randn(B, L, WIDTH)):
        found = sample.values["output_share"]["Model"].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert sample.coverage["Model"].values_reason == ""
        assert sample.diagnostics["after_last_attention"] == "skipped"


def test_projection_of_the_last_layer_is_not_computed() -> None:
    # Through the second weight of an adapter go the few rows that are read.
    for way, num_read in {"linear": 0, "addmm": 0, "scaled by feature": 0, "with an adapter": 1}.items():
        model, probe = Model(WAYS[way]), torch.randn(B, L, WIDTH)
        with AttentionMonitor(model, probe, metrics=["output_share"], alerts=False, record=None) as monitor:
            assert num_products(partial(model, probe)) > num_read
            assert num_products(partial(monitor.sample, 0)) == num_read


@pytest.mark.parametrize("way", UNREADABLE)
def test_unreadable_projection_is_nan_with_a_reason(way: str) -> None:
    for sample in samples_of(Model(UNREADABLE[way]), torch.randn(B, L, WIDTH)):
        assert sample.values["output_share"]["Model"].isnan().all()
        assert "its output projection is not known" in sample.coverage["Model"].values_reason


def test_projection_of_another_input_is_nan_with_a_reason() -> None:
    """What acts on the output since attach is seen in each sample, not only in the first."""
    model = Model(lambda model, x: linear(x * model.scale.max().round(), model.weight))
    with torch.no_grad():
        model.scale.fill_(1.0)
    with AttentionMonitor(
        model, torch.randn(B, L, WIDTH), metrics=["output_share"], alerts=False, record=None
    ) as monitor:
        assert monitor.sample(0).values["output_share"]["Model"].isfinite().all()
        with torch.no_grad():
            model.scale.fill_(2.0)
        sample = monitor.sample(1)
    assert sample.values["output_share"]["Model"].isnan().all()
    assert "as at attach" in sample.coverage["Model"].values_reason


@pytest.mark.parametrize("way", ["positions first", "heads last", "linear"])
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["zeros", "one value for all positions"])
def test_output_that_says_nothing_at_attach_is_found_later(way: str, spread: float) -> None:
    """The first self-attention of DETR's decoder has zeros as its values before training."""
    model = Model(WAYS[way])
    values, model.v = model.v, spread * torch.randn(D).expand(B, H, L, D)
    monitor = AttentionMonitor(
        model, torch.randn(B, L, WIDTH), metrics=["output_share"], alerts=False, record=None, strict=True
    )
    model.v = values
    expected = TWINS["output_share"](model.layer(model.weight)).mean(0)
    for step in range(2):
        found = monitor.sample(step).values["output_share"]["Model"].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_shares_by_its_projection(batch_first: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(WIDTH, H, 16, dropout=0.0, batch_first=batch_first)
    with torch.no_grad():
        model.self_attn.out_proj.weight[:, D : 2 * D] *= 0.04
    for sample in samples_of(model, torch.randn(B, L, WIDTH)):
        (shares,) = sample.values["output_share"].values()
        assert shares[1] < 0.01 < shares[[0, 2, 3]].min()
        assert float(shares.sum()) == pytest.approx(1)


def test_head_muted_in_the_projection_is_named() -> None:
    model = Model(WAYS["linear"])
    with torch.no_grad():
        model.weight[:, D : 2 * D] *= 0.04
    with AttentionMonitor(model, torch.randn(B, L, WIDTH), record=None) as monitor:
        events = [event for step in range(3) for event in monitor.sample(step).events]
    heads = [(event.rule, event.head, event.metric) for event in events if event.scope != "run"]
    assert heads == [("silent_output", 1, "output_share")]
