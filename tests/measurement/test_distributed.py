"""Models sharded over real processes: training is unchanged, numbers are those of the whole model, one rank writes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from models import TinyGPT, token_batch, train_step
from processes import ON_TWO, on_processes, spread, tell
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.measurement.quiet import quiet
from attnmonitor.messages import AttentionMonitorWarning
from attnmonitor.parallel.collectives import CollectiveRecorder
from attnmonitor.parallel.exchange import Exchange
from attnmonitor.record import RunRecord

Ends = tuple[Path, list[dict[str, Any]]]


def _train(rank: int, how: str, watched: bool, **settings: Any) -> dict[str, Any]:
    tell(f"{how}, {watched=}")
    torch.manual_seed(0)
    plain = TinyGPT(dropout=0.0 if "tp" in how else 0.1, batch_norm=how == "ddp", num_kv_heads=2)
    model = spread(plain, how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if watched:
        settings = {"record": f"{how}.sqlite", **settings}
        monitor = attach(model, optimizer, token_batch(), every_n_steps=2, strict=True, **settings)
    torch.manual_seed(rank)
    losses = []
    for step in range(5):
        batch = token_batch(seed=10 * step + (0 if "tp" in how else rank))
        losses.append(train_step(model, optimizer, batch))
    state = [value for values in optimizer.state.values() for value in values.values()]
    end: dict[str, Any] = {"tensors": [*map(_local, (*model.parameters(), *model.buffers(), *state)), *losses]}
    end["generator"] = torch.get_rng_state()
    if watched:
        monitor.close()
        end["record"], end["history"] = str(monitor.record_path), monitor.history.steps
    return end


def _local(value: torch.Tensor) -> torch.Tensor:
    return (value.to_local() if isinstance(value, DTensor) else value).detach().clone()


def _one_sample(rank: int, how: str | None) -> dict[str, Any]:
    """One sample with every kind of metric; ``how`` None: the whole model on one process."""
    tell(f"one sample, {how}")
    torch.manual_seed(0)
    model = TinyGPT(num_kv_heads=2)
    if how is not None:
        model = spread(model, how)
    elif rank:
        return {}
    metrics = ["energy_effective_rank", "energy_rms", "key_incoherence", "key_rms", "attention_entropy"]
    monitor = AttentionMonitor(model, token_batch(), metrics=metrics, record=None, strict=True)
    sample = monitor.sample(0)
    assert bool(sample.values) == (rank == 0)
    heads = {name: layer.heads for name, layer in monitor.coverage.items()}
    return {"values": sample.values, "spread": sample.spread, "heads": heads, "signature": monitor.describe()}


def _own_collectives(rank: int, how: str) -> int:
    """Collectives of a sample beyond those of the probe's forward."""
    tell(f"own collectives, {how}")
    model = spread(TinyGPT(), how)
    monitor = AttentionMonitor(model, token_batch(), record=None, strict=True)
    with CollectiveRecorder() as forward, quiet(monitor.model):
        if how != "ddp" or rank == 0:
            model(token_batch()) if how != "ddp" else monitor.model(token_batch())
    with CollectiveRecorder() as sample:
        monitor.sample(0)
    return len(sample.calls) - len(forward.calls)


def _exchanges(how: str, **settings: Any) -> int:
    """Exchanges between the processes in one sample."""
    tell(f"exchanges, {how}")
    monitor = AttentionMonitor(spread(TinyGPT(), how), token_batch(), record=None, strict=True, **settings)
    with mock.patch.object(Exchange, "gather", autospec=True, side_effect=Exchange.gather) as gather:
        monitor.sample(0)
    return gather.call_count


def _unknown_slices(rank: int) -> dict[str, Any]:
    """Shard only the output projections, from which the heads of each rank cannot be read."""
    model = TinyGPT()
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        parallelize_module(block.attn, mesh, {"o_proj": RowwiseParallel(input_layouts=Replicate())})
    with pytest.warns(AttentionMonitorWarning) if rank == 0 else contextlib.nullcontext():
        sample = AttentionMonitor(model, token_batch(), record=None).sample(0)
    return {"values": sample.values, "reasons": [layer.reason for layer in sample.coverage.values()]}


def _different_probes(rank: int) -> str:
    with pytest.raises(ValueError, match="give them") as raised:
        AttentionMonitor(spread(TinyGPT(), "tp"), token_batch(seed=rank), record=None)
    return str(raised.value)


def _everything(rank: int) -> dict[str, Any]:
    # One pair of processes for all: starting them costs more than what they do.
    ends: dict[Any, Any] = {(how, watched): _train(rank, how, watched) for how in ON_TWO for watched in (False, True)}
    ends["ddp", "shared"] = _train(rank, "ddp", True, record=None, processes="all")
    samples = {how: _one_sample(rank, how) for how in (None, *ON_TWO)}
    own = {how: _own_collectives(rank, how) for how in ON_TWO}
    refused = {"unknown slices": _unknown_slices(rank), "different probes": _different_probes(rank)}
    exchanges = {how: _exchanges(how) for how in ON_TWO} | {"shared": _exchanges("ddp", processes="all")}
    return {"ends": ends, "samples": samples, "own collectives": own, "exchanges": exchanges, **refused}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    folder = tmp_path_factory.mktemp("processes")
    return folder, on_processes(folder, _everything)


@pytest.mark.parametrize(("how", "which"), [*((how, True) for how in ON_TWO), ("ddp", "shared")])
def test_training_on_two_processes_is_bit_identical(how: str, which: bool | str, processes: Ends) -> None:
    for rank in range(2):
        bare, watched = (processes[1][rank]["ends"][how, each] for each in (False, which))
        assert torch.equal(bare["generator"], watched["generator"])
        assert len(bare["tensors"]) > 20
        for one, other in zip(bare["tensors"], watched["tensors"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("how", ON_TWO)
def test_only_one_process_writes(how: str, processes: Ends) -> None:
    folder, (first, second) = processes
    assert first["ends"][how, True]["history"] == [0, 2, 4]
    assert list(RunRecord.open(folder / first["ends"][how, True]["record"]).steps) == [0, 2, 4]
    assert second["ends"][how, True]["record"] == "None"
    assert second["ends"][how, True]["history"] == []
    assert {path.name for path in folder.glob("*.sqlite")} == {f"{how}.sqlite" for how in ON_TWO}


@pytest.mark.parametrize("how", ON_TWO)
def test_sharded_model_has_the_numbers_of_the_whole_model(how: str, processes: Ends) -> None:
    samples = processes[1][0]["samples"]
    _same_numbers(samples[how], samples[None], exact=how != "tp")


def _same_numbers(found: dict[str, Any], expected: dict[str, Any], *, exact: bool) -> None:
    assert found["heads"] == expected["heads"] == dict.fromkeys(expected["heads"], (4, 2, 8))
    assert found["signature"]["model_signature"] == expected["signature"]["model_signature"]
    for table in ("values", "spread"):
        assert found[table].keys() == expected[table].keys()
        for metric, layers in expected[table].items():
            for layer, values in layers.items():
                if exact:
                    assert torch.equal(found[table][metric][layer], values)
                else:  # tensor parallelism adds the same numbers in another order
                    torch.testing.assert_close(found[table][metric][layer], values, rtol=1e-5, atol=1e-5)


def test_monitor_has_no_collectives_of_its_own(processes: Ends) -> None:
    for rank in range(2):
        assert processes[1][rank]["own collectives"] == dict.fromkeys(ON_TWO, 0)


def test_number_of_exchanges_per_sample(processes: Ends) -> None:
    # One to meet, one for how it ended, and one to join heads.
    for rank in range(2):
        expected = {"ddp": 0, "fsdp1": 2, "fsdp2": 2, "tp": 3, "shared": 1}
        assert processes[1][rank]["exchanges"] == {how: expected[how] for how in (*ON_TWO, "shared")}


def test_layer_with_unknown_head_slices_is_nan_with_reason(processes: Ends) -> None:
    found = processes[1][0]["unknown slices"]
    assert all("none of them gives each process 4 query heads" in reason for reason in found["reasons"])
    assert len(found["reasons"]) == 2
    for layers in found["values"].values():
        assert all(values.isnan().all() for values in layers.values())


def test_processes_that_share_heads_need_the_same_probe(processes: Ends) -> None:
    assert "2 different probes" in processes[1][0]["different probes"] == processes[1][1]["different probes"]


def _on_four(rank: int, how: str) -> dict[str, Any]:
    ends = [_train(rank, how, watched) for watched in (False, True)]
    return {"ends": ends, "samples": [_one_sample(rank, each) for each in (None, how)]}


@pytest.mark.soak
def test_four_processes_on_a_mesh_of_fsdp_and_tensor_parallel(tmp_path: Path) -> None:
    found = on_processes(tmp_path, _on_four, "fsdp2 x tp", world=4)
    for rank in range(4):
        bare, watched = found[rank]["ends"]
        assert all(map(torch.equal, bare["tensors"], watched["tensors"]))
        assert torch.equal(bare["generator"], watched["generator"])
        assert watched["history"] == ([0, 2, 4] if rank == 0 else [])
    _same_numbers(*reversed(found[0]["samples"]), exact=False)
