"""A collective that one process would start alone is seen before it starts, whatever starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from processes import on_processes, tell
from torch import Tensor, nn

from attnmonitor.parallel.collectives import CollectiveRecorder, LoneCollectiveError, no_collectives, why_not_joinable


class Caller(nn.Module):
    """Calls a collective in its forward."""

    def __init__(self, call: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(x)


class Swallowing(nn.Module):
    """Goes on whatever goes wrong inside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        try:
            self.inner(x)
        except Exception:
            return x
        return x


def _exchange(x: Tensor) -> None:
    other = 1 - dist.get_rank()
    both = [dist.P2POp(dist.isend, x, other), dist.P2POp(dist.irecv, x.clone(), other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()


CALLS: dict[str, Callable[[Tensor], Any]] = {
    "all_reduce": dist.all_reduce,
    "all_reduce async": lambda x: dist.all_reduce(x, async_op=True).wait(),
    "broadcast": lambda x: dist.broadcast(x, 0),
    "reduce": lambda x: dist.reduce(x, 0),
    "all_gather": lambda x: dist.all_gather([x.clone(), x.clone()], x),
    "all_gather_into_tensor": lambda x: dist.all_gather_into_tensor(x.repeat(2), x),
    "reduce_scatter_tensor": lambda x: dist.reduce_scatter_tensor(x[:2].clone(), x),
    "all_to_all": lambda x: dist.all_to_all([*torch.empty(4).chunk(2)], [*x.chunk(2)]),
    "all_to_all_single": lambda x: dist.all_to_all_single(torch.empty_like(x), x),
    "barrier": lambda _: dist.barrier(),
    "monitored_barrier": lambda _: dist.monitored_barrier(),
    "all_gather_object": lambda _: dist.all_gather_object([None, None], "text"),
    "broadcast_object_list": lambda _: dist.broadcast_object_list(["text"], 0),
    "send or recv": lambda x: dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0),
    "batch_isend_irecv": _exchange,
    "functional all_reduce": lambda x: functional.all_reduce(x, "sum", dist.group.WORLD) + 1,
    "functional all_to_all_single": lambda x: functional.all_to_all_single(x, None, None, dist.group.WORLD) + 1,
    "differentiable all_reduce": differentiable.all_reduce,
    "differentiable all_to_all": lambda x: differentiable.all_to_all([*torch.empty(4).chunk(2)], [*x.chunk(2)]),
}
POINT_TO_POINT = ("send or recv", "batch_isend_irecv")
UNEVEN: dict[str, Callable[[Tensor], Any]] = {
    "uneven all_to_all_single": lambda x: dist.all_to_all_single(
        torch.empty((2, 6)[dist.get_rank()]), x, ([1, 1], [3, 3])[dist.get_rank()], [1, 3]
    )
}


def _stopped(name: str, call: Callable[[Tensor], Any]) -> str:
    tell(name)
    model = nn.Sequential(nn.Identity(), Caller(call))
    with pytest.raises(LoneCollectiveError) as raised, CollectiveRecorder() as started, no_collectives(model):
        model(torch.ones(4))
    assert started.calls == []
    return f"{raised.value}"


def _on_process(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {"stopped": {name: _stopped(name, call) for name, call in CALLS.items()}}
    with pytest.raises(LoneCollectiveError), no_collectives(swallowing := Swallowing(Caller(dist.all_reduce))):
        swallowing(torch.ones(4))
    alone = [dist.new_group([each]) for each in range(2)][rank]
    x = torch.ones(4)
    with no_collectives(model := Caller(lambda x: dist.all_reduce(x, group=alone))):
        model(x)
    found["in a group of one"] = x.tolist()
    found["not joinable"] = {}
    for name, call in {**CALLS, **UNEVEN}.items():
        tell(f"recorded {name}")
        with CollectiveRecorder() as recorder:
            try:
                call(torch.ones(4))
            except RuntimeError as error:
                if "does not support" not in str(error):
                    raise
                continue
        found["not joinable"][name] = "; ".join(filter(None, map(why_not_joinable, recorder.calls)))
    return found


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(tmp_path_factory.mktemp("collectives"), _on_process)


@pytest.mark.parametrize("name", CALLS)
def test_collective_of_one_process_is_stopped(name: str, processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert " in 1 (Caller) needs 2 processes, but one measures alone; it was not started" in found["stopped"][name]


def test_group_of_one_process_may_communicate(processes: list[dict[str, Any]]) -> None:
    assert all(found["in a group of one"] == [1.0] * 4 for found in processes)


@pytest.mark.parametrize("name", [*CALLS, *UNEVEN])
def test_which_collectives_can_be_joined_with_zeros(name: str, processes: list[dict[str, Any]]) -> None:
    for found in processes:
        if name not in found["not joinable"]:
            pytest.skip("this version of gloo has no such collective")
        reason = found["not joinable"][name]
        if name in POINT_TO_POINT:
            assert "passes tensors between single processes" in reason
        elif name in UNEVEN:
            assert reason == "alltoall has sizes that depend on the data: [1, 3]"
        else:
            assert reason == ""


def test_one_process_alone_is_not_watched(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        with no_collectives(model := Caller(dist.all_reduce)):
            model(torch.ones(1))
    finally:
        dist.destroy_process_group()
