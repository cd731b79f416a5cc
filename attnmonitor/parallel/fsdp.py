"""Private attributes of both FSDPs, in one file: the one to open when torch changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from attnmonitor.parallel.sharding import loaded_class

__all__ = ["restored_shards", "through_wrapper"]


def through_wrapper(model: nn.Module, call: Callable[[nn.Module], object]) -> None:
    """Call ``call(module)`` with the user's own module, inside the forward of the FSDP wrapper around it if any."""
    wrapper = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
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
def restored_shards(model: nn.Module) -> Iterator[None]:
    """Free what FSDP gathers for forwards in the context, and have it forget them, also one that broke off.

    The root stays gathered after a forward without gradients, and an optimizer step would go past it. FSDP also notes
    the order of a forward's layers for the next backward, and after an exception takes the next forward for the inside
    of the broken one: a process would then gather what the others do not, or on a GPU not wait for the optimizer.
    """
    first, second = (
        loaded_class("torch.distributed.fsdp", name) for name in ("FullyShardedDataParallel", "FSDPModule")
    )
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
