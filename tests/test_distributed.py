"""Models spread over real processes: trained as without the monitor, measured as whole, written by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import TinyGPT, language_loss, token_batch
from processes import on_processes, spread, tell
from torch.distributed.tensor import DTensor

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.record import RunRecord

ON_TWO = ("ddp", "fsdp1", "fsdp2", "tp")
Ends = tuple[Path, list[dict[str, Any]]]


def _train(rank: int, how: str, watched: bool) -> dict[str, Any]:
    tell(f"{how}, {watched=}")
    torch.manual_seed(0)
    plain = TinyGPT(dropout=0.0 if "tp" in how else 0.1, batch_norm=how == "ddp", num_kv_heads=2)
    model = spread(plain, how)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    if watched:
        monitor = attach(model, optimizer, token_batch(), every_n_steps=2, strict=True, record=f"{how}.sqlite")
    torch.manual_seed(rank)
    losses = []
    for step in range(5):
        batch = token_batch(seed=10 * step + (0 if "tp" in how else rank))
        optimizer.zero_grad()
        loss = language_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
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


def _everything(rank: int) -> dict[str, Any]:
    # One pair of processes for all: starting them costs more than what they do.
    ends = {(how, watched): _train(rank, how, watched) for how in ON_TWO for watched in (False, True)}
    return {"ends": ends, "samples": {how: _one_sample(rank, how) for how in (None, *ON_TWO)}}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Ends:
    folder = tmp_path_factory.mktemp("processes")
    return folder, on_processes(folder, _everything)


@pytest.mark.parametrize("how", ON_TWO)
def test_two_processes_train_bit_identically_watched_or_not(how: str, processes: Ends) -> None:
    for rank in range(2):
        bare, watched = (processes[1][rank]["ends"][how, which] for which in (False, True))
        assert torch.equal(bare["generator"], watched["generator"])
        assert len(bare["tensors"]) > 20
        for one, other in zip(bare["tensors"], watched["tensors"], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("how", ON_TWO)
def test_one_process_writes_for_all(how: str, processes: Ends) -> None:
    folder, (first, second) = processes
    assert first["ends"][how, True]["history"] == [0, 2, 4]
    assert list(RunRecord.open(folder / first["ends"][how, True]["record"]).steps) == [0, 2, 4]
    assert second["ends"][how, True]["record"] == "None"
    assert second["ends"][how, True]["history"] == []
    assert {path.name for path in folder.glob("*.sqlite")} == {f"{how}.sqlite" for how in ON_TWO}


@pytest.mark.parametrize("how", ON_TWO)
def test_a_model_spread_over_processes_has_the_heads_and_numbers_of_the_whole_one(how: str, processes: Ends) -> None:
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
