"""Which heads of a layer a rank holds under tensor parallelism."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import distributed, nn

from attnmonitor.parallel.sharding import dtensor_class

__all__ = ["HeadSlice", "head_slice"]


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
        if isinstance(parameter, dtensor_class()) and any(placement.is_shard() for placement in parameter.placements)
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
