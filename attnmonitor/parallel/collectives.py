"""The collectives of a forward: stop them, record them, and run the remaining ones with zeros after a failure.

A forward that one process runs alone must start none: the others would wait, or pair it with one of their own training.
A dispatch mode sees each collective before it starts, whatever started it.

A forward of a sharded model runs collectives on all ranks: FSDP gathers each layer's weights, tensor parallelism sums
over ranks. If one rank fails in the middle, it joins the remaining ones with zeros so that the others do not hang.
Which ones remain is known from a record of a complete forward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from attnmonitor.parallel.sharding import dtensor_class
from attnmonitor.parallel.wrappers import unwrapped_modules

__all__ = [
    "Collective",
    "CollectiveMode",
    "CollectiveRecorder",
    "LoneCollectiveError",
    "group_of",
    "is_point_to_point",
    "name_of",
    "no_collectives",
    "run_with_zeros",
    "running_module",
    "why_not_joinable",
]

_NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "symm_mem")
_LOCAL_OPERATIONS = ("wait_tensor", "_wrap_tensor_autograd")  # in these namespaces, but no communication

Collective = tuple[Any, Any, Any]  # operation, arguments, keyword arguments; tensors replaced by their _TensorSpec


@dataclass(frozen=True)
class _TensorSpec:
    """Shape, type and device of a tensor, without its contents."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class LoneCollectiveError(RuntimeError):
    """A forward that one process ran alone came to a collective, which was not started.

    Attributes:
        collective: The collective.
        place: Name and class of the module that calls it.
    """

    def __init__(self, collective: Collective, place: str, group: distributed.ProcessGroup | None) -> None:
        self.collective = collective
        self.place = place
        size = "several" if group is None else str(group.size())
        super().__init__(
            f"{name_of(collective)} in {place} needs {size} processes, but one measures alone; it was not started"
        )


class CollectiveMode(TorchDispatchMode):
    """Sees each collective that this process starts while the context is open."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, dtensor_class()) for each in types):
            return NotImplemented  # DTensor then calls plain operations and collectives
        if not _is_collective(func):
            return func(*args, **kwargs)
        call = _specified(func, args, kwargs)
        self.before(call)
        result = func(*args, **kwargs)
        self.after(call)
        return result

    def before(self, call: Collective) -> None:
        """Do something before a collective starts; if this raises, it is not started."""

    def after(self, call: Collective) -> None:
        """Do something when a collective has started."""


class _CollectiveStop(CollectiveMode):
    """Raises LoneCollectiveError at the first collective over more than one process, before it starts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self.found: LoneCollectiveError | None = None

    def before(self, call: Collective) -> None:
        group = group_of(call)
        if group is None or group.size() > 1:
            self.found = LoneCollectiveError(call, running_module(self._model), group)
            raise self.found


@contextmanager
def no_collectives(model: nn.Module) -> Iterator[None]:
    """Stop each collective of the model's forward before it starts, where there are several processes.

    Raises:
        LoneCollectiveError: There was one; also where the model has caught the exception.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield
        return
    with _CollectiveStop(model) as stop:
        yield
    if stop.found is not None:
        raise stop.found


class CollectiveRecorder(CollectiveMode):
    """Records every collective that this process starts while the context is open.

    A collective that fails to start is not recorded: on a GPU, memory for its result may be missing.

    Attributes:
        calls: The collectives in order, as `run_with_zeros` takes them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def after(self, call: Collective) -> None:
        """Record a collective."""
        self.calls.append(call)


def is_point_to_point(call: Collective) -> bool:
    """Return whether a call passes tensors between single processes."""
    return call[0].namespace == "symm_mem" or call[0]._opname in ("send", "recv_", "recv_any_source_")


def why_not_joinable(call: Collective) -> str:
    """Return why a process could not join this collective with zeros after a failure; ``""`` where it could."""
    func, args, kwargs = call
    if is_point_to_point(call):
        return f"{name_of(call)} passes tensors between single processes"
    if "all_to_all" in func._opname or "alltoall" in func._opname:
        sizes = [[getattr(each, "shape", each) for each in values] for values in _lists((args, kwargs))]
        if uneven := next((each for each in sizes if any(size != each[0] for size in each)), None):
            return f"{name_of(call)} has sizes that depend on the data: {[*map(_plain, uneven)]}"
    return ""


def _plain(size: Any) -> Any:
    return tuple(size) if isinstance(size, torch.Size) else size


def _lists(arguments: Any) -> Iterator[Sequence[Any]]:
    args, kwargs = arguments
    yield from (each for each in (*args, *kwargs.values()) if isinstance(each, list | tuple) and each)


def _is_collective(func: Any) -> bool:
    """Return whether an operation of the dispatcher passes tensors between processes."""
    return getattr(func, "namespace", "") in _NAMESPACES and func._opname not in _LOCAL_OPERATIONS


def _specified(func: Any, args: Any, kwargs: Any) -> Collective:
    """Return a call of a collective, without the contents of its tensors."""
    specs = tree_map_only(Tensor, lambda x: _TensorSpec(x.shape, x.dtype, x.device), (args, kwargs))
    return (func, *specs)


def name_of(call: Collective) -> str:
    """Return the name of a collective as its callers know it: ``alltoall_base_`` is ``alltoall``."""
    return str(call[0]._opname).strip("_").removesuffix("_base")


def group_of(call: Collective) -> distributed.ProcessGroup | None:
    """Return the processes of a collective; None where its arguments do not say."""
    func, args, kwargs = call
    given = {**dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)), **kwargs}
    group = given.get("process_group", given.get("group_name", given.get("group")))
    c10d: Any = distributed.distributed_c10d
    try:
        found = c10d._resolve_process_group(group) if isinstance(group, str) else c10d.ProcessGroup.unbox(group)
    except (TypeError, ValueError, RuntimeError, AttributeError):  # other torch versions may pass it in another form
        return None
    return found if isinstance(found, distributed.ProcessGroup) else None


def running_module(model: nn.Module) -> str:
    """Return the name of the innermost module of the model whose code is running, and its class."""
    names = {module: name for name, module in unwrapped_modules(model)}
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        first = frame.f_code.co_varnames[:1]
        module = frame.f_locals.get(first[0]) if first else None
        if isinstance(module, nn.Module) and module in names:
            return f"{names[module]} ({type(module).__name__})"
    return f"the forward of {type(model).__name__}"


def run_with_zeros(calls: Sequence[Collective]) -> None:
    """Run these collectives with zeros, so that no other rank waits for this one; their results are not used."""
    for func, args, kwargs in calls:
        args, kwargs = tree_map_only(_TensorSpec, _TensorSpec.zeros, (args, kwargs))
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional":
            for each in tree_iter(result):
                torch.ops._c10d_functional.wait_tensor(each)
