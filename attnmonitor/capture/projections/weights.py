"""Match a head's coordinates with columns of noise by correlation, and read the weights of these columns."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.hooks import replaced_hooks
from attnmonitor.capture.projections.noise import Draws
from attnmonitor.capture.projections.reading import ModuleWeight, ParameterRows, UnreadableError
from attnmonitor.capture.verify import without_autocast

__all__ = ["Coordinates", "HeadGain", "Weights", "match_columns", "mha_projections"]

Weights = MutableMapping[Any, Tensor]
"""The weights that modules have now, each read once, by the ``key`` of the `ModuleWeight` or `ParameterRows`."""

MATCH = 0.999
"""Smallest absolute correlation of a match; a copied column rounded to bfloat16 still has 0.99999."""


class _UnmatchedError(LookupError):
    """A coordinate of the queries or keys follows no column of a weight."""


@dataclass(eq=False)
class _LinearMap:
    """One module with weights as a matrix from the layer's input to its output columns.

    Attributes:
        own: The weight of the module itself.
        norms: Norms that act on its input.
        hooks: Keys of the hooks that take part in what a module computes.
        source: The coordinates of other modules' outputs that make up its input; None for the layer's own input.
    """

    own: ModuleWeight | ParameterRows
    norms: tuple[weakref.ref[nn.Module], ...]
    hooks: set[int]
    source: Coordinates | None

    def matrix(self, weights: Weights) -> Tensor:
        """Return the effective weight, ``(N, D)`` float32."""
        if self.own.key not in weights:
            weights[self.own.key] = self.own.read()
        weight = weights[self.own.key]
        for norm in self.norms:
            weight = weight * _gain(norm(), weight.shape[-1], weight.device, self.hooks)
        if self.source is None:
            return weight
        inner = self.source.weight(weights).flatten(0, -2)
        with without_autocast(weight):
            return weight @ inner


@dataclass(eq=False)
class HeadGain:
    """The gain of a norm that acts on coordinates after their projection.

    Attributes:
        norm: The norm.
        index: The entry of its gain that acts on each coordinate, ``(S,)``.
        hooks: Keys of the hooks that take part in what it computes.
    """

    norm: weakref.ref[nn.Module]
    index: Tensor
    hooks: set[int]

    def read(self, device: torch.device) -> Tensor:
        """Return the gain of each coordinate as it is now, ``(S,)``."""
        gain = _gain(self.norm(), int(self.index.max()) + 1, device, self.hooks)
        return gain[self.index.to(device)]


@dataclass(eq=False)
class Coordinates:
    """Coordinates of shape ``(H, d)`` or ``(width,)``, each one a column of a linear map times a gain."""

    shape: tuple[int, ...]
    parts: list[tuple[_LinearMap, Tensor, Tensor, Tensor]]  # map, which coordinates, their columns, their gains
    head_gain: HeadGain | None = None

    def with_gain(self, gain: HeadGain) -> Coordinates:
        """Return the same coordinates after a norm."""
        return replace(self, head_gain=gain)

    def drawn(self, draws: Draws) -> Tensor | None:
        """Return what the coordinates are for the noise of one forward, ``(B, S)``; None where it was not noted."""
        columns: list[Tensor] = []
        order: list[Tensor] = []
        for linear, which, column, gains in self.parts:
            module = linear.own.module()
            if module is None or module not in draws.noise:
                return None
            noise = torch.cat(draws.noise[module])
            columns.append(noise[:, column.to(noise.device)] * gains.to(noise))
            order.append(which)
        return torch.cat(columns, 1)[:, torch.cat(order).argsort().to(columns[0].device)]

    def weight(self, weights: Weights) -> Tensor:
        """Return the weight of each coordinate, ``(*shape, D)`` float32.

        Args:
            weights: The weights of modules that have been read already; more are added.
        """
        with torch.no_grad():
            rows: list[Tensor] = []
            order: list[Tensor] = []
            for linear, which, columns, gains in self.parts:
                matrix = linear.matrix(weights)
                rows.append(matrix[columns.to(matrix.device)] * gains.to(matrix.device)[:, None])
                order.append(which.to(matrix.device))
            weight = torch.cat(rows)[torch.cat(order).argsort()]
            if self.head_gain is not None:
                weight = weight * self.head_gain.read(weight.device)[:, None]
            return weight.reshape(*self.shape, -1)

    def own_weights(self) -> Iterator[ModuleWeight | ParameterRows]:
        """Yield what is read of each module, also of the modules in front."""
        for linear, *_ in self.parts:
            yield linear.own
            if linear.source is not None:
                yield from linear.source.own_weights()

    def norms(self) -> tuple[nn.Module, ...]:
        """Return every norm whose gain is multiplied in, each once."""
        found: dict[int, nn.Module] = {}
        for linear, *_ in self.parts:
            inner = () if linear.source is None else linear.source.norms()
            own = (norm for reference in linear.norms if (norm := reference()) is not None)
            found |= {id(norm): norm for norm in (*own, *inner)}
        return tuple(found.values())


def match_columns(coordinates: Tensor, draws: Draws) -> Coordinates:
    """Return coordinates ``(S, *shape)`` as the columns of noise that they are multiples of.

    Raises:
        LookupError: One of them matches no column.
    """
    num_samples, *shape = coordinates.shape
    modules = [module for module, noise in draws.noise.items() if sum(map(len, noise)) == num_samples]
    if not modules:
        raise _UnmatchedError("no module with weights was seen inside the layer")
    widths = torch.tensor([draws.noise[module][0].shape[-1] for module in modules])
    noise = torch.cat([torch.cat(draws.noise[module]) for module in modules], -1)
    wanted, offered = _standardized(coordinates.flatten(1)), _standardized(noise)
    with without_autocast(wanted):  # the caller's autocast would round a correlation of 1 to 0.996
        best, column = (wanted.mT @ offered).abs().max(-1)
    if not bool((best > MATCH).all()):
        raise _UnmatchedError(f"{int((best <= MATCH).sum())} of {len(best)} coordinates follow no column of a weight")
    gain = (coordinates.flatten(1).std(0) / noise[:, column].std(0)) * (wanted * offered[:, column]).sum(0).sign()
    owner = torch.bucketize(column.cpu(), widths.cumsum(0), right=True).to(column.device)
    start = (widths.cumsum(0) - widths).to(column.device)
    parts = []
    for index in owner.unique().tolist():
        (which,) = torch.where(owner == index)
        parts.append((_linear_map(modules[index], draws), which, column[which] - start[index], gain[which]))
    return Coordinates(tuple(shape), parts)


def _standardized(x: Tensor) -> Tensor:
    """Return columns over samples without their mean, of unit length; a constant column is zero and has no match."""
    x = x - x.mean(0)
    norm = x.norm(dim=0)
    return torch.where(norm > 1e-6 * norm.max(), x / norm.clamp_min(torch.finfo(x.dtype).tiny), 0.0)


def _linear_map(module: nn.Module, draws: Draws) -> _LinearMap:
    inputs = torch.cat(draws.inputs[module])  # (S, width)
    try:
        source = match_columns(inputs, _without(draws, module))
    except _UnmatchedError:
        source = None
    arrived, name = draws.arrived[module], draws.names[module]
    own = ModuleWeight(
        weakref.ref(module), name, inputs.shape[-1], arrived.dim(), arrived.dtype, arrived.device, draws.hooks
    )
    return _LinearMap(own, _norms_in_block(module, draws), draws.hooks, source)


def _norms_in_block(module: nn.Module, draws: Draws) -> tuple[weakref.ref[nn.Module], ...]:
    return tuple(weakref.ref(norm) for norm in draws.norms[module] if norm in draws.block_norms)


def _without(draws: Draws, module: nn.Module) -> Draws:
    """Return the draws of a layer without one of its modules, to find what that module's input is made of."""
    noise = {other: rows for other, rows in draws.noise.items() if other is not module}
    return replace(draws, noise=noise)


def mha_projections(module: nn.MultiheadAttention, draws: Draws) -> tuple[Coordinates, Coordinates]:
    """Return the projections of ``nn.MultiheadAttention``: its parameters, which are no modules with hooks."""
    head_dim, num_heads, width = module.head_dim, module.num_heads, module.embed_dim
    query, key = draws.inputs[module]
    norms = _norms_in_block(module, draws)

    def block(name: str, start: int, norms: tuple[weakref.ref[nn.Module], ...]) -> Coordinates:
        own = ParameterRows(weakref.ref(module), draws.names[module], name, start, start + width)
        every = torch.arange(width, device=query.device)
        parts = [(_LinearMap(own, norms, draws.hooks, None), every, every, torch.ones_like(every))]
        return Coordinates((num_heads, head_dim), parts)

    key_norms = norms if key is query else ()
    if module.in_proj_weight is not None:
        return block("in_proj_weight", 0, norms), block("in_proj_weight", width, key_norms)
    return block("q_proj_weight", 0, norms), block("k_proj_weight", 0, key_norms)


def _gain(norm: nn.Module | None, width: int, device: torch.device, hooks: set[int]) -> Tensor:
    """Return the gain of a norm per coordinate, ``(width,)``, whether it is stored as g or as 1 + g.

    On a vector of zero mean, both layer norm and RMS norm divide by its root mean square, so the difference of the
    responses to x and -x keeps the gain and removes the bias.
    """
    if norm is None:
        raise UnreadableError("a norm beside the projections has been replaced")
    own = next(parameter for parameter in norm.parameters())
    x = torch.ones(width, dtype=own.dtype, device=device if own.is_meta else own.device)
    x[1::2] = -1.0
    if width % 2:
        x[-3:] = x.new_tensor([1.0, 1.0, -2.0])
    with replaced_hooks(norm.modules(), lambda key, hook: hook if key in hooks else None):
        response = norm(x[None, None]) - norm(-x[None, None])
    gain: Tensor = (response[0, 0].float() / (2.0 * x.float())) * x.float().square().mean().sqrt()
    return gain.to(device)
