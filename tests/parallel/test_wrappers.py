"""Modules that only wrap another one are in no layer name, and one that synchronizes processes can be left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lightning.fabric.strategies import SingleDeviceStrategy
from lightning.fabric.wrappers import _FabricModule
from models import Block, TinyGPT, token_batch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from attnmonitor import AttentionMonitor
from attnmonitor.parallel.wrappers import data_parallel_left_out, unwrap, unwrapped_modules, whole_name


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    rendezvous = tmp_path_factory.mktemp("group") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Holder(nn.Module):
    """Holds a model under a name that wrappers use as well."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.module(token_ids)


def _checkpointed(model: TinyGPT) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model


def _fsdp1(model: TinyGPT, *, use_orig_params: bool) -> nn.Module:
    return FullyShardedDataParallel(
        model,
        device_id=torch.device("cpu"),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=use_orig_params,
    )


WRAPPED = {
    "ddp": nn.parallel.DistributedDataParallel,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "fabric": lambda model: _FabricModule(model, SingleDeviceStrategy()),
    "fabric ddp": lambda model: _FabricModule(
        nn.parallel.DistributedDataParallel(model), SingleDeviceStrategy(), original_module=model
    ),
    "checkpointed": _checkpointed,
    "fsdp1": lambda model: _fsdp1(model, use_orig_params=False),
    "fsdp1 with original parameters": lambda model: _fsdp1(model, use_orig_params=True),
}


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`", "ignore:The `NO_SHARD` sharding strategy")
@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_are_in_no_layer_name(how: str) -> None:
    model = WRAPPED[how](TinyGPT())
    plain = [name for name, _ in TinyGPT().named_modules() if name]
    assert whole_name(model) == "TinyGPT"
    assert list(dict.fromkeys(name for name, _ in unwrapped_modules(model))) == ["TinyGPT", *plain]
    monitor = AttentionMonitor(model, token_batch(), record=None, strict=True)
    assert list(monitor.coverage) == ["blocks.0.attn", "blocks.1.attn"]
    assert list(monitor.sample(0).values["key_rms"]) == ["blocks.0.attn", "blocks.1.attn"]


def test_module_of_the_user_called_module_keeps_its_name() -> None:
    holder = Holder(nn.parallel.DistributedDataParallel(TinyGPT()))
    monitor = AttentionMonitor(holder, token_batch(), record=None, strict=True)
    assert list(monitor.coverage) == ["module.blocks.0.attn", "module.blocks.1.attn"]


def test_unwrap_looks_through_compile_and_data_parallel() -> None:
    model = nn.Linear(2, 2)
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(torch.compile(nn.DataParallel(model))) is model


@pytest.mark.parametrize("fails", [False, True])
def test_left_out_forward_of_ddp_comes_back(fails: bool) -> None:
    calls: list[str] = []

    class Counted(nn.parallel.DistributedDataParallel):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            calls.append("ddp")
            return super().forward(*args)

    holder = Holder(Counted(nn.Linear(2, 2)))
    handle = holder.module.module.register_forward_hook(lambda *_: calls.append("inner"))
    try:
        with data_parallel_left_out(holder):
            holder(torch.ones(1, 3 if fails else 2))
    except RuntimeError:
        assert fails
    holder(torch.ones(1, 2))
    assert calls == [*(() if fails else ("inner",)), "ddp", "inner"]
    assert "forward" not in vars(holder.module)
    handle.remove()
