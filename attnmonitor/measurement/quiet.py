"""Run a forward and restore all state that it changes: a monitored run stays bit-identical.

A forward changes the generators of torch (CPU, and CUDA once it is in use), ``random`` and numpy, and the modules'
buffers. The probe needs eval mode, no gradients, no cached autocast casts and no compilation. `quiet` restores all of
that on exit, also after an exception; `default_torch_state` is for what is computed from the probe afterwards.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from attnmonitor.parallel.fsdp import restored_shards
from attnmonitor.parallel.process_state import restored_random_state
from attnmonitor.parallel.threads import ProcessSetting

__all__ = ["default_torch_state", "not_compiled", "quiet", "statistics_of"]

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode without gradients, and on exit restore all state that a forward can change.

    That is: the random number generators; each module's own ``training`` flag; each entry of each module's buffers (the
    object and its value); grad mode; whether autocast caches its casts; the ``torch.compile`` stance, which is
    ``force_eager`` in the context, so that a probe adds no graph and no recompilation. Modules under FSDP are sharded
    again.
    """
    with ExitStack() as restore:
        restore.enter_context(restored_random_state())
        restore.enter_context(_restored_modules(model))
        restore.enter_context(restored_shards(model))
        # Not inference mode: a cache (RoPE) that a probe fills first in it breaks the next training step.
        restore.enter_context(torch.inference_mode(False))
        restore.enter_context(torch.no_grad())
        restore.enter_context(_no_autocast_cache())
        # Without dynamo loaded nothing can have been compiled, and loading it here would cost seconds. FlexAttention
        # loads it in its first call, to compile itself.
        if not sys.modules.keys().isdisjoint(("torch._dynamo", "torch.nn.attention.flex_attention")):
            restore.enter_context(_eager_mode())
        _to_eval_mode(model)
        yield


def _to_eval_mode(model: nn.Module) -> None:
    try:
        model.eval()
    except NotImplementedError:  # a module from `torch.export` in it has no modes, and refuses
        for module in model.modules():
            module.training = False


_eager_mode = ProcessSetting(lambda: torch.compiler.set_stance("force_eager"))


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function, run as it is where a compiled training step calls it: neither traced nor compiled."""
    if "torch._dynamo" in sys.modules:
        return _without_dynamo(function)
    disabled: Callable[P, T] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:  # loading it here would cost seconds
            return function(*args, **kwargs)
        disabled = disabled or _without_dynamo(function)
        return disabled(*args, **kwargs)

    return call


def _without_dynamo(function: Callable[P, T]) -> Callable[P, T]:
    disabled: Callable[P, T] = torch.compiler.disable(function)
    return disabled


@contextmanager
def default_torch_state() -> Iterator[None]:
    """Compute as in a fresh process, whatever default device or inference mode the caller has switched on.

    Tensors kept from one sample to the next would otherwise be on that device, or be inference tensors, which cannot be
    written outside of inference mode.
    """
    # Naming the device that is the default already would make every operation slower by some microseconds.
    device = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.inference_mode(False), torch.no_grad(), device:
        yield


@contextmanager
def _restored_modules(model: nn.Module) -> Iterator[None]:
    flags = [(module, getattr(module, "training", None)) for module in model.modules()]  # a frozen script has none
    buffers = [
        (module, name, buffer, None if buffer is None else (buffer.detach().clone(), _version(buffer)))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    names = [(module, set(module._buffers.keys())) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            if training is None:
                vars(module).pop("training", None)
            else:
                module.training = training
        for module, known in names:
            for added in set(module._buffers.keys()) - known:
                del module._buffers[added]
        for module, name, buffer, saved in buffers:
            if module._buffers[name] is not buffer:
                module._buffers[name] = buffer
            if buffer is not None and saved is not None:
                _restore(buffer, *saved)


def _restore(buffer: Tensor, value: Tensor, version: int) -> None:
    """Restore a buffer that was written, and no other: autograd refuses tensors written since the forward."""
    with torch.no_grad():
        if buffer.shape != value.shape:  # the observer of a fake quantization gives its buffers their size
            buffer.resize_(value.shape)
        if _version(buffer) != version:
            buffer.copy_(value)
        elif _may_be_statistics(buffer):
            buffer.data.copy_(value)  # through `data`: the version stays


def _may_be_statistics(buffer: Tensor) -> bool:
    """Return whether an operation may have written the buffer without raising the version.

    ``F.batch_norm`` does so with its running statistics, fused fake quantization with its ranges and scales.
    """
    can_be = buffer.dim() <= 1 and buffer.dtype is not torch.bool and not (buffer.is_inference() or buffer.is_meta)
    return can_be and buffer.layout is torch.strided and 0 not in buffer.stride()


def statistics_of(model: nn.Module) -> dict[str, bytes]:
    """Return the buffers that an operation may write unseen, for a comparison."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if _may_be_statistics(buffer)}
    return {name: buffer.detach().float().cpu().numpy().tobytes() for name, buffer in buffers.items()}


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@contextmanager
def _no_autocast_cache() -> Iterator[None]:
    # A cast cached without grad would be reused by the training forward that follows in the same autocast region.
    enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(enabled)
