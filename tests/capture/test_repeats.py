"""Keys repeated per query head are captured unrepeated, in either order; other copies are kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from einops import rearrange, repeat
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import layer_statistics
from torch import Tensor, nn

from attnmonitor import AlertEvent, AttentionMonitor, LayerCoverage
from attnmonitor.sample import heads_concerned
from benchmarks.pages.third_party_models import captured

Repeat = Callable[[Tensor, int], Tensor]

# (B, Hkv, L, d) and the number of copies to (B, Hq, L, d); whether the whole set of heads is repeated.
REPEATS: dict[str, tuple[Repeat, bool]] = {
    "repeat_interleave": (lambda k, g: k.repeat_interleave(g, dim=1), False),
    "torch.repeat_interleave": (lambda k, g: torch.repeat_interleave(k, repeats=g, dim=1), False),
    "expand and reshape": (
        lambda k, g: k[:, :, None].expand(-1, -1, g, -1, -1).reshape(len(k), -1, *k.shape[2:]),
        False,
    ),
    "repeat and flatten": (lambda k, g: k.unsqueeze(2).repeat(1, 1, g, 1, 1).flatten(1, 2), False),
    "einops": (lambda k, g: repeat(k, "b h l d -> b (h g) l d", g=g), False),
    "positions first": (
        lambda k, g: (
            k.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, g, -1).flatten(2, 3).transpose(1, 2).contiguous()
        ),
        False,
    ),
    "repeat": (lambda k, g: k.repeat(1, g, 1, 1), True),
    "tile": (lambda k, g: torch.tile(k, (1, g, 1, 1)), True),
    "expand in front": (lambda k, g: k[:, None].expand(-1, g, -1, -1, -1).flatten(1, 2), True),
    "einops tiled": (lambda k, g: repeat(k, "b h l d -> b (g h) l d", g=g), True),
    "tiled, positions first": (
        lambda k, g: rearrange(repeat(k, "b h l d -> b l (g h) d", g=g), "b l h d -> b h l d"),
        True,
    ),
}


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v)


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v).transpose(1, 2)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    num_sequences = len(q)
    q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (num_sequences, -1))


def by_bmm_and_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).softmax(-1)
    return weights.unflatten(0, v.shape[:2]) @ v


class Grouped(nn.Module):
    """Query heads that share keys, which are repeated for them by ``repeat_heads``."""

    def __init__(
        self, num_kv_heads: int, group: int, repeat_heads: Repeat, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.num_kv_heads, self.group = num_kv_heads, group
        self.q_proj = nn.Linear(8, 4 * num_kv_heads * group)
        self.kv_proj = nn.Linear(8, 2 * 4 * num_kv_heads)
        self.repeat_heads, self.attend = repeat_heads, attend

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = self.q_proj(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = self.kv_proj(x).unflatten(-1, (2, -1, 4)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = self.attend(q, self.repeat_heads(k, self.group), self.repeat_heads(v, self.group))
        return y.transpose(1, 2).flatten(2)


@settings(max_examples=30, deadline=None)
@given(
    way=st.sampled_from(sorted(REPEATS)),
    attend=st.sampled_from([by_sdpa, by_matmul, by_einsum, by_bmm, by_bmm_and_matmul]),
    num_sequences=st.integers(1, 3),
    num_kv_heads=st.integers(1, 4),
    group=st.integers(2, 4),
    length=st.integers(2, 6),
    seed=st.integers(0, 2**16),
)
def test_repeated_keys_are_captured_unrepeated(
    way: str, attend: Callable[..., Tensor], num_sequences: int, num_kv_heads: int, group: int, length: int, seed: int
) -> None:
    torch.manual_seed(seed)
    repeat_heads, tiled = REPEATS[way]
    model = Grouped(num_kv_heads, group, repeat_heads, attend).double()
    x = torch.randn(num_sequences, length, 8, dtype=torch.float64)
    (call,) = captured(model, x=x).calls
    with torch.no_grad():
        q, k, v = model.heads(x)
    repeated = repeat_heads(k, group)
    assert call.key.shape == k.shape
    assert torch.equal(call.key, k)
    assert torch.equal(call.value, v)
    # Copies of a single key head are in both orders at once.
    assert call.tiled == (tiled and num_kv_heads > 1)
    assert call.error < 1e-10
    own = q @ repeated.mT * 4**-0.5 if attend not in (by_bmm, by_bmm_and_matmul) else q @ repeated.mT
    assert torch.allclose(call.logit_rows(torch.arange(length)).double(), own, atol=1e-5)
    sample = AttentionMonitor(model, {"x": x}, record=None, alerts=False).sample(0)
    coverage = sample.coverage["Grouped"]
    assert (coverage.num_query_heads, coverage.num_kv_heads) == (num_kv_heads * group, num_kv_heads)
    for head in range(num_kv_heads * group):
        assert torch.equal(repeated[:, head], k[:, coverage.kv_head_of(head)])
    expected = layer_statistics(q, repeated, coverage.scale)
    for metric in ("energy_rms", "energy_participation_ratio", "energy_delocalization", "query_rms"):
        assert torch.allclose(sample.values[metric]["Grouped"].double(), expected[metric].mean(0), rtol=1e-5), metric


def test_interaction_metrics_of_tiled_keys_match_their_heads() -> None:
    from attnmonitor.functional import interaction_participation_ratio

    torch.manual_seed(0)
    model = Grouped(2, 3, REPEATS["tile"][0], by_sdpa)
    metrics = ["interaction_participation_ratio"]
    sample = AttentionMonitor(model, torch.randn(3, 6, 8), metrics=metrics, record=None, alerts=False).sample(0)
    w_q = model.q_proj.weight.reshape(6, 4, 8)
    w_k = model.kv_proj.weight[:8].reshape(2, 4, 8).repeat(3, 1, 1)
    expected = interaction_participation_ratio(w_q, w_k).float()
    assert torch.allclose(sample.values[metrics[0]]["Grouped"], expected, rtol=1e-4)


def of_positions(k: Tensor, g: int) -> Tensor:
    return k.repeat(1, 1, g, 1)


def of_sequences(k: Tensor, g: int) -> Tensor:
    return k[:1].expand(len(k), -1, -1, -1)


def of_one_key_over_positions(k: Tensor, g: int) -> Tensor:
    return k[:, :, :1].expand(-1, -1, k.shape[2], -1)


def none_at_all(k: Tensor, g: int) -> Tensor:
    return k + 0 * k[:, :1]


@pytest.mark.parametrize("attend", [by_sdpa, by_matmul, by_bmm], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "copies", [of_positions, of_sequences, of_one_key_over_positions, none_at_all], ids=lambda f: f.__name__
)
def test_copies_of_other_axes_are_kept(copies: Repeat, attend: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Grouped(3, 1, copies, attend), torch.randn(2, 5, 8)
    (call,) = captured(model, x=x).calls
    assert torch.equal(call.key, copies(model.heads(x)[1], 1))
    assert not call.tiled
    assert call.error < 1e-6


@pytest.mark.parametrize("attend", [by_sdpa, by_matmul], ids=lambda f: f.__name__)
def test_one_head_that_all_operands_repeat_is_measured(attend: Callable[..., Tensor]) -> None:
    class OneHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return attend(*(part[:, None].repeat(1, 3, 1, 1) for part in self.qkv(x).chunk(3, -1)))

    (call,) = captured(OneHead(), x=torch.randn(2, 5, 8)).calls
    assert call.query.shape == call.key.shape
    assert call.error < 1e-6


def rotated(k: Tensor) -> Tensor:
    angles = torch.arange(float(k.shape[2]))[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
    return k * angles.cos() + torch.cat((-k[..., 2:], k[..., :2]), -1) * angles.sin()


def normed(k: Tensor) -> Tensor:
    first, second = nn.functional.rms_norm(k.reshape(k.shape), (4,)).chunk(2, dim=-1)
    return torch.cat((2 * second, first - 1), -1) * torch.rsqrt(k.pow(2).mean(-1, keepdim=True))


def by_head(k: Tensor) -> Tensor:
    return k * torch.arange(1.0, 1 + k.shape[1])[:, None, None]


@pytest.mark.parametrize("way", ["positions first", "tile"])
@pytest.mark.parametrize("after", [rotated, normed, by_head], ids=lambda f: f.__name__)
def test_keys_repeated_before_other_steps_are_unrepeated(way: str, after: Callable[[Tensor], Tensor]) -> None:
    """Falcon and older Megatron-LM repeat keys before the rotary embedding; what differs by head makes other keys."""
    repeat_heads, tiled = REPEATS[way]
    torch.manual_seed(0)
    model, x = Grouped(2, 3, lambda k, g: after(repeat_heads(k, g)), by_matmul), torch.randn(2, 5, 8)
    (call,) = captured(model, x=x).calls
    with torch.no_grad():
        k = model.heads(x)[1]
    expected = after(repeat_heads(k, 3)) if after is by_head else after(k)
    assert call.key.shape == expected.shape
    assert torch.allclose(call.key, expected, atol=1e-6)
    assert call.error < 1e-6
    assert call.tiled == (tiled and after is not by_head)


@pytest.mark.parametrize("way", ["repeat_interleave", "tile"])
def test_keys_changed_after_the_copy_fail_the_check(way: str) -> None:
    """A change in place keeps the note on the copy, so the keys are wrong: verification finds it."""

    def changed(k: Tensor, g: int) -> Tensor:
        k = REPEATS[way][0](k, g)
        k[:, 0] += torch.linspace(0, 3, k.shape[2])[:, None]
        return k

    torch.manual_seed(0)
    (call,) = captured(Grouped(2, 2, changed, by_sdpa), x=torch.randn(2, 5, 8)).calls
    assert call.error > 1e-3


def test_heads_map_to_kv_heads_and_back_in_both_orders() -> None:
    for tiled, shared in ((False, [(0, 1, 2), (3, 4, 5)]), (True, [(0, 2, 4), (1, 3, 5)])):
        layer = LayerCoverage("attn", num_query_heads=6, num_kv_heads=2, tiled=tiled)
        sink = AlertEvent("key_sink", "key_sink", "kv_head", "attn", 1, 9.0, 2.0, 100, "firing")
        assert heads_concerned(sink, "query_head", {"attn": layer}) == shared[1]
        assert [layer.query_heads_of(kv_head) for kv_head in range(2)] == shared
        assert [layer.kv_head_of(head) for head in range(6)] == [
            next(kv_head for kv_head in range(2) if head in shared[kv_head]) for head in range(6)
        ]
