"""How the measurement reads long tensors: with the digits that are needed, and a block of positions at a time.

A block is upcast, reduced and dropped before the next is read, so the memory a layer needs beside its q and k does not
grow with its length, and on a CPU the upcast block never leaves the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from attnmonitor.parallel.threads import ProcessSetting

__all__ = ["Rounding", "fits_float32", "full_precision", "gram_of", "is_short", "norms_of", "position_blocks"]

# 2^18 float64 entries are 2 MiB, a CPU core's second-level cache: one third faster there than the whole tensor at once
# (9 heads × 4 sequences × 512 positions × 64). A GPU prefers few launches.
_ENTRIES_PER_BLOCK = {"cpu": 2**18}
_ENTRIES_PER_BLOCK_ELSEWHERE = 2**24


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products in the precision of their operands: no TF32 and no autocast, whatever the caller has switched on."""
    with _no_tf32(), torch.autocast(device.type, enabled=False):
        yield


@ProcessSetting
@contextmanager
def _no_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def position_blocks(
    heads: Tensor,
    valid: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    minus: Tensor | None = None,
    read_only: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Read ``(B, H, L, d)`` in blocks of positions, each into the same memory.

    Fresh memory for every block would cost more than reading it: the system clears each page when it is first touched.

    Args:
        heads: ``(B, H, L, d)``.
        valid: ``(B, L)`` bool; positions that are not valid read as zero, whatever they hold. None where all are.
        dtype: Type of the blocks; those in float32 hold no more positions than `Rounding` says.
        minus: What is subtracted from every position, ``(B, H, 1, d)`` of that type.
        read_only: The caller does not change the blocks, so that they may be parts of ``heads``.

    Yields:
        The block's positions as a slice of L, and the block: the caller's to change, and gone with the next one.
    """
    num_sequences, num_heads, length, head_dim = heads.shape
    entries = _ENTRIES_PER_BLOCK.get(heads.device.type, _ENTRIES_PER_BLOCK_ELSEWHERE)
    largest = max(64, entries // max(1, num_sequences * num_heads * head_dim))
    if dtype == torch.float32:  # whatever is joined with a layer, so that its sums have the same bits
        largest = _float32_terms(heads)
    size = -(-length // max(1, -(-length // largest)))  # blocks of one size, none of them a small remainder
    # Only where they lie in memory as the blocks do: products of other strides may have other bits.
    is_read_in_place = read_only and valid is None and minus is None and heads.dtype == dtype and heads.is_contiguous()
    memory = heads if is_read_in_place else heads.new_empty(num_sequences, num_heads, size, head_dim, dtype=dtype)
    for start in range(0, length, size):
        positions = slice(start, min(start + size, length))
        block = heads[:, :, positions]
        if is_read_in_place:
            yield positions, block
            continue
        if valid is not None:
            block = torch.where(valid[:, None, positions, None], block, 0)
        part = memory[:, :, : positions.stop - start]
        if minus is None:
            part.copy_(block)
        elif block.dtype == dtype:
            torch.sub(block, minus, out=part)
        else:
            part.copy_(block).sub_(minus)
        yield positions, part


def gram_of(heads: Tensor, blocks: Iterable[Tensor]) -> Tensor:
    r""":math:`x^\top x` of each head, ``(B, H, d, d)`` float64, computed in the type of the blocks.

    Args:
        heads: ``(B, H, L, d)``, of which the shape and the device are looked at.
        blocks: x in blocks of positions, ``(B, H, block, d)``: the heads as `position_blocks` reads them, or what was
            made of them.
    """
    num_sequences, num_heads, _, head_dim = heads.shape
    strips = _strips(head_dim, heads.device)
    sums: list[Tensor] = []  # each contiguous: of parts of one matrix, every head would be a product of its own
    for block in blocks:
        flat = block.flatten(0, 1)
        if not sums:
            sums = [flat.new_zeros(len(flat), strip.stop - strip.start, head_dim - strip.start) for strip in strips]
        for strip, found in zip(strips, sums, strict=True):
            found.baddbmm_(flat[..., strip].mT, flat[..., strip.start :])
    shape = num_sequences, num_heads, head_dim, head_dim
    if not sums:  # there are no positions
        return heads.new_zeros(shape, dtype=torch.float64)
    if len(sums) == 1:
        return sums[0].to(torch.float64).view(shape)
    gram = heads.new_empty(num_sequences * num_heads, head_dim, head_dim, dtype=torch.float64)
    for strip, found in zip(strips, sums, strict=True):
        gram[:, strip, strip.start :] = found
        gram[:, strip.stop :, strip] = found[..., strip.stop - strip.start :].mT
    return gram.view(shape)


def _strips(head_dim: int, device: torch.device) -> list[slice]:
    """Rows of a Gram matrix to compute at a time, from the diagonal on, because it is symmetric."""
    count = 1 if device.type != "cpu" or head_dim < 64 else 2 if head_dim < 256 else 4
    edges = [head_dim * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges)]


def is_short(heads: Tensor) -> bool:
    """Whether products with ``heads`` may be in float32 where their values allow it.

    On a CPU only: a GPU would have to wait for the values, and those for data centers are as fast in float64.
    """
    return heads.device.type == "cpu" and heads.dtype in (torch.float32, torch.bfloat16, torch.float16)


def fits_float32(energy: Tensor) -> Tensor:
    """Whether no product in float32 overflowed, and none that matters vanished, ``(...)`` bool; False for NaN."""
    # Entries below 2^-75 vanish when squared: of 2^30 positions they are less than 2^-100 of this energy.
    return (energy > 2.0**-40) & (energy < 2.0**120)


def norms_of(vectors: Tensor) -> Tensor:
    """Norms along the last axis, ``(..., n) -> (...)`` float64, also where float32 cannot hold their squares."""
    in_float32 = is_short(vectors)
    dtype = torch.float32 if in_float32 else torch.float64
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, dtype=dtype)
    if not in_float32:
        return norms
    again = ((norms > 2.0**-50) & (norms < 2.0**60)).logical_not_()
    norms = norms.to(torch.float64)
    if again.any():
        norms[again] = torch.linalg.vector_norm(vectors[again], dim=-1, dtype=torch.float64)
    return norms


def _float32_terms(heads: Tensor) -> int:
    """Products that are added up in float32 before their sum is added to those of other blocks."""
    return max(128, 2 * heads.shape[-1])


@dataclass(frozen=True)
class Rounding:
    r"""How a Gram matrix was rounded.

    Attributes:
        dtype: Type of the products and sums.
        terms: The most roundings that a product takes part in: of the sum of its block, and of the blocks.
    """

    dtype: torch.dtype
    terms: int

    @property
    def unit(self) -> float:
        """Unit roundoff u of the products."""
        return float(torch.finfo(self.dtype).eps) / 2

    @classmethod
    def of(cls, heads: Tensor, dtype: torch.dtype) -> Rounding:
        """The rounding of the Gram matrix of heads that are read in blocks of ``dtype``."""
        length = heads.shape[2]
        if dtype != torch.float32:
            return cls(dtype, length)
        in_block = min(length, _float32_terms(heads))
        return cls(dtype, in_block + length // max(in_block, 1))
