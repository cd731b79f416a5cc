"""Hand-written attention is recognized by its operations, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attnmonitor.capture import capture_attention, fused
from attnmonitor.capture.fused import read_sdpa
from attnmonitor.capture.modules import Frames
from attnmonitor.capture.tracing import beginnings
from attnmonitor.capture.verify import Attention
from benchmarks.pages.handwritten_models import HandWritten, by_matmul, imported_by_name
from benchmarks.pages.third_party_models import captured, sharpen

WIDTH, LENGTH = 32, 12


def hidden() -> Tensor:
    return torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A module with projections and a body that is given."""

    def __init__(self, body: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.slots = nn.Parameter(torch.randn(2, 4, WIDTH))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def moe_gate(layer: Layer, x: Tensor) -> Tensor:
    weights = layer.gate(x).softmax(-1)
    return torch.einsum("ble,bled->bld", weights, torch.einsum("bld,edf->blef", x, layer.experts))


def soft_moe(layer: Layer, x: Tensor) -> Tensor:
    dispatch = torch.einsum("bld,bsd->bls", x, layer.slots).softmax(1)
    return torch.einsum("bls,bld->bsd", dispatch, x)


def bilinear_head(layer: Layer, x: Tensor) -> Tensor:
    return layer.first(x) @ layer.second(x).transpose(1, 2)


def contrastive_loss(layer: Layer, x: Tensor) -> Tensor:
    a, b = nn.functional.normalize(layer.first(x), dim=-1), nn.functional.normalize(layer.second(x), dim=-1)
    logits = a @ b.transpose(1, 2) / 0.07
    return nn.functional.cross_entropy(logits, torch.arange(LENGTH).expand(2, -1))


def pointer_distribution(layer: Layer, x: Tensor) -> Tensor:
    return (layer.first(x) @ layer.second(x).transpose(1, 2)).softmax(-1)


def linear_attention(layer: Layer, x: Tensor) -> Tensor:
    q, k = layer.first(x).softmax(-1), layer.second(x).softmax(1)
    return q @ (k.transpose(1, 2) @ x)


def gram_matrix_of_softmax(layer: Layer, x: Tensor) -> Tensor:
    p = layer.first(x).softmax(-1)
    return (p @ p.transpose(1, 2)) @ x


def sigmoid_attention(layer: Layer, x: Tensor) -> Tensor:
    return torch.sigmoid(layer.first(x) @ layer.second(x).transpose(1, 2)) @ x


def tied_language_model_head(layer: Layer, x: Tensor) -> Tensor:
    return (x @ layer.first.weight.t()).softmax(-1) @ layer.first.weight


def batch_similarity(layer: Layer, x: Tensor) -> Tensor:
    pooled = x.mean(1)
    return (layer.first(pooled) @ layer.second(pooled).t()).softmax(-1) @ pooled


NOT_ATTENTION = [
    moe_gate,
    soft_moe,
    bilinear_head,
    contrastive_loss,
    pointer_distribution,
    linear_attention,
    gram_matrix_of_softmax,
    sigmoid_attention,
    tied_language_model_head,
    batch_similarity,
]


@pytest.mark.parametrize("body", NOT_ATTENTION, ids=lambda body: body.__name__)
def test_other_products_give_no_record(body: Callable[[Layer, Tensor], Tensor]) -> None:
    assert captured(Layer(body), x=hidden()).calls == []


class ExpAttention(nn.Module):
    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        weights = torch.exp(q @ k.transpose(1, 2) * x.shape[-1] ** -0.5)
        return (weights / weights.sum(-1, keepdim=True)) @ v


def slot_attention(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    return (q @ k.mT + ((q + 1) @ (k - 1).mT).tanh()).softmax(-1) @ v


def test_unseen_attention_is_missed_by_name() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = ExpAttention()
            self.idle_attn = ExpAttention()
            self.mlp = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.mixer(x))

    result = captured(Model(), x=hidden())
    assert result.calls == []
    assert result.missed == {
        "mixer": "its logits go through exp, which cannot be followed",
        "idle_attn": "not called in this forward",
    }


REUSES = {
    "logits": lambda logits, weights: logits.softmax(-1),
    "scaled logits": lambda logits, weights: (2 * logits).softmax(-1),
    "weights": lambda logits, weights: weights,
    "exchanged": lambda logits, weights: logits.mT.softmax(-1),
}


@pytest.mark.parametrize("reuse", REUSES.values(), ids=REUSES)
def test_layer_that_attends_by_another_layers_product_is_named(reuse: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.query(x) @ x.mT
            weights = logits.softmax(-1)
            return logits, weights, weights @ self.value(x)

    class Borrower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
            return reuse(logits, weights) @ self.value(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.owner, self.borrower = Owner(), Borrower()

        def forward(self, x: Tensor) -> Tensor:
            logits, weights, written = self.owner(x)
            return self.borrower(x + written, logits, weights)

    result = captured(Model(), x=hidden())
    assert [call.layer for call in result.calls] == ["owner"]
    assert result.missed == {"borrower": "it attends by the queries and keys of owner and has none of its own"}


def near_and_far(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    """Local keys beside those of a summary, as in Pegasus-X."""
    logits = torch.cat([q @ k.mT, q @ k[:, :, :2].mT], -1)
    return logits.softmax(-1) @ torch.cat([v, v[:, :, :2]], -2)


def leaky(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = q @ k.mT
    return torch.where(logits > 0, logits, 0.2 * logits).softmax(-1) @ v


AMBIGUOUS = {
    slot_attention: "its softmax does not run over the positions its values come from",
    two_products: "its logits are the sum of several query-key products",
    near_and_far: "its logits are made of several query-key products by cat, which cannot be followed",
    leaky: "its logits are combined with themselves by where, which cannot be followed",
}


@pytest.mark.parametrize("attend", AMBIGUOUS, ids=lambda attend: attend.__name__)
def test_ambiguous_attention_is_missed_with_the_true_reason(attend: Callable[..., Tensor]) -> None:
    result = captured(HandWritten(attend), x=hidden())
    assert (result.calls, result.missed) == ([], {"HandWritten": AMBIGUOUS[attend]})


def talking_heads(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), torch.ones(4, 4)) @ v


def test_model_without_attention_is_missed_as_a_whole() -> None:
    assert list(captured(HandWritten(talking_heads), x=hidden()).missed) == ["HandWritten"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_scripted_modules_are_missed_by_name() -> None:
    model = nn.Sequential(torch.jit.script(ExpAttention()), HandWritten(by_matmul))
    result = captured(model, input=hidden())
    assert [call.layer for call in result.calls] == ["1"]
    assert list(result.missed) == ["0"]
    assert "scripted" in result.missed["0"]


def grouped_einsum(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bghid,bgjd->bghij", q.unflatten(1, (2, 2)), k[:, ::2]) * 8**-0.5
    return torch.einsum("bghij,bgjd->bghid", logits.masked_fill(blocked, -torch.inf).softmax(-1), v[:, ::2]).flatten(
        1, 2
    )


def shared_key_head(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    return (q @ k[:, :1].mT).masked_fill(blocked, -torch.inf).softmax(-1) @ v


def keys_first_by_matmul(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (k @ q.mT).mul(0.3).masked_fill(blocked.mT, -torch.inf)
    return logits.softmax(-2).mT @ v


def keys_first_by_einsum(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = torch.einsum("bhjd,bhid->bjih", k, q * 0.3) + torch.where(blocked.mT, -1e9, 0.0)[..., None]
    return torch.einsum("bjih,bhjd->bhid", nn.functional.softmax(logits, dim=1), v)


def keys_first_by_baddbmm(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    hidden = torch.zeros(LENGTH, LENGTH).masked_fill(blocked.mT, -torch.inf).expand(len(q), -1, -1)
    weights = torch.baddbmm(hidden, k, q.transpose(1, 2), alpha=0.3).softmax(1)
    return torch.bmm(weights.transpose(1, 2), v).view(2, 4, LENGTH, 8)


def keys_first_with_a_cap_and_a_slope(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    logits = (k @ q.mT * 0.3).transpose(-1, -2) + torch.linspace(0, 1, LENGTH)
    logits = (5 * torch.tanh(logits / 5)).masked_fill(blocked, -torch.inf)
    return torch.einsum("bhji,bhjd->bhid", logits.mT.softmax(2), v)


@pytest.mark.parametrize(
    ("attend", "outside"),
    [
        (keys_first_by_matmul, ()),
        (keys_first_by_einsum, ()),
        (keys_first_by_baddbmm, ()),
        (keys_first_with_a_cap_and_a_slope, ("bias", "softcap")),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_product_of_keys_with_queries_is_attention(attend: Callable[..., Tensor], outside: tuple[str, ...]) -> None:
    model = sharpen(HandWritten(attend))
    result = captured(model, x=hidden())
    (call,) = result.calls
    q, k, _ = model.qkv(hidden()).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.allclose(call.scale * call.query, 0.3 * q, atol=1e-6)
    assert torch.equal(call.key, k)
    assert call.error < 2e-6
    assert (call.outside, result.missed) == (outside, {})
    visible = call.logit_rows(torch.arange(LENGTH)).isfinite()
    assert torch.equal(visible, torch.ones(LENGTH, LENGTH).tril().bool().expand_as(visible))


def test_keys_first_are_captured_unrepeated() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        return (k[:, ::2].repeat_interleave(2, dim=1) @ q.mT).softmax(-2).mT @ v

    model = sharpen(HandWritten(attend))
    (call,) = captured(model, x=hidden()).calls
    assert torch.equal(call.key, model.qkv(hidden()).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)[1][:, ::2])
    assert call.error < 1e-6


def test_one_product_with_a_softmax_each_way_is_two_attentions() -> None:
    """Co-attention: each sequence attends to the other through the same product."""

    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        logits = q @ k.mT * 0.3
        return logits.softmax(-1) @ v + logits.softmax(-2).mT @ v

    model = sharpen(HandWritten(attend))
    there, back = captured(model, x=hidden()).calls
    assert (there.layer, back.layer) == ("HandWritten", "HandWritten#2")
    assert torch.equal(there.query, back.key)
    assert torch.equal(there.key, back.query)
    assert max(there.error, back.error) < 1e-6


def expanded_keys(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
    k = k[:, ::2].unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(k.shape)
    return (q @ k.transpose(-1, -2)).masked_fill(blocked, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("attend", "num_kv_heads"),
    [(grouped_einsum, 2), (shared_key_head, 1), (expanded_keys, 2)],
    ids=lambda x: str(x)[:20],
)
def test_keys_are_never_repeated_per_query_head(attend: Callable[..., Tensor], num_kv_heads: int) -> None:
    model = sharpen(HandWritten(attend))
    (call,) = captured(model, x=hidden()).calls
    q, k, _ = model.qkv(hidden()).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.equal(call.query, q)
    assert torch.equal(call.key, k[:, :: 4 // num_kv_heads])
    assert call.error < 1e-6


def test_weights_used_twice_are_one_attention() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v + torch.einsum("bhij,ijd->bhid", weights, torch.ones(LENGTH, LENGTH, 8))

    (call,) = captured(HandWritten(attend), x=hidden()).calls
    assert call.error < 1e-6


def test_untraced_change_of_the_logits_fails_the_check() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        logits = q @ k.mT
        logits.detach().numpy()[:, :, blocked.numpy()] = -torch.inf
        return logits.softmax(-1) @ v

    (call,) = captured(sharpen(HandWritten(attend)), x=hidden()).calls
    assert call.error > 0.1


def test_failed_rebuild_is_missed_and_keeps_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("no such shape")

    monkeypatch.setattr(Attention, "rebuilt", refuse)
    model = HandWritten(by_matmul)
    result = captured(model, x=hidden())
    assert result.calls == []
    assert result.missed == {"HandWritten": "its attention could not be rebuilt: no such shape"}
    assert torch.equal(result.output, model(hidden()))


def test_failure_of_another_operation_keeps_the_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("odd arguments")

    monkeypatch.setattr(Frames, "note_projection", refuse)
    result = captured(HandWritten(by_matmul), x=hidden())
    assert len(result.calls) == 1
    assert result.missed == {}


@pytest.mark.parametrize(
    ("attend", "reason"), [(by_matmul, "a call of matmul"), (imported_by_name, "a call of scaled")]
)
def test_failure_of_the_attention_is_the_reason_it_is_missed(
    attend: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("odd arguments")

    monkeypatch.setattr(beginnings, "pairwise_product", refuse)
    monkeypatch.setattr(fused, "mask_step", refuse)
    monkeypatch.setattr(fused, "attend", refuse)
    result = captured(HandWritten(attend), x=hidden())
    assert result.calls == []
    assert result.missed["HandWritten"].startswith(reason)
    assert result.missed["HandWritten"].endswith("could not be followed: odd arguments")


def test_missed_second_attention_of_a_layer_is_named() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        return by_matmul(q, k, v, blocked) + slot_attention(q, k, v, blocked)

    result = captured(HandWritten(attend), x=hidden())
    assert [call.layer for call in result.calls] == ["HandWritten"]
    assert list(result.missed) == ["HandWritten#2"]
    assert "does not run over the positions its values come from" in result.missed["HandWritten#2"]


@given(
    scale=st.floats(0.01, 2.0),
    groups=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    fault=st.sampled_from(["scale", "query", "key heads", "mask", "value of the key"]),
    seed=st.integers(0, 2**16),
)
def test_verification_fails_for_every_fault(scale: float, groups: tuple[int, int], fault: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, LENGTH, 8, generator=generator).double() for heads in (groups[0], *groups[1:] * 2))
    mask = torch.ones(LENGTH, LENGTH).tril().bool()
    output = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    right = read_sdpa(q, k, v, mask, scale=scale)
    assert right.rebuilt(output).error < 1e-10
    wrong = {
        "scale": lambda: replace(right, scale=1.1 * scale),
        "query": lambda: replace(right, query=q.roll(1, 1)),
        "key heads": lambda: replace(right, key=k.flip(1) if groups[1] > 1 else k.roll(1, 0)),
        "mask": lambda: replace(right, affine=[]),
        "value of the key": lambda: replace(right, key=k + 0.1 * torch.randn(k.shape, generator=generator)),
    }[fault]()
    assert wrong.rebuilt(output).error > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_tensors_keep_their_dtype(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        weights = (q @ k.mT / 8**0.5).masked_fill(blocked, -torch.inf).float().softmax(-1).to(q.dtype)
        return nn.functional.dropout(weights, 0.0, training=True) @ v

    (call,) = captured(sharpen(HandWritten(attend)).to(dtype), x=hidden().to(dtype)).calls
    assert call.query.dtype == call.key.dtype == dtype
    assert call.scale == pytest.approx(8**-0.5)
    assert call.error < (1e-6 if dtype is torch.float32 else 3e-2)


def test_dropout_on_the_weights_gives_no_error() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        return nn.functional.dropout((q @ k.mT).softmax(-1), 0.5) @ v

    (call,) = captured(HandWritten(attend), x=hidden()).calls
    assert call.error is None


def test_rows_of_logits_are_those_that_enter_the_softmax() -> None:
    seen = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        logits = 30 * torch.tanh((q @ k.mT * 0.4 + torch.linspace(0, 1, LENGTH)) / 30)
        seen["logits"] = logits.masked_fill(blocked, -torch.inf)
        return seen["logits"].softmax(-1) @ v

    (call,) = captured(sharpen(HandWritten(attend)), x=hidden()).calls
    rows = torch.tensor([0, 5, 11])
    assert torch.allclose(call.logit_rows(rows), seen["logits"][:, :, rows], atol=1e-5)
    assert call.scale == pytest.approx(0.4)
    assert call.outside == ("bias", "softcap")


LESS_MAXIMUM: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: (x - x.amax(-1, keepdim=True)).softmax(-1),
    "detached": lambda x: x.sub(x.max(dim=-1, keepdim=True)[0].detach()).softmax(-1),
    "without its axis": lambda x: (x - x.max(-1).values.unsqueeze(-1).float()).softmax(-1),
    "of all": lambda x: (x - x.max()).flatten(0, 1).softmax(-1).view(x.shape),
    "with a sink": lambda x: with_sink(torch.cat([x, torch.zeros_like(x[..., :1])], -1)),
}


def with_sink(x: Tensor) -> Tensor:
    return (x - x.max(-1, keepdim=True).values).softmax(-1)[..., :-1]


@pytest.mark.parametrize("weigh", LESS_MAXIMUM.values(), ids=LESS_MAXIMUM)
def test_maximum_that_code_subtracts_stays_in_the_logits(weigh: Callable[[Tensor], Tensor]) -> None:
    seen = {}

    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        seen["logits"] = (q @ k.mT * 0.4).masked_fill(blocked, -torch.inf)
        return weigh(seen["logits"]) @ v

    (call,) = captured(sharpen(HandWritten(attend)), x=hidden()).calls
    rows = torch.tensor([0, 5, 11])
    assert torch.allclose(call.logit_rows(rows), seen["logits"][:, :, rows], atol=1e-5)
    assert call.error is not None
    assert float(call.error) < 1e-5


@pytest.mark.parametrize("hidden_by", [-1e4, -1e9, -torch.inf])
def test_added_mask_is_no_bias(hidden_by: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor) -> Tensor:
        return (q @ k.mT * 0.3 + torch.zeros(blocked.shape).masked_fill(blocked, hidden_by)).softmax(-1) @ v

    (call,) = captured(sharpen(HandWritten(attend)), x=hidden()).calls
    assert call.outside == ()
    assert torch.equal(call.logit_rows(torch.arange(LENGTH)).isfinite()[0, 0], torch.ones(LENGTH, LENGTH).tril().bool())


def test_soft_cap_is_found_at_small_logits() -> None:
    class Capped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            logits = 50 * torch.tanh(x @ x.mT / 50)
            return logits.softmax(-1) @ x

    model, calls = nn.ModuleDict({"attn": Capped()}), []
    with torch.no_grad(), capture_attention(model, lambda call: calls.append(call.outside)):
        model["attn"](0.01 * torch.randn(2, 4, 12, 8))
    assert calls == [("softcap",)]
