"""Match a head's coordinates with columns of noise by correlation, and read the weights of these columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.projections.noise import Draws

__all__ = ["Coordinates", "match_columns", "mha_projections"]

MATCH = 0.999
"""Smallest absolute correlation of a match; a copied column rounded to bfloat16 still has 0.99999."""


class _UnmatchedError(LookupError):
    """A coordinate of the queries or keys follows no column of a weight."""


@dataclass(eq=False)
class _LinearMap:
    """One module with weights as a matrix from the layer's input to its output columns.

    Attributes:
        function: The module, or a function that applies a bare parameter.
        width: Size of its input.
        norms: Norms that act on its input.
        source: The coordinates of other modules' outputs that make up its input; None for the layer's own input.
        like: A parameter of it: its dtype and device are those of the input.
    """

    function: Callable[[Tensor], Tensor]
    width: int
    norms: tuple[nn.Module, ...]
    source: Coordinates | None
    like: Tensor

    def matrix(self) -> Tensor:
        """Return the effective weight, ``(N, D)`` float32."""
        options: dict[str, Any] = {"dtype": self.like.dtype, "device": self.like.device}
        inputs = torch.eye(self.width, **options)[None]
        origin = self.function(torch.zeros(1, 1, self.width, **options))
        weight = (self.function(inputs) - origin)[0].float().mT  # (N, width)
        for norm in self.norms:
            weight = weight * _gain(norm, self.width, options)
        return weight if self.source is None else weight @ self.source.weight().flatten(0, -2)


@dataclass(eq=False)
class Coordinates:
    """Coordinates of shape ``(H, d)`` or ``(width,)``, each one a column of a linear map times a gain."""

    shape: tuple[int, ...]
    parts: list[tuple[_LinearMap, Tensor, Tensor, Tensor]]  # map, which coordinates, their columns, their gains

    def weight(self) -> Tensor:
        """Return the weight of each coordinate, ``(*shape, D)`` float32."""
        with torch.no_grad():
            rows: list[Tensor] = []
            order: list[Tensor] = []
            for linear, which, columns, gains in self.parts:
                rows.append(linear.matrix()[columns] * gains[:, None])
                order.append(which)
            return torch.cat(rows)[torch.cat(order).argsort()].reshape(*self.shape, -1)

    def norms(self) -> tuple[nn.Module, ...]:
        """Return every norm whose gain is multiplied in, each once."""
        found: dict[int, nn.Module] = {}
        for linear, *_ in self.parts:
            inner = () if linear.source is None else linear.source.norms()
            found |= {id(norm): norm for norm in (*linear.norms, *inner)}
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
    norms = tuple(norm for norm in draws.norms[module] if norm in draws.block_norms)
    return _LinearMap(module, inputs.shape[-1], norms, source, next(module.parameters()))


def _without(draws: Draws, module: nn.Module) -> Draws:
    """Return the draws of a layer without one of its modules, to find what that module's input is made of."""
    noise = {other: rows for other, rows in draws.noise.items() if other is not module}
    return Draws(draws.block_norms, draws.inputs, noise, draws.norms)


def mha_projections(module: nn.MultiheadAttention, draws: Draws) -> tuple[Coordinates, Coordinates]:
    """Return the projections of ``nn.MultiheadAttention``: its parameters, which are no modules with hooks."""
    head_dim, num_heads, width = module.head_dim, module.num_heads, module.embed_dim
    query, key = draws.inputs[module]
    norms = tuple(norm for norm in draws.norms[module] if norm in draws.block_norms)

    def block(name: str, start: int, width_in: int, norms_before: tuple[nn.Module, ...]) -> Coordinates:
        weight = getattr(module, name)

        def apply(x: Tensor) -> Tensor:
            return nn.functional.linear(x, getattr(module, name)[start : start + width])

        linear = _LinearMap(apply, width_in, norms_before, None, weight)
        every = torch.arange(width, device=weight.device)
        return Coordinates((num_heads, head_dim), [(linear, every, every, torch.ones_like(every))])

    key_norms = norms if key is query else ()
    if module.in_proj_weight is not None:
        return block("in_proj_weight", 0, width, norms), block("in_proj_weight", width, width, key_norms)
    return block("q_proj_weight", 0, width, norms), block("k_proj_weight", 0, module.kdim or width, key_norms)


def _gain(norm: nn.Module, width: int, options: dict[str, Any]) -> Tensor:
    """Return the gain of a norm per coordinate, ``(width,)``, whether it is stored as g or as 1 + g.

    On a vector of zero mean, both layer norm and RMS norm divide by its root mean square, so the difference of the
    responses to x and -x keeps the gain and removes the bias.
    """
    x = torch.ones(width, **options)
    x[1::2] = -1.0
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0], **options)
    response = norm(x[None, None]) - norm(-x[None, None])
    gain: Tensor = (response[0, 0].float() / (2.0 * x.float())) * x.float().square().mean().sqrt()
    return gain
