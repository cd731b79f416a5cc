"""W_Q and W_K of each head of any attention module, found by correlation with noise, whatever their layout and names.

Projections have many layouts: separate, fused, interleaved per head, transposed, low rank. In all of them a coordinate
of a head's query is one column of some module's output, times a constant. So a few forwards are run in which noise
replaces the output of every module with weights inside an attention layer (``noise.py``). At position 0, where a rotary
embedding is the identity, each query coordinate is then a multiple of exactly one column of that noise, which is found
by correlation (``weights.py``). Norms between the projection and the product (QK-norm) are bypassed in these forwards.

The weight of a column is ``f(I) - f(0)`` of the module, which holds for a linear layer, a transposed one and one with
an adapter beside it. A module fed by another one of the layer (low rank) is composed with it. The gain of the norm
before the projections is multiplied in where the block has one; rotary embeddings, biases and QK-norm gains are left
out. A layer of which any coordinate stays unmatched gets a reason, not a guess.

Letters: Hq query heads, Hkv key heads, d head size, D width of the layer's input, B sequences, L positions, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture import capture_attention
from attnmonitor.capture.projections.noise import Draws, block_norms, noisy, note_call
from attnmonitor.capture.projections.weights import Coordinates, match_columns, mha_projections
from attnmonitor.parallel.wrappers import unwrapped_modules

__all__ = ["HeadProjections", "discover_projections"]

NUM_SAMPLES = 16
"""Samples behind each correlation: a random column of 16 samples correlates to `weights.MATCH` with a given one with
probability below 1e-18, so that among 1e5 columns no match is by chance."""


@dataclass(frozen=True, eq=False)
class HeadProjections:
    """The projections of one attention layer, read from the current weights on each access.

    Attributes:
        norms: The norms whose gain is multiplied in; empty where there is none before the projections.
    """

    _query: Coordinates
    _key: Coordinates
    norms: tuple[nn.Module, ...]

    @property
    def w_q(self) -> Tensor:
        """Return the query projection of each head, ``(Hq, d, D)`` float32."""
        return self._query.weight()

    @property
    def w_k(self) -> Tensor:
        """Return the projection of each key head, ``(Hkv, d, D)`` float32; of each query head where keys are tiled."""
        return self._key.weight()


def discover_projections(
    model: nn.Module, forward: Callable[[], Any], layers: Collection[str]
) -> dict[str, HeadProjections | str]:
    """Find the query and key projections of attention layers, whatever their layout.

    The layout of a layer never changes, so one discovery serves a whole run; the weights are read on access. The
    forwards run with noise in place of the layers' projections: call this inside `attnmonitor.measurement.quiet` and
    outside of any other capture. Position 0 must be a token: text unpadded, or padded on the right.

    Args:
        model: The model whose modules the names belong to.
        forward: Runs the model once on a few sequences.
        layers: Names as captured; ``name#2`` shares the projections of ``name``.

    Returns:
        For each layer its `HeadProjections`, or why they could not be found.
    """
    modules = dict(unwrapped_modules(model))
    wanted = {name.partition("#")[0] for name in layers}
    draws = {name: Draws(block_norms(name, wanted, modules)) for name in wanted if name in modules}
    generator = torch.Generator()
    generator.manual_seed(0)
    seen = 0
    with torch.no_grad():
        while seen < NUM_SAMPLES:
            before = seen
            with noisy(modules, draws, generator), capture_attention(model, partial(note_call, draws)):
                forward()
            seen = max((sum(len(q) for q in draw.query) for draw in draws.values()), default=seen)
            if seen == before:
                break
    found: dict[str, HeadProjections | str] = {}
    for name in layers:
        base = name.partition("#")[0]
        found[name] = found[base] if base in found else _projections_of(modules.get(base), draws.get(base))
    return found


def _projections_of(module: nn.Module | None, draws: Draws | None) -> HeadProjections | str:
    if module is None or draws is None or not draws.query:
        return "no attention of this name was captured"
    try:
        if isinstance(module, nn.MultiheadAttention):
            query, key = mha_projections(module, draws)
        else:
            query, key = (match_columns(torch.cat(x), draws) for x in (draws.query, draws.key))
        projections = HeadProjections(query, key, tuple({id(n): n for n in (*query.norms(), *key.norms())}.values()))
        projections.w_q, projections.w_k  # noqa: B018 - fail now for a weight that cannot be read
    except (LookupError, RuntimeError, TypeError, ValueError) as reason:
        return str(reason).partition("\n")[0]
    return projections
