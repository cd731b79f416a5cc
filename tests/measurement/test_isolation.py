"""A copy of a user's objects shares nothing that can move, whatever way their code reaches it, or it is refused."""

from __future__ import annotations

import enum
import functools
import multiprocessing
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import randrange
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from attnmonitor.measurement.loader import CannotCopyError, draw_first_batch

LARGE = 2**28 + 1  # bytes: more than a copy may take; untouched pages take no memory

shared = np.random.default_rng(0)
PAIR = (1, shared)
numbers = iter(range(100))
bound = shared.integers

own_module: Any = ModuleType("own_module")
exec(
    "import random\nmoving = random.Random(0)\ndef still(index): return index + 1\nclass Counts: made = 0",
    vars(own_module),
)
sys.modules["own_module"] = own_module


class Rows(Dataset[int]):
    """Rows that call a function, and hold what it may use."""

    def __init__(self, draw: Callable[..., Any] = int, held: Any = None) -> None:
        self.draw, self.held = draw, held

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        return self.draw(index)


class Box:
    calls = 0

    def call(self, index: int) -> int:
        self.calls += 1
        return self.calls


call = Box().call


class OfCode(Rows):
    def __getitem__(self, index: int) -> int:
        return int(shared.integers(99))


class OfBase(OfCode):
    pass


class OfListOfClass(Rows):
    seen: ClassVar[list[int]] = []

    def __getitem__(self, index: int) -> int:
        self.seen.append(index)
        return len(self.seen)


class OfType(Rows):
    calls = 0

    def __getitem__(self, index: int) -> int:
        type(self).calls += 1
        return self.calls


class OfCell(Rows):
    calls = 0

    def __getitem__(self, index: int) -> int:
        __class__.calls += 1  # type: ignore[name-defined]
        return self.calls


class OfClassMethod(Rows):
    calls = 0

    @classmethod
    def count(cls) -> int:
        cls.calls += 1
        return cls.calls

    def __getitem__(self, index: int) -> int:
        return self.count()


count = OfClassMethod.count


class OfMethods(Rows):
    """Methods of all kinds: each calls a function of the class."""

    def __getitem__(self, index: int) -> int:
        return self.class_method() + self.static_method() + self.read


def still(*_: Any) -> int:
    return 1


def with_method(kind: str, function: Callable[..., int]) -> Rows:
    """Return rows with three methods, of which one calls a function, the others nothing that moves."""
    kinds: dict[str, Any] = {"class_method": classmethod, "static_method": staticmethod, "read": property}
    methods = {name: wrap(function if name == kind else still) for name, wrap in kinds.items()}
    rows: Rows = type("WithMethod", (OfMethods,), methods)()
    return rows


class Numbered:
    """Objects that count themselves."""

    made = 0

    def __init__(self) -> None:
        Numbered.made += 1
        self.number = Numbered.made


class NumberedByType(Numbered):
    def __init__(self) -> None:
        self.number = type(self).made = type(self).made + 1


class NumberedByAttribute(Numbered):
    def __init__(self) -> None:
        own_module.Counts.made += 1
        self.number = own_module.Counts.made


class NumberedBySet(Numbered):
    def __init__(self) -> None:
        self.number = Numbered.made
        Numbered.made = self.number + 1


class Point:
    """Objects whose constructor sets only what is theirs, in all ways of writing that."""

    def __init__(self, index: int) -> None:
        self.x = self.y = abs(index)
        self.box = Box()
        self.box.calls = self.x + len(type(self).__name__)
        self.box.calls += 1
        self.y += sum(self.x for _ in range(2))
        self.later = lambda: self.x


def of_generator(*_: Any) -> int:
    return int(shared.integers(99))


def of_function(index: int) -> int:
    of_function.calls = getattr(of_function, "calls", 0) + 1  # type: ignore[attr-defined]
    return of_function.calls  # type: ignore[attr-defined, no-any-return]


def of_class(index: int) -> int:
    Box.calls += 1
    return Box.calls


def of_setattr(index: int) -> int:
    setattr(Box, "calls", Box.calls + 1)  # noqa: B010
    return Box.calls


def of_namespace(index: int) -> int:
    names = vars(of_namespace)
    names["calls"] = names.get("calls", 0) + 1
    return int(names["calls"])


def of_constructor(kind: type[Any]) -> Callable[[int], int]:
    return lambda index: kind().number  # type: ignore[no-any-return]


def of_point(index: int) -> int:
    return Point(index).box.calls


def of_nested_code(index: int) -> int:
    return (lambda: int(shared.integers(99)))()


def of_tuple(index: int) -> int:
    return int(PAIR[1].integers(99))  # type: ignore[attr-defined]


def of_iterator(index: int) -> int:
    return next(numbers)


def of_builtin_method(index: int) -> int:
    return int(bound(99))


def of_method(index: int) -> int:
    return call(index)


def of_class_method(index: int) -> int:
    return count()


def of_default(index: int, seen: list[int] = []) -> int:  # noqa: B006
    seen.append(index)
    return len(seen)


def of_keyword_default(index: int, *, seen: list[int] = []) -> int:  # noqa: B006
    seen.append(index)
    return len(seen)


def of_module(index: int) -> int:
    return int(own_module.moving.randrange(99))


def of_import(index: int) -> int:
    from own_module import moving

    return int(moving.randrange(99))


def of_globals(index: int) -> int:
    return int(globals()["shared"].integers(99))


@functools.lru_cache
def cached(index: int) -> int:
    return index


def of_cache(index: int) -> int:
    return cached(index) + cached.cache_info().hits


def of_closure() -> Callable[[int], int]:
    own = random.Random(0)
    return lambda index: own.randrange(99)


def of_nonlocal() -> Callable[[int], int]:
    turn = 0

    def draw(index: int) -> int:
        nonlocal turn
        turn = 1 - turn
        return turn

    return draw


MOVING: dict[str, tuple[Callable[[], Any], str]] = {
    "code of its class": (OfCode, "share a Generator"),
    "code of a base class": (OfBase, "share a Generator"),
    "list of its class": (OfListOfClass, "share a list"),
    "counter of its type": (OfType, "sets attributes"),
    "counter of its class": (OfCell, "sets attributes"),
    "counter of a class method": (OfClassMethod, "sets attributes of its class"),
    "class method": (lambda: with_method("class_method", of_generator), "share a Generator"),
    "static method": (lambda: with_method("static_method", of_generator), "share a Generator"),
    "property": (lambda: with_method("read", of_generator), "share a Generator"),
    "counter of a function": (lambda: Rows(of_function), "sets attributes"),
    "counter of another class": (lambda: Rows(of_class), "sets attributes"),
    "counter by setattr": (lambda: Rows(of_setattr), "sets attributes"),
    "counter in a namespace": (lambda: Rows(of_namespace), "sets attributes"),
    "counter of objects": (lambda: Rows(of_constructor(Numbered)), "__init__ sets attributes"),
    "counter of objects by type": (lambda: Rows(of_constructor(NumberedByType)), "__init__ sets attributes"),
    "counter of objects in a module": (lambda: Rows(of_constructor(NumberedByAttribute)), "__init__ sets attributes"),
    "counter of objects, set": (lambda: Rows(of_constructor(NumberedBySet)), "__init__ sets attributes"),
    "nested code": (lambda: Rows(of_nested_code), "share a Generator"),
    "tuple": (lambda: Rows(of_tuple), "share a Generator"),
    "iterator": (lambda: Rows(of_iterator), "share a range_iterator"),
    "method of C": (lambda: Rows(of_builtin_method), "bound to an object"),
    "method": (lambda: Rows(of_method), "bound to an object"),
    "class method by name": (lambda: Rows(of_class_method), "sets attributes of its class"),
    "default": (lambda: Rows(of_default), "share a list"),
    "keyword default": (lambda: Rows(of_keyword_default), "share a list"),
    "module": (lambda: Rows(of_module), "share a Random"),
    "import": (lambda: Rows(of_import), "imports own_module"),
    "globals": (lambda: Rows(of_globals), "uses globals"),
    "cache": (lambda: Rows(of_cache), "share a _lru_cache_wrapper"),
    "closure": (lambda: Rows(of_closure()), "share a Random"),
    "nonlocal": (lambda: Rows(of_nonlocal()), "sets turn"),
    "memory of processes": (lambda: Rows(held=multiprocessing.Value("i")), "shared between processes"),
    "large tensor": (lambda: Rows(held=torch.empty(LARGE, dtype=torch.uint8)), "would take 256 MB"),
    "large array": (lambda: Rows(held=np.empty(LARGE, np.uint8)), "would take 256 MB"),
    "large bytes": (lambda: Rows(held=bytes(LARGE)), "more than 256 MB"),
    "many bytes": (lambda: Rows(held=[bytes(LARGE // 2), bytes(LARGE // 2 + 1)]), "more than 256 MB"),
    "moving rows beside plain ones": (lambda: ConcatDataset([TensorDataset(torch.zeros(1)), OfCode()]), "a Generator"),
}


@pytest.mark.parametrize("kind", MOVING)
def test_what_moves_and_would_be_shared_is_refused(kind: str) -> None:
    make, reason = MOVING[kind]
    dataset = make()
    with pytest.raises(CannotCopyError, match=f"its dataset {type(dataset).__name__} may hold .*{reason}"):
        draw_first_batch(DataLoader(dataset, 2))


class Color(enum.Enum):
    RED = 1


class OfConstants(Rows):
    names = ("a", frozenset((1, 2)))
    color = Color.RED
    path = Path("rows")
    pattern = re.compile("a")

    def __getitem__(self, index: int) -> int:
        return index + self.color.value + len(self.names)


def of_constant() -> Callable[[int], int]:
    offset = 3
    return lambda index: index + offset


def of_own_function(index: int) -> int:
    return int(own_module.still(index))


def of_installed_import(index: int) -> int:
    import math

    return math.floor(index + 0.5)


def of_random(index: int) -> int:
    return randrange(99) + int(np.random.randint(99)) + int(torch.randint(99, ()))


def large_rows() -> TensorDataset:
    return TensorDataset(torch.zeros(LARGE // 1024, dtype=torch.uint8).expand(1025, -1).t())


def read_only() -> Rows:
    array = np.zeros(LARGE, np.uint8)
    array.flags.writeable = False
    return Rows(held=array)


STILL: dict[str, Callable[[], Any]] = {
    "constants of its class": OfConstants,
    "objects that are made": lambda: Rows(of_point),
    "constant of a closure": lambda: Rows(of_constant()),
    "methods of all kinds": lambda: with_method("", of_generator),
    "function of a module": lambda: Rows(of_own_function),
    "import of an installed module": lambda: Rows(of_installed_import),
    "global generators": lambda: Rows(of_random),
    "large array that is read only": read_only,
    "large rows": large_rows,
    "subset of large rows": lambda: Subset(large_rows(), [3, 1, 2, 0]),
    "large rows joined": lambda: ConcatDataset([large_rows(), large_rows()]),
}


def first_batches(loader: DataLoader[Any]) -> str:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    batches = iter(loader)
    return str([next(batches), next(batches)])


@pytest.mark.parametrize("kind", STILL)
def test_what_cannot_move_is_copied(kind: str) -> None:
    loader = DataLoader(STILL[kind](), 2)
    read = first_batches(loader)
    drawn = str(draw_first_batch(loader))
    assert drawn == str(draw_first_batch(loader))
    assert first_batches(loader) == read
    if kind != "global generators":  # there the batch depends on their state
        assert read.startswith(f"[{drawn}")
