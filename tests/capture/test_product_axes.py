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


def calls_of_two_forwards(layer: nn.Module, length: int) -> list[AttentionCall]:
    """Return the attention as found at attach, and as in a sample."""
    calls: list[AttentionCall] = []
    layouts: Layouts = {}
    batch = hidden(length)
    with torch.no_grad():
        for _ in range(2):
            with capture_attention(layer, calls.append, layouts=layouts):
                layer(batch)
    return calls


def hidden(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(0))


def causal(logits: Tensor) -> Tensor:
    return torch.ones_like(logits, dtype=torch.bool).tril()


def assert_captured(layer: nn.Module, query: Tensor, key: Tensor, length: int, sees: str = "causal") -> None:
    calls = calls_of_two_forwards(layer, length)
    assert len(calls) == 2
    for call in calls:
        assert torch.allclose(call.scale * call.query, 0.3 * query, atol=1e-6)
        assert torch.allclose(call.key, key, atol=1e-6)
        assert call.layout.sees == sees
        assert call.error < 1e-6


def visible(logits: Tensor) -> Tensor:
    return logits.masked_fill(~causal(logits), -torch.inf)


def reshaped(parts: Parts, add: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The first product has sequences and heads in one axis."""
    query, key = (x.flatten(0, 1) for x in parts[:2])
    second = parts[2] @ parts[3].mT
    return add((query @ key.mT).view(second.shape), second) * 0.3


SUMS: dict[str, tuple[float, Callable[[Parts], Tensor]]] = {
    "sum": (1, lambda p: (p[0] @ p[1].mT + p[2] @ p[3].mT) * 0.3),
    "each scaled": (2, lambda p: (p[0] @ p[1].mT).mul(0.3) + p[2] @ p[3].mT * 0.6),
    "in place": (0.5, lambda p: (p[0] @ p[1].mT).add_(p[2] @ p[3].mT, alpha=0.5) * 0.3),
    "difference": (-1, lambda p: (p[0] @ p[1].mT - p[2] @ p[3].mT) * 0.3),
    "running total": (1, lambda p: sum([p[0] @ p[1].mT, p[2] @ p[3].mT]) * 0.3),
    "einsum": (1, lambda p: (torch.einsum("bhid,bhjd->bhij", *p[:2]) + torch.einsum("bhid,bhjd->bhij", *p[2:])) * 0.3),
    "biased before": (1, lambda p: (visible(p[0] @ p[1].mT) + (visible(p[2] @ p[3].mT) + 0.1)) * 0.3),
    "biased is subtracted": (-1, lambda p: p[0] @ p[1].mT * 0.3 - (p[2] @ p[3].mT - torch.ones(6, 6)) * 0.3),
    "negative": (-1, lambda p: (-(p[2] @ p[3].mT) + p[0] @ p[1].mT) * 0.3),
    "negative first": (1, lambda p: -(-(p[0] @ p[1].mT) - p[2] @ p[3].mT) * 0.3),
    "reshaped": (1, lambda p: reshaped(p, lambda first, second: first + second)),
    "into reshaped": (1, lambda p: reshaped(p, lambda first, second: second + first)),
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
    expected = query @ torch.cat([second, last.expand(-1, HEADS, -1, -1)], -1).mT * 0.3
    for call in calls_of_two_forwards(layer, 6):
        assert torch.allclose(call.scale * call.query @ call.key.mT, expected, atol=1e-5)
        assert call.query.shape[-1] == SIZE
        assert call.layout.sees == "causal"
        assert call.error < 1e-6


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


def heads_of_a_position_in_its_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in GPTBigCode."""
    length, rows, key = q.shape[1], q.flatten(1, 2), k[:, :, 0]
    logits = torch.baddbmm(q.new_empty(len(q), rows.shape[1], length), rows, key.mT, beta=0, alpha=0.3)
    seen = torch.ones(length, length, dtype=torch.bool)[:, None]
    weights = torch.where(seen, logits.view(-1, length, HEADS, length), -1e30).softmax(-1)
    return torch.bmm(weights.view(logits.shape), v[:, :, 0]).view(q.shape)


def heads_before_positions_in_the_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length, rows = q.shape[1], q.transpose(1, 2).flatten(1, 2)
    logits = (rows @ k[:, :, 0].mT).unflatten(1, (HEADS, length)) * 0.3
    return (logits.softmax(-1).flatten(1, 2) @ v[:, :, 0]).unflatten(1, (HEADS, length)).transpose(1, 2)


def rows_never_viewed_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    temperature = torch.full((1, q.shape[1] * HEADS, 1), 0.3)
    return ((q.flatten(1, 2) @ k[:, :, 0].mT * temperature).softmax(-1) @ v[:, :, 0]).view(q.shape)


def rows_of_all_for_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1)
    weights = (logits.view(-1, q.shape[1]) * 0.3).softmax(-1).view_as(logits)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


FORMS = {
    "heads after positions": by_einsum("bihd,bjd->bihj"),
    "heads first": by_einsum("bihd,bjd->hbij"),
    "heads last": by_einsum("bihd,bjd->bijh"),
    "key first": by_einsum("bjd,bihd->bihj"),
    "matmul": by_matmul,
    "heads of a position in its rows": heads_of_a_position_in_its_rows,
    "heads before positions in the rows": heads_before_positions_in_the_rows,
    "rows never viewed apart": rows_never_viewed_apart,
    "rows of all for the softmax": rows_of_all_for_the_softmax,
}


@pytest.mark.parametrize("length", [6, HEADS], ids=["long", "as many as heads"])
@pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS)
def test_one_key_for_all_heads_has_positions_as_rows(attend: Callable[..., Tensor], length: int) -> None:
    layer = Layer(1, attend)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(length)))
    assert_captured(layer, q, k, length, sees="both")


def groups_in_the_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Query heads that share a key head stand in its rows."""
    length, (q, k, v) = q.shape[1], (x.transpose(1, 2) for x in (q, k, v))
    logits = q.unflatten(1, (2, 2)).flatten(2, 3) @ k.mT * 0.3
    logits = logits.view(-1, HEADS, length, length) + torch.full((length, length), -torch.inf).triu(1)
    return (logits.softmax(-1).view(-1, 2, 2 * length, length) @ v).view(q.shape).transpose(1, 2)


@pytest.mark.parametrize("attend", [groups_in_the_rows, rows_of_all_for_the_softmax], ids=lambda f: f.__name__)
def test_values_and_outputs_of_merged_rows_are_by_head(attend: Callable[..., Tensor]) -> None:
    layer = Layer(2 if attend is groups_in_the_rows else HEADS, attend)
    q, k, v = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    assert_captured(layer, q, k, 6, sees="causal" if attend is groups_in_the_rows else "both")
    for call in calls_of_two_forwards(layer, 6):
        assert call.value is not None
        assert torch.equal(call.value, v)
        assert call.rows.output is not None
        assert torch.allclose(call.rows.output, layer(hidden(6)).transpose(1, 2), atol=1e-6)


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda x: -x * 0.3,
    "from a number": lambda x: 1 - x * 0.3,
    "from a bias": lambda x: (torch.arange(6.0) - x) * 0.3,
    "from a bias, each scaled": lambda x: torch.sub(torch.arange(6.0), x, alpha=0.3),
    "distances": lambda x: -(torch.arange(6.0) - 2 * x) * 0.15,
    "clamped": lambda x: x.clamp(-50, 50) * 0.3,
    "clamped, then negative": lambda x: -(x.clamp(-50, 50)) / 5,
    "capped": lambda x: 6 * torch.tanh(x * 0.05),
    "masked between cap and scale": lambda x: torch.tanh(x * 0.05).masked_fill(~causal(x), -1e9) * 6,
    "multiplied by a mask": lambda x: (x * causal(x).float() - 1e9 * (~causal(x)).float()) * 0.3,
    "beside a sink": lambda x: torch.cat([x, torch.zeros(2, HEADS, 6, 1)], -1) * 0.3,
    "temperature after a clamp": lambda x: x.clamp(-50, 50) * torch.full((1, HEADS, 1, 1), 0.3),
    "temperature beside a sink": lambda x: torch.cat([x, x.new_zeros(2, HEADS, 6, 1)], -1) * torch.full((6, 1), 0.3),
}


@pytest.mark.parametrize("name", SLOPES)
def test_scale_is_the_slope_of_the_logits(name: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return SLOPES[name](q @ k.mT).softmax(-1)[..., :6] @ v

    layer = Layer(HEADS, attend)
    q, k, _ = (x.transpose(1, 2) for x in layer.heads(hidden(6)))
    at_zero = torch.zeros(2, HEADS, 6, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(SLOPES[name](at_zero)[..., -1, 0].sum(), at_zero)
    factor = float(slope[0, 0, -1, 0])
    for call in calls_of_two_forwards(layer, 6):
        assert torch.allclose(call.scale * call.query, factor * q, atol=1e-6)
        assert torch.equal(call.key, k)
        assert call.error < 1e-6


def test_keys_that_a_subtracted_mask_hides_are_padding() -> None:
    hidden_keys = torch.tensor([[0.0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0]])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        logits = q @ k.mT * 0.3 - 1e9 * hidden_keys[:, None, None].expand(-1, 1, 6, -1)
        return logits.softmax(-1) @ v

    (call, _) = calls_of_two_forwards(Layer(HEADS, attend), 6)
    assert torch.equal(call.key_mask, hidden_keys == 0)


class WithTable(nn.Module):
    """Relative positions as in Shaw et al. 2018: queries times an embedding of the distance, (L, L, d)."""

    def __init__(self, equation: str, *, first: bool) -> None:
        super().__init__()
        self.qkv, self.table = nn.Linear(WIDTH, 3 * WIDTH), nn.Embedding(2 * LENGTH - 1, SIZE)
        self.equation, self.first = equation, first

    def heads(self, x: Tensor) -> Tensor:
        return self.qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        steps = torch.arange(x.shape[1])
        distances = self.table(steps[:, None] - steps + x.shape[1] - 1)
        operand = k if self.equation.startswith("bhjd") else q
        terms = [q @ k.mT * 0.3, torch.einsum(self.equation, operand, distances) * 0.3]
        return (sum(reversed(terms) if self.first else terms).softmax(-1) @ v).transpose(1, 2).flatten(2)


LENGTH = 6


@pytest.mark.parametrize("first", [True, False], ids=["table first", "table second"])
@pytest.mark.parametrize("length", [LENGTH, HEADS], ids=["long", "as many as heads"])
@pytest.mark.parametrize("equation", ["bhid,ijd->bhij", "bhjd,ijd->bhij"], ids=["queries", "keys"])
def test_product_with_a_table_of_distances_is_a_bias(equation: str, length: int, first: bool) -> None:
    layer = WithTable(equation, first=first)
    q, k, _ = layer.heads(hidden(length))
    assert_captured(layer, q, k, length, sees="both")
    assert all(call.outside == ("bias",) for call in calls_of_two_forwards(layer, length))
