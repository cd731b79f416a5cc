"""Modules that only wrap another one: to compile, shard, checkpoint or synchronize it.

A wrapper is in no layer name, and the forward of one that synchronizes processes is left out when one of them runs the
model alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["data_parallel_left_out", "unwrap", "unwrapped_modules", "whole_name"]

_SYNCHRONIZING = (nn.parallel.DistributedDataParallel, nn.DataParallel)
# Names under which torch.compile, FSDP1, activation checkpointing and Lightning Fabric hold the module they wrap.
_WRAPPED = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "_original_module")
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module under compile, DDP and DataParallel wrappers."""
    while True:
        if isinstance(model, _SYNCHRONIZING):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            return model


def whole_name(model: nn.Module) -> str:
    """Return the class name of the user's own module, by which the whole model is called."""
    return [type(module).__name__ for name, module in _unwrapped_modules(model) if not name][-1]


def unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each module under the name it has without wrappers; the whole model under `whole_name`.

    A wrapper has the name of the module that it wraps, and comes before it.
    """
    whole = whole_name(model)
    for name, module in _unwrapped_modules(model):
        yield name or whole, module


def _unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[nn.Module] = set()

    # Not `named_modules`: a module's own name may have dots in it, so that its path does not say which its parent is.
    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for child, submodule in module.named_children():
            is_wrapped = child in _WRAPPED or (child == "module" and isinstance(module, _SYNCHRONIZING))
            yield from walk(name if is_wrapped else f"{name}.{child}" if name else child, submodule)

    return walk("", model)


@contextmanager
def data_parallel_left_out(model: nn.Module) -> Iterator[None]:
    """Call the module inside each DDP and DataParallel wrapper directly, while the context is open.

    DDP's own forward sends the buffers of the first process to the others, which do not run a forward now.
    """
    wrappers = [module for module in model.modules() if isinstance(module, _SYNCHRONIZING)]
    earlier = [vars(wrapper).get("forward") for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            vars(wrapper)["forward"] = _forward_of(wrapper.module)
        yield
    finally:
        for wrapper, own_forward in zip(wrappers, earlier, strict=True):
            del vars(wrapper)["forward"]
            if own_forward is not None:
                vars(wrapper)["forward"] = own_forward


def _forward_of(module: Any) -> Any:
    return lambda *args, **kwargs: module(*args, **kwargs)
