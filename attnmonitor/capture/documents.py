"""Rows that hold several documents: found in the pattern of an attention, and cut so that each is a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Documents", "blocks_in", "documents_at", "numbered_documents"]

Spans = list[list[tuple[int, int]]]
"""Of each sequence, the first and past-the-last positions of its parts."""


@dataclass(frozen=True, eq=False)
class Documents:
    """The positions of every document, padded to one length.

    Attributes:
        index: ``(D, L')`` positions in ``(B·L)``, 0 where padded.
        valid: ``(D, L')`` bool, False where padded.
    """

    index: Tensor
    valid: Tensor

    @property
    def count(self) -> int:
        """Number of documents."""
        return len(self.index)

    def cut(self, heads: Tensor) -> Tensor:
        """Return ``(B, H, L, d)`` as ``(D, H, L', d)``."""
        by_document: Tensor = heads.transpose(1, 2).flatten(0, 1)[self.index].transpose(1, 2)
        return by_document

    def of_rows(self, function: Callable[[Tensor], Tensor], length: int, rows: Tensor) -> Tensor:
        """Return rows ``(R,)`` of every document, ``(D, H, R, n)``, of what a function gives for whole rows.

        Args:
            function: Maps positions ``(R,)`` to ``(B, H, R, n)``.
            length: Positions L of a whole row.
            rows: Positions in the documents.
        """
        index = self.index.index_select(1, rows)  # (D, R)
        found = function((index % length).flatten())
        by_document: Tensor = found.unflatten(-2, index.shape)  # (B, H, D, R, n)
        own: Tensor = by_document[self.index[:, 0] // length, :, torch.arange(self.count, device=rows.device)]
        return own

    def rows(self, logit_rows: Callable[[Tensor], Tensor], length: int) -> Callable[[Tensor], Tensor]:
        """Return the function that gives rows of logits by document, ``(D, H, R, L')``.

        Args:
            logit_rows: Maps rows ``(R,)`` to ``(B, H, R, L)``.
            length: Positions L of a whole row.
        """

        def by_document(rows: Tensor) -> Tensor:
            logits = self.of_rows(logit_rows, length, rows)
            columns = (self.index % length)[:, None, None, :].expand(*logits.shape[:-1], -1)
            return logits.gather(-1, columns).masked_fill(~self.valid[:, None, None, :], -torch.inf)

        return by_document

    def to(self, device: torch.device) -> Documents:
        """Return them on a device."""
        return Documents(self.index.to(device), self.valid.to(device))


def documents_at(spans: list[tuple[int, int]], device: torch.device, tokens: Tensor | None = None) -> Documents:
    """Return documents from their first and past-the-last positions in ``(B·L)``, without what is no token."""
    positions = [torch.arange(*span) for span in spans]
    if tokens is not None:
        positions = [own[tokens[own]] for own in positions]
    index = pad_sequence(positions, batch_first=True)
    lengths = torch.tensor([len(own) for own in positions])
    return Documents(index.to(device), (torch.arange(index.shape[1]) < lengths[:, None]).to(device))


def blocks_in(firsts: Tensor, lasts: Tensor, valid: Tensor) -> Spans:
    """Return the blocks on the diagonal of what each sequence sees, as first and past-the-last positions.

    A block begins at a position that sees nothing before itself; no later position may see past the beginning, and none
    past the end. A sliding window has no such beginnings, so it is one block; padding that is wider than the distance
    at which any position sees another may be a gap in a window, and parts nothing.

    Args:
        firsts: ``(B, L)``, the first token that each position sees.
        lasts: ``(B, L)``, the last one.
        valid: ``(B, L)`` bool, True for a token.
    """
    blocks = []
    for first, last, tokens in zip(firsts.tolist(), lasts.tolist(), valid.tolist(), strict=True):
        positions = [position for position, is_token in enumerate(tokens) if is_token]
        reach = max((max(i - first[i], last[i] - i) for i in positions), default=0)
        before = dict(zip(positions[1:], positions, strict=False))
        starts = [i for i in positions if first[i] == i and i - before.get(i, i) <= max(reach, 1)]
        ends = [*starts[1:], positions[-1] + 1] if starts else []
        spans = list(zip(starts, ends, strict=True))
        holds = all(start <= first[i] and last[i] < end for start, end in spans for i in positions if start <= i < end)
        whole = [(positions[0], positions[-1] + 1)] if positions else []
        # A gap of padding after a document is not a part of it.
        cut = [(start, max(i for i in positions if i < end) + 1) for start, end in spans]
        blocks.append(cut if holds and starts and starts[0] == positions[0] else whole)
    return blocks


def numbered_documents(blocks: Spans, valid: Tensor, arguments: Mapping[str, Tensor]) -> Spans:
    """Return the documents that an argument of the model numbers, where blocks are parts of them; else the blocks.

    A layer that attends in chunks cuts each document once more. Position ids begin anew with a document, and the ids of
    documents change: every such beginning is that of a block, and all other blocks begin at multiples of one length.

    Args:
        blocks: The blocks on the diagonal of what each sequence sees.
        valid: ``(B, L)`` bool, True for a token.
        arguments: The tensors the model was called with, by name.
    """
    tokens = valid.cpu()
    between = tokens[:, 1:] & tokens[:, :-1]
    for x in arguments.values():
        if x.shape not in (tokens.shape, tokens[:1].shape) or x.is_floating_point() or x.is_complex():
            continue
        steps = x.cpu().long().expand(tokens.shape).diff()
        for change in ((steps != 1) & between, (steps != 0) & between):
            whole = [
                _joined(row, {position + 1 for position in changed.nonzero().flatten().tolist()}, token.tolist())
                for row, changed, token in zip(blocks, change, tokens, strict=True)
            ]
            documents = [each for each in whole if each is not None]
            if len(documents) == len(whole) and _are_in_chunks(blocks, documents):
                return documents
    return blocks


def _joined(blocks: list[tuple[int, int]], beginnings: set[int], is_token: list[bool]) -> list[tuple[int, int]] | None:
    """Return blocks, each joined with those after it that begin no document; None where one begins inside a block."""
    if not beginnings <= {start for start, _ in blocks}:
        return None
    documents: list[tuple[int, int]] = []
    for start, end in blocks:
        if not documents or start in beginnings or not is_token[start - 1]:
            documents.append((start, end))
        else:
            documents[-1] = (documents[-1][0], end)
    return documents


def _are_in_chunks(blocks: Spans, documents: Spans) -> bool:
    """Return whether blocks are documents cut at multiples of one length, counted in the row or in the document."""
    if not any(len(row) > 1 for row in documents):
        return False
    starts = [{start for start, _ in row} for row in blocks]
    cuts = [own - {start for start, _ in row} for own, row in zip(starts, documents, strict=True)]
    rows = [[(row[0][0], row[-1][1])] if row else [] for row in documents]
    return any(_are_multiples(cuts, starts, spans) for spans in (rows, documents))


def _are_multiples(cuts: list[set[int]], starts: list[set[int]], spans: Spans) -> bool:
    """Return whether cuts are at multiples of one length, counted from the beginnings of spans, and starts at all."""
    parts = [
        (first, end, row_cuts, row_starts)
        for row, row_cuts, row_starts in zip(spans, cuts, starts, strict=True)
        for first, end in row
    ]
    length = math.gcd(*(cut - first for first, end, own, _ in parts for cut in own if first < cut < end))
    return length > 1 and all(own.issuperset(range(first, end, length)) for first, end, _, own in parts)
