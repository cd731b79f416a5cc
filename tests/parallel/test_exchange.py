"""Exchanges between real processes: complete on all of them, or given up on all of them, within the limit."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from processes import on_processes, tell

from attnmonitor.parallel.exchange import Exchange, MissingProcessError

LIMIT = 2.0
LATE = 4.0


def _gather(exchange: Exchange, own: Any) -> tuple[list[Any] | str, float]:
    started = time.monotonic()
    try:
        found: list[Any] | str = exchange.gather(own)
    except MissingProcessError as error:
        found = str(error)
    return found, time.monotonic() - started


def _late(rank: int, who: int) -> dict[str, Any]:
    """One process is late for an exchange, and in time for the next."""
    tell(f"process {who} is late")
    exchange = Exchange(range(3))
    if rank == who:
        time.sleep(LATE)
    given_up = _gather(exchange, rank)
    dist.barrier()  # as training would: else those who gave up are early
    return {"given up": given_up, "next": _gather(exchange, rank)[0]}


def _absent(rank: int) -> list[Any]:
    """Process 1 attaches only at the second try of the others."""
    tell("absent")
    found = [_gather(Exchange(range(3)), rank)[0]] if rank != 1 else []
    dist.barrier()
    return [*found, Exchange(range(3)).gather(rank)]


def _everything(rank: int) -> dict[str, Any]:
    exchange, pair = Exchange(range(3)), Exchange([2, 0])
    found: dict[str, Any] = {"many": [exchange.gather((rank, number)) for number in range(20)]}
    keys = dist.distributed_c10d._get_default_store().num_keys
    count = keys()
    dist.barrier()
    for number in range(50):
        exchange.gather(number)
    dist.barrier()
    found["keys"] = keys() - count
    found["first"] = exchange.from_first({"large": torch.arange(3_000_000)} if rank == 0 else None)["large"].sum()
    found["pair"] = pair.gather(rank) if rank != 1 else None
    found["alone"] = Exchange([rank]).gather(rank)
    with mock.patch("attnmonitor.parallel.exchange.TIME_LIMIT", LIMIT):
        found["late"] = {who: _late(rank, who) for who in (0, 2)}
        found["absent"] = _absent(rank)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_processes(tmp_path_factory.mktemp("exchange"), _everything, world=3)


def test_gather_returns_all_objects_in_order_of_ranks(found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        assert each["many"] == [[(other, number) for other in range(3)] for number in range(20)]
        assert each["pair"] == ([2, 0] if rank != 1 else None)
        assert each["alone"] == [rank]


def test_object_larger_than_a_value_of_the_store_arrives(found: list[dict[str, Any]]) -> None:
    assert [each["first"] for each in found] == [torch.arange(3_000_000).sum()] * 3


def test_exchanges_leave_no_keys(found: list[dict[str, Any]]) -> None:
    assert all(abs(each["keys"]) < 50 for each in found)  # those of the barriers come and go


@pytest.mark.parametrize("who", [0, 2])
def test_missing_process_is_named_within_the_limit(who: int, found: list[dict[str, Any]]) -> None:
    for rank, each in enumerate(found):
        said, seconds = each["late"][who]["given up"]
        assert said == f"process {who} did not take part within 2 s"
        assert seconds < (LIMIT + 1.5 if rank != who else 1.0)


@pytest.mark.parametrize("who", [0, 2])
def test_exchange_after_a_given_up_one_is_complete(who: int, found: list[dict[str, Any]]) -> None:
    assert [each["late"][who]["next"] for each in found] == [[0, 1, 2]] * 3


def test_second_try_is_complete_where_one_was_absent(found: list[dict[str, Any]]) -> None:
    absent = "process 1 did not take part within 2 s"
    assert [each["absent"] for each in found] == [[absent, [0, 1, 2]], [[0, 1, 2]], [absent, [0, 1, 2]]]


def _host_store(port: Any) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    time.sleep(600)


@pytest.fixture
def host() -> Iterator[tuple[int, int]]:
    """Yield the process that hosts a store, and its port."""
    context = multiprocessing.get_context("forkserver")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_host_store, args=(send,), daemon=True)
    process.start()
    yield process.pid, receive.recv()
    process.kill()


def test_store_that_does_not_answer_is_given_up(host: tuple[int, int]) -> None:
    pid, port = host
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    exchange = "attnmonitor.parallel.exchange"
    try:
        made = Exchange([0, 1])
        os.kill(pid, signal.SIGSTOP)  # as a machine that is gone without a word
        with mock.patch(f"{exchange}.TIME_LIMIT", 0.5), mock.patch(f"{exchange}.ANSWER_LIMIT", 0.5):
            for each in (made, Exchange([0, 1])):
                with pytest.raises(MissingProcessError, match="common store does not answer: 1 s"):
                    each.gather(0)
    finally:
        os.kill(pid, signal.SIGKILL)
        dist.destroy_process_group()


ENDING = """
import os, signal, sys, threading
import torch.distributed as dist
from attnmonitor.parallel import exchange

pid, port = map(int, sys.argv[1:])
store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
made = exchange.Exchange([0, 1])
threading.Timer(0.2, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
try:
    made.gather(0)
except KeyboardInterrupt:
    print("interrupted")  # the thread still runs
exchange.TIME_LIMIT = 0.2
normal, exchange.ANSWER_LIMIT = exchange.ANSWER_LIMIT, 0.2
os.kill(pid, signal.SIGSTOP)
try:
    made.gather(0)
except exchange.MissingProcessError as error:
    print(error)
exchange.ANSWER_LIMIT = normal
os.kill(pid, signal.SIGKILL)  # the thread returns while the program ends
sys.exit(7)
"""


def test_left_threads_do_not_abort_an_ending_program(host: tuple[int, int]) -> None:
    command = [sys.executable, "-c", ENDING, *map(str, host)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    said = "interrupted\nthe processes' common store does not answer: 0.4 s\n"
    assert (ended.stdout, ended.returncode) == (said, 7), ended.stderr
