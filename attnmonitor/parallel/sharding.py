"""Weights spread over processes: who holds which heads, and what a forward owes to the other processes.

A forward of sharded weights is an appointment: FSDP gathers each layer's weights from all processes, tensor parallelism
sums over them. A process that breaks off in the middle would leave the others waiting for it, so the collectives of a
forward are noted while it runs; the rest of them can then be kept with empty hands. And FSDP, broken off, believes
itself still inside that forward, so it is put back to where a forward begins.

Of the heads of a layer under tensor parallelism each process holds a slice. Which one is read off the placements of
the layer's weights while its forward runs: FSDP has then gathered its own dimension of the mesh, and what is still
sharded is the other one.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

__all__ = [
    "Collective",
    "Collectives",
    "HeadSlice",
    "check_known_sharding",
    "head_slice",
    "is_sharded",
    "keep",
    "kept_shards",
    "through_wrapper",
]

_COLLECTIVES = ("c10d", "_c10d_functional")
_ALONE = ("wait_tensor", "_wrap_tensor_autograd")  # in that namespace, but done by each process for itself


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, so that all of them must run a forward together."""
    if not distributed.is_initialized():
        return False
    wrapper, sharded = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel"), _dtensor()
    return any(isinstance(module, wrapper) for module in model.modules()) or any(
        isinstance(parameter, sharded) for parameter in model.parameters()
    )


def check_known_sharding(model: nn.Module) -> None:
    """Raise ValueError where weights are spread in a way that is not supported: one process would wait for the others.

    DeepSpeed's ZeRO-3 marks each parameter it has partitioned with an id of its own.
    """
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):
            raise ValueError(
                f"model={type(model).__qualname__}: {name} is partitioned by DeepSpeed ZeRO-3, whose forwards need "
                "every process in a way this monitor does not know; train with ZeRO-1, ZeRO-2 or FSDP, or audit its "
                "checkpoints with `attnmonitor scan`"
            )


def through_wrapper(model: nn.Module, call: Callable[[nn.Module], object]) -> None:
    """Call ``call(module)`` with the user's own module, inside the forward of the FSDP wrapper around it if any."""
    wrapper = _loaded("torch.distributed.fsdp", "FullyShardedDataParallel")
    if not isinstance(model, wrapper):
        call(model)
        return
    inner = model.module
    kept = vars(inner).get("forward")

    def put_back() -> None:
        vars(inner).pop("forward", None)
        if kept is not None:
            inner.forward = kept

    def enter(_: None) -> None:
        put_back()
        call(inner)

    inner.forward = enter
    try:
        model(None)  # FSDP of torch 2.6 fails on a forward without arguments
    finally:
        put_back()


@contextmanager
def kept_shards(model: nn.Module) -> Iterator[None]:
    """Free what FSDP gathers for forwards in the context, and have it forget them, also one that broke off.

    The root stays gathered after a forward without gradients, and an optimizer step would go past it. FSDP also notes
    the order of a forward's layers for the next backward, and after an exception takes the next forward for the inside
    of the broken one: a process would then gather what the others do not, or on a GPU not wait for the optimizer.
    """
    first, second = (_loaded("torch.distributed.fsdp", name) for name in ("FullyShardedDataParallel", "FSDPModule"))
    put_back = [
        _as_first_is(module) if isinstance(module, first) else _as_second_is(module)
        for module in model.modules()
        if isinstance(module, (first, second))
    ]
    try:
        yield
    finally:
        for each in put_back:
            each()


# Of either FSDP, what a forward leaves behind is in attributes of its own: there is no public way to them, but for
# `reset_iter_state` of the latest torch, which discards gradients that are being accumulated.


def _as_second_is(module: Any) -> Callable[[], None]:
    """How to put one module under ``fully_shard`` back to where it is now, with sharded weights."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    groups = [group for group in groups if group is not None]
    indices = [list(group._post_forward_indices) for group in groups]
    order = list(getattr(state._comm_ctx, "post_forward_order", ()))

    def put_back() -> None:
        for group, kept in zip(groups, indices, strict=True):
            _drop_gathered(group)
            group._training_state = type(group._training_state).IDLE
            group._post_forward_indices[:] = kept
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        getattr(state, "_modules_to_run_forward", set()).clear()
        if hasattr(state._comm_ctx, "post_forward_order"):  # there is none before the first forward
            state._comm_ctx.post_forward_order[:] = order
        module.reshard()

    return put_back


def _drop_gathered(group: Any) -> None:
    """Wait for weights that are being gathered, and forget them: to unpack them would take memory that may be short."""
    gathered = group._all_gather_result
    if gathered is not None:
        if gathered.all_gather_work is not None:
            gathered.all_gather_work.wait()
        if gathered.all_gather_event is not None:
            group._wait_all_gather_streams_on_event(gathered.all_gather_event)
        group._all_gather_result = None


def _as_first_is(module: Any) -> Callable[[], None]:
    """How to put one ``FullyShardedDataParallel`` module back to where it is now, with sharded weights."""
    from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle, order = module._handle, list(module._exec_order_data.handles_post_forward_order)
    index = None if handle is None else handle._post_forward_index

    def put_back() -> None:
        module._exec_order_data.handles_post_forward_order[:] = order
        module.training_state = TrainingState.IDLE
        if handle is not None:
            handle._post_forward_index = index
            handle._training_state = HandleTrainingState.IDLE
            _reshard(module, handle, free_unsharded_flat_param=True)

    return put_back


@dataclass(frozen=True)
class _Blank:
    """A tensor without its contents."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def filled(self) -> Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


Collective = tuple[Any, Any, Any]  # operation, arguments, keyword arguments; tensors left blank


class Collectives(TorchDispatchMode):
    """Notes every collective that this process starts while the context is open.

    One that fails has not been started: on a GPU it is memory for its outcome that is short.

    Attributes:
        calls: What `keep` takes, in order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(each, _dtensor()) for each in types):
            return NotImplemented  # it comes back in pieces that are plain tensors and collectives
        result = func(*args, **kwargs)
        if func.namespace in _COLLECTIVES and func._opname not in _ALONE:
            blank = tree_map_only(Tensor, lambda x: _Blank(x.shape, x.dtype, x.device), (args, kwargs))
            self.calls.append((func, *blank))
        return result


def keep(calls: Sequence[Collective]) -> None:
    """Take part in these collectives with zeros, so that nobody waits; what comes of it is good for nothing."""
    for func, args, kwargs in calls:
        args, kwargs = tree_map_only(_Blank, _Blank.filled, (args, kwargs))
        result = func(*args, **kwargs)
        if func.namespace == "_c10d_functional":
            for each in tree_iter(result):
                torch.ops._c10d_functional.wait_tensor(each)


@dataclass(frozen=True, eq=False)
class HeadSlice:
    """Which part of a layer's heads this process holds.

    Attributes:
        group: The processes that share the layer, in the order of their heads.
        splits_keys: Whether the key heads are dealt out as well, and not all of them to every process.
    """

    group: distributed.ProcessGroup
    splits_keys: bool


def head_slice(module: nn.Module, heads: tuple[int, int, int]) -> HeadSlice | str | None:
    """Say how the heads of a layer are dealt out to processes, from its weights as they are inside its forward.

    Args:
        module: The layer.
        heads: Query heads, key heads and head size that this process computed.

    Returns:
        None where this process has all of them; a reason where the weights do not tell.
    """
    sharded = [
        parameter
        for parameter in module.parameters()
        if isinstance(parameter, _dtensor()) and any(placement.is_shard() for placement in parameter.placements)
    ]
    if not sharded:
        return None
    mesh = sharded[0].device_mesh
    if mesh.ndim != 1 or any(parameter.device_mesh != mesh for parameter in sharded):
        return "its weights are spread over several dimensions of a mesh, which does not tell its heads apart"
    rows = Counter(
        parameter.to_local().shape[0]
        for parameter in sharded
        if parameter.dim() == 2 and parameter.placements[0].is_shard(0)
        if parameter.shape[0] == mesh.size() * parameter.to_local().shape[0]
    )
    num_query_heads, num_kv_heads, head_dim = heads
    if rows[(num_query_heads + 2 * num_kv_heads) * head_dim]:
        return HeadSlice(mesh.get_group(), splits_keys=True)
    if rows[num_query_heads * head_dim]:
        queries_among_them = num_query_heads == num_kv_heads
        return HeadSlice(mesh.get_group(), splits_keys=rows[num_kv_heads * head_dim] > queries_among_them)
    return (
        f"its weights are spread over {mesh.size()} processes, and none of them deals out {num_query_heads} query "
        f"heads of size {head_dim} to each"
    )


def _dtensor() -> Any:
    return _loaded("torch.distributed.tensor", "DTensor")


def _loaded(module: str, name: str) -> Any:
    """A class for ``isinstance``, without importing what nobody has: a second, for something few runs need."""
    return getattr(sys.modules.get(module), name, ())
