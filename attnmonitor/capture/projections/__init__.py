"""W_Q and W_K of each head of any attention module, found by correlation with noise, whatever their layout and names.

Projections have many layouts: separate, fused, interleaved per head, transposed, low rank. In all of them a coordinate
of a head's query is one column of some module's output, times a constant. So a few forwards are run in which noise
replaces the output of every module with weights inside an attention layer (``noise.py``). At position 0, where a rotary
embedding is the identity, each query coordinate is then a multiple of exactly one column of that noise, which is found
by correlation (``weights.py``). Norms between the projection and the product (QK-norm) are bypassed in these forwards.

The weight of a column is ``f(I) - f(0)`` of the module (``reading.py``), which holds for a linear layer, a transposed
one, one with an adapter beside it and one whose weight is packed. A module fed by another one of the layer (low rank)
is composed with it. The gain of the norm before the projections is multiplied in where the block has one, and that of a
norm after them (QK-norm) where it is a diagonal on the coordinates (``head_norms.py``); rotary embeddings and biases
are left out. A layer of which a coordinate stays unmatched or a module is not
linear gets a reason, not a guess. The layout holds until the layer has other modules (``structure.py``).

Letters: Hq query heads, Hkv key heads, d head size, D width of the layer's input, B sequences, L positions, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from attnmonitor.capture import capture_attention
from attnmonitor.capture.hooks import watched_hooks
from attnmonitor.capture.projections.head_norms import with_head_gain
from attnmonitor.capture.projections.noise import Draws, Patterns, block_norms, is_norm, noisy, note_call
from attnmonitor.capture.projections.reading import (
    ModuleWeight,
    Observation,
    ParameterRows,
    UnreadableError,
    observed,
    storage_of,
)
from attnmonitor.capture.projections.structure import Structure, structures
from attnmonitor.capture.projections.weights import Coordinates, Weights, match_columns, mha_projections
from attnmonitor.parallel.wrappers import unwrapped_modules

__all__ = ["HeadProjections", "Structure", "UnreadableError", "discover_projections", "structures"]

NUM_SAMPLES = 16
"""Samples behind each correlation: a random column of 16 samples correlates to `weights.MATCH` with a given one with
probability below 1e-18, so that among 1e5 columns no match is by chance."""


@dataclass(frozen=True, eq=False)
class HeadProjections:
    """The projections of one attention layer, read from the current weights on each access."""

    _query: Coordinates
    _key: Coordinates
    note: str = ""  # what is left out beside rotary embeddings and biases

    def read(self, weights: Weights | None = None) -> tuple[Tensor, Tensor]:
        """Return `w_q` and `w_k`, each module read once.

        Args:
            weights: The weights of modules that have been read already.

        Raises:
            UnreadableError: A module cannot be read, or has been replaced since.
        """
        weights = {} if weights is None else weights
        return self._query.weight(weights), self._key.weight(weights)

    @property
    def w_q(self) -> Tensor:
        """Return the query projection of each head, ``(Hq, d, D)`` float32."""
        return self._query.weight({})

    @property
    def w_k(self) -> Tensor:
        """Return the projection of each key head, ``(Hkv, d, D)`` float32; of each query head where keys are tiled."""
        return self._key.weight({})

    def with_head_gains(self, draws: Draws, patterns: Patterns) -> HeadProjections:
        """Return the same projections with the gains of norms between them and the product; see `with_head_gain`."""
        query = with_head_gain(self._query, torch.cat(draws.query), draws, patterns)
        key = with_head_gain(self._key, torch.cat(draws.key), draws, patterns)
        return HeadProjections(query.coordinates, key.coordinates, query.left_out or key.left_out)

    def own_weights(self) -> Iterator[ModuleWeight | ParameterRows]:
        """Yield what is read of each module."""
        yield from {own.key: own for own in (*self._query.own_weights(), *self._key.own_weights())}.values()

    @property
    def norms(self) -> tuple[nn.Module, ...]:
        """Return the norms whose gain is multiplied in; empty where there is none before the projections."""
        return tuple({id(norm): norm for norm in (*self._query.norms(), *self._key.norms())}.values())


def discover_projections(
    model: nn.Module, forward: Callable[[], Any], layers: Collection[str]
) -> dict[str, HeadProjections | str]:
    """Find the query and key projections of attention layers, whatever their layout.

    One discovery serves until the `structures` of a layer change; the weights are read on access. The forwards run with
    noise in place of the layers' projections: call this inside `attnmonitor.measurement.quiet` and outside of any other
    capture; read the weights inside `quiet` as well. Position 0 must be a token: text unpadded, or padded on the right.

    Args:
        model: The model whose modules the names belong to.
        forward: Runs the model once on a few sequences.
        layers: Names as captured; ``name#2`` shares the projections of ``name``.

    Returns:
        For each layer its `HeadProjections`, or why they could not be found.
    """
    modules = dict(unwrapped_modules(model))
    names = {module: name for name, module in modules.items()}
    wanted = {name.partition("#")[0] for name in layers}
    draws = {name: Draws(block_norms(name, wanted, modules), names) for name in wanted if name in modules}
    watched = dict.fromkeys(
        each for name, draw in draws.items() for each in (*modules[name].modules(), *draw.block_norms)
    )
    generator = torch.Generator()
    generator.manual_seed(0)
    seen = 0
    with torch.no_grad():
        while seen < NUM_SAMPLES:
            before = seen
            with (
                watched_hooks(watched) as hooks,
                noisy(modules, draws, generator),
                capture_attention(model, partial(note_call, draws)),
            ):
                forward()
            for draw in draws.values():
                draw.hooks |= hooks
            seen = max((sum(len(q) for q in draw.query) for draw in draws.values()), default=seen)
            if seen == before:
                break
        of_layer = {name: _projections_of(modules.get(name), draws.get(name)) for name in wanted}
        of_layer |= _with_head_gains(of_layer, draws, model, forward)
        read = {
            own.module() for one in of_layer.values() if isinstance(one, HeadProjections) for own in one.own_weights()
        }
        with observed([module for module in read if module is not None]) as observations:
            if read:
                forward()
        return {name: _verified(of_layer[name.partition("#")[0]], observations) for name in layers}


def _projections_of(module: nn.Module | None, draws: Draws | None) -> HeadProjections | str:
    if module is None or draws is None or not draws.query:
        return "no attention of this name was captured"
    try:
        if type(module).forward is nn.MultiheadAttention.forward:
            return HeadProjections(*mha_projections(cast(nn.MultiheadAttention, module), draws))
        return HeadProjections(match_columns(torch.cat(draws.query), draws), match_columns(torch.cat(draws.key), draws))
    except (LookupError, RuntimeError, TypeError, ValueError) as reason:
        return str(reason).partition("\n")[0] + _not_followed(draws)


def _with_head_gains(
    found: Mapping[str, HeadProjections | str], draws: Mapping[str, Draws], model: nn.Module, forward: Callable[[], Any]
) -> dict[str, HeadProjections | str]:
    """Return the projections of layers with norms in them, with the gains that act on queries and keys."""
    modules = dict(unwrapped_modules(model))
    layers = {
        name: each
        for name, each in found.items()
        if isinstance(each, HeadProjections) and any(map(is_norm, modules[name].modules()))
    }
    again = {name: Draws(draws[name].block_norms, draws[name].names, draws[name].hooks) for name in layers}
    patterns: Patterns = {}
    if layers:
        generator = torch.Generator()
        generator.manual_seed(1)
        with noisy(modules, again, generator, patterns), capture_attention(model, partial(note_call, again)):
            forward()
    return {name: each.with_head_gains(again[name], patterns) for name, each in layers.items() if again[name].query}


def _verified(found: HeadProjections | str, seen: Mapping[nn.Module, Observation]) -> HeadProjections | str:
    """Return the projections if their weights can be read and are those the model's forward uses, else the reason."""
    if isinstance(found, str):
        return found
    weights: Weights = {}
    try:
        for own in found.own_weights():
            weights[own.key] = own.read()
            module = own.module()
            if module is not None and module in seen:
                own.check(weights[own.key], seen[module])
        found.read(weights)
    except Exception as reason:  # a module of the user's, or one of a library, is called
        return str(reason).partition("\n")[0]
    return found


def _not_followed(draws: Draws) -> str:
    """Name the modules with weights that ran before the attention and whose outputs could not be made noise."""
    return "".join(
        f"; {draws.names[module]} ({storage_of(module)}) could not be followed"
        for module in draws.ran
        if module not in draws.noise and module in draws.names
    )
