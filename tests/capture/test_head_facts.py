"""Mistakes that verification cannot know of are visible in what is said of a layer, or listed as unseen."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from attnmonitor import AttentionMonitor
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.sample import LayerCoverage
from attnmonitor.summary.structure import likely_mistakes
from attnmonitor.summary.verdict import closing_lines

WIDTH, HEADS, LENGTH, LAYERS = 32, 4, 16, 4
DOCS = Path(__file__).parents[2] / "docs" / "what-is-measured.md"


def turned(x: Tensor) -> Tensor:
    """Rotary embedding."""
    angles = torch.arange(x.shape[-2])[:, None] * 0.5 ** torch.arange(4)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


class Attention(nn.Module):
    """Attention as a user may write it, with one mistake or none."""

    def __init__(self, mistake: str) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mistake = mistake
        self.q_proj.requires_grad_(mistake != "frozen q_proj")

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        mistake, length = self.mistake, x.shape[1]
        heads = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        if mistake == "view instead of transpose":
            q, k, v = (y.view(len(x), HEADS, length, 8) for y in heads)
        else:
            q, k, v = (y.view(len(x), length, HEADS, 8).transpose(1, 2) for y in heads)
        if mistake == "K and V swapped":
            k, v = v, k
        if mistake != "no RoPE":
            q, k = turned(q), k if mistake == "RoPE on q only" else turned(k)
        if mistake == "RoPE twice":
            q, k = turned(q), turned(k)
        if mistake == "q of a head is zero":
            q = q * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None]
        if mistake == "k of a head is constant":
            k = torch.cat([k[:, :3], k[:, 3:].mean(-2, keepdim=True).expand(-1, -1, length, -1)], 1)
        if mistake == "two heads are one":
            q, k = (torch.cat([y[:, :3], y[:, :1]], 1) for y in (q, k))
        mask = torch.ones(length, length, dtype=torch.bool).tril(1 if mistake == "mask off by one" else 0)
        if mistake != "padding attended":
            mask = mask & valid[:, None, None, :]
        mask = mask | torch.eye(length, dtype=torch.bool)  # a row of padding sees itself
        logits = q @ k.transpose(-1, -2) * (1 if mistake == "no 1/√d" else 8**-0.5)
        weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)
        if mistake == "dropout in evaluation":
            weights = dropout(weights, 0.1)
        return self.o_proj((weights @ v).transpose(1, 2).reshape(x.shape))


class Decoder(nn.Module):
    """A decoder whose layers ``wrong`` have a mistake."""

    def __init__(self, mistake: str, wrong: range) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, WIDTH)
        self.layers = nn.ModuleList(Attention(mistake if i in wrong else "") for i in range(LAYERS))

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask.bool())
        return x


def watched(mistake: str, wrong: range) -> AttentionMonitor:
    """Return a monitor of a decoder whose first sequence begins with padding."""
    torch.manual_seed(0)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :5] = 0
    batch = {"ids": torch.randint(6, (2, LENGTH)), "attention_mask": mask}
    return AttentionMonitor(Decoder(mistake, wrong), batch, record=None, alerts=False)


def printed(mistake: str, wrong: range) -> str:
    """Return what a monitor prints of such a decoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AttentionMonitorWarning)
        with watched(mistake, wrong) as monitor:
            return str(monitor)


IN_ALL, IN_ONE = range(LAYERS), range(1, 2)
SEEN = {
    "mask off by one": (r"layers.0 .* 1 ahead, 0\.\d+ on later positions", r"layers.1: odd: it attends to later pos"),
    "padding attended": (r"layers.0.*: attends to padding \(mass 0\.\d+\)", r"layers.1: attends to padding"),
    "no 1/√d": (r"layers.0 .* 1 = 2.83/√d", r"layers.1: odd: its scale is 2.83/√d, 1/√d in the other 3"),
    "RoPE on q only": (r"layers.0.*: equal tokens have equal keys but not .*: only the queries", None),
    "no RoPE": (r"layers.0.*: equal tokens have equal queries and keys", None),
    "view instead of transpose": (r"layers.0.*: its rows mix positions and features", r"layers.1: its rows mix"),
    "q of a head is zero": (r"layers.0.*: queries of head 1 are zero", r"layers.1: queries of head 1 are zero"),
    "k of a head is constant": (r"layers.0.*: keys of head 3 are the same at every", r"layers.1: keys of head 3 are"),
    "two heads are one": (r"layers.0.*: queries of heads 0 and 3 are equal", r"layers.1: keys of heads 0 and 3 are"),
    "dropout in evaluation": (r"layers.0.*: dropout acts on its attention in", r"layers.1: dropout acts on"),
}
UNSEEN = ("K and V swapped", "RoPE twice", "frozen q_proj")


@pytest.mark.parametrize("mistake", SEEN)
def test_mistakes_are_visible_at_attach(mistake: str) -> None:
    for pattern, wrong in zip(SEEN[mistake], (IN_ALL, IN_ONE), strict=True):
        if pattern is not None:
            assert re.search(pattern, printed(mistake, wrong)), printed(mistake, wrong)


def test_right_model_has_no_remarks() -> None:
    right = printed("", IN_ALL)
    assert not re.search(r"^layers\.\d[:,]", right, re.MULTILINE)
    assert "later" not in right


@pytest.mark.parametrize(
    ("mistake", "wrong", "pattern"),
    [
        ("mask off by one", IN_ALL, r"layers.0, .*: sees 1 later position and all earlier ones"),
        ("mask off by one", IN_ONE, r"layers.1: odd: it attends to later positions"),
        ("no 1/√d", IN_ONE, r"layers.1: odd: its scale is 2.83/√d"),
    ],
)
def test_likely_mistakes_are_warned_of_and_said_at_the_end(mistake: str, wrong: range, pattern: str) -> None:
    with pytest.warns(AttentionMonitorWarning, match=pattern), watched(mistake, wrong) as monitor:
        ending = closing_lines(monitor.summary, "attnmonitor: ")
    assert re.search(f"seen at attach: {pattern}", " ".join(ending.split())), ending


def test_prefix_that_sees_itself_is_no_mask_that_is_off() -> None:
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    masks = {"prefix": causal.clone(), "pairs": causal.clone()}
    masks["prefix"][:4, :4] = True
    masks["pairs"] |= torch.block_diag(*[torch.ones(2, 2)] * (LENGTH // 2)).bool()
    masks["off by two"] = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(2)
    warned = {}
    for name, mask in masks.items():
        model = Masked(mask)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            AttentionMonitor(model, torch.randn(2, LENGTH, WIDTH), record=None, alerts=False).close()
        warned[name] = [str(each.message) for each in raised if "is a causal mask off" in str(each.message)]
    assert not warned["prefix"]
    assert not warned["pairs"]
    assert "off by 2" in warned["off by two"][0]


def test_layers_that_need_not_be_causal_are_not_compared() -> None:
    """Queries of fewer positions than keys look neither back nor ahead: a layer beside them is not odd."""
    seen = {"future_mass": 0.4, "sees": "both", "head_dim": 4, "scale": 0.5}
    layers = [
        LayerCoverage(f"h.{i}", "sdpa", **(seen if i == 3 else {**seen, "future_mass": math.nan})) for i in range(4)
    ]
    assert not likely_mistakes({layer.layer: layer for layer in layers})


def test_right_model_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as raised, watched("", IN_ALL) as monitor:
        assert "seen at attach" not in closing_lines(monitor.summary, "attnmonitor: ")
    assert not raised


@pytest.mark.parametrize("mistake", UNSEEN)
def test_docs_list_what_stays_unseen(mistake: str) -> None:
    assert printed(mistake, IN_ALL).replace(mistake, "") == printed("", IN_ALL)
    section = DOCS.read_text(encoding="utf-8").partition("## What a layer does")[2].partition("\n## ")[0]
    assert mistake in section.partition("Not visible")[2]


class Masked(nn.Module):
    """Self-attention under a given mask."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask
        self.projection = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.projection(x).chunk(3, -1))
        return scaled_dot_product_attention(*heads, attn_mask=self.mask).transpose(1, 2).flatten(2)


class Local(nn.Module):
    def __init__(self, back: int, ahead: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.back, self.ahead = back, ahead

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 8)).movedim(-3, 0).transpose(-2, -3)
        full = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return scaled_dot_product_attention(q, k, v, full.tril(self.ahead).triu(-self.back)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("back", "ahead", "text"),
    [
        (3, 0, "causal, window of 3 back"),
        (3, 2, "2 ahead, window of 3 back, 0.37 on later positions"),
        (LENGTH, LENGTH, "both ways, 0.47 on later positions"),
        (LENGTH, 0, "causal"),
        (LENGTH, 2, "2 ahead, 0.28 on later positions"),
    ],
)
def test_reach_of_a_window_is_said(back: int, ahead: int, text: str) -> None:
    torch.manual_seed(0)
    with AttentionMonitor(nn.Sequential(Local(back, ahead)), torch.randn(2, LENGTH, WIDTH), record=None) as monitor:
        assert re.sub(r"0\.\d+", "x", text) in re.sub(r"0\.\d+", "x", str(monitor))


def _by_index(x: Tensor, chosen: Tensor) -> Tensor:
    return x[torch.arange(len(x))[:, None, None], torch.arange(HEADS)[:, None], chosen]


def _by_gather(x: Tensor, chosen: Tensor) -> Tensor:
    return x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1]))


class Sparse(nn.Module):
    """Attention of the queries that differ most, as in Informer; the other positions keep their values."""

    def __init__(self, pick: Callable[[Tensor, Tensor], Tensor], *, keys_too: bool) -> None:
        super().__init__()
        self.qkv, self.pick, self.keys_too = nn.Linear(WIDTH, 3 * WIDTH), pick, keys_too

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, 8)).movedim(-3, 0).transpose(-2, -3)
        chosen = q.square().sum(-1).topk(5).indices
        picked = [self.pick(y, chosen) if self.keys_too else y for y in (k, v)]
        written = (self.pick(q, chosen) @ picked[0].mT * 8**-0.5).softmax(-1) @ picked[1]
        return v.scatter(2, chosen[..., None].expand_as(written), written).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("pick", [_by_index, _by_gather], ids=lambda pick: pick.__name__)
def test_queries_that_scores_choose_are_named(pick: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    remark = f"its queries are 5 of {LENGTH} positions, chosen by scores"
    layers = {"first": Sparse(pick, keys_too=False), "second": Sparse(pick, keys_too=False)}
    model = nn.Sequential(
        OrderedDict({**layers, "pruned": Sparse(pick, keys_too=True), "plain": Local(LENGTH, LENGTH)})
    )
    with AttentionMonitor(model, torch.randn(2, LENGTH, WIDTH), record=None) as monitor:
        remarks = {name: each.remarks for name, each in monitor.coverage.items()}
    assert remarks == {"first": (remark,), "second": (remark,), "pruned": (), "plain": ()}
