"""Rows of several documents are cut where the documents begin, also in layers that attend in chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor

WIDTH, HEADS, LENGTH, CHUNK = 32, 4, 18, 4
SPANS = [[(0, 10), (10, 18)], [(0, 4), (4, 12), (12, 18)]]
STARTS = torch.tensor([[0] * 10 + [10] * 8, [0] * 4 + [4] * 8 + [12] * 6])
POSITIONS = torch.arange(LENGTH) - STARTS


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT).masked_fill(~mask[:, None], -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


class Chunked(nn.Module):
    """Two layers of packed documents, the first in chunks of positions in the row or, as Llama 4, in the document."""

    def __init__(self, ids: Callable[[Tensor], Tensor], starts: Tensor) -> None:
        super().__init__()
        self.chunked, self.full, self.ids, self.starts = Layer(), Layer(), ids, starts

    def forward(self, x: Tensor, numbers: Tensor) -> Tensor:
        ids, rows = self.ids(numbers), torch.arange(LENGTH)
        seen = (ids[:, :, None] == ids[:, None, :]) & (rows[:, None] >= rows)
        chunk = (rows - self.starts) // CHUNK
        return self.full(self.chunked(x, seen & (chunk[:, :, None] == chunk[:, None])), seen)


def by_positions(numbers: Tensor) -> Tensor:
    return torch.cat([torch.zeros(len(numbers), 1), (numbers.diff() != 1).cumsum(-1)], -1).expand(2, -1)


def as_they_are(numbers: Tensor) -> Tensor:
    return numbers


@pytest.mark.parametrize("in_row", [True, False], ids=["in the row", "in the document"])
@pytest.mark.parametrize(
    ("ids", "numbers", "spans"),
    [
        (by_positions, POSITIONS, SPANS),
        (as_they_are, STARTS, SPANS),
        (by_positions, POSITIONS[:1], [SPANS[0], SPANS[0]]),
        (
            lambda numbers: by_positions(numbers // 2),
            2 * POSITIONS,
            None,
        ),  # numbered in no known way: the chunks are cut
    ],
    ids=["positions", "ids of documents", "positions of all rows", "neither"],
)
def test_chunks_of_documents_are_no_documents(
    ids: Callable[[Tensor], Tensor], numbers: Tensor, spans: list[list[tuple[int, int]]] | None, in_row: bool
) -> None:
    torch.manual_seed(0)
    starts = torch.zeros(2, 1, dtype=torch.long) if in_row else STARTS[: len(numbers)].expand(2, -1)
    model = Chunked(ids, starts)
    with AttentionMonitor(model, (torch.randn(2, LENGTH, WIDTH), numbers), record=None, alerts=False) as monitor:
        chunked, full = (monitor.coverage[name] for name in ("chunked", "full"))
    assert (full.sees, full.outside) == ("documents", ())
    assert chunked.sees == "documents"
    assert chunked.error is not None
    assert chunked.error < 1e-6
    if spans is None:
        assert chunked.documents > full.documents
    else:
        assert chunked.outside == ("window",)
        assert chunked.documents == full.documents == sum(map(len, spans))
