"""Forwards in which noise replaces the outputs of the modules with weights in attention layers.

Hooks put the noise in, bypass norms inside the layers, and note for each module its input, its noise and the norms
before it; `note_call` adds the queries and keys that result.
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

from attnmonitor.capture import AttentionCall
from attnmonitor.capture.modules import is_linear_layer
from attnmonitor.capture.tensor_notes import Notes

__all__ = ["Draws", "Patterns", "block_norms", "is_norm", "noisy", "note_call"]

Patterns = dict[nn.Module, Tensor]
"""For norms inside layers, what their output is multiplied by in their place, ``(width,)``: see `head_norms`."""


# The types of packed weights; int64 and bool are indices and masks.
_PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}

# In eval mode these are linear maps with a weight of their own, unlike a norm of each vector.
_LINEAR_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(eq=False)
class Draws:
    """The random draws of one layer: inputs, noise, and the queries and keys that result, at position 0.

    Attributes:
        block_norms: Norms that belong to the layer's block: only their gain is multiplied in.
        names: The name of each module of the model.
        hooks: Keys of the user's hooks that take part in what a module computes.
        inputs: Per module, its input at position 0, one ``(B, width)`` per forward.
        noise: Per module, the noise in place of its output at position 0, one ``(B, N)`` per forward.
        arrived: Per module, its input as it arrived, without the values.
        ran: The modules with weights that ran before the attention.
        norms: Per module, the norms before it.
        query: ``(B, Hq, d)`` per forward, at position 0.
        key: ``(B, Hkv, d)`` per forward.
        running: Inputs and noise of the current forward, all positions.
        complete: Whether the layer has been called in the current forward; a shared layer counts once.
    """

    block_norms: set[nn.Module] = field(default_factory=set)
    names: dict[nn.Module, str] = field(default_factory=dict)
    hooks: set[int] = field(default_factory=set)
    inputs: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    noise: dict[nn.Module, list[Tensor]] = field(default_factory=dict)
    arrived: dict[nn.Module, Tensor] = field(default_factory=dict)
    ran: dict[nn.Module, None] = field(default_factory=dict)
    norms: dict[nn.Module, tuple[nn.Module, ...]] = field(default_factory=dict)
    query: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    running: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)
    complete: bool = False


@contextmanager
def noisy(
    modules: dict[str, nn.Module],
    draws: dict[str, Draws],
    generator: torch.Generator,
    patterns: Patterns | None = None,
) -> Iterator[None]:
    """Replace the outputs of modules with weights inside the layers by noise, and bypass their norms.

    With ``patterns`` each bypassed norm with a gain multiplies by a pattern of its own, which is added to them.
    """
    handles: list[RemovableHandle] = []
    inside = {layer: set(modules[layer].modules()) for layer in draws}
    norms_before = Notes[tuple[nn.Module, ...]]()
    try:
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                continue
            layer = next((layer for layer in draws if name != layer and module in inside[layer]), None)
            kind = _kind(module)
            if layer is None and kind == "norm":
                hook: Callable[..., Any] = partial(_note_norm, norms_before)
            elif layer is not None and (kind == "weight" or isinstance(module, _LINEAR_NORMS)):
                hook = partial(_make_noise, draws[layer], norms_before, generator)
            elif layer is not None and kind != "table":
                hook = partial(_bypass, norms_before, patterns if kind == "norm" else None)
            elif name in draws and isinstance(module, nn.MultiheadAttention):
                hook = partial(_note_mha_inputs, draws[name], norms_before)
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


def block_norms(layer: str, layers: Collection[str], modules: dict[str, nn.Module]) -> set[nn.Module]:
    """Return the norms of the block that holds ``layer``.

    These are the norms inside it, those beside it or beside a module around it, and all in a module around it that
    holds no other layer. The last norm of the preceding block, which feeds a post-norm block, is not one of them.
    """
    found = set(modules[layer].modules())
    parts = layer.split(".")
    for depth in range(1, len(parts)):
        holder = modules[".".join(parts[:depth])]
        held = set(holder.modules())
        holds_no_other = sum(modules[other] in held for other in layers if other in modules) == 1
        found |= held if holds_no_other else set(holder.children())
    return {module for module in found if _kind(module) == "norm"}


def _kind(module: nn.Module) -> str:
    """Return what a module is: with a weight, a norm, with tables (angles, positions), or bare."""
    sizes = [parameter.dim() for parameter in module.parameters()]
    if any(size >= 2 for size in sizes) or _is_packed(module):
        return "weight"
    if sizes:
        return "norm"
    return "table" if any(buffer.dim() >= 2 for buffer in module.buffers()) else "bare"


def is_norm(module: nn.Module) -> bool:
    """Return whether a module has vectors for parameters only, as a norm with a gain has."""
    return _kind(module) == "norm"


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module without parameters has a weight: in buffers, packed codes, or an object of a library."""
    return is_linear_layer(module) or any(
        buffer.dim() >= 2 and (buffer.dtype in _PACKED or name.rpartition(".")[2] == "weight")
        for name, buffer in module.named_buffers()
    )


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = next(iter((*args, *kwargs.values())), None)
    return x if isinstance(x, Tensor) and x.is_floating_point() else None


def _note_norm(
    norms_before: Notes[tuple[nn.Module, ...]], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    x = _first_input(args, kwargs)
    if x is not None and isinstance(output, Tensor) and output.shape == x.shape:
        norms_before.put(output, (module,))


def _bypass(
    norms_before: Notes[tuple[nn.Module, ...]],
    patterns: Patterns | None,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Any:
    x = _first_input(args, kwargs)
    if x is None or not isinstance(output, Tensor) or type(module).__module__ == nn.Softmax.__module__:
        return None  # also not an activation: weights with one between them are no one matrix
    if output.shape != x.shape or output.dtype != x.dtype:
        return None
    passed = x.clone()  # a new tensor object, which can carry a note of its own
    if patterns is not None:
        passed = passed * _pattern(patterns, module, x)
    norms_before.put(passed, (*_norms_before(x, norms_before), *((module,) if _kind(module) == "norm" else ())))
    return passed


def _pattern(patterns: Patterns, norm: nn.Module, x: Tensor) -> Tensor:
    """Return the pattern of a norm: powers of two, which no floating type rounds; a pattern per norm."""
    if norm not in patterns or len(patterns[norm]) != x.shape[-1]:
        generator = torch.Generator().manual_seed(len(patterns))
        patterns[norm] = 2.0 ** torch.randint(4, (x.shape[-1],), generator=generator)
    return patterns[norm].to(x)


def _norms_before(x: Tensor, norms_before: Notes[tuple[nn.Module, ...]]) -> tuple[nn.Module, ...]:
    return norms_before.get(x) or norms_before.get(x._base) or ()


def _note_mha_inputs(
    draws: Draws, norms_before: Notes[tuple[nn.Module, ...]], module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    named = dict(zip(("query", "key"), args, strict=False)) | kwargs
    draws.norms[module] = _norms_before(named["query"], norms_before)
    draws.inputs[module] = [named["query"], named["key"]]


def _make_noise(
    draws: Draws,
    norms_before: Notes[tuple[nn.Module, ...]],
    generator: torch.Generator,
    module: nn.Module,
    args: Any,
    kwargs: Any,
    output: Any,
) -> Tensor | None:
    if not draws.complete:
        draws.ran[module] = None
    x = _first_input(args, kwargs)
    if x is None or not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    noise = torch.randn(output.shape, generator=generator).to(output)
    if module not in draws.running and not draws.complete:
        draws.running[module] = x, noise
        draws.arrived[module] = x.new_empty((0,) * x.dim())
        draws.norms[module] = _norms_before(x, norms_before)
    return noise


def note_call(draws: dict[str, Draws], call: AttentionCall) -> None:
    """Keep position 0 of a layer's queries and keys, and of its modules' inputs and noise."""
    draw = draws.get(call.layer)
    if draw is None:
        return
    draw.complete = True
    num_sequences = call.query.shape[0]
    draw.query.append(call.query[:, :, 0].float())
    key = call.key.repeat(1, call.query.shape[1] // call.key.shape[1], 1, 1) if call.tiled else call.key
    draw.key.append(key[:, :, 0].float())
    lengths = {call.query.shape[-2], call.key.shape[-2]}
    for module, tensors in draw.running.items():
        rows = [_first_position(x, num_sequences, lengths) for x in tensors]
        found = [row.float() for row in rows if row is not None]
        if len(found) == len(rows):
            for kept, row in zip((draw.inputs, draw.noise), found, strict=True):
                kept.setdefault(module, []).append(row)


def _first_position(x: Tensor, num_sequences: int, lengths: Collection[int]) -> Tensor | None:
    """Return position 0 of every sequence, ``(B, N)``, of ``(B, L, N)``, ``(L, B, N)`` or ``(B·L, N)``; else None."""
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
