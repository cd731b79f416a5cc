"""Drawing a probe from a loader moves nothing, whatever state the loader has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from loaders import KINDS, PLAIN, Once, Order, Rows, fresh
from models import TinyGPT, language_loss
from torch.utils.data import DataLoader

from attnmonitor import AttentionMonitor
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.measurement.loader import CannotCopyError, draw_first_batch
from attnmonitor.messages import AttentionMonitorWarning

CANNOT_COPY = ["global generator", "global counter", "class counter", "queue", "file", "stream", "collate function"]


def two_epochs(kind: str, *, watched: bool) -> list[int]:
    fresh()
    loader = KINDS[kind]()
    state = torch.get_rng_state()
    if watched:
        monitor = AttentionMonitor(TinyGPT(), loader, record=None)
    torch.set_rng_state(state)  # a new model draws from it
    epochs = 1 if kind in ("queue", "stream", "file", "list that is consumed") else 2
    seen = [int((batch * torch.arange(1, 25)).sum()) for _ in range(epochs) for batch in loader]
    if watched:
        monitor.close()
        assert "_get_iterator" not in vars(loader)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_given_loader_yields_the_same_training_batches(kind: str) -> None:
    assert two_epochs(kind, watched=True) == two_epochs(kind, watched=False)


@pytest.mark.parametrize("kind", CANNOT_COPY)
def test_loader_that_cannot_be_copied_names_the_part(kind: str) -> None:
    fresh()
    part = "collate_fn" if kind == "collate function" else "dataset"
    with pytest.raises(CannotCopyError, match=f"its {part} "):
        draw_first_batch(KINDS[kind]())


class OwnLoader(DataLoader[Any]):
    pass


class Incomplete(Rows):
    """Rows that do not work in a copy."""

    def __getstate__(self) -> dict[str, Any]:
        return {"count": 0}


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (OwnLoader(PLAIN, 2), "OwnLoader is a loader of your own"),
        (DataLoader(Incomplete(lambda _, index: index), 2), "a copy of it fails: AttributeError"),
    ],
    ids=["own loader", "copy fails"],
)
def test_first_batch_of_such_a_loader_is_seen_as_it_passes(loader: DataLoader[Any], reason: str) -> None:
    monitor = AttentionMonitor(TinyGPT(), loader, record=None)
    assert reason in monitor.probe.source
    with pytest.warns(AttentionMonitorWarning, match="attach failed and was ignored: RuntimeError: probe=DataLoader"):
        assert monitor.sample(0).failure == monitor.probe.missing
    assert monitor.history.steps == []
    first, *_ = list(loader)
    assert monitor.sample(0).failure is None
    assert monitor.history.steps == [0]
    assert torch.equal(monitor.probe.batch, first)
    monitor.close()


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - set(CANNOT_COPY)))
def test_other_loaders_are_drawn_twice_alike(kind: str) -> None:
    fresh()
    loader = KINDS[kind]()
    assert torch.equal(draw_first_batch(loader), draw_first_batch(loader))


def test_first_batch_training_reads_becomes_the_probe() -> None:
    model, loader = TinyGPT(), DataLoader(Once(iter(PLAIN)), 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monitor = attach(model, optimizer, loader, every_n_steps=1, record=None)
    assert monitor.sample(0).failure is not None
    for batch in loader:
        language_loss(model(batch), batch).backward()
        optimizer.step()
    assert torch.equal(monitor.probe.batch, torch.stack(PLAIN[:2]))
    assert monitor.history.steps == [0, 1, 2, 3, 4]

    resumed = AttentionMonitor(model, DataLoader(Once(iter(PLAIN[4:])), 2), record=None)
    resumed.load_state_dict(monitor.state_dict())
    assert resumed.probe.fingerprint == monitor.probe.fingerprint
    assert resumed.history.steps == [0, 1, 2, 3, 4]
    monitor.close()


def test_sampler_with_state_is_copied() -> None:
    order = Order()
    draw_first_batch(DataLoader(PLAIN, 2, sampler=order))
    assert list(order) == list(Order())
    rows = Rows(lambda each, _: each.count)
    draw_first_batch(DataLoader(rows, 2))
    assert rows.count == 0
