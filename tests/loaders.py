"""Data pipelines with state of their own, by kind: reading a batch from one changes what the next reader gets."""

from __future__ import annotations

import queue
import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler

VOCABULARY, LENGTH, ROWS = 50, 24, 8
shared = np.random.default_rng(0)
num_read = 0


def row(seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(seed))


class Rows(Dataset[Tensor]):
    """Rows that depend on how many numbers ``draw`` has given so far."""

    calls = 0

    def __init__(self, draw: Callable[[Any, int], int], state: Any = None) -> None:
        self.draw, self.state, self.count = draw, state, 0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Tensor:
        return row(int(self.draw(self, index)))


def counted(rows: Rows, index: int) -> int:
    rows.count += 1
    return rows.count


def counted_globally(rows: Rows, index: int) -> int:
    global num_read
    num_read += 1
    return num_read


def counted_in_class(rows: Rows, index: int) -> int:
    Rows.calls += 1
    return Rows.calls


class Order(Sampler[int]):
    def __init__(self) -> None:
        self.random = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.sample(range(ROWS), ROWS))


class Once(IterableDataset[Tensor]):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.rows)


class Lines:
    """A file that is closed with its last reference."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.file.writelines(f"{index}\n" for index in range(ROWS))
        self.file.seek(0)

    def __del__(self) -> None:
        self.file.close()


def filled() -> queue.Queue[int]:
    numbers: queue.Queue[int] = queue.Queue()
    for number in range(ROWS):
        numbers.put(number)
    return numbers


def masking() -> Callable[[list[Tensor]], Tensor]:
    own = np.random.default_rng(0)
    return lambda rows: torch.stack(rows) * int(own.integers(1, 3)) % VOCABULARY


def popping(rows: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([each.pop("ids") if "ids" in each else torch.zeros(LENGTH, dtype=torch.int64) for each in rows])


def fresh() -> None:
    """Set back the state that is not in a loader."""
    global shared, num_read
    shared, num_read, Rows.calls = np.random.default_rng(0), 0, 0
    torch.manual_seed(0)
    random.seed(0)


PLAIN = [row(index) for index in range(ROWS)]
KINDS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(PLAIN, 2, shuffle=True),
    "own torch generator": lambda: DataLoader(PLAIN, 2, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "numpy generator": lambda: DataLoader(Rows(lambda r, _: r.state.integers(99), np.random.default_rng(0)), 2),
    "random generator": lambda: DataLoader(Rows(lambda r, _: r.state.randrange(99), random.Random(0)), 2),
    "torch generator": lambda: DataLoader(
        Rows(lambda r, _: torch.randint(99, (), generator=r.state), torch.Generator().manual_seed(1)), 2
    ),
    "global generator": lambda: DataLoader(Rows(lambda *_: shared.integers(99)), 2),
    "counter": lambda: DataLoader(Rows(counted), 2),
    "global counter": lambda: DataLoader(Rows(counted_globally), 2),
    "class counter": lambda: DataLoader(Rows(counted_in_class), 2),
    "list that is consumed": lambda: DataLoader(Rows(lambda r, _: r.state.pop(), list(range(ROWS))), 2),
    "queue": lambda: DataLoader(Rows(lambda r, _: r.state.get_nowait(), filled()), 2),
    "file": lambda: DataLoader(Rows(lambda r, _: int(r.state.file.readline()), Lines()), 2),
    "stream": lambda: DataLoader(Once(row(index) for index in range(ROWS)), 2),
    "sampler": lambda: DataLoader(PLAIN, 2, sampler=Order()),
    "batch sampler": lambda: DataLoader(PLAIN, batch_sampler=BatchSampler(Order(), 2, drop_last=False)),
    "collate function": lambda: DataLoader(PLAIN, 2, collate_fn=masking()),
    "rows written in place": lambda: DataLoader([{"ids": each} for each in PLAIN], 2, collate_fn=popping),
    "persistent workers": lambda: DataLoader(Rows(counted), 2, num_workers=1, persistent_workers=True),
}
