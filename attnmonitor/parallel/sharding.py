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
from typing import Any

from torch import distributed, nn

__all__ = ["check_known_sharding", "is_sharded"]


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes, so that all of them must run a forward together."""
    if not distributed.is_initialized():
        return False
    wrapper, sharded = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel"), dtensor_class()
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


# Of either FSDP, what a forward leaves behind is in attributes of its own: there is no public way to them, but for
# `reset_iter_state` of the latest torch, which discards gradients that are being accumulated.


def dtensor_class() -> Any:
    return loaded_class("torch.distributed.tensor", "DTensor")


def loaded_class(module: str, name: str) -> Any:
    """A class for ``isinstance``, without importing what nobody has: a second, for something few runs need."""
    return getattr(sys.modules.get(module), name, ())
