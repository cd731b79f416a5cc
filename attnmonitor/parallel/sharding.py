"""Whether a model's weights are sharded over processes, so that every rank must run its forward.

FSDP and tensor parallelism are recognized by their classes. These are looked up only where they have been imported:
a model that uses one has imported it, and importing them costs about a second.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

from torch import distributed, nn

__all__ = ["check_known_sharding", "dtensor_class", "is_sharded", "loaded_class", "objects_of"]


def is_sharded(model: nn.Module) -> bool:
    """Return whether parameters are spread over processes, so that all ranks must run a forward together."""
    if not distributed.is_initialized():
        return False
    wrapper, sharded = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel"), dtensor_class()
    return any(isinstance(module, wrapper) and _shards(module) for module in model.modules()) or any(
        isinstance(parameter, sharded) for parameter in model.parameters()
    )


def _shards(wrapper: Any) -> bool:
    """Return whether an FSDP1 wrapper divides weights; not with NO_SHARD, which one process always has."""
    return wrapper._handle is not None and bool(wrapper._handle.uses_sharded_strategy)


def check_known_sharding(model: nn.Module) -> None:
    """Raise ValueError where weights are sharded in an unsupported way, in which one rank would wait for the others."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id"):  # set by DeepSpeed ZeRO-3 on each parameter that it has partitioned
            raise ValueError(
                f"model={type(model).__qualname__}: {name} is partitioned by DeepSpeed ZeRO-3, whose forwards need "
                "every process in a way this monitor does not know; train with ZeRO-1, ZeRO-2 or FSDP, or audit its "
                "checkpoints with `attnmonitor scan`"
            )
    if _is_pipeline_stage(model):
        raise ValueError(
            f"model={type(model).__qualname__} is a stage of a pipeline (torch.distributed.pipelining): it takes what "
            "the stage before it computes, and no process can run a probe through all of them; audit its checkpoints "
            "with `attnmonitor scan`"
        )


def _is_pipeline_stage(model: nn.Module) -> bool:
    stages = loaded_class("torch.distributed.pipelining.stage", "_PipelineStageBase")
    if not stages:
        return False
    held = [stage.submod for stage in objects_of(stages) if hasattr(stage, "submod")]
    return any(module is model for submodule in held for module in submodule.modules())


def dtensor_class() -> Any:
    """Return ``DTensor`` for ``isinstance``; an empty tuple where it has not been imported."""
    return loaded_class("torch.distributed.tensor", "DTensor")


def loaded_class(module: str, name: str) -> Any:
    """Return a class for ``isinstance`` without importing its module; an empty tuple where that is not imported."""
    return getattr(sys.modules.get(module), name, ())


def objects_of(kind: Any) -> list[Any]:
    """Return all objects of a class, to find what holds a module: the module itself does not know."""
    # The type is asked, because isinstance would call properties of any object.
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]
