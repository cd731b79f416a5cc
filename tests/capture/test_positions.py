"""Which axes count heads, which positions are queries, keys, padding and documents: by what tensors are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from reference import layer_statistics
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import Rule, Threshold

WIDTH, HEADS, LENGTH = 32, 4, 12
SCALE = 8**-0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * SCALE).softmax(-1) @ v


class Mixer(nn.Module):
    """Projections and an attention whose axes ``layout`` arranges; keeps the heads it used, ``(B, H, L, d)``."""

    def __init__(self, layout: Callable[[Attend, Tensor, Tensor, Tensor], object], attend: Attend) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layout, self.attend = layout, attend

    def forward(self, x: Tensor) -> None:
        split = [f(x).unflatten(-1, (HEADS, -1)) for f in (self.q_proj, self.k_proj, self.v_proj)]  # (..., L, H, d)
        self.kept = [y.transpose(-2, -3).reshape(-1, HEADS, x.shape[-2], 8) for y in split[:2]]
        self.layout(self.attend, *split)


def one_sequence(attend: Attend, *qkv: Tensor) -> None:
    """(H, L, d), a call per sequence."""
    for q, k, v in zip(*qkv, strict=True):
        attend(*(y.transpose(0, 1) for y in (q, k, v)))


def rows_before_heads(attend: Attend, *qkv: Tensor) -> None:
    """(B, R, H, L, d): axial and pair attention."""
    attend(*(y.transpose(-2, -3) for y in qkv))


def heads_before_rows(attend: Attend, *qkv: Tensor) -> None:
    """(B, H, R, L, d): blocks of an image, mask units."""
    attend(*(y.permute(0, 3, 1, 2, 4) for y in qkv))


def heads_first(attend: Attend, *qkv: Tensor) -> None:
    """(H, B, L, d)."""
    attend(*(y.permute(2, 0, 1, 3) for y in qkv))


def heads_outside(attend: Attend, *qkv: Tensor) -> None:
    """(H·B, L, d)."""
    attend(*(y.permute(2, 0, 1, 3).flatten(0, 1) for y in qkv))


def sequences_outside(attend: Attend, *qkv: Tensor) -> None:
    """(B·H, L, d)."""
    attend(*(y.transpose(1, 2).flatten(0, 1) for y in qkv))


def rows_as_sequences(attend: Attend, *qkv: Tensor) -> None:
    """(B·R, H, L, d)."""
    attend(*(y.flatten(0, 1).transpose(1, 2) for y in qkv))


def two_heads_at_once(attend: Attend, *qkv: Tensor) -> None:
    """Slices of two of (B·H, L, d): sliced attention."""
    for parts in zip(*(y.transpose(1, 2).flatten(0, 1).split(2) for y in qkv), strict=True):
        attend(*parts)


FLAT, WITH_ROWS = (2, LENGTH, WIDTH), (2, 4, LENGTH, WIDTH)


@pytest.mark.parametrize("attend", [by_hand, scaled_dot_product_attention], ids=["by hand", "fused"])
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (one_sequence, (1, *FLAT[1:])),
        (rows_before_heads, WITH_ROWS),
        (heads_before_rows, WITH_ROWS),
        (heads_first, FLAT),
        (heads_outside, FLAT),
        (sequences_outside, FLAT),
        (rows_as_sequences, WITH_ROWS),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_heads_are_the_axis_of_features(layout: Callable[..., None], shape: tuple[int, ...], attend: Attend) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mixer": Mixer(layout, attend)})
    x = torch.randn(shape)
    with AttentionMonitor(model, x, forward=lambda model, x: model["mixer"](x), record=None, alerts=False) as monitor:
        for sample in (monitor.sample(0), monitor.sample(1)):
            assert list(sample.coverage) == ["mixer"]
            assert sample.coverage["mixer"].heads == (HEADS, HEADS, 8)
            assert sample.coverage["mixer"].sees == "both"
            expected = layer_statistics(*(y.double() for y in model["mixer"].kept), SCALE, None, None)
            for metric in ("energy_rms", "energy_effective_rank", "key_incoherence"):
                assert torch.allclose(sample.values[metric]["mixer"].double(), expected[metric].mean(0), rtol=1e-4)


def test_slice_of_heads_is_a_part_and_says_so() -> None:
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"mixer": Mixer(two_heads_at_once, by_hand)}), torch.randn(FLAT)
    with AttentionMonitor(model, x, forward=lambda model, x: model["mixer"](x), record=None, alerts=False) as monitor:
        values = monitor.sample(1).values["energy_rms"]
        q, k = (y.double() for y in model["mixer"].kept)
        for part, (name, coverage) in enumerate(monitor.coverage.items()):
            assert name == ("mixer" if part == 0 else f"mixer#{part + 1}")
            assert bool(coverage.remarks) == (part > 0)
            row, heads = part // 2, slice(part % 2 * 2, part % 2 * 2 + 2)
            expected = layer_statistics(q[row : row + 1, heads], k[row : row + 1, heads], SCALE, None, None)
            assert torch.allclose(values[name].double(), expected["energy_rms"][0], rtol=1e-4)
        assert part == 3


class Attention(nn.Module):
    """Attention of ``x + position`` on ``memory + its position``, with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (
            f(y).unflatten(-1, (HEADS, 8)).transpose(1, 2)
            for f, y in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        self.kept = q, k
        return scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class Detector(nn.Module):
    """An encoder whose queries and keys are tokens with positions, and a decoder of as many learned queries."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.own, self.cross = Attention(), Attention(), Attention()
        self.queries = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def forward(self, source: Tensor, position: Tensor, valid: Tensor) -> None:
        mask = valid[:, None, None, :]
        query = key = source + position
        memory = source + self.encoder(query, key, source, mask)
        queries = self.queries.expand(len(source), -1, -1)
        target = torch.zeros_like(queries)
        target = target + self.own(target + queries, target + queries, target)
        self.cross(target + queries, memory + position, memory, mask)


def given_anew(model: nn.Module, batch: tuple[Tensor, ...]) -> object:
    """Call the model with copies, as where the batch is moved to a device."""
    return model(*(x.clone() for x in batch))


def padded(shape: tuple[int, ...] = (2, LENGTH)) -> Tensor:
    valid = torch.ones(shape, dtype=torch.bool)
    valid[1, LENGTH - 5 :] = False
    return valid


def expect(monitor: AttentionMonitor, layer: str, kept: tuple[Tensor, ...], rows: Tensor, keys: Tensor) -> None:
    """The layer's values are those of its kept heads with these masks, in two samples alike."""
    expected = layer_statistics(*(y.detach().double() for y in kept), SCALE, rows, keys)
    for step in (0, 1):
        values = monitor.sample(step).values
        for metric in ("energy_rms", "energy_effective_rank", "key_incoherence"):
            assert torch.allclose(values[metric][layer].double(), expected[metric].mean(0), rtol=1e-4), metric


MADE_WITH_NEW_TENSORS: dict[str, Callable[[Tensor], Tensor]] = {
    "a constant times": lambda x: torch.full(x.shape, 2.0) * x,
    "columns times ones": lambda x: x[..., :1] * torch.ones_like(x),
    "a constant less": lambda x: 1 - x + torch.zeros(x.shape),
    "where": lambda x: torch.where(x > 0, torch.zeros_like(x), x),
    "addcmul": lambda x: torch.addcmul(torch.zeros_like(x), x, x),
    "scatter": lambda x: torch.zeros_like(x).masked_scatter(torch.ones_like(x, dtype=torch.bool), x),
    "out": lambda x: torch.mul(x, 2, out=torch.empty_like(x)),
    "in place": lambda x: torch.zeros_like(x).add_(x),
    "turned by a matrix": lambda x: (
        x @ torch.linalg.qr(torch.arange(float(x.shape[-1] ** 2)).cos().view(x.shape[-1], -1))[0]
    ),
}


class WithNewTensors(nn.Module):
    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made, self.q, self.k = made, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.q, self.k))
        return self.made(q), self.made(k)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k = self.heads(x)
        return (q @ k.mT * 0.4).masked_fill(~valid[:, None, None], -torch.inf).softmax(-1) @ k


MADE_OF_PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "split and joined": lambda x: torch.cat([torch.tanh(head) for head in x.split(1, 1)], 1),
    "unsqueezed and joined": lambda x: torch.cat([x[:, 0, None], 2 * x[:, 1, None]], 1),
    "joined in a module": lambda x: WithScale(lambda y: torch.hstack([y[:, :1], 2 * y[:, 1:]]))(x),
    "unequal parts": lambda x: torch.cat([x[:, :1], 2 * x[:, 1:], x], 1),
    "picked by a list": lambda x: x.transpose(1, 2).flatten(2).unflatten(2, (16, -1))[:, :, [-2]].transpose(1, 2),
    "written head by head": lambda x: written(x),
}
"""Ways to make heads of other heads."""


class WithScale(nn.Module):
    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made, self.scale = made, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.made(x) * self.scale


def written(x: Tensor) -> Tensor:
    whole = torch.empty_like(x)
    for head in range(x.shape[1]):
        whole[:, head] = x[:, head] * (head + 1)
    return whole


@pytest.mark.parametrize("made", {**MADE_WITH_NEW_TENSORS, **MADE_OF_PARTS}.items(), ids=lambda item: item[0])
def test_heads_are_found_whatever_they_are_made_of(made: tuple[str, Callable[[Tensor], Tensor]]) -> None:
    torch.manual_seed(0)
    model, x, valid = WithNewTensors(made[1]), torch.randn(2, LENGTH, WIDTH), padded()
    with torch.no_grad(), AttentionMonitor(model, (x, valid), record=None, alerts=False) as monitor:
        expected = layer_statistics(*(each.double() for each in model.heads(x)), 0.4, valid, valid)
        found = monitor.sample(0).values
    for metric in ("query_rms", "energy_rms"):
        assert torch.allclose(found[metric]["WithNewTensors"].double(), expected[metric].mean(0), rtol=1e-4), metric


def test_self_or_cross_is_what_queries_and_keys_are_made_of() -> None:
    torch.manual_seed(0)
    model, valid = Detector(), padded()
    inputs = torch.randn(2, LENGTH, WIDTH), torch.randn(2, LENGTH, WIDTH), valid
    with AttentionMonitor(model, inputs, record=None, alerts=False, forward=given_anew) as monitor:
        kinds = {name: layer.kind for name, layer in monitor.coverage.items()}
        assert kinds == {"encoder": "self", "own": "self", "cross": "cross"}
        everything = torch.ones_like(valid)
        expect(monitor, "encoder", model.encoder.kept, valid, valid)
        expect(monitor, "own", model.own.kept, everything, everything)
        expect(monitor, "cross", model.cross.kept, everything, valid)


class Masked(nn.Module):
    """One layer of self-attention with a mask made of the model's inputs."""

    def __init__(self, mask: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.attn, self.mask = Attention(), mask

    def forward(self, x: Tensor, attention_mask: Tensor) -> None:
        self.attn(x, x, x, self.mask(attention_mask))


EYE, CAUSAL = torch.eye(LENGTH, dtype=torch.bool), torch.ones(LENGTH, LENGTH).tril().bool()


MASKS = {
    "hidden": (lambda valid: valid[:, None, None, :], "both"),
    "self-seeing": (lambda valid: valid[:, None, None, :] | EYE, "both"),
    "self-seeing causal": (lambda valid: valid[:, None, None, :] & CAUSAL | EYE, "causal"),
    "isolated": (lambda valid: valid[:, None, :, None] & valid[:, None, None, :] | EYE, "both"),
    # Only the model's argument says which positions of these are padding.
    "all-seeing": (lambda valid: valid[:, None, None, :] & CAUSAL | ~valid[:, None, :, None], "causal"),
}


@pytest.mark.parametrize("named", [True, False], ids=["argument", "mask alone"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MASKS)
def test_padding_that_sees_itself_is_padding(name: str, named: bool, side: str) -> None:
    mask, sees = MASKS[name]
    named = named or name == "all-seeing"
    torch.manual_seed(0)
    valid = padded() if side == "right" else padded().flip(-1)
    model = Masked(mask)
    x = torch.randn(2, LENGTH, WIDTH).masked_fill(~valid[..., None], 5.0)
    inputs = {"x": x, "attention_mask": valid} if named else {"x": x}
    forward = lambda model, batch: model(batch["x"], batch.get("attention_mask", valid))  # noqa: E731
    if not named:
        model.mask = lambda _: mask(valid)
        forward = lambda model, batch: model(batch["x"], torch.ones(1))  # noqa: E731
    with AttentionMonitor(model, inputs, forward=forward, record=None, alerts=False) as monitor:
        expect(monitor, "attn", model.attn.kept, valid, valid)
        assert monitor.coverage["attn"].sees == sees
        assert monitor.coverage["attn"].outside == ()


class Choosing(nn.Module):
    """Attention to the two keys per query that an indexer scores best."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.attn, self.mask = Attention(), mask
        self.index_q, self.index_k = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> None:
        scores = (self.index_q(x) @ self.index_k(x).mT).masked_fill(~attention_mask[:, None], -torch.inf)
        self.attn(x, x, x, self.mask(scores)[:, None])


def worst_kept(scores: Tensor) -> Tensor:
    return scores.topk(2).values[..., -1:]


CHOICES: dict[str, Callable[[Tensor], Tensor]] = {
    "scattered": lambda scores: torch.zeros_like(scores).bool().scatter(-1, scores.topk(2).indices, True),
    "above a limit": lambda scores: scores >= worst_kept(scores),
    "added": lambda scores: torch.full_like(scores, -torch.inf).scatter_(-1, scores.topk(2).indices, 0.0),
    "written": lambda scores: torch.zeros_like(scores).masked_fill(scores < worst_kept(scores), -1e9),
    "sorted": lambda scores: scores >= scores.sort(descending=True).values[..., 1:2],
}


@pytest.mark.parametrize("name", CHOICES)
def test_token_that_no_query_chooses_is_no_padding(name: str) -> None:
    torch.manual_seed(0)
    model, valid = Choosing(CHOICES[name]), padded()
    inputs = {"x": torch.randn(2, LENGTH, WIDTH), "attention_mask": valid}
    with AttentionMonitor(model, inputs, record=None, alerts=False) as monitor:
        expect(monitor, "attn", model.attn.kept, valid, valid)


def test_attention_to_padding_is_said_with_its_mass() -> None:
    torch.manual_seed(0)
    model, valid = Masked(lambda _: None), padded()
    x = torch.randn(2, LENGTH, WIDTH)
    with AttentionMonitor(model, {"x": x, "attention_mask": valid}, record=None, alerts=False) as monitor:
        weights = (SCALE * model.attn.kept[0] @ model.attn.kept[1].mT).softmax(-1)
        mass = weights[..., ~valid[1]].sum(-1)[1, :, : LENGTH - 5].sum() / (HEADS * int(valid.sum()))
        assert monitor.coverage["attn"].padding_mass == pytest.approx(float(mass), rel=1e-4)
        expect(monitor, "attn", model.attn.kept, valid, valid)


class Packed(Masked):
    def forward(self, x: Tensor, document_ids: Tensor) -> None:
        super().forward(x, document_ids)


def same_document(ids: Tensor) -> Tensor:
    return (ids[:, :, None] == ids[:, None, :])[:, None]


# The ids of two documents look like a padding mask.
@pytest.mark.parametrize(
    "spans",
    [
        [[(0, 5), (5, 12)], [(0, 4), (4, 8), (8, 12)]],
        [[(0, 5), (5, 12)], [(0, 8), (8, 12)]],
        [[(0, 12)], [(0, 8), (8, 12)]],
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_documents_are_fields_of_their_own(causal: bool, spans: list[list[tuple[int, int]]]) -> None:
    torch.manual_seed(0)
    ids = torch.stack([torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(row)]) for row in spans])
    model = Packed(lambda ids: same_document(ids) & CAUSAL if causal else same_document(ids))
    batch = torch.randn(2, LENGTH, WIDTH), ids
    with AttentionMonitor(model, batch, record=None, alerts=False) as monitor:
        coverage = monitor.coverage["attn"]
        parts = [(row, *span) for row, own in enumerate(spans) for span in own]
        assert (coverage.sees, coverage.documents, coverage.outside) == ("documents", len(parts), ())
        q, k = (y.detach().double() for y in model.attn.kept)
        fields = [layer_statistics(q[r : r + 1, :, a:b], k[r : r + 1, :, a:b], SCALE, None, None) for r, a, b in parts]
        sample = monitor.sample(1)
        for metric in ("energy_rms", "energy_effective_rank", "key_incoherence"):
            expected = torch.cat([field[metric] for field in fields]).mean(0)
            assert torch.allclose(sample.values[metric]["attn"].double(), expected, rtol=1e-4)
    with AttentionMonitor(model, batch, record=None, alerts=False, packed="one") as monitor:
        assert monitor.coverage["attn"].documents == 0
        expect(monitor, "attn", model.attn.kept, None, None)


@pytest.mark.parametrize("lengths", [(5, 9), (5, LENGTH)])
def test_zeros_after_the_ids_of_a_document_are_padding(lengths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    valid = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
    with AttentionMonitor(
        model := Packed(same_document), (torch.randn(2, LENGTH, WIDTH), valid.long()), record=None
    ) as monitor:
        expect(monitor, "attn", model.attn.kept, valid, valid)


def block_mask(same: Callable[..., Tensor]) -> BlockMask:
    return create_block_mask(same, 1, None, LENGTH, LENGTH, device="cpu")


def of_one(ids: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return ids[b, i] == ids[b, j]


def closed_over(ids: Tensor) -> BlockMask:
    return block_mask(lambda b, h, i, j: ids[b, i] == ids[b, j])


def composed(ids: Tensor) -> BlockMask:
    return block_mask(and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: ids[b, i] == ids[b, j]))


IDS = torch.tensor([[0] * 7 + [1] * 5])
RESTARTING = torch.cat([torch.arange(7), torch.arange(5)])[None]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize(
    ("given", "mask", "count"),
    [
        (IDS, closed_over, 2),
        (IDS, composed, 2),
        (IDS, lambda ids: block_mask(partial(of_one, ids)), 2),
        (RESTARTING, lambda positions: composed((positions == 0).cumsum(-1)), 2),
        (composed(IDS), lambda mask: mask, 2),
        ({"packed": composed(IDS)}, lambda masks: masks["packed"], 2),
        (IDS, lambda _: block_mask(lambda b, h, i, j: (i >= j) & (i // 7 == j // 7)), 0),
    ],
    ids=["closed over", "composed", "partial", "positions that restart", "block mask", "of a mapping", "chunks"],
)
def test_documents_of_flex_masks_follow_from_inputs(
    given: object, mask: Callable[[Any], BlockMask], count: int
) -> None:
    """One row of two documents looks like chunks of the architecture but for what its mask function reads."""

    class Flex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor, given: object) -> None:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, 8).permute(2, 0, 3, 1, 4)
            flex_attention(q, k, v, block_mask=mask(given))

    with AttentionMonitor(Flex(), (torch.randn(1, LENGTH, WIDTH), given), record=None, alerts=False) as monitor:
        coverage = next(iter(monitor.coverage.values()))
        assert (coverage.documents, coverage.sees) == (count, "documents" if count else "window")


@pytest.mark.parametrize("of_labels", [False, True])
def test_padding_that_sees_itself_is_no_document(of_labels: bool) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3, [0] * 9 + [-1] * 3])
    model = Packed(lambda _: same_document(ids) & CAUSAL)
    batch = torch.randn(2, LENGTH, WIDTH), torch.where(ids < 0, -100, 7) if of_labels else ids
    with AttentionMonitor(model, batch, record=None, alerts=False) as monitor:
        assert (monitor.coverage["attn"].documents, monitor.coverage["attn"].sees) == (3, "documents")
        q, k = (y.detach().double() for y in model.attn.kept)
        parts = [(0, 0, 5), (0, 5, 9), (1, 0, 9)]
        fields = [layer_statistics(q[r : r + 1, :, a:b], k[r : r + 1, :, a:b], SCALE, None, None) for r, a, b in parts]
        expected = torch.cat([field["energy_rms"] for field in fields]).mean(0)
        assert torch.allclose(monitor.sample(1).values["energy_rms"]["attn"].double(), expected, rtol=1e-4)


def test_wrong_word_for_packed_is_refused() -> None:
    with pytest.raises(ValueError, match="packed='rows'; give \"documents\""):
        AttentionMonitor(Detector(), torch.ones(2, 3), packed="rows")


def test_bias_that_is_learned_from_zero_is_named_once_it_acts() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.bias = Attention(), nn.Parameter(torch.zeros(HEADS, LENGTH, LENGTH))

        def forward(self, x: Tensor) -> None:
            self.attn(x, x, x, self.bias[None])

    model = Biased()
    with AttentionMonitor(model, torch.randn(2, LENGTH, WIDTH), record=None, alerts=False) as monitor:
        assert monitor.sample(0).coverage["attn"].outside == ()
        with torch.no_grad():
            model.bias[1, 3, 2] = 0.5
            model.bias[1, LENGTH - 1, 2] = 0.5
        assert monitor.sample(1).coverage["attn"].outside == ("bias",)
        assert monitor.coverage["attn"].outside == ("bias",)


def test_single_key_is_no_field_of_rank_zero() -> None:
    class Pooled(Detector):
        def forward(self, x: Tensor) -> None:
            x = x + self.own(x, x[:, :2], x[:, :2])
            self.cross(x, x.mean(1, keepdim=True), x.mean(1, keepdim=True))

    with AttentionMonitor(Pooled(), torch.randn(2, LENGTH, WIDTH), record=None, alerts=False) as monitor:
        sample = monitor.sample(0)
        assert "single key" in sample.coverage["cross"].reason
        assert sample.values["energy_effective_rank"]["cross"].isnan().all()
        assert sample.coverage["own"].measured, "two keys are enough"


def test_channels_that_attend_to_channels_are_named() -> None:
    class CrossCovariance(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

        def forward(self, x: Tensor) -> None:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, 8).permute(2, 0, 3, 4, 1)  # (B, H, d, L)
            ((nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT).softmax(-1) @ v).sum()

    takeover = Rule(
        "any", "key_sink", "kv_head", Threshold("key_leverage_max", "value", fire_above=-9.0, clear_below=-9.5)
    )
    dead = Rule("dead", "dead_head", "query_head", Threshold("energy_rms", "value", fire_below=9.0, clear_above=9.5))
    rules = [replace(rule, grace=0, patience=1) for rule in (takeover, dead)]
    model = nn.Sequential(CrossCovariance())
    with AttentionMonitor(model, torch.randn(2, LENGTH, WIDTH), record=None, alerts=rules) as monitor:
        assert (monitor.coverage["0"].sees, monitor.coverage["0"].num_keys) == ("channels", 8)
        sample = monitor.sample(1)
        assert sample.values["key_leverage_max"]["0"].isfinite().all()
        assert {event.rule for event in sample.firing} == {"dead"}


def test_window_with_gaps_of_padding_is_no_document() -> None:
    """Padding that is wider than the window separates tokens without being the end of a document."""
    torch.manual_seed(0)
    valid = torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, [3, 7]] = False
    apart = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    model = Masked(lambda valid: (apart < 2) & valid[:, None, None])
    with AttentionMonitor(model, (torch.randn(2, LENGTH, WIDTH), valid), record=None, alerts=False) as monitor:
        assert monitor.coverage["attn"].documents == 0
        expect(monitor, "attn", model.attn.kept, valid, valid)


CHUNKS = (torch.arange(LENGTH)[:, None] // 11 == torch.arange(LENGTH) // 11) & CAUSAL


@pytest.mark.parametrize(
    "mask", [lambda _: CHUNKS & torch.ones(()).bool(), lambda valid: CHUNKS & valid[:, None, None]]
)
def test_token_alone_in_its_chunk_is_no_padding(mask: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, valid = Masked(mask), torch.ones(2, LENGTH, dtype=torch.bool)
    with AttentionMonitor(model, {"x": torch.randn(2, LENGTH, WIDTH), "attention_mask": valid}, record=None) as monitor:
        assert monitor.coverage["attn"].sees == "window"
        expect(monitor, "attn", model.attn.kept, None, None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["prefix", "appended"])
def test_further_keys_do_not_hide_that_attention_is_causal(first: bool, causal: bool) -> None:
    class Extended(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.more = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(3, HEADS, 8))

        def forward(self, x: Tensor) -> None:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, HEADS, 8).permute(2, 0, 3, 1, 4)
            seen, all_seen = (CAUSAL if causal else torch.ones_like(CAUSAL)), torch.ones(LENGTH, 3, dtype=torch.bool)
            more = self.more.transpose(0, 1).expand(len(x), -1, -1, -1)
            k, v, mask = (
                torch.cat(parts if first else parts[::-1], -2 if parts[1].dim() == 4 else -1)
                for parts in ([more, k], [more, v], [all_seen, seen])
            )
            scaled_dot_product_attention(q, k, v, mask)

    with AttentionMonitor(nn.Sequential(Extended()), torch.randn(2, LENGTH, WIDTH), record=None) as monitor:
        coverage = monitor.coverage["0"]
        assert (coverage.kind, coverage.sees, coverage.num_keys) == ("self", "causal" if causal else "both", LENGTH + 3)


def test_padding_inside_a_document_is_not_measured() -> None:
    torch.manual_seed(0)
    ids, valid = torch.tensor([[1] * 5 + [2] * 7] * 2), torch.ones(2, LENGTH, dtype=torch.bool)
    valid[:, [2, 8]] = False
    model = Masked(lambda ids: same_document(ids) & valid[:, None, None])
    with AttentionMonitor(model, (torch.randn(2, LENGTH, WIDTH), ids), record=None, alerts=False) as monitor:
        assert monitor.coverage["attn"].documents == 4
        q, k = (y.detach().double() for y in model.attn.kept)
        fields = [
            layer_statistics(q[row : row + 1, :, at], k[row : row + 1, :, at], SCALE, None, None)
            for row in range(2)
            for at in (valid[row] & (ids[row] == 1), valid[row] & (ids[row] == 2))
        ]
        expected = torch.cat([field["energy_rms"] for field in fields]).mean(0)
        assert torch.allclose(monitor.sample(1).values["energy_rms"]["attn"].double(), expected, rtol=1e-4)
