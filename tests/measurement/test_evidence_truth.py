"""The evidence of a head is what the dense float64 field and the dense attention of that head say."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnmonitor import AttentionMonitor, HeadEvidence

LENGTH, HEADS, SIZE = 40, 4, 8
DOCUMENTS = torch.tensor([[0] * 15 + [1] * 25, [0] * 10 + [1] * 10 + [2] * 20])


class Attention(nn.Module):
    """One attention whose queries, keys and mask stay at hand."""

    def __init__(self, num_kv_heads: int, tiled: bool) -> None:
        super().__init__()
        self.num_kv_heads, self.tiled = num_kv_heads, tiled
        self.q_proj, self.k_proj = nn.Linear(32, HEADS * SIZE), nn.Linear(32, num_kv_heads * SIZE)
        self.v_proj = nn.Linear(32, num_kv_heads * SIZE)

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            f(z).unflatten(-1, (-1, SIZE)).transpose(1, 2)
            for f, z in ((self.q_proj, x), (self.k_proj, y), (self.v_proj, y))
        )
        self.kept = q.detach(), k.detach()
        group = HEADS // self.num_kv_heads
        if self.tiled:
            k, v = (each.repeat(1, group, 1, 1) for each in (k, v))
        elif group > 1:
            k, v = (each.repeat_interleave(group, 1) for each in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Attends to itself, or to the ids of an encoder; with padding, or with several documents in a row."""

    def __init__(self, num_kv_heads: int = HEADS, *, tiled: bool = False, sees: str = "causal") -> None:
        super().__init__()
        self.sees = sees
        self.embed, self.place = nn.Embedding(60, 32), nn.Embedding(LENGTH, 32)
        self.attn = Attention(num_kv_heads, tiled)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        y = self.embed(input_ids) + self.place.weight
        x = y if decoder_input_ids is None else self.embed(decoder_input_ids)
        mask = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool)
        if decoder_input_ids is None:
            mask = mask.tril()
        self.seen = mask.expand(len(x), 1, -1, -1)
        if attention_mask is not None:
            self.seen = self.seen & attention_mask[:, None, None].bool()
        if documents is not None:
            self.seen = self.seen & (documents[:, None, :, None] == documents[:, None, None])
        return self.attn(x, y, self.seen)


def ids(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(60, (2, length), generator=torch.Generator().manual_seed(seed))


def padding() -> Tensor:
    return (torch.arange(LENGTH) < torch.tensor([[LENGTH], [26]])).long()


CASES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "own keys": ({}, {}),
    "grouped keys": ({"num_kv_heads": 2}, {}),
    "tiled keys": ({"num_kv_heads": 2, "tiled": True}, {}),
    "one key head": ({"num_kv_heads": 1}, {}),
    "cross": ({}, {"decoder_input_ids": ids(24, seed=1)}),
    "padding": ({"num_kv_heads": 2}, {"attention_mask": padding()}),
    "documents": ({"num_kv_heads": 2}, {"documents": DOCUMENTS}),
}


def watched(name: str, **settings: Any) -> tuple[Model, AttentionMonitor]:
    torch.manual_seed(0)
    arguments, more = CASES[name]
    model = Model(**arguments)
    with torch.no_grad():
        model.attn.k_proj.weight *= 2  # attention that is not uniform
    batch = {"input_ids": ids(), **more}
    return model, AttentionMonitor(model, batch, record=None, strict=True, alerts=False, **settings)


@dataclass
class Part:
    """A document of the probe, or a whole row: the dense field and the dense attention of one head."""

    row: int
    positions: range
    places: list[int]
    field: Tensor
    leverage: Tensor
    probability: Tensor

    @property
    def shares(self) -> Tensor:
        return self.field.square().sum(0) / self.field.square().sum()


def dense(name: str, model: Model, evidence: HeadEvidence) -> list[Part]:
    q, k = (each.double() for each in model.attn.kept)
    num_kv_heads = k.shape[1]
    reads = [h % num_kv_heads if model.attn.tiled else h * num_kv_heads // HEADS for h in range(HEADS)]
    by_query = evidence.scope == "query_head"
    heads = [evidence.head] if by_query else [h for h in range(HEADS) if reads[h] == evidence.head]
    key_head = reads[heads[0]]
    parts = []
    for row in range(2):
        edges = [0, LENGTH]
        if name == "documents":
            edges[1:1] = (DOCUMENTS[row].diff().nonzero().flatten() + 1).tolist()
        for start, end in itertools.pairwise(edges):
            keys = k[row, key_head, start:end]
            queries = q[row, heads, start:end] if name == "documents" else q[row, heads]
            valid = padding()[row].bool() if name == "padding" else torch.ones(end - start).bool()
            seen = model.seen[row, 0, start:end] if name == "documents" else model.seen[row, 0]
            logits = (SIZE**-0.5 * queries @ keys.T).masked_fill(~seen[:, start:end], -torch.inf)
            asked = queries[:, valid] if name == "padding" else queries
            parts.append(
                Part(
                    row,
                    range(start, end),
                    (start + valid.nonzero().flatten()).tolist(),
                    reference.field(asked.flatten(0, 1), keys[valid], SIZE**-0.5),
                    reference.leverage(keys[valid])[0],
                    logits.softmax(-1).mean(0),
                )
            )
    return parts


@pytest.mark.parametrize("scope", ["query_head", "kv_head"])
@pytest.mark.parametrize("name", CASES)
def test_evidence_is_the_dense_truth(name: str, scope: Any) -> None:
    model, monitor = watched(name, decode=lambda token: f"<{token}>")
    for head in range(HEADS if scope == "query_head" else model.attn.num_kv_heads):
        evidence = monitor.inspect("attn", head, scope=scope)
        assert (evidence.layer, evidence.head, evidence.scope, evidence.rule) == ("attn", head, scope, None)
        parts = dense(name, model, evidence)
        expected = {
            (part.row, place): (float(leverage), float(share))
            for part in parts
            for place, leverage, share in zip(part.places, part.leverage, part.shares, strict=True)
        }
        for row, place, leverage, share, token in evidence.positions:
            assert (leverage, share) == pytest.approx(expected[row, place], rel=1e-4, abs=1e-6)
            assert token == f"<{int(ids()[row, place])}>"
        sums = [leverage + share for _, _, leverage, share, _ in evidence.positions]
        assert sums == sorted(sums, reverse=True)
        found = {(row, place) for row, place, *_ in evidence.positions}
        for which in (0, 1):
            most = sorted(expected, key=lambda place: -expected[place][which])[:8]
            assert set(most) <= found, "the leading positions of either kind are there"
        row, first, *_ = evidence.positions[0]
        [part] = [part for part in parts if part.row == row == evidence.sequence and first in part.positions]
        values = torch.linalg.svdvals(part.field)[: len(evidence.singular_values)]
        torch.testing.assert_close(evidence.singular_values.double(), values, rtol=1e-4, atol=1e-4)
        attention_is_true(name, evidence, parts)


def attention_is_true(name: str, evidence: HeadEvidence, parts: list[Part]) -> None:
    num_columns = min(32, evidence.num_keys)
    assert evidence.attention.shape == (len(evidence.rows), num_columns)
    assert 8 <= len(evidence.rows) <= 32
    for (row, query), found in zip(evidence.rows, evidence.attention.double(), strict=True):
        [part] = [each for each in parts if each.row == row and (name != "documents" or query in each.positions)]
        row_of = part.probability[query - part.positions.start if name == "documents" else query]
        column_of = torch.arange(len(row_of)) * num_columns // evidence.num_keys
        expected = torch.zeros(num_columns).double().index_add(0, column_of, row_of)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
