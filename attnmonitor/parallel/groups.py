"""The processes that share a model: those that hold parts of its weights, or replicas that train in step.

Trainer and rollout, or actor and critic, may be two models on two groups of processes. Each group measures its own
model, and the first rank of each group writes, logs and alerts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from torch import distributed, nn

from attnmonitor.parallel.sharding import dtensor_class, loaded_class, objects_of

__all__ = ["ModelGroup", "model_group"]


@dataclass(frozen=True)
class ModelGroup:
    """The processes that share one model.

    Attributes:
        ranks: Their ranks in the world, in ascending order.
        own_rank: This process's rank in the world.
    """

    ranks: tuple[int, ...] = (0,)
    own_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes, logs and alerts for the group."""
        return self.own_rank == self.ranks[0]


def model_group(model: nn.Module) -> ModelGroup:
    """Return the processes that share a model, with DDP wrappers around it: all of its meshes and process groups.

    It is the one mesh or group that contains all others, for example the mesh of FSDP and tensor parallelism together.
    Where none does, or the model names none (replicas averaged by hand), it is all processes.
    """
    if not distributed.is_initialized():
        return ModelGroup()
    named = set(_named_groups(model))
    largest = max(named, key=lambda ranks: (len(ranks), ranks), default=())
    if not largest or not all(set(ranks) <= set(largest) for ranks in named):
        largest = tuple(range(distributed.get_world_size()))
    return ModelGroup(largest, distributed.get_rank())


def _named_groups(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Return the ranks of each mesh of a `DTensor`, and of each process group of FSDP1 and DDP."""
    fsdp1 = loaded_class("torch.distributed.fsdp", "FullyShardedDataParallel")
    inside = [module for module in model.modules() if isinstance(module, (nn.parallel.DistributedDataParallel, fsdp1))]
    for module in dict.fromkeys([*inside, *_replicas_of(model)]):
        with suppress(Exception):  # a group that has been destroyed since
            yield tuple(sorted(distributed.get_process_group_ranks(module.process_group)))
    meshes = {param.device_mesh for param in model.parameters() if isinstance(param, dtensor_class())}
    for mesh in meshes:
        yield tuple(sorted(mesh.mesh.flatten().tolist()))


def _replicas_of(model: nn.Module) -> list[nn.parallel.DistributedDataParallel]:
    """Return the DDP wrappers around a model, which does not know what holds it."""
    ddp = nn.parallel.DistributedDataParallel
    return [each for each in objects_of(ddp) if any(module is model for module in each.modules())]
