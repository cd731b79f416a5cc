"""Rows that hold several documents: found in the pattern of an attention, and cut so that each is a sequence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

__all__ = ["Documents", "blocks_in", "documents_at"]


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


def blocks_in(firsts: Tensor, lasts: Tensor, valid: Tensor) -> list[list[tuple[int, int]]]:
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
