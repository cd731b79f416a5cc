"""Query-key products in parts are one product, and those of one key for all heads have positions as rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.capture.layouts import Layouts
from benchmarks.pages.third_party_models import captured

WIDTH, HEADS, SIZE = 32, 4, 8
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


class Layer(nn.Module):
    def __init__(self, key_heads: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * key_heads * SIZE)
        self.attend = attend

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as ``(B, L, H, d)``."""
        return self.q(x).unflatten(-1, (-1, SIZE)), *self.kv(x).unflatten(-1, (2, -1, SIZE)).unbind(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(*self.heads(x))


def calls_of_two_forwards(layer: Layer, length: int) -> list[AttentionCall]:
    """Return the attention as found at attach, and as in a sample."""
    calls: list[AttentionCall] = []
    layouts: Layouts = {}
    with torch.no_grad():
        for _ in range(2):
            with capture_attention(layer, calls.append, layouts=layouts):
                layer(hidden(length))
    return calls


def hidden(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(0))


def causal(logits: Tensor) -> Tensor:
    return torch.ones_like(logits, dtype=torch.bool).tril()


def assert_captured(layer: Layer, query: Tensor, key: Tensor, length: int, sees: str = "causal") -> None:
    calls = calls_of_two_forwards(layer, length)
    assert len(calls) == 2
    for call in calls:
        assert torch.allclose(call.scale * call.query, 0.3 * query, atol=1e-6)
        assert torch.allclose(call.key, key, atol=1e-6)
        assert call.layout.sees == sees
        assert call.error < 1e-6


def visible(logits: Tensor) -> Tensor:
    return logits.masked_fill(~causal(logits), -torch.inf)


SUMS: dict[str, tuple[float, Callable[[Parts], Tensor]]] = {
    "sum": (1, lambda p: (p[0] @ p[1].mT + p[2] @ p[3].mT) * 0.3),
    "each scaled": (2, lambda p: (p[0] @ p[1].mT).mul(0.3) + p[2] @ p[3].mT * 0.6),
    "in place": (0.5, lambda p: (p[0] @ p[1].mT).add_(p[2] @ p[3].mT, alpha=0.5) * 0.3),
    "difference": (-1, lambda p: (p[0] @ p[1].mT - p[2] @ p[3].mT) * 0.3),
    "running total": (1, lambda p: sum([p[0] @ p[1].mT, p[2] @ p[3].mT]) * 0.3),
    "einsum": (1, lambda p: (torch.einsum("bhid,bhjd->bhij", *p[:2]) + torch.einsum("bhid,bhjd->bhij", *p[2:])) * 0.3),
    "masked before": (1, lambda p: visible(p[0] @ p[1].mT * 0.3) + p[2] @ p[3].mT * 0.3),
}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", SUMS)
def test_sum_of_products_is_one_product(name: str, shared: bool) -> None:
    factor, product = SUMS[name]

    def parts(q: Tensor, k: Tensor) -> Parts:
        rotated = k[:, :1, :, 5:] if shared else k[..., 5:]
        return q[..., :5], k[..., :5], q[..., 5:], rotated

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = product(parts(q, k))
        return visible(logits).softmax(-1) @ v

    layer = Layer(HEADS, attend)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    first, second, third, last = parts(q, k)
    query = torch.cat([first, factor * third], -1)
    assert_captured(layer, query, torch.cat([second, last.expand(-1, HEADS, -1, -1)], -1), 6)


def keys_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (
        k[..., part].transpose(1, 2) @ q[..., part].permute(0, 2, 3, 1) for part in (slice(5), slice(5, 8))
    )
    weights = ((first + second) * 0.3).masked_fill(~causal(first).mT, -torch.inf).softmax(-2)
    return weights.mT @ v.transpose(1, 2)


def test_sum_of_products_with_keys_first() -> None:
    layer = Layer(HEADS, keys_first)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    assert_captured(layer, q, k, 6)


def added_by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    logits = torch.baddbmm(q[..., :5] @ k[..., :5].mT, q[..., 5:], k[..., 5:].mT) * 0.3
    return visible(logits).softmax(-1) @ v


def test_product_added_by_baddbmm_is_no_bias() -> None:
    layer = Layer(HEADS, added_by_baddbmm)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    assert_captured(layer, q.roll(3, -1), k.roll(3, -1), 6)


DIFFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "viewed": lambda weights: weights.view(2, 2, 2, 6, 6)[:, :, 0] - 0.3 * weights.view(2, 2, 2, 6, 6)[:, :, 1],
    "every second": lambda weights: weights[:, ::2] - weights[:, 1::2] * 0.3,
    "halves": lambda weights: weights[:, :2].add(weights[:, 2:], alpha=-0.3),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_heads_whose_weights_are_subtracted_have_their_fields(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return DIFFERENCES[name](visible(q @ k.mT * 0.3).softmax(-1)) @ v[:, :2]

    layer = Layer(HEADS, attend)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    assert_captured(layer, q, k, 6)
    assert all(call.value is None for call in calls_of_two_forwards(layer, 6))


def straight_through(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    soft = visible(q @ k.mT * 0.3).softmax(-1)
    hard = nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return (hard + soft - soft.detach()) @ v


def test_hard_weights_with_a_soft_gradient_are_measured() -> None:
    layer = Layer(HEADS, straight_through)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    assert_captured(layer, q, k, 6)


def test_logits_that_the_next_layer_adds_are_measured_with_it() -> None:
    """As in RealFormer, where one module computes all layers."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = q @ k.mT * 0.3
        hidden = visible(logits).softmax(-1) @ v
        return visible(logits + k @ hidden.mT * 0.6).softmax(-1) @ v

    calls = calls_of_two_forwards(Layer(HEADS, attend), 6)
    assert [call.query.shape[-1] for call in calls] == [SIZE, 2 * SIZE] * 2
    assert max(call.error for call in calls) < 1e-6


def test_sum_of_two_softmaxes_is_missed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ((q @ k.mT).softmax(-1) + (k @ q.mT).softmax(-1)) @ v

    result = captured(Layer(HEADS, attend), x=hidden(6))
    assert (result.calls, result.missed) == ([], {"Layer": "its weights are the sum of several softmaxes"})


def test_weights_of_some_heads_alone_are_missed() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return (q @ k.mT).softmax(-1)[:, :2] @ v[:, :2]

    result = captured(Layer(HEADS, attend), x=hidden(6))
    assert (result.calls, result.missed) == ([], {"Layer": "its weights are used by some of its heads alone"})


def by_einsum(equation: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = equation[-4:]
        logits = torch.einsum(equation, *((k[:, :, 0], q) if equation.startswith("bjd") else (q, k[:, :, 0]))) * 0.3
        weights = logits.softmax(out.index("j"))
        return torch.einsum(f"{out},bjd->bihd", weights, v[:, :, 0])

    return attend


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k[:, None, :, 0].mT * 0.3).softmax(-1) @ v[:, None, :, 0]


FORMS = {
    "heads after positions": by_einsum("bihd,bjd->bihj"),
    "heads first": by_einsum("bihd,bjd->hbij"),
    "heads last": by_einsum("bihd,bjd->bijh"),
    "key first": by_einsum("bjd,bihd->bihj"),
    "matmul": by_matmul,
}


@pytest.mark.parametrize("length", [6, HEADS], ids=["long", "as many as heads"])
@pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS)
def test_one_key_for_all_heads_has_positions_as_rows(attend: Callable[..., Tensor], length: int) -> None:
    layer = Layer(1, attend)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(length)))
    assert_captured(layer, q, k, length, sees="both")
