"""Which heads of a layer a rank holds under tensor parallelism.

Each rank holds a slice of a layer's heads. It is read from the placements of the layer's weights while its forward
runs: FSDP has then gathered its own dimension of the mesh, so that what is still sharded is tensor parallelism. Where
tensor parallelism is written by hand, weights have no placements: then what each rank holds is compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import distributed, nn

from attnmonitor.parallel.sharding import dtensor_class

__all__ = ["HeadSlice", "head_slice", "projection_hashes", "unmarked_slice"]


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


def projection_hashes(module: nn.Module, heads: tuple[int, int, int]) -> dict[int, list[str]]:
    """Return hashes of the first rows of weights that may be projections to these heads, by number of rows.

    Args:
        module: The layer.
        heads: Query heads, key heads and head size that this process computed.
    """
    num_query_heads, num_kv_heads, head_dim = heads
    hashes: dict[int, list[str]] = {
        rows * head_dim: [] for rows in (num_query_heads, num_kv_heads, num_query_heads + 2 * num_kv_heads)
    }
    for parameter in module.parameters():
        if parameter.dim() == 2 and parameter.shape[0] in hashes:
            start = parameter.detach()[:8].cpu().contiguous()  # different shards differ in each row
            content = start.flatten().view(torch.uint8).numpy().tobytes()
            hashes[parameter.shape[0]].append(hashlib.sha256(content).hexdigest())
    return hashes


def unmarked_slice(
    group: distributed.ProcessGroup | None,
    heads: tuple[int, int, int],
    hashes: Sequence[Mapping[int, Sequence[str]]],
    *,
    same_numbers: bool | None,
) -> HeadSlice | str | None:
    """Return how a layer without placements is divided, from what each process of the group holds and measured.

    Args:
        group: The processes that the model's forward communicates with; None where there are several groups.
        heads: Query heads, key heads and head size that each process computed.
        hashes: `projection_hashes` of each process, in the order of the group.
        same_numbers: Whether all have measured the same; None where their probes differ, so that it is unknown.

    Returns:
        None where every process has the whole layer; a reason where it cannot be told.
    """
    num_query_heads, num_kv_heads, head_dim = heads
    first = hashes[0]
    divided = {
        rows: sum(len({each[rows][place] for each in hashes}) > 1 for place in range(len(first[rows])))
        for rows in first
        if all(len(each.get(rows, ())) == len(first[rows]) for each in hashes)
    }
    if same_numbers or (same_numbers is None and not any(divided.values())):
        return None
    if same_numbers is None:
        return "its weights differ between processes, and so do their probes; give all of them the same batch"
    if group is not None and divided.get((num_query_heads + 2 * num_kv_heads) * head_dim):
        return HeadSlice(group, splits_keys=True)
    if group is not None and (queries := divided.get(num_query_heads * head_dim)):
        if num_query_heads == num_kv_heads:
            return HeadSlice(group, splits_keys=queries > 1)
        return HeadSlice(group, splits_keys=bool(divided.get(num_kv_heads * head_dim)))
    return "processes measure different heads or positions of it, and its weights do not tell which"
