"""W_Q and W_K of each head, out of any attention module, found by what they do and not by what they are called.

Projections hide in many layouts: separate, fused, interleaved per head, transposed, low rank. What they all share is
that a coordinate of a head's query is one column of some module's output, times a constant. So a few forwards are run
in which the output of every weight-bearing module inside an attention layer is replaced by noise. At position 0, where
a rotary embedding is the identity, each query coordinate then follows exactly one column of that noise, and finding it
is a correlation. Normalisations between the projection and the product (QK-norm) are bypassed in these forwards.

The weight behind a column is read off the module as ``f(I) - f(0)``, which is right for a linear layer, a transposed
one and one with an adapter beside it. A module fed by another one of the layer (low rank) is composed with it.
The gain of the norm in front of the projections is folded in where the block has one; rotary embeddings, biases and
QK-norm gains are left out. A layer of which any coordinate stays unmatched gets a reason, not a guess.

Letters: Hq query heads, Hkv key heads, d head size, D width of the layer's input, B sequences, L positions, N columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.capture.frames import own_name
from attnmonitor.capture.notes import Notes

__all__ = ["HeadProjections", "discover_projections"]

NUM_SAMPLES = 16
"""Draws behind each correlation: a random column of 16 draws correlates to `MATCH` with a given one with probability
below 1e-18, so among 1e5 columns no match is an accident."""

MATCH = 0.999
"""Least absolute correlation of a match; a copied column rounded to bfloat16 still has 0.99999."""


class _UnmatchedError(LookupError):
    """A coordinate of the queries or keys does not lead back to a weight."""


@dataclass(frozen=True, eq=False)
class HeadProjections:
    """The projections of one attention layer, read anew from the live weights whenever they are asked for.

    Attributes:
        norms: The normalisations whose gain is folded in; empty where none stands in front of the projections.
    """

    _query: _Coordinates
    _key: _Coordinates
    norms: tuple[nn.Module, ...]

    @property
    def w_q(self) -> Tensor:
        """Query projection of each head, ``(Hq, d, D)`` float32."""
        return self._query.weight()

    @property
    def w_k(self) -> Tensor:
        """Key projection of each key head, ``(Hkv, d, D)`` float32; of each query head where keys are tiled."""
        return self._key.weight()


@dataclass(eq=False)
class _LinearMap:
    """One weight-bearing module as a matrix from the layer's input to its output columns.

    Attributes:
        function: The module, or a function that applies a bare parameter.
        width: Size of its input.
        norms: Normalisations that act on its input.
        source: The coordinates of other modules' outputs that its input consists of, None for the layer's own input.
        like: A parameter of it: its dtype and device are those of the input.
    """

    function: Callable[[Tensor], Tensor]
    width: int
    norms: tuple[nn.Module, ...]
    source: _Coordinates | None
    like: Tensor

    def matrix(self) -> Tensor:
        """The effective weight, ``(N, D)`` float32."""
        options: dict[str, Any] = {"dtype": self.like.dtype, "device": self.like.device}
        inputs = torch.eye(self.width, **options)[None]
        origin = self.function(torch.zeros(1, 1, self.width, **options))
        weight = (self.function(inputs) - origin)[0].float().mT  # (N, width)
        for norm in self.norms:
            weight = weight * _gain(norm, self.width, options)
        return weight if self.source is None else weight @ self.source.weight().flatten(0, -2)


@dataclass(eq=False)
class _Coordinates:
    """Coordinates of shape ``(H, d)`` or ``(width,)``, each one a column of a linear map times a gain."""

    shape: tuple[int, ...]
    parts: list[tuple[_LinearMap, Tensor, Tensor, Tensor]]  # map, which coordinates, their columns, their gains

    def weight(self) -> Tensor:
        """``(*shape, D)`` float32."""
        with torch.no_grad():
            rows: list[Tensor] = []
            order: list[Tensor] = []
            for linear, which, columns, gains in self.parts:
                rows.append(linear.matrix()[columns] * gains[:, None])
                order.append(which)
            return torch.cat(rows)[torch.cat(order).argsort()].reshape(*self.shape, -1)

    def norms(self) -> tuple[nn.Module, ...]:
        """Every normalisation folded in, without repeats."""
        found: dict[int, nn.Module] = {}
        for linear, *_ in self.parts:
            inner = () if linear.source is None else linear.source.norms()
            found |= {id(norm): norm for norm in (*linear.norms, *inner)}
        return tuple(found.values())


@dataclass(eq=False)
class _Draws:
    """What the noisy forwards showed of one layer.

    Attributes:
        block_norms: Normalisations that belong to the layer's block: only their gain is folded in.
        inputs: Per module, what it was given at position 0, one ``(B, width)`` per forward.
        noise: Per module, what its output was replaced by at position 0, one ``(B, N)`` per forward.
        norms: Per module, the normalisations in front of it.
        query: ``(B, Hq, d)`` per forward, at position 0.
        key: ``(B, Hkv, d)`` per forward.
        running: Inputs and noise of the forward under way, all positions.
        complete: Whether the layer has been called in the forward under way; a shared layer counts once.
    """

    block_norms: set[nn.Module] = field(default_factory=set)
    inputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    noise: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[nn.Module, ...]] = field(default_factory=dict)
    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    running: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    complete: bool = False


def discover_projections(
    model: nn.Module, forward: Callable[[], Any], layers: Collection[str]
) -> dict[str, HeadProjections | str]:
    """Find the query and key projections of attention layers, whatever their layout.

    The layout of a layer never changes, so one discovery serves a whole run; the weights are read when asked for. The
    forwards run with noise in place of the layers' projections: call this inside the guard that keeps a probe quiet and
    outside of any other capture. Position 0 must be a token: text unpadded, or padded on the right.

    Args:
        model: The model whose modules the names belong to.
        forward: Runs the model once on a few sequences.
        layers: Names as captured; ``name#2`` shares the projections of ``name``.

    Returns:
        For each layer its `HeadProjections`, or why they could not be found.
    """
    modules = {own_name(name): module for name, module in model.named_modules()}
    modules[type(model).__name__] = modules.pop("")
    wanted = {name.partition("#")[0] for name in layers}
    draws = {name: _Draws(_block_norms(name, wanted, modules)) for name in wanted if name in modules}
    generator = torch.Generator()
    generator.manual_seed(0)
    seen = 0
    with torch.no_grad():
        while seen < NUM_SAMPLES:
            before = seen
            with _noisy(modules, draws, generator), capture_attention(model, partial(_note_call, draws)):
                forward()
            seen = max((sum(len(q) for q in draw.query) for draw in draws.values()), default=seen)
            if seen == before:
                break
    found: dict[str, HeadProjections | str] = {}
    for name in layers:
        base = name.partition("#")[0]
        found[name] = found[base] if base in found else _explain(modules.get(base), draws.get(base))
    return found


def _explain(module: nn.Module | None, draws: _Draws | None) -> HeadProjections | str:
    if module is None or draws is None or not draws.query:
        return "no attention of this name was captured"
    try:
        if isinstance(module, nn.MultiheadAttention):
            query, key = _packed(module, draws)
        else:
            query, key = (_match(torch.cat(x), draws) for x in (draws.query, draws.key))
        projections = HeadProjections(query, key, tuple({id(n): n for n in (*query.norms(), *key.norms())}.values()))
        projections.w_q, projections.w_k  # noqa: B018 - a weight that cannot be read now is no weight to report later
    except (LookupError, RuntimeError, TypeError, ValueError) as reason:
        return str(reason).partition("\n")[0]
    return projections


# The noisy forward.


@contextmanager
def _noisy(modules: dict[str, nn.Module], draws: dict[str, _Draws], generator: torch.Generator) -> Iterator[None]:
    """Replace what the weights inside the layers put out by noise and bypass their norms, while the context is open."""
    handles: list[RemovableHandle] = []
    inside = {layer: set(modules[layer].modules()) for layer in draws}
    in_front = Notes[tuple[nn.Module, ...]]()
    try:
        for name, module in modules.items():
            layer = next((layer for layer in draws if name != layer and module in inside[layer]), None)
            kind = _kind(module)
            if layer is None and kind == "norm":
                hook: Callable[..., Any] = partial(_note_norm, in_front)
            elif layer is not None and kind == "weight":
                hook = partial(_make_noise, draws[layer], in_front, generator)
            elif layer is not None and kind != "weight":
                hook = partial(_bypass, in_front)
            elif name in draws and isinstance(module, nn.MultiheadAttention):
                hook = partial(_note_front, draws[name], in_front)
            else:
                continue
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for draw in draws.values():
            draw.running.clear()
            draw.complete = False


def _block_norms(layer: str, layers: Collection[str], modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Normalisations of the block that holds ``layer``.

    Those inside it, those beside it or beside a module around it, and all of what holds no other layer. The last norm
    of the block before, which feeds a post-norm block, is none of these.
    """
    found = set(modules[layer].modules())
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        holder = modules[".".join(parts[:depth])]
        held = set(holder.modules())
        alone = sum(modules[other] in held for other in layers if other in modules) == 1
        found |= held if alone else set(holder.children())
    return {module for module in found if _kind(module) == "norm"}


def _kind(module: nn.Module) -> str:
    sizes = [parameter.dim() for parameter in module.parameters()]
    if any(size >= 2 for size in sizes):
        return "weight"
    return "norm" if sizes else "bare"


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = next(iter((*args, *kwargs.values())), None)
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def _note_norm(in_front: Notes[tuple[nn.Module, ...]], module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    x = _first_input(args, kwargs)
    if x is not None and isinstance(output, Tensor) and output.shape == x.shape:
        in_front.put(output, (module,))


def _bypass(in_front: Notes[tuple[nn.Module, ...]], module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    x = _first_input(args, kwargs)
    if x is None or not isinstance(output, Tensor) or isinstance(module, nn.Softmax):
        return None
    if output.shape != x.shape or output.dtype != x.dtype:
        return None
    passed = x.clone()  # a tensor of its own, so that what is made from it is known to have come through here
    in_front.put(passed, (*_front_of(x, in_front), *((module,) if _kind(module) == "norm" else ())))
    return passed


def _front_of(x: Tensor, in_front: Notes[tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    return in_front.get(x) or in_front.get(x._base) or ()


def _note_front(
    draws: _Draws, in_front: Notes[tuple[nn.Module, ...]], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    named = dict(zip(("query", "key"), args, strict=False)) | kwargs
    draws.norms[module] = _front_of(named["query"], in_front)
    draws.inputs[module] = [named["query"], named["key"]]


def _make_noise(
    draws: _Draws,
    in_front: Notes[tuple[nn.Module, ...]],
    generator: torch.Generator,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Tensor | None:
    x = _first_input(args, kwargs)
    if x is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    noise = torch.randn(output.shape, generator=generator).to(output)
    if module not in draws.running and not draws.complete:
        draws.running[module] = x, noise
        draws.norms[module] = _front_of(x, in_front)
    return noise


def _note_call(draws: dict[str, _Draws], call: AttentionCall) -> None:
    """Keep position 0 of a layer's queries and keys, and of what its modules took in and put out."""
    draw = draws.get(call.layer)
    if draw is None:
        return
    draw.complete = True
    num_sequences = call.query.shape[0]
    draw.query.append(call.query[:, :, 0].float())
    key = call.key.repeat(1, call.query.shape[1] // call.key.shape[1], 1, 1) if call.tiled else call.key
    draw.key.append(key[:, :, 0].float())
    lengths = {call.query.shape[-2], call.key.shape[-2]}
    for module, (x, noise) in draw.running.items():
        rows = _first_position(x, num_sequences, lengths), _first_position(noise, num_sequences, lengths)
        if rows[0] is not None and rows[1] is not None:
            draw.inputs.setdefault(module, []).append(rows[0].float())
            draw.noise.setdefault(module, []).append(rows[1].float())


def _first_position(x: Tensor, num_sequences: int, lengths: Collection[int]) -> Tensor | None:
    """Position 0 of every sequence, ``(B, N)``, of ``(B, L, N)``, ``(L, B, N)`` or ``(B·L, N)``; None for others."""
    if x.dim() == 4 and x.shape[1] == 1:
        x = x.squeeze(1)
    for length in lengths:
        if x.shape[:-1] == (num_sequences, length):
            return x[:, 0]
        if x.shape[:-1] == (length, num_sequences):
            return x[0]
        if x.shape[:-1] == (num_sequences * length,):
            return x.reshape(num_sequences, length, -1)[:, 0]
    return None


# From draws to weights.


def _match(coordinates: Tensor, draws: _Draws) -> _Coordinates:
    """Coordinates ``(S, *shape)`` as columns of the noise they follow.

    Raises:
        LookupError: One of them follows none.
    """
    num_samples, *shape = coordinates.shape
    modules = [module for module, noise in draws.noise.items() if sum(map(len, noise)) == num_samples]
    if not modules:
        raise _UnmatchedError("no module with weights was seen inside the layer")
    widths = torch.tensor([draws.noise[module][0].shape[-1] for module in modules])
    noise = torch.cat([torch.cat(draws.noise[module]) for module in modules], -1)
    wanted, offered = _standardised(coordinates.flatten(1)), _standardised(noise)
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
    return _Coordinates(tuple(shape), parts)


def _standardised(x: Tensor) -> Tensor:
    """Columns over samples, mean removed, of unit length; a constant column stays nought and matches nothing."""
    x = x - x.mean(0)
    norm = x.norm(dim=0)
    return torch.where(norm > 1e-6 * norm.max(), x / norm.clamp_min(torch.finfo(x.dtype).tiny), 0.0)


def _linear_map(module: nn.Module, draws: _Draws) -> _LinearMap:
    inputs = torch.cat(draws.inputs[module])  # (S, width)
    try:
        source = _match(inputs, _without(draws, module))
    except _UnmatchedError:
        source = None
    norms = tuple(norm for norm in draws.norms[module] if norm in draws.block_norms)
    return _LinearMap(module, inputs.shape[-1], norms, source, next(module.parameters()))


def _without(draws: _Draws, module: nn.Module) -> _Draws:
    """The draws of a layer without one of its modules, for what that module is fed by."""
    noise = {other: rows for other, rows in draws.noise.items() if other is not module}
    return _Draws(draws.block_norms, draws.inputs, noise, draws.norms)


def _packed(module: nn.MultiheadAttention, draws: _Draws) -> tuple[_Coordinates, _Coordinates]:
    """The projections of torch's own module: bare parameters, which no hook can see."""
    head_dim, num_heads, width = module.head_dim, module.num_heads, module.embed_dim
    query, key = draws.inputs[module]
    norms = tuple(norm for norm in draws.norms[module] if norm in draws.block_norms)

    def block(name: str, start: int, width_in: int, in_front: tuple[nn.Module, ...]) -> _Coordinates:
        weight = getattr(module, name)

        def apply(x: Tensor) -> Tensor:
            return nn.functional.linear(x, getattr(module, name)[start : start + width])

        linear = _LinearMap(apply, width_in, in_front, None, weight)
        every = torch.arange(width, device=weight.device)
        return _Coordinates((num_heads, head_dim), [(linear, every, every, torch.ones_like(every))])

    key_norms = norms if key is query else ()
    if module.in_proj_weight is not None:
        return block("in_proj_weight", 0, width, norms), block("in_proj_weight", width, width, key_norms)
    return block("q_proj_weight", 0, width, norms), block("k_proj_weight", 0, module.kdim or width, key_norms)


def _gain(norm: nn.Module, width: int, options: dict[str, Any]) -> Tensor:
    """The per-coordinate gain of a normalisation, ``(width,)``, whether it keeps it as g or as 1 + g.

    On a vector of zero mean, layer norm and RMS norm alike divide by its root mean square, so that an odd difference
    leaves the gain and removes the bias.
    """
    x = torch.ones(width, **options)
    x[1::2] = -1.0
    if width % 2:
        x[-3:] = torch.tensor([1.0, 1.0, -2.0], **options)
    response = norm(x[None, None]) - norm(-x[None, None])
    gain: Tensor = (response[0, 0].float() / (2.0 * x.float())) * x.float().square().mean().sqrt()
    return gain
