"""Programs that need every process in ways that weights do not tell, and models that are set up after attach.

In each: training is bit-identical, nothing hangs, and every sample has numbers or a reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from models import Block, TinyGPT, token_batch, train_step
from processes import FSDP2, in_parallel, on_processes, tell
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor import DTensor

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach

CPU = torch.device("cpu")
LAYERS = ["blocks.0.attn", "blocks.1.attn"]


class Experts(nn.Module):
    """One expert per process: each token chunk goes to a process's expert and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expert = nn.Linear(width, width)

    def exchanged(self, x: Tensor) -> Tensor:
        parts = [*x.chunk(dist.get_world_size())]
        return torch.cat(differentiable.all_to_all([torch.empty_like(part) for part in parts], parts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return self.exchanged(self.expert(self.exchanged(tokens))).view_as(x)


class Summed(nn.Module):
    """A product divided over processes, as in tensor parallelism written by hand."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return differentiable.all_reduce(self.inner(x))


class Passing(nn.Module):
    """A stage of a pipeline: the first process sends, the second receives."""

    def forward(self, x: Tensor) -> Tensor:
        dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)
        return x


class Dropless(nn.Module):
    """Sends tokens to experts in parts whose sizes would come from a router."""

    def forward(self, x: Tensor) -> Tensor:
        tokens, rank = x.flatten(0, 1), dist.get_rank()
        sizes = [[len(tokens) // 2] * 2, [len(tokens) // 4, len(tokens) - len(tokens) // 4]]
        received = tokens.new_empty(sum(each[rank] for each in sizes), tokens.shape[1])
        dist.all_to_all_single(received, tokens, [each[rank] for each in sizes], sizes[rank])
        return x


class Holder(nn.Module):
    """A module of the user's that holds a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.net(token_ids)


def _with_mlp(make: Callable[[nn.Module], nn.Module]) -> TinyGPT:
    model = TinyGPT()
    for block in model.blocks:
        block.mlp = make(block.mlp)
    return model


def _with_heads_divided_by_hand() -> TinyGPT:
    """Each process holds two of the four heads, without a word of it in the weights."""
    model = TinyGPT()
    for block in model.blocks:
        attn, rank = block.attn, dist.get_rank()
        for name in ("q_proj", "k_proj", "v_proj"):
            whole = getattr(attn, name)
            own = nn.Linear(32, 16)
            own.load_state_dict({key: value.chunk(2)[rank] for key, value in whole.state_dict().items()})
            setattr(attn, name, own)
        own = nn.Linear(16, 32, bias=False)
        own.load_state_dict({"weight": attn.o_proj.weight.detach().chunk(2, dim=1)[rank]})
        attn.o_proj = Summed(own)
        attn.num_query_heads = attn.num_kv_heads = 2
    return model


def _fsdp1(model: nn.Module, **settings: Any) -> nn.Module:
    settings = {"auto_wrap_policy": ModuleWrapPolicy({Block}), "use_orig_params": True, **settings}
    return FullyShardedDataParallel(model, device_id=CPU, **settings)


def _fsdp2(model: TinyGPT) -> nn.Module:
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def _compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _held_ddp(holder: Holder) -> Holder:
    holder.net = nn.parallel.DistributedDataParallel(holder.net)
    return holder


def _same(model: nn.Module) -> nn.Module:
    return model


ddp = nn.parallel.DistributedDataParallel
Setup = tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]
"""What makes the model that a monitor is attached to, and what is done to it after that."""

SETUPS: dict[str, Setup] = {
    "experts": (lambda: _with_mlp(lambda mlp: Experts(32)), _same),
    "tensor parallel by hand": (lambda: _with_mlp(Summed), _same),
    "heads divided by hand": (_with_heads_divided_by_hand, _same),
    "ddp in a module": (lambda: _held_ddp(Holder(TinyGPT(batch_norm=True, dropout=0.1))), _same),
    "no_shard": (lambda: _fsdp1(TinyGPT(), sharding_strategy=ShardingStrategy.NO_SHARD), _same),
    "fsdp1, flat parameters": (lambda: _fsdp1(TinyGPT(), use_orig_params=False), _same),
    "ddp after": (lambda: TinyGPT(batch_norm=True, dropout=0.1), ddp),
    "ddp in a module after": (lambda: Holder(TinyGPT(batch_norm=True, dropout=0.1)), _held_ddp),
    "compiled after": (lambda: TinyGPT(dropout=0.1), _compiled_in_place),
    "fsdp1 after": (TinyGPT, _fsdp1),
    "fsdp1 after, one unit": (TinyGPT, lambda model: _fsdp1(model, auto_wrap_policy=None)),
    "fsdp1 after, flat parameters": (TinyGPT, lambda model: _fsdp1(model, use_orig_params=False)),
    "no_shard after": (TinyGPT, lambda model: _fsdp1(model, sharding_strategy=ShardingStrategy.NO_SHARD)),
    "tensor parallel after": (TinyGPT, lambda model: in_parallel(model, init_device_mesh("cpu", (2,)))),
    "experts after": (TinyGPT, lambda model: _mlp_replaced(model, Experts(32))),
}
if FSDP2:
    SETUPS["fsdp2 after"] = (TinyGPT, _fsdp2)
HELD = ("ddp in a module", "ddp in a module after")


def _mlp_replaced(model: TinyGPT, mlp: nn.Module) -> TinyGPT:
    model.blocks[0].mlp = mlp
    return model


def _local(value: Tensor) -> Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def _train(rank: int, how: str, watched: bool) -> dict[str, Any]:
    tell(f"{how}, {watched=}")
    make, finish = SETUPS[how]
    torch.manual_seed(0)
    model = make()
    if watched:
        monitor = AttentionMonitor(model, token_batch(batch=4), 2, record=None)
    model = finish(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(rank)
    losses = []
    for step in range(3):
        if watched:
            monitor.on_step(step)
        losses.append(train_step(model, optimizer, token_batch(seed=10 * step + rank, batch=4)))
    state = [value for values in optimizer.state.values() for value in values.values()]
    end: dict[str, Any] = {"tensors": [*map(_local, (*model.parameters(), *model.buffers(), *state)), *losses]}
    end["generator"] = torch.get_rng_state()
    if watched:
        end["steps"], end["failures"] = monitor.history.steps, monitor.failures
        end["coverage"] = dict(monitor.coverage)
        end["values"] = {} if monitor.last_sample is None else monitor.last_sample.values
    return end


def _refused(model: nn.Module) -> str:
    with pytest.raises(ValueError, match="model=") as raised:
        AttentionMonitor(model, token_batch(), record=None)
    return str(raised.value)


def _refusals(rank: int) -> dict[str, str]:
    tell("refusals")
    staged = TinyGPT()
    stage = PipelineStage(staged, rank, 2, CPU)
    found = {"passing": _refused(_with_mlp(lambda mlp: nn.Sequential(mlp, Passing()))), "stage": _refused(staged)}
    assert stage.submod is staged
    found["dropless"] = _refused(_with_mlp(lambda mlp: nn.Sequential(mlp, Dropless())))
    part = TinyGPT()
    whole = _fsdp1(nn.Sequential(part))
    found["part"] = _refused(part)
    return {**found, "whole": type(whole).__name__}


def _on_first_process_only(rank: int) -> list[int]:
    """A monitor of replicas needs no other process."""
    tell("first process only")
    torch.manual_seed(0)
    model = ddp(TinyGPT(batch_norm=True))
    optimizer = torch.optim.AdamW(model.parameters())
    if rank == 0:
        monitor = attach(model, optimizer, token_batch(), every_n_steps=1, strict=True, record=None)
    for step in range(2):
        train_step(model, optimizer, token_batch(seed=step))
    return monitor.history.steps if rank == 0 else []


def _everything(rank: int) -> dict[str, Any]:
    # One pair of processes for all: starting them costs more than what they do.
    warnings.simplefilter("ignore")
    ends = {(how, watched): _train(rank, how, watched) for how in SETUPS for watched in (False, True)}
    return {"ends": ends, "refusals": _refusals(rank), "first only": _on_first_process_only(rank)}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("setups")
    return on_processes(folder, _everything)


@pytest.mark.parametrize("how", SETUPS)
def test_training_is_bit_identical(how: str, processes: list[dict[str, Any]]) -> None:
    for rank in range(2):
        bare, watched = (processes[rank]["ends"][how, which] for which in (False, True))
        assert torch.equal(bare["generator"], watched["generator"])
        assert len(bare["tensors"]) > 6
        for one, other in zip(bare["tensors"], watched["tensors"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("how", [how for how in SETUPS if how != "experts after"])
def test_every_sample_has_all_layers(how: str, processes: list[dict[str, Any]]) -> None:
    first, second = (each["ends"][how, True] for each in processes)
    names = [f"net.{name}" if how in HELD else name for name in LAYERS]
    assert (first["steps"], first["failures"]) == ([0, 2], 0)
    assert (second["steps"], second["failures"]) == ([], 0)
    assert list(first["coverage"]) == names
    assert all(layer.measured for layer in first["coverage"].values())
    # The output projection of divided heads is divided as well.
    divided = {"output_share"} if how in ("heads divided by hand", "tensor parallel after") else set()
    for metric, layers in first["values"].items():
        assert list(layers) == names
        assert all(heads.shape == (4,) for heads in layers.values())
        assert all(heads.isnan().all() if metric in divided else not heads.isnan().any() for heads in layers.values())
    if divided:
        assert all("output_share" in layer.values_reason for layer in first["coverage"].values())


def test_collective_that_comes_after_attach_is_not_started(processes: list[dict[str, Any]]) -> None:
    first = processes[0]["ends"]["experts after", True]
    assert (first["steps"], first["failures"]) == ([0, 2], 2)
    for layer in first["coverage"].values():
        assert "in blocks.0.mlp (Experts) needs 2 processes, but one measures alone; it was not started" in layer.reason
    assert all(heads.isnan().all() for layers in first["values"].values() for heads in layers.values())


def test_point_to_point_calls_are_refused_by_name(processes: list[dict[str, Any]]) -> None:
    for rank, call in enumerate(("send", "recv")):
        message = processes[rank]["refusals"]["passing"]
        assert f"{call} passes tensors between single processes, in blocks.0.mlp.1 (Passing)" in message
        assert "forward=" in message


def test_sizes_that_depend_on_data_are_refused_on_all(processes: list[dict[str, Any]]) -> None:
    for each in processes:
        message = each["refusals"]["dropless"]
        assert "alltoall has sizes that depend on the data: [" in message
        assert "in blocks.0.mlp.1 (Dropless)" in message


def test_pipeline_stage_is_refused(processes: list[dict[str, Any]]) -> None:
    assert all("stage of a pipeline" in each["refusals"]["stage"] for each in processes)


def test_part_of_a_wrapped_model_is_refused(processes: list[dict[str, Any]]) -> None:
    assert all("is a part of a Sequential under" in each["refusals"]["part"] for each in processes)


def test_replicas_need_a_monitor_on_the_first_process_only(processes: list[dict[str, Any]]) -> None:
    assert [each["first only"] for each in processes] == [[0, 1, 2], []]
