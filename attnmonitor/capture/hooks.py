"""Forward hooks of modules: left out for a while, or watched: do they take part in what a module computes?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["Hook", "replaced_hooks", "same_versions", "versions_of", "watched_hooks"]

Hook = Callable[..., Any]


@contextmanager
def replaced_hooks(modules: Iterable[nn.Module], replacement: Callable[[int, Hook], Hook | None]) -> Iterator[None]:
    """Exchange the forward hooks and pre-hooks of modules; handles that remove hooks still work.

    Args:
        modules: The modules.
        replacement: Maps a hook's key, which no other hook has, and the hook to the hook in its place; None for none.
    """
    originals: list[tuple[nn.Module, str, Any]] = []
    try:
        for module in modules:
            for kind in ("_forward_pre_hooks", "_forward_hooks"):
                hooks = getattr(module, kind)
                others = OrderedDict(
                    (key, other) for key, hook in hooks.items() if (other := replacement(key, hook)) is not None
                )
                if others != hooks:
                    originals.append((module, kind, hooks))
                    setattr(module, kind, others)
        yield
    finally:
        for module, kind, hooks in reversed(originals):
            setattr(module, kind, hooks)


@contextmanager
def watched_hooks(modules: Iterable[nn.Module]) -> Iterator[set[int]]:
    """Yield a set that receives the keys of hooks that take part in what their modules compute.

    As it runs, such a hook returns something, or changes a tensor of its arguments or of its module: the spectral norm,
    the weight norm and the pruning of ``torch.nn.utils`` set the module's weight in a pre-hook.
    """
    taking_part: set[int] = set()

    def watch(key: int, hook: Hook) -> Hook:
        def watched(module: nn.Module, *arguments: Any) -> Any:
            before = versions_of(_reachable(module, arguments))
            result = hook(module, *arguments)
            after = versions_of(_reachable(module, arguments))
            if result is not None or not same_versions(before, after):
                taking_part.add(key)
            return result

        return watched

    with replaced_hooks(modules, watch):
        yield taking_part


def versions_of(tensors: Iterable[Tensor]) -> list[tuple[Tensor, int]]:
    """Return each tensor with a number that every write into it raises; an inference tensor has none: -1."""
    return [(tensor, -1 if tensor.is_inference() else tensor._version) for tensor in tensors]


def same_versions(before: list[tuple[Tensor, int]], after: list[tuple[Tensor, int]]) -> bool:
    """Return whether these are the same tensors, none of them written in between."""
    return len(before) == len(after) and all(
        x is y and version == other for (x, version), (y, other) in zip(before, after, strict=True)
    )


def _reachable(module: nn.Module, arguments: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors a hook can reach: the module's own, also its parameters and buffers, and its arguments."""
    for value in (*vars(module).values(), *arguments):
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        yield from (each for each in inner if isinstance(each, Tensor))
