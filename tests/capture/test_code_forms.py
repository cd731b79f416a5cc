"""Forms in which libraries write attention: each is measured as what it is, or named with the true reason."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from reference import layer_statistics
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import AttentionMonitor
from attnmonitor.capture import capture_attention, pattern
from attnmonitor.capture.fused import read_sdpa
from benchmarks.pages.third_party_models import captured, sharpen

WIDTH, LENGTH = 32, 16


def hidden(length: int = LENGTH) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """Projections, tables and mixers, and a body that uses them."""

    def __init__(self, body: Callable[[Layer, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.rows = nn.Parameter(torch.randn(4, 4, 8))
        self.mixer = nn.Conv2d(4, 4, 1, bias=False)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return self.body(self, q, k, v)


def relative(layer: Layer, q: Tensor) -> Tensor:
    """A term per row of the image: queries times a learned table, (B, H, h, w, h)."""
    return torch.einsum("bhijc,ikc->bhijk", q[:, :, -LENGTH:].unflatten(2, (4, 4)), layer.rows)


def added_in_a_view(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * 0.3) @ k.mT
    by_place = logits.view(2, 4, 4, 4, 4, 4) + relative(layer, q)[..., None]
    return by_place.view(logits.shape).softmax(-1) @ v


def written_back(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * 0.3) @ k.mT
    by_place = logits[:, :, 0:, 0:].view(2, 4, 4, 4, 4, 4) + relative(layer, q).unsqueeze(-1)
    logits[:, :, 0:, 0:] = by_place.view(logits.shape)
    return logits.softmax(-1) @ v


def in_place_of_a_view(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * 0.3) @ k.mT
    first = q.shape[2] - LENGTH  # a class token
    logits[:, :, first:, first:].view(2, 4, 4, 4, 4, 4).add_(relative(layer, q)[..., None])
    return logits.softmax(-1) @ v


def on_all_of_a_view(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q * 0.3) @ k.mT
    logits.view(2, 4, 4, 4, 4, 4).add_(relative(layer, q)[..., None])
    return logits.softmax(-1) @ v


@pytest.mark.parametrize(
    ("body", "length"),
    [
        (added_in_a_view, LENGTH),
        (written_back, LENGTH),
        (in_place_of_a_view, LENGTH + 1),
        (on_all_of_a_view, LENGTH),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_relative_positions_are_a_bias_however_added(body: Callable[..., Tensor], length: int) -> None:
    model = sharpen(Layer(body))
    (call,) = captured(model, x=hidden(length)).calls
    q, k, _ = model.qkv(hidden(length)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.allclose(call.scale * call.query, 0.3 * q, atol=1e-6)
    assert torch.equal(call.key, k)
    assert call.outside == ("bias",)
    assert call.error < 1e-6


FUTURE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


def written_over(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT * 0.3
    logits[:, :, FUTURE] = -torch.inf
    return logits.softmax(-1) @ v


def columns_written_over(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT * 0.3
    logits[FUTURE.expand(2, 4, -1, -1)] = -torch.inf
    logits[..., 2:3] = -1e9
    return logits.softmax(-1) @ v


def multiplied_by_a_mask(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As in the first GPT."""
    seen = (~FUTURE).float()
    return (q @ k.mT * 0.3 * seen - 1e4 * (1 - seen)).softmax(-1) @ v


def with_a_key_of_nothing(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = (q @ k.mT * 0.3).masked_fill(FUTURE, -torch.inf)
    return nn.functional.pad(logits, (1, 0)).softmax(-1)[..., 1:] @ v


def by_special_functions(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = torch.add(torch.zeros(LENGTH, LENGTH).masked_fill(FUTURE, -torch.inf), q @ k.mT, alpha=0.3)
    return torch.special.softmax(logits, -1) @ v


def one_head_after_the_other(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(H·B, L, d) by slices of features, as in many recommenders."""
    q, k, v = (torch.cat(y.transpose(1, 2).flatten(2).split(8, dim=2), dim=0) for y in (q, k, v))
    return torch.stack(((q @ k.mT * 0.3).masked_fill(FUTURE, -torch.inf).softmax(-1) @ v).chunk(4), 1)


def heads_stacked(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (torch.stack(y.transpose(1, 2).flatten(2).chunk(4, -1)) for y in (q, k, v))
    logits = torch.einsum("nbik,nbjk->nbij", q, k) * 0.3
    return torch.einsum("nbij,nbjk->bnik", logits.masked_fill(FUTURE, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize(
    ("body", "outside", "num_hidden"),
    [
        (written_over, (), 0),
        (columns_written_over, (), 1),
        (multiplied_by_a_mask, (), 0),
        (with_a_key_of_nothing, ("sinks",), 0),
        (by_special_functions, (), 0),
        (one_head_after_the_other, (), 0),
        (heads_stacked, (), 0),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_causal_attention_is_that_however_written(
    body: Callable[..., Tensor], outside: tuple[str, ...], num_hidden: int
) -> None:
    model = sharpen(Layer(body))
    (call,) = captured(model, x=hidden()).calls
    q, k, _ = model.qkv(hidden()).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    assert torch.allclose(call.scale * call.query, 0.3 * q, atol=1e-6)
    assert torch.equal(call.key, k)
    assert (call.outside, call.layout.sees) == (outside, "causal")
    assert call.error < 1e-6
    assert call.key_mask is None or int((~call.key_mask).sum()) == 2 * num_hidden


def rows_of_one_sequence(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Matrices, one sequence of one head at a time."""
    q, k, v = (y[0].transpose(0, 1).flatten(1) for y in (q, k, v))
    return torch.mm((torch.mm(q, k.t()) * 0.3).softmax(-1), v)


def tied_rows(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Logits summed over the rows of an alignment: features of all rows are one vector."""
    q, k, v = (y.unflatten(2, (4, 4)) for y in (q, k, v))
    return torch.einsum("bhij,bhrjd->bhrid", (torch.einsum("bhrid,bhrjd->bhij", q, k) * 0.3).softmax(-1), v)


@pytest.mark.parametrize(
    ("body", "heads", "shape"),
    [(rows_of_one_sequence, 1, (1, 1, LENGTH, WIDTH)), (tied_rows, 4, (2, 4, 4, 32))],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_products_of_other_ranks_are_measured(body: Callable[..., Tensor], heads: int, shape: tuple[int, ...]) -> None:
    model, batch = sharpen(Layer(body)), hidden()
    with AttentionMonitor(model, batch, record=None, alerts=False) as monitor:
        for sample in (monitor.sample(0), monitor.sample(1)):
            [coverage] = sample.coverage.values()
            assert coverage.num_query_heads == heads
            assert coverage.error is not None
            assert coverage.error < 1e-6
    (call,) = captured(model, x=batch).calls
    assert call.query.shape == shape
    assert call.value is not None
    assert call.value.shape == shape


UNSEEN: dict[str, Callable[..., list[Tensor]]] = {
    "rotary embedding": lambda q, k, v: [turn(q), turn(k), v],
    "norm of keys": lambda q, k, v: [q, nn.functional.normalize(k, dim=-1), v],
    "all three": lambda q, k, v: [turn(y) for y in (q, k, v)],
}


def turn(x: Tensor) -> Tensor:
    return torch.cat([-x[..., 4:], x[..., :4]], -1) * torch.arange(1.0, 1 + x.shape[-2])[:, None].cos()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kernel", UNSEEN.values(), ids=UNSEEN)
def test_what_an_unseen_kernel_makes_is_measured(kernel: Callable[..., list[Tensor]], fused: bool) -> None:
    def body(layer: Layer, *heads: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction() if layer.is_unseen else nullcontext():
            q, k, v = kernel(*heads)
        return nn.functional.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT * 0.3).softmax(-1) @ v

    model = sharpen(Layer(body))
    model.is_unseen = False
    (expected,) = captured(model, x=hidden()).calls
    model.is_unseen = True
    (found,) = captured(model, x=hidden()).calls
    assert (found.kind, found.scale, found.layout.lead) == (expected.kind, expected.scale, expected.layout.lead)
    torch.testing.assert_close((found.query, found.key), (expected.query, expected.key))


def gated(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * 0.3) * (1 + layer.gate)).softmax(-1) @ v


def test_factor_that_begins_at_one_is_named_once_it_acts() -> None:
    model = sharpen(Layer(gated))
    model.gate = nn.Parameter(torch.zeros(LENGTH, LENGTH))
    with AttentionMonitor(nn.Sequential(model), hidden(), record=None, alerts=False) as monitor:
        assert monitor.sample(0).coverage["0"].outside == ()
        with torch.no_grad():
            model.gate[-1, 3] = 0.5
        assert monitor.sample(1).coverage["0"].outside == ("bias",)


class OfLengths(nn.Module):
    """Sequences of several lengths as one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "qkv")

    def by_head(self, x: Tensor) -> list[Tensor]:
        return [weight(x).unflatten(-1, (4, 8)).transpose(1, 2) for weight in self.qkv]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*self.by_head(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_sequences_have_their_own_lengths() -> None:
    model, rows = nn.Sequential(OfLengths()), hidden()
    nested = torch.nested.nested_tensor([rows[0], rows[1, :7]], layout=torch.jagged)
    with AttentionMonitor(model, nested, record=None, alerts=False) as monitor:
        sample = monitor.sample(1)
        coverage = sample.coverage["0"]
        assert (coverage.heads, coverage.sees, coverage.kind) == ((4, 4, 8), "both", "self")
        assert coverage.error is not None
        assert coverage.error < 1e-6
    q, k, _ = (y.detach().double() for y in model[0].by_head(rows))
    parts = [(q[:1], k[:1]), (q[1:, :, :7], k[1:, :, :7])]
    expected = torch.cat([layer_statistics(*part, 8**-0.5, None, None)["energy_rms"] for part in parts]).mean(0)
    assert torch.allclose(sample.values["energy_rms"]["0"].double(), expected, rtol=1e-4)


class OverDepth(nn.Module):
    """A learned query at every position, over what earlier blocks gave there."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.blocks = (
            nn.Parameter(torch.randn(WIDTH)),
            nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in "abc"),
        )

    def forward(self, x: Tensor) -> Tensor:
        depths = [x := block(x) for block in self.blocks]
        states = torch.cat([each.unsqueeze(2) for each in depths], 2)
        query = self.query.view(1, WIDTH).expand(*x.shape[:2], -1, -1)
        return nn.functional.scaled_dot_product_attention(query, states, states)


class InBlocks(nn.Module):
    """Heads beside the batch and a single block of positions, after a convolution (HaloNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Conv2d(8, 32, 1), nn.Conv2d(8, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).reshape(8, 8, -1, 1).transpose(1, 3)
        kv = self.kv(x).unfold(2, 4, 4).unfold(3, 4, 4).reshape(8, 16, 1, -1).permute(0, 2, 3, 1)
        k, v = kv.split(8, dim=-1)
        return (q @ k.mT).softmax(-1) @ v


class InPatches(nn.Module):
    """Pixels of a patch as a sequence: patches come from an unfold, before the first weight (TNT)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Conv2d(3, WIDTH, 1), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        patches = nn.functional.unfold(x, 4, stride=4).transpose(1, 2).reshape(-1, 3, 4, 4)
        pixels = self.embed(patches).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(pixels).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("model", "batch", "shape"),
    [
        (OverDepth(), hidden(5), (10, 1, 1, WIDTH)),
        (InBlocks(), torch.randn(2, 8, 4, 4), (2, 4, 16, 8)),
        (InPatches(), torch.randn(2, 3, 8, 8), (8, 4, 16, 8)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_sequences_do_not_pass_for_heads(model: nn.Module, batch: Tensor, shape: tuple[int, ...]) -> None:
    (call,) = captured(sharpen(model), x=batch).calls
    assert call.query.shape == shape
    assert call.error < 1e-6


def mixed_and_added(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    return (logits + layer.mixer(logits)).softmax(-1) @ v


@torch.jit.script
def soft_cap(x: Tensor, cap: float) -> Tensor:
    return (x / cap).tanh() * cap


def capped_by_a_script(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft_cap(q @ k.mT, 5.0).softmax(-1) @ v


def weighted_by_a_kernel(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    logits = q @ k.mT
    with torch._C.DisableTorchFunction():  # a fused scale, mask and softmax
        weights = logits.softmax(-1)
    return weights @ v


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (mixed_and_added, "talking heads"),
        (capped_by_a_script, "logits come out of a function that cannot be seen"),
        (weighted_by_a_kernel, "logits go into a function that cannot be seen"),
    ],
    ids=["mixed and added", "capped by a script", "weighted by a kernel"],
)
def test_reason_is_where_the_logits_went(body: Callable[..., Tensor], reason: str) -> None:
    result = captured(sharpen(Layer(body)), x=hidden())
    assert result.calls == []
    assert reason in result.missed["Layer"]


class ChosenByExperts(nn.Module):
    """Queries are projected by two of four experts per token, which gives twice as many heads (JetMoE)."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.kv = nn.Parameter(torch.randn(4, WIDTH, 2 * 8)), nn.Linear(WIDTH, 2 * 2 * 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        choice = torch.arange(2 * len(tokens)) * 7 % 4
        queries = tokens.new_zeros(2 * len(tokens), 16)
        for expert in range(4):
            chosen = (choice == expert).nonzero()[:, 0]
            queries = queries.index_add(0, chosen, nn.functional.linear(tokens[chosen // 2], self.experts[expert].T))
        q = queries.view(*x.shape[:-1], 2, -1).view(*x.shape[:-1], -1, 8).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2).repeat(1, 2, 1, 1) for y in self.kv(x).chunk(2, -1))
        return (q @ k.mT).softmax(-1) @ v


def test_queries_that_experts_project_have_their_heads() -> None:
    (call,) = captured(sharpen(ChosenByExperts()), x=hidden()).calls
    assert (call.query.shape, call.key.shape, call.kind) == ((2, 4, LENGTH, 8), (2, 2, LENGTH, 8), "self")
    assert call.tiled
    assert call.error < 1e-6


class OverFrames(nn.Module):
    """Pixels as sequences of frames, straight from an input whose last axis is a width (diffusers)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.permute(0, 3, 4, 1, 2).reshape(-1, x.shape[1], x.shape[2])
        q, k, v = self.qkv(frames).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_axes_of_an_input_are_sequences_after_a_projection() -> None:
    (call,) = captured(sharpen(OverFrames()), x=torch.randn(2, 5, WIDTH, 3, 4)).calls
    assert call.query.shape == (2 * 3 * 4, 4, 5, 8)


class Called(nn.Module):
    """Two blocks whose attention is called past its hooks."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor], body: Callable[..., Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"attn": Layer(body), "mlp": nn.Linear(8, 8)}) for _ in range(2))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["mlp"](self.call(block["attn"], x)).transpose(1, 2).flatten(2)
        return x


def plain(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_exp(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@pytest.mark.parametrize("call", [lambda child, x: child.forward(x), lambda child, x: type(child).forward(child, x)])
def test_modules_called_past_their_hooks_have_their_names(call: Callable[..., Tensor]) -> None:
    result = captured(Called(call, plain), x=hidden())
    assert [each.layer for each in result.calls] == ["blocks.0.attn", "blocks.1.attn"]
    assert result.missed == {}
    result = captured(Called(call, by_exp), x=hidden())
    assert result.calls == []
    assert set(result.missed) == {"blocks.0.attn", "blocks.1.attn"}
    assert all("exp" in reason for reason in result.missed.values())


class Functional(nn.Module):
    """Holds its layers in a list and calls them past their hooks, as a functional model of Keras does."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = [Layer(plain) for _ in range(2)]
        for number, operation in enumerate(self.operations):
            operation.path = f"block_{number}/attention"
        self.weights = nn.ParameterList(x for operation in self.operations for x in operation.parameters())

    def forward(self, x: Tensor) -> Tensor:
        for operation in self.operations:
            x = x + operation.forward(x).transpose(1, 2).flatten(2)
        return x


def test_layers_of_a_functional_model_have_the_names_it_gives() -> None:
    metrics = ["key_rms", "interaction_effective_rank"]
    with AttentionMonitor(sharpen(Functional()), hidden(), metrics=metrics, record=None, alerts=False) as monitor:
        assert list(monitor.coverage) == ["block_0.attention", "block_1.attention"]
        assert all(coverage.measured and coverage.weights_reason for coverage in monitor.coverage.values())


class InTurns(nn.Module):
    """Sequences packed into one row ``(T, D)``, each attended to in its turn (the vision tower of Qwen2.5-VL)."""

    def __init__(self, lengths: tuple[int, ...], *, fused: bool) -> None:
        super().__init__()
        self.qkv, self.lengths, self.fused = nn.Linear(WIDTH, 3 * WIDTH), lengths, fused

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(1, 2, 0, 3)[:, None].unbind(0)  # (1, H, T, d) each
        turns = zip(*(part.split(self.lengths, dim=2) for part in parts), strict=True)
        attend = nn.functional.scaled_dot_product_attention if self.fused else eager
        return torch.cat([attend(*turn) for turn in turns], dim=2)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lengths", [(4, 4, 4), (3, 7, 2)])
def test_windows_in_a_loop_are_sequences_of_one_layer(lengths: tuple[int, ...], fused: bool) -> None:
    model, x = sharpen(nn.Sequential(InTurns(lengths, fused=fused), nn.Identity())), hidden(12)[0]
    q, k, _ = model[0].qkv(x).detach().unflatten(-1, (3, 4, 8)).permute(1, 2, 0, 3)
    fields = [
        layer_statistics(a[None].double(), b[None].double(), 8**-0.5, None, None)
        for a, b in zip(q.split(lengths, 1), k.split(lengths, 1), strict=True)
    ]
    with AttentionMonitor(model, x, record=None, alerts=False) as monitor:
        assert list(monitor.coverage) == ["0"]
        coverage = monitor.coverage["0"]
        assert (coverage.heads, coverage.kind, coverage.remarks) == ((4, 4, 8), "self", ())
        assert coverage.error < 1e-6
        for step in (1, 2):
            sample = monitor.sample(step)
            for metric in ("energy_rms", "energy_effective_rank", "key_incoherence", "key_rms"):
                expected = torch.cat([field[metric] for field in fields]).mean(0)
                assert torch.allclose(sample.values[metric]["0"].double(), expected, rtol=1e-4), metric
            assert sample.values["value_rms"]["0"].isfinite().all()


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.untyped_storage().nbytes():
            self.size = max(self.size, output.numel())
        return output


def test_pattern_of_a_long_mask_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    length = 512
    places = torch.arange(length)
    mask = (places[:, None] >= places) & (places[:, None] // 200 == places // 200)
    q, k, v = torch.randn(3, 1, 2, length, 8)
    attention = read_sdpa(q, k, v, mask)
    whole = pattern.pattern_of(attention, []), *pattern.spans_of(attention, torch.ones(1, length, dtype=torch.bool))
    monkeypatch.setattr(pattern, "BLOCK_NUMBERS", 2**14)
    with Largest() as largest:
        parts = pattern.pattern_of(attention, []), *pattern.spans_of(attention, torch.ones(1, length, dtype=torch.bool))
    assert largest.size <= 2**14
    for name in ("itself", "sees_others", "seen_by_others", "looks_ahead", "first"):
        assert torch.equal(getattr(whole[0], name), getattr(parts[0], name))
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[2], parts[2])
    monkeypatch.undo()
    model = sharpen(Layer(lambda layer, q, k, v: nn.functional.scaled_dot_product_attention(q, k, v, mask)))
    with AttentionMonitor(model, hidden(length), record=None, alerts=False) as monitor:
        assert monitor.coverage["Layer"].measured


def num_matrices() -> int:
    """How many tensors of the size of a layer's logits are alive."""
    tensors = [each for each in gc.get_objects() if type(each) is Tensor]
    return len({x.untyped_storage()._cdata for x in tensors if x.untyped_storage().nbytes() == 4 * 2 * 4 * LENGTH**2})


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize(
    "body",
    [
        added_in_a_view,
        written_back,
        in_place_of_a_view,
        on_all_of_a_view,
        written_over,
        columns_written_over,
        multiplied_by_a_mask,
        with_a_key_of_nothing,
        by_special_functions,
        one_head_after_the_other,
        heads_stacked,
        mixed_and_added,
        capped_by_a_script,
        weighted_by_a_kernel,
    ],
    ids=lambda body: body.__name__,
)
def test_no_logits_outlive_their_layer(body: Callable[..., Tensor]) -> None:
    alive = []

    class Merged(Layer):
        def forward(self, x: Tensor) -> Tensor:
            alive.append(num_matrices())
            return super().forward(x).transpose(1, 2).flatten(2)

    model, layouts = nn.Sequential(*(Merged(body) for _ in range(3))), {}
    for _ in range(2):  # the first time more is followed than later
        with torch.no_grad(), capture_attention(model, lambda call: None, layouts=layouts):
            model(hidden())
        alive.append(num_matrices())
    assert alive == [0] * 8
