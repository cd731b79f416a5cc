"""Random models, sampled by the real monitor, against the dense float64 reference on the queries and keys they used.

Hypothesis draws the model: its depth, each layer's heads, key heads and head sizes, how attention is written, masks,
padding, lengths and types. The model keeps what it attended with; nothing of the capture is used to find it.

25 models a run; ``make fuzz`` takes 1,000 (``pytest --hypothesis-profile=fuzz``).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import reference
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from attnmonitor import DEFAULT_METRICS, AttentionMonitor
from attnmonitor.metrics.catalog import METRICS, OPT_IN_METRICS


class Heads(NamedTuple):
    num_kv_heads: int
    group: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a model and its probe."""

    seed: int
    layers: list[Heads]
    attend: str
    width: int
    num_sequences: int
    length: int
    memory_length: int | None
    padding: str
    causal: bool
    window: int | None
    float_mask: bool
    rotary: bool
    scale: float | None
    sharpness: float
    offset: float
    dtype: torch.dtype
    autocast: bool


class Seen(NamedTuple):
    """What a layer attended with."""

    query: Tensor
    key: Tensor
    scale: float
    query_valid: Tensor | None
    key_valid: Tensor | None
    visible: Tensor | None


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding on pairs of features; the last of an odd number stays."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / max(half, 1))
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def fused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=True)


def fused_on_repeated_keys(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def hidden(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    lowest = torch.finfo(logits.dtype).min
    if causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), lowest)
    if mask is None:
        return logits
    return logits.masked_fill(~mask, lowest) if mask.dtype == torch.bool else logits + mask


def by_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    logits = hidden(scale * (q @ k.transpose(-2, -1)), mask, causal)
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(v.dtype) @ v


def by_grouped_einsum(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, causal: bool) -> Tensor:
    logits = torch.einsum("bhgid,bhjd->bhgij", q.unflatten(1, (k.shape[1], -1)), k) * scale
    weights = F.softmax(hidden(logits, None if mask is None else mask[:, None], causal), dim=-1)
    return torch.einsum("bhgij,bhje->bhgie", weights, v).flatten(1, 2)


WRITTEN = {
    "fused": fused,
    "fused on repeated keys": fused_on_repeated_keys,
    "matmul": by_matmul,
    "grouped einsum": by_grouped_einsum,
}
# Computed from one row per position in float32, where rounding moves keys that lie close together far from 0, and
# weak directions, the most.
OVER_POSITIONS = ("key_leverage_max", "key_incoherence", "key_norm_participation", "energy_delocalization")
# The model keeps no values, and a layer's output in half precision differs from one in float64 by its rounding.
OF_VALUES = {"value_rms", "value_spread", "output_rms", "output_share"}
MEASURED = tuple(name for name in (*DEFAULT_METRICS, *OPT_IN_METRICS) if name not in OF_VALUES)
PYTORCHS_OWN = ("nn.MultiheadAttention", "nn.MultiheadAttention with weights")


def sharpened(linear: nn.Linear, recipe: Recipe) -> nn.Linear:
    """Give the outputs decaying directions and a mean that may dominate, as training does."""
    with torch.no_grad():
        linear.weight *= recipe.sharpness * torch.logspace(0, -1.5, len(linear.weight))[:, None]
        linear.bias += recipe.offset * torch.randn(len(linear.bias))
    return linear


class Attention(nn.Module):
    def __init__(self, heads: Heads, recipe: Recipe) -> None:
        super().__init__()
        self.heads, self.recipe = heads, recipe
        num_query_heads = heads.group * heads.num_kv_heads
        self.q = sharpened(nn.Linear(recipe.width, num_query_heads * heads.head_dim), recipe)
        self.k = sharpened(nn.Linear(recipe.width, heads.num_kv_heads * heads.head_dim), recipe)
        self.v = nn.Linear(recipe.width, heads.num_kv_heads * heads.value_dim)
        self.out = nn.Linear(num_query_heads * heads.value_dim, recipe.width)

    def forward(self, x: Tensor, source: Tensor, masks: Masks) -> Tensor:
        heads, recipe = self.heads, self.recipe
        q = self.q(x).unflatten(-1, (-1, heads.head_dim)).transpose(1, 2)
        k = self.k(source).unflatten(-1, (-1, heads.head_dim)).transpose(1, 2)
        v = self.v(source).unflatten(-1, (-1, heads.value_dim)).transpose(1, 2)
        if recipe.rotary:
            q, k = rotated(q), rotated(k)
        scale = heads.head_dim**-0.5 if recipe.scale is None else recipe.scale
        self.seen = Seen(q, k, scale, *masks)
        is_causal_call = recipe.causal and recipe.window is None and recipe.padding == "none"
        mask = None if is_causal_call or masks.visible is None else masks.visible[:, None]
        if mask is not None and recipe.float_mask:
            # Half of the least number: that itself, added to a logit of -20, is -inf in float16, and a row of it NaN.
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min / 2)
        mixed = WRITTEN[recipe.attend](q, k, v, scale, mask, is_causal_call)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PyTorchsAttention(nn.Module):
    """``nn.MultiheadAttention``, where each head has its own keys; its queries and keys are computed a second time."""

    def __init__(self, heads: Heads, recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.num_heads = recipe, heads.group * heads.num_kv_heads
        self.needs_weights = recipe.attend.endswith("with weights")
        width = self.num_heads * heads.head_dim
        self.into, self.memory_into = nn.Linear(recipe.width, width), nn.Linear(recipe.width, width)
        self.inner = nn.MultiheadAttention(width, self.num_heads, batch_first=True)
        self.out = nn.Linear(width, recipe.width)

    def forward(self, x: Tensor, source: Tensor, masks: Masks) -> Tensor:
        crosses = source is not x
        x = self.into(x)
        source = self.memory_into(source) if crosses else x
        blocked = None
        if self.recipe.causal or self.recipe.window:
            blocked = ~band(x.shape[1], self.recipe)
        padding = None if masks.key_valid is None else ~masks.key_valid
        mixed, _ = self.inner(
            x,
            source,
            source,
            key_padding_mask=padding,
            attn_mask=blocked,
            need_weights=self.needs_weights,
        )
        self.keep(x, source, masks)
        return self.out(mixed)

    def keep(self, x: Tensor, source: Tensor, masks: Masks) -> None:
        width = x.shape[-1]
        weight, bias = self.inner.in_proj_weight, self.inner.in_proj_bias
        q = F.linear(x, weight[:width], bias[:width])
        k = F.linear(source, weight[width : 2 * width], bias[width : 2 * width])
        q, k = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k))
        scale = q.shape[-1] ** -0.5
        # With need_weights it scales the queries before the product.
        self.inner.seen = Seen(q * scale, k, 1.0, *masks) if self.needs_weights else Seen(q, k, scale, *masks)


class Masks(NamedTuple):
    query_valid: Tensor | None
    key_valid: Tensor | None
    visible: Tensor | None  # (B, Lq, Lk)


def band(length: int, recipe: Recipe) -> Tensor:
    """Which keys each query may see, padding aside, ``(L, L)``."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if recipe.causal:
        allowed &= distance >= 0
    if recipe.window is not None:
        allowed &= distance.abs() < recipe.window
    return allowed


class Model(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        kind = PyTorchsAttention if recipe.attend in PYTORCHS_OWN else Attention
        self.norms = nn.ModuleList(nn.LayerNorm(recipe.width) for _ in recipe.layers)
        self.layers = nn.ModuleList(kind(heads, recipe) for heads in recipe.layers)

    def forward(self, x: Tensor, valid: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        masks = self.masks(x, valid, memory)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            source = norm(x)
            x = x + layer(source, source if memory is None else memory, masks)
        return x

    def masks(self, x: Tensor, valid: Tensor | None, memory: Tensor | None) -> Masks:
        if memory is not None:
            visible = None if valid is None else valid[:, None].expand(-1, x.shape[1], -1)
            return Masks(None, valid, visible)
        if valid is None and not self.recipe.causal and self.recipe.window is None:
            return Masks(None, None, None)
        allowed = band(x.shape[1], self.recipe).expand(len(x), -1, -1)
        return Masks(valid, valid, allowed if valid is None else allowed & valid[:, None])


def padding_of(recipe: Recipe) -> Tensor | None:
    """``(B, Lk)``, True where a token is; at least two of them in every sequence."""
    length = recipe.memory_length or recipe.length
    if recipe.padding == "none":
        return None
    number = torch.randint(2, length + 1, (recipe.num_sequences, 1))
    place = torch.arange(length).expand(recipe.num_sequences, -1)
    if recipe.padding == "holes":
        place = torch.rand(place.shape).argsort(-1)
    return place >= length - number if recipe.padding == "left" else place < number


def probe_of(recipe: Recipe) -> dict[str, Tensor]:
    def tokens(length: int) -> Tensor:
        return torch.randn(recipe.num_sequences, length, recipe.width, dtype=recipe.dtype)

    probe = {"x": tokens(recipe.length)}
    if recipe.memory_length is not None:
        probe["memory"] = tokens(recipe.memory_length)
    if (valid := padding_of(recipe)) is not None:
        probe["valid"] = valid
    return probe


@st.composite
def recipes(draw: Any) -> Recipe:
    crosses = draw(st.integers(0, 5)) == 5
    lengths = st.integers(2, 64)  # of longer sequences only 64 rows are measured
    heads = st.builds(
        Heads,
        num_kv_heads=st.integers(1, 3),
        group=st.integers(1, 4),
        head_dim=st.sampled_from([1, 2, 3, 5, 8, 16, 17, 33, 48]),
        value_dim=st.integers(1, 9),
    )
    attend = draw(st.sampled_from([*WRITTEN, *PYTORCHS_OWN]))
    is_pytorchs = attend in PYTORCHS_OWN
    # Its queries and keys are computed a second time here, and half precision would round them differently.
    half = [] if is_pytorchs else [torch.bfloat16, torch.float16]
    dtype = draw(st.sampled_from([torch.float32, torch.float64, *half]))
    padding = draw(st.sampled_from(["none", "right", "left", "holes"]))
    # It returns NaN for rows that see no key, which padding and a band can cause.
    has_band = not crosses and not (is_pytorchs and padding != "none")
    return Recipe(
        seed=draw(st.integers(0, 2**20)),
        layers=draw(st.lists(heads, min_size=1, max_size=4)),
        attend=attend,
        width=draw(st.integers(3, 40)),
        num_sequences=draw(st.integers(1, 3)),
        length=draw(lengths),
        memory_length=draw(lengths) if crosses else None,
        padding=padding,
        causal=has_band and draw(st.booleans()),
        window=draw(st.none() | st.integers(1, 20)) if has_band else None,
        float_mask=draw(st.booleans()),
        rotary=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 1.0, 0.03, 2.5])),
        sharpness=draw(st.sampled_from([0.1, 1.0, 4.0])),
        offset=draw(st.sampled_from([0.0, 1.0, 10.0])),
        dtype=dtype,
        autocast=not is_pytorchs and dtype == torch.float32 and draw(st.booleans()),
    )


def has_flat_logits(seen: Seen) -> bool:
    """Whether the logits of some head differ between keys by hardly more than float32's rounding."""
    key = seen.key.double().repeat_interleave(seen.query.shape[1] // seen.key.shape[1], 1)
    logits = seen.query.double() @ key.mT
    valid = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool) if seen.key_valid is None else seen.key_valid
    valid = valid[:, None, None]
    mean = (logits * valid).sum(-1, keepdim=True) / valid.sum(-1, keepdim=True)
    spread, total = (torch.linalg.vector_norm(x * valid, dim=(-2, -1)) for x in (logits - mean, logits))
    return bool((spread <= 1e-5 * total).any())


def expected_range(seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """Lowest and highest mean over sequences of each metric, ``(H,)``, on operands off in the last four bits.

    Long sums and a decomposition may lose that much. A value that it moves (a rank next to its mark, the leverage of
    weak directions) may be anywhere in this range.
    """
    generator = torch.Generator().manual_seed(0)
    rounding = 16 * torch.finfo(torch.float64 if seen.query.dtype == torch.float64 else torch.float32).eps
    found: dict[str, list[Tensor]] = {}
    for size in (0.0, *[rounding] * 4):
        query, key = (
            x.double() * (1 + size * torch.randn(x.shape, generator=generator, dtype=torch.float64))
            for x in (seen.query, seen.key)
        )
        checked = reference.checked_rows(query.shape[2])
        layer = reference.Layer(query, key, seen.scale, seen.query_valid, seen.key_valid, seen.visible, checked=checked)
        for metric in MEASURED:
            per_sequence = reference.TWINS[metric](layer)
            # A sequence may have none of the checked rows; it is left out then.
            some_rows = METRICS[metric].summary == "checked_rows"
            found.setdefault(metric, []).append(per_sequence.nanmean(0) if some_rows else per_sequence.mean(0))
    return {metric: (torch.stack(means).amin(0), torch.stack(means).amax(0)) for metric, means in found.items()}


TO_ITSELF_AMONG_HOLES = Recipe(
    seed=0,
    layers=[Heads(num_kv_heads=1, group=1, head_dim=1, value_dim=1)],
    attend="fused",
    width=3,
    num_sequences=1,
    length=10,
    memory_length=None,
    padding="holes",
    causal=False,
    window=1,
    float_mask=False,
    rotary=False,
    scale=None,
    sharpness=0.1,
    offset=0.0,
    dtype=torch.float64,
    autocast=False,
)
"""Tokens that see only themselves, which are no documents."""


@given(recipes())
@example(TO_ITSELF_AMONG_HOLES)
def test_sample_of_random_model_equals_reference(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    model, probe = Model(recipe).to(recipe.dtype).eval(), probe_of(recipe)
    with torch.autocast("cpu", dtype=torch.bfloat16) if recipe.autocast else nullcontext():
        monitor = AttentionMonitor(model, probe, metrics=MEASURED, alerts=False, record=None, strict=True)
        sample = monitor.sample(0)
        with torch.no_grad():
            model(**probe)
    layers = {name: module.seen for name, module in model.named_modules() if hasattr(module, "seen")}
    assert list(sample.coverage) == list(layers)
    assert len(layers) == len(recipe.layers)
    for name, seen in layers.items():
        assert sample.coverage[name].measured, sample.coverage[name]
        assert sample.coverage[name].heads == (seen.query.shape[1], seen.key.shape[1], seen.query.shape[3])
        ranges = expected_range(seen)
        assert set(ranges) == set(MEASURED)
        for metric, (lowest, highest) in ranges.items():
            value = sample.values[metric][name].double()
            assert value.shape == lowest.shape == (sample.coverage[name].heads[METRICS[metric].scope == "kv_head"],)
            # The measurement's rounding is one more draw: it may lie outside of the range of five, by about its width.
            slack = (2e-3 if metric in OVER_POSITIONS else 1e-4) * highest.abs() + 1e-6 + (highest - lowest)
            inside = (value >= lowest - slack) & (value <= highest + slack)
            undefined = value.isnan() & (lowest.isnan() | (metric == "head_similarity" and has_flat_logits(seen)))
            assert (inside | undefined).all(), f"{name} {metric}: {value} is not in {lowest} … {highest}"
