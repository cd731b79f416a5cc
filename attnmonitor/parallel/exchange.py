"""Objects exchanged between processes within a time limit: no process waits longer for one that does not come.

They go through the key-value store with which the processes found each other, not through a collective. A collective
that one process does not start cannot be given up: on gloo its group is then unusable, on NCCL the process is aborted
after the group's own time limit. Giving up a key is harmless, and the missing process is known by name. The way is the
same with every backend, needs no group of its own and does not wait for a GPU.

The first rank collects the objects and puts down the list, so that n processes make about 3n requests and not n². One
key, written once (``compare_set``), decides whether an exchange has succeeded: all processes come to the same result,
also where one is late by about the limit.

A request to the store has no limit of its own: it waits for ever where the machine that hosts the store is gone without
a word. So an exchange runs in a thread, which is left behind if it does not come back. The end of the program waits for
it a little: up to Python 3.13, a thread that returns from the store while Python ends aborts the process.
"""

from __future__ import annotations

import atexit
import hashlib
import pickle
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from torch import distributed

__all__ = ["ANSWER_LIMIT", "TIME_LIMIT", "Exchange", "MissingProcessError", "refuse"]

TIME_LIMIT = 60.0  # seconds
ANSWER_LIMIT = 5.0  # seconds after that: the store does not answer
_PIECE = 4 << 20  # bytes; the store closes the connection on a value of more than 8 MiB
_SUCCESS = b"complete"
_MAX_NAMED = 8  # of missing processes in a message

_num_made: Counter[tuple[int, ...]] = Counter()
_ends: weakref.WeakSet[threading.Event] = weakref.WeakSet()  # one per thread that asks the store


class MissingProcessError(RuntimeError):
    """A process did not take part in an exchange in time, or the store is gone."""


class Exchange:
    """Exchanges objects among some processes; each makes its exchanges in the same order.

    Args:
        ranks: The processes by their rank in the world, this one among them, in the same order on all of them.
        attempt: What the exchanges belong to; where a process has refused it, see `refuse`, none waits for it.
    """

    def __init__(self, ranks: Sequence[int], attempt: int = 0) -> None:
        self._ranks = tuple(ranks)
        self._refused = _refusal_key(self._ranks, attempt)
        self._rank = distributed.get_rank()
        self._num_done = 0
        self._common = _common_store()
        self._gone: MissingProcessError | None = None
        try:
            self._store = _in_time(self._limit, lambda _: self._own_store())
        except MissingProcessError as error:
            self._gone = error

    def gather(self, own: Any) -> list[Any]:
        """Return the object of each process, in the order of the ranks.

        Raises:
            MissingProcessError: Not all processes came within `TIME_LIMIT`, or half of the world's own time limit where
                that is shorter; raised on all that came, and on those that come later.
        """
        if len(self._ranks) == 1:
            return [own]
        number, self._num_done = self._num_done, self._num_done + 1
        if self._gone is not None:
            raise self._gone
        objects: list[Any] = _in_time(self._limit, lambda is_over: self._gather(str(number), own, is_over))
        return objects

    def from_first(self, own: Any) -> Any:
        """Return the object of the first of the ranks on all processes.

        Raises:
            MissingProcessError: As for `gather`.
        """
        return self.gather(own if self._rank == self._ranks[0] else None)[0]

    @property
    def _limit(self) -> float:
        return _limit_of(self._common)

    def _own_store(self) -> Any:
        store, members = self._common, _members_key(self._ranks)
        number = _num_made[self._ranks]
        # A process that missed earlier ones, which the others gave up, takes part in their next one.
        while store.check([given_up := f"{members}/{number}/0/end"]) and store.get(given_up) != _SUCCESS:
            number += 1
        _num_made[self._ranks] = number + 1
        return distributed.distributed_c10d.PrefixStore(f"{members}/{number}", store)

    def _gather(self, number: str, own: Any, is_over: threading.Event) -> list[Any]:
        end = f"{number}/end"
        self._put(f"{number}/{self._rank}", pickle.dumps(own))
        is_first = self._rank == self._ranks[0]
        if not self._have_come([f"{number}/{rank}" for rank in self._ranks] if is_first else [end], end, is_over):
            result = self._store.compare_set(end, "", self._missing(number))
        elif is_first and not self._store.check([end]):
            self._put(f"{number}/all", pickle.dumps([self._take(f"{number}/{rank}") for rank in self._ranks]))
            result = self._store.compare_set(end, "", _SUCCESS.decode())
        else:
            result = self._store.get(end)
        if result != _SUCCESS:
            raise MissingProcessError(result.decode())
        objects = [pickle.loads(each) for each in pickle.loads(self._take(f"{number}/all"))]
        if is_first:
            self._delete(int(number) - 1)
        return objects

    def _have_come(self, keys: Sequence[str], end: str, is_over: threading.Event) -> bool:
        """Wait until all keys are there or the exchange has ended; return False if the limit passes before."""
        pause = 0.0002
        while not self._store.check([end]):
            keys = [key for key in keys if not self._store.check([key])]
            if not keys:
                break
            # Only in the first exchange: a process that refused is in none, so the others do not come to a second.
            if self._num_done == 1 and self._common.check([self._refused]):
                self._store.compare_set(end, "", self._common.get(self._refused).decode())
                break
            # Not `Store.wait`: it would hold the connection, which NCCL's watchdog needs as well.
            if is_over.wait(pause):
                return False
            pause = min(1.3 * pause, 0.02)
        return True

    def _missing(self, number: str) -> str:
        """Say which processes have not come; where all have, it is the first, which has not put down the list."""
        absent = [str(rank) for rank in self._ranks if not self._store.check([f"{number}/{rank}"])]
        absent = absent or [str(self._ranks[0])]
        named, num_more = ", ".join(absent[:_MAX_NAMED]), len(absent) - _MAX_NAMED
        if num_more > 0:
            named += f" and {num_more} more"
        return f"process {named} did not take part within {self._limit:.3g} s"

    def _put(self, key: str, value: bytes) -> None:
        """Store a value in pieces; the key itself comes last, so that where it exists all pieces do."""
        pieces = [value[start : start + _PIECE] for start in range(0, len(value), _PIECE)]
        for index, piece in enumerate(pieces):
            self._store.set(f"{key}/{index}", piece)
        self._store.set(key, str(len(pieces)))

    def _take(self, key: str) -> bytes:
        return b"".join(self._store.get(f"{key}/{index}") for index in range(int(self._store.get(key))))

    def _delete(self, number: int) -> None:
        """Delete an earlier exchange: all who take part in a later one have read it."""
        with suppress(RuntimeError):  # a kind of store that deletes nothing
            for which in (*self._ranks, "all"):
                key = f"{number}/{which}"
                if self._store.check([key]):
                    for index in range(int(self._store.get(key))):
                        self._store.delete_key(f"{key}/{index}")
                    self._store.delete_key(key)
            self._store.delete_key(f"{number}/end")


def _common_store() -> Any:
    """Return the store with which the processes of this program found each other."""
    return distributed.distributed_c10d._get_default_store()


def _limit_of(store: Any) -> float:
    # While one process waits here, the others may wait for it in a collective of training, which has a limit too.
    half: float = store.timeout.total_seconds() / 2
    return min(TIME_LIMIT, half)


def _members_key(ranks: tuple[int, ...]) -> str:
    return f"attnmonitor/{hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]}"


def _refusal_key(ranks: tuple[int, ...], attempt: int) -> str:
    return f"{_members_key(ranks)}/refused/{attempt}"


def refuse(ranks: Sequence[int], attempt: int, reason: str) -> None:
    """Tell the other processes not to wait for this one in an attempt.

    Args:
        ranks: As of the `Exchange` that the others may make.
        attempt: As there.
        reason: What has failed here.
    """
    text = f"process {distributed.get_rank()} cannot take part: {reason}"
    store, key = _common_store(), _refusal_key(tuple(ranks), attempt)
    with suppress(MissingProcessError):
        _in_time(_limit_of(store), lambda _: store.set(key, text))


def _in_time(limit: float, requests: Callable[[threading.Event], Any]) -> Any:
    """Return what requests to the store come to; raise MissingProcessError where it does not answer.

    Args:
        limit: Seconds.
        requests: Makes them; called with an event that is set when the limit has passed.
    """
    found: list[tuple[Any, Exception | None]] = []
    is_over, has_ended = threading.Event(), threading.Event()
    _ends.add(has_ended)

    def work() -> None:
        try:
            found.append((requests(is_over), None))
        except Exception as error:
            found.append((None, error))
        finally:
            has_ended.set()

    # A daemon: where the store never answers, the program can still end.
    threading.Thread(target=work, name="attnmonitor", daemon=True).start()
    try:
        has_ended.wait(limit)  # not by reading a clock, which may stand still
    finally:
        is_over.set()  # also at Ctrl-C, after which `Thread.join` takes a running thread for ended
    has_ended.wait(ANSWER_LIMIT)
    result, error = found[0] if found else (None, TimeoutError(f"{limit + ANSWER_LIMIT:.3g} s"))
    if isinstance(error, (distributed.DistError, TimeoutError)):
        raise MissingProcessError(f"the processes' common store does not answer: {error}") from error
    if error is not None:
        raise error
    return result


@atexit.register
def _wait_for_threads() -> None:
    """Wait up to `ANSWER_LIMIT` for each thread that asks the store."""
    for has_ended in list(_ends):
        if not has_ended.wait(ANSWER_LIMIT):
            break  # the others ask the same store
