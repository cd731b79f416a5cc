"""A first forward in step: complete on all processes, or ended on all of them before a collective is left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import PATIENCE, on_processes, tell
from torch import nn

from attnmonitor.parallel.exchange import Exchange
from attnmonitor.parallel.in_step import in_step

WORLD, LIMIT = 3, 3.0
Forward = Callable[[int, Any], Any]


class Model(nn.Module):
    def __init__(self, forward: Forward, group: Any) -> None:
        super().__init__()
        self.of, self.group = forward, group

    def forward(self, rank: int) -> None:
        self.of(rank, self.group)


def _sum() -> None:
    dist.all_reduce(torch.ones(2))


def _complete(rank: int, pair: Any) -> None:
    _sum()
    dist.barrier()


def _in_pairs(rank: int, group: Any) -> None:
    """Processes 0 and 1 have a call of their own, which process 2 does not wait for before its end."""
    if rank < 2:
        dist.all_reduce(torch.ones(2), group=group)
        _sum()
    else:
        _sum()


def _raises(rank: int, pair: Any) -> None:
    _sum()
    if rank == 1:
        raise KeyError("no such expert")
    _sum()
    _sum()


def _swallows(rank: int, pair: Any) -> None:
    for _ in range(3):
        try:
            _raises(rank, pair)
        except Exception:
            if rank == 1:
                raise


def _differs(rank: int, pair: Any) -> None:
    dist.broadcast(torch.ones(2), 0) if rank == 2 else _sum()


def _ends_early(rank: int, pair: Any) -> None:
    _sum()
    if rank:
        _sum()


def _passes(rank: int, pair: Any) -> None:
    _sum()
    dist.send(torch.ones(1), 1) if rank == 0 else None
    _sum()


def _is_late(rank: int, pair: Any) -> None:
    if rank == 2:
        time.sleep(2 * LIMIT)
    _sum()


CASES: dict[str, tuple[Forward, tuple[str, ...] | str]] = {
    "complete": (_complete, ""),
    "in pairs": (_in_pairs, ""),
    "raises": (_raises, ("OtherProcessError: on process 1: KeyError: 'no such expert'", "KeyError: 'no such expert'")),
    "swallows": (_swallows, ("OtherProcessError: on process 1: ", "KeyError: 'no such expert'")),
    "differs": (_differs, "NotTogetherError: .*process 2 comes to broadcast of processes [0, 1, 2] in "),
    "ends early": (_ends_early, "NotTogetherError: .*process 0 to the end, process 1 comes to allreduce"),
    "passes": (_passes, "NotTogetherError: send passes tensors between single processes, in Model (Model)"),
    "is late": (_is_late, "MissingProcessError: process 2 did not take part within 3 s"),
}


def _run(rank: int, name: str, exchange: Exchange, pair: Any) -> dict[str, Any]:
    tell(name)
    model, said, started = Model(CASES[name][0], pair), "", time.monotonic()
    try:
        with in_step(exchange, range(WORLD), model):
            model(rank)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    seconds = time.monotonic() - started
    dist.all_reduce(after := torch.ones(1))  # nothing is left that this could be paired with
    return {"said": said, "seconds": seconds, "after": after.item()}


def _everything(rank: int) -> dict[str, Any]:
    exchange, pair = Exchange(range(WORLD)), dist.new_group([0, 1])
    found = {}
    for name in CASES:
        with mock.patch("attnmonitor.parallel.exchange.TIME_LIMIT", LIMIT if name == "is late" else 60.0):
            found[name] = _run(rank, name, exchange, pair)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(tmp_path_factory.mktemp("in_step"), _everything, world=WORLD)


@pytest.mark.parametrize("name", CASES)
def test_forward_is_complete_or_ended_on_all_processes(name: str, found: list[dict[str, Any]]) -> None:
    expected = CASES[name][1]
    for rank, each in enumerate(found):
        on_others, on_failing = expected if isinstance(expected, tuple) else (expected, expected)
        text = on_failing if rank == 1 else on_others
        assert all(part in each[name]["said"] for part in text.split(".*")), each[name]["said"]
        assert bool(each[name]["said"]) is bool(text)
        assert each[name]["after"] == WORLD
        assert each[name]["seconds"] < PATIENCE / 2  # the processes' own time limit is not waited for
