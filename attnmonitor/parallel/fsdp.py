"""Restore FSDP's state after a probe's forward, also after one that failed: all private attributes of both FSDPs.

After a forward without gradients the root module's weights stay gathered, and an optimizer step would not reach them
(pytorch#131965). FSDP also notes the order of a forward's layers for the next backward. After an exception it takes the
next forward for a part of the failed one: a rank would then gather weights that the others do not gather, or on a GPU
not wait for the optimizer. There is no public way to this state but ``reset_iter_state`` of the latest torch, which
discards gradients that are being accumulated. This is the one file to change when torch changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import distributed, nn

from attnmonitor.parallel.sharding import loaded_class, objects_of

__all__ = ["enclosing_fsdp1", "flattened_modules", "restored_shards", "through_wrapper"]


def enclosing_fsdp1(model: nn.Module) -> nn.Module:
    """Return the outermost FSDP1 wrapper whose module this is; the model itself where there is none.

    A forward of the module without its wrapper would make each wrapper inside it a root of its own, and the next
    training forward would fail.

    Raises:
        ValueError: The model is a part of a model under an FSDP1 wrapper.
    """
    wrapper = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    if not wrapper or not distributed.is_initialized():
        return model
    wrappers = objects_of(wrapper)
    while (around := next((each for each in wrappers if each.module is model), None)) is not None:
        model = around
    for other in wrappers:
        if other is not model and any(module is model for module in other.modules()):
            raise ValueError(
                f"model={type(model).__qualname__} is a part of a {type(other.module).__qualname__} under "
                "FullyShardedDataParallel, whose forward gathers the weights; give the whole wrapped model"
            )
    return model


def flattened_modules(model: nn.Module) -> dict[nn.Module, int]:
    """Return the modules whose parameters FSDP1 holds flattened, each with the most axes of one of its parameters."""
    wrapper = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    found: dict[nn.Module, int] = {}
    for unit in model.modules():
        if isinstance(unit, wrapper) and unit._handle is not None:
            flat = unit._handle.flat_param
            for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
                found[info.module] = max(len(shape), found.get(info.module, 0))
    return found


def through_wrapper(model: nn.Module, call: Callable[[nn.Module], object]) -> None:
    """Call ``call(module)`` on the user's own module, inside the forward of its FSDP wrapper if it has one."""
    wrapper = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    if not isinstance(model, wrapper):
        call(model)
        return
    inner = model.module
    own_forward = vars(inner).get("forward")

    def restore() -> None:
        vars(inner).pop("forward", None)
        if own_forward is not None:
            inner.forward = own_forward

    def call_inner(_: None) -> None:
        restore()
        call(inner)

    inner.forward = call_inner
    try:
        model(None)  # FSDP of torch 2.6 fails on a forward without arguments
    finally:
        restore()


@contextmanager
def restored_shards(model: nn.Module) -> Iterator[None]:
    """On exit, free the weights that FSDP gathered in the context and restore its state, also after an exception."""
    fsdp1, fsdp2 = (loaded_class("torch.distributed.fsdp", name) for name in ("FullyShardedDataParallel", "FSDPModule"))
    restore = [
        _fsdp1_restore(module) if isinstance(module, fsdp1) else _fsdp2_restore(module)
        for module in model.modules()
        if isinstance(module, (fsdp1, fsdp2))
    ]
    try:
        yield
    finally:
        for each in restore:
            each()


def _fsdp2_restore(module: Any) -> Callable[[], None]:
    """Return a function that restores one module under ``fully_shard`` to its present state, weights sharded."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    groups = [group for group in groups if group is not None]
    indices = [list(group._post_forward_indices) for group in groups]
    order = list(getattr(state._comm_ctx, "post_forward_order", ()))

    def restore() -> None:
        for group, earlier_indices in zip(groups, indices, strict=True):
            _drop_gathered(group)
            group._training_state = type(group._training_state).IDLE
            group._post_forward_indices[:] = earlier_indices
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = None
        getattr(state, "_modules_to_run_forward", set()).clear()
        if hasattr(state._comm_ctx, "post_forward_order"):  # there is none before the first forward
            state._comm_ctx.post_forward_order[:] = order
        module.reshard()

    return restore


def _drop_gathered(group: Any) -> None:
    """Wait for weights that are being gathered and drop them: unpacking them takes memory that may be missing."""
    gathered = group._all_gather_result
    if gathered is not None:
        if gathered.all_gather_work is not None:
            gathered.all_gather_work.wait()
        if gathered.all_gather_event is not None:
            group._wait_all_gather_streams_on_event(gathered.all_gather_event)
        group._all_gather_result = None


def _fsdp1_restore(module: Any) -> Callable[[], None]:
    """Return a function that restores one ``FullyShardedDataParallel`` to its present state, weights sharded."""
    from torch.distributed.fsdp._common_utils import HandleTrainingState, TrainingState
    from torch.distributed.fsdp._runtime_utils import _reshard

    handle, order = module._handle, list(module._exec_order_data.handles_post_forward_order)
    index = None if handle is None else handle._post_forward_index

    def restore() -> None:
        module._exec_order_data.handles_post_forward_order[:] = order
        module.training_state = TrainingState.IDLE
        if handle is not None:
            handle._post_forward_index = index
            handle._training_state = HandleTrainingState.IDLE
            _reshard(module, handle, free_unsharded_flat_param=handle.uses_sharded_strategy)

    return restore
