"""Which heads of a layer a rank holds under tensor parallelism.

Each rank holds a slice of a layer's heads. It is read from the placements of the layer's weights while its forward
runs: FSDP has then gathered its own dimension of the mesh, so that what is still sharded is tensor parallelism.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import distributed, nn

from attnmonitor.parallel.sharding import dtensor_class

__all__ = ["HeadSlice", "head_slice"]


@dataclass(frozen=True, eq=False)
class HeadSlice:
    """A layer whose heads are divided among processes.

    Attributes:
        group: The processes that share the layer, in the order of their heads.
        splits_keys: Whether the key heads are divided as well; otherwise every process holds all of them.
    """

    group: distributed.ProcessGroup
    splits_keys: bool


def head_slice(module: nn.Module, heads: tuple[int, int, int]) -> HeadSlice | str | None:
    """Return how the heads of a layer are divided among processes, from its weights as they are inside its forward.

    Args:
        module: The layer.
        heads: Query heads, key heads and head size that this process computed.

    Returns:
        None where this process has all of them; a reason where it cannot be read from the weights.
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
        return (
            "its weights are sharded over several dimensions of a mesh, so it is unknown which process has which heads"
        )
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
        includes_query_weight = num_query_heads == num_kv_heads  # then the count has the query projection in it
        return HeadSlice(mesh.get_group(), splits_keys=rows[num_kv_heads * head_dim] > includes_query_weight)
    return (
        f"its weights are sharded over {mesh.size()} processes, but none of them gives each process {num_query_heads} "
        f"query heads of size {head_dim}"
    )
