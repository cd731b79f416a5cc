"""Modules that look like attention by their names are named only where something in them may be attention."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.pages.third_party_models import captured

WIDTH, LENGTH = 32, 12


class Attn(nn.Module):
    """Named like attention, with projections named likewise; ``body`` is what it computes."""

    def __init__(self, body: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.query, self.key, self.value))
        return self.body(q, k, v)


def kernel_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    return q @ (k.mT @ v) / (q * k.sum(-2, keepdim=True)).sum(-1, keepdim=True)


def softmax_features(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q) * k + v


def recurrence(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(k[:, :, 0]), []
    for t in range(k.shape[2]):
        state = 0.9 * state + k[:, :, t].exp() * v[:, :, t]
        outputs.append(torch.sigmoid(q[:, :, t]) * state)
    return torch.stack(outputs, 2)


def channel_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v * q.mean((2, 3), keepdim=True).softmax(1)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def as_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1) @ v


def outside_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.from_numpy(q.numpy() + k.numpy())


@pytest.mark.parametrize("body", [kernel_features, softmax_features, gate, recurrence, channel_gate])
def test_what_is_no_softmax_attention_gets_no_name(body: Callable[..., Tensor]) -> None:
    result = captured(nn.Sequential(Attn(body)), input=torch.randn(2, LENGTH, WIDTH))
    assert (result.calls, result.missed) == ([], {})


@pytest.mark.parametrize("body", [by_hand, as_sum, outside_torch])
def test_what_may_be_attention_is_named(body: Callable[..., Tensor]) -> None:
    result = captured(nn.Sequential(Attn(body)), input=torch.randn(2, LENGTH, WIDTH))
    assert (result.calls, list(result.missed)) == ([], ["0"])


class Codes(nn.Module):
    """A linear layer whose weight is in buffers, as GPTQ and AWQ keep it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("codes", (linear.weight.detach() * 100).to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.codes.to(x.dtype) / 100)


@pytest.mark.parametrize(
    ("body", "found"), [(nn.functional.scaled_dot_product_attention, (["1"], [])), (outside_torch, ([], ["1"]))]
)
def test_layer_without_parameters_has_its_own_name(
    body: Callable[..., Tensor], found: tuple[list[str], list[str]]
) -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), Attn(body))
    for name in ("query", "key", "value"):
        setattr(model[1], name, Codes(getattr(model[1], name)))
    result = captured(model, input=torch.randn(2, LENGTH, WIDTH))
    assert ([call.layer for call in result.calls], list(result.missed)) == found


def test_attention_on_a_graph_is_named_as_such() -> None:
    class MessagePassing(nn.Module):
        """The base class of this name in torch_geometric."""

    class GATConv(MessagePassing):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.att_src = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(1, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x) * (x * self.att_src).sum(-1, keepdim=True)

    result = captured(nn.Sequential(GATConv()), input=torch.randn(LENGTH, WIDTH))
    assert "edges of a graph" in result.missed["0"]


@pytest.mark.parametrize("answer", [lambda *args: args, 5, "attention"], ids=["function", "number", "text"])
def test_module_that_answers_to_any_name_is_measured(answer: object) -> None:
    class Answering(Attn):
        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return answer

    model = Answering(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)
    assert len(captured(model, x=torch.randn(2, LENGTH, WIDTH)).calls) == 1
