"""A copy of a user's objects that shares nothing that can move, or the reason why there is none.

State in attributes is copied with its object by pickling. Functions, classes and modules are not copied by anything, so
they may be shared only if their code cannot reach state through them: a global or closure that holds a generator, a
counter that is a class attribute, a ``global`` statement. Installed packages are taken to keep their state in objects;
the global generators of torch, random and numpy are restored by the caller.
"""

from __future__ import annotations

import copy
import dis
import inspect
import io
import pickle
import random
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from enum import Enum
from itertools import pairwise
from logging import Logger
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

__all__ = ["CannotCopyError", "is_installed", "isolated"]

_MOST_BYTES = 2**28  # of a copy; above, it would cost time and memory that the user feels
_CONSTANTS = (
    int, float, complex, str, bytes, range, slice, type(None), type(Ellipsis), type(NotImplemented), Enum, PurePath,
    Logger, re.Pattern, np.dtype, np.generic, np.ufunc, torch.dtype, torch.device, torch.Size,
)  # fmt: skip
_RESTORED = (random.getstate.__self__, np.random.get_state.__self__)  # type: ignore[attr-defined]
_CONSTRUCTORS = {"__init__", "__new__", "__post_init__"}  # they may set attributes of new objects
_SETTERS = {"setattr", "delattr", "vars", "__dict__"}  # code sets attributes by them as well
_ANYTHING = {"globals", "eval", "exec", "__import__", "__globals__", "stdin", "input"}  # code reaches shared state


class CannotCopyError(ValueError):
    """No copy shares nothing that can move; the message is the reason, about "its" part."""


def isolated(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of named objects that share nothing that can move; what they share among them stays shared.

    Raises:
        CannotCopyError: One of them has no such copy; the message names it.
    """
    try:
        copies: dict[str, Any] = _copy(dict(parts), parts.get("dataset"))
        return copies
    except Exception as failure:
        for name, part in parts.items():
            try:
                _copy(part, parts.get("dataset"))
            except Exception as error:
                what = f"its {name} {getattr(part, '__qualname__', type(part).__name__)}"
                raise CannotCopyError(f"{what} may hold state of its own ({error})") from error
        raise CannotCopyError(str(failure)) from failure


def is_installed(part: Any) -> bool:
    """Return whether a module, class or function belongs to Python or an installed package."""
    name = part.__name__ if isinstance(part, ModuleType) else getattr(part, "__module__", None)
    root = (name or "").partition(".")[0]
    if root in sys.builtin_module_names:
        return root != "__main__"
    file = getattr(sys.modules.get(root), "__file__", None) or next(
        iter(getattr(sys.modules.get(root), "__path__", ())), None
    )
    return file is not None and str(file).startswith(_INSTALLED)


_INSTALLED = tuple(
    {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")} | {site.getusersitepackages()}
)


def _copy(parts: Any, dataset: Any) -> Any:
    buffer = _Bounded()
    pickler = _Pickler(buffer, dataset if _is_plain(dataset) else None)
    pickler.dump(parts)
    return _Unpickler(io.BytesIO(buffer.getvalue()), pickler.shared).load()


class _Pickler(pickle.Pickler):
    """Pickles state, and passes by reference what may be shared."""

    def __init__(self, buffer: io.BytesIO, dataset: Any) -> None:
        super().__init__(buffer, protocol=5)
        self.shared: list[Any] = []
        self._dataset = dataset
        self._checked: set[int] = set()

    def persistent_id(self, part: Any) -> int | None:
        """Return the index of a part that is shared; None for one that is copied."""
        if self._dataset is not None and part is self._dataset:
            part = _Rows(part)
        elif isinstance(part, (ModuleType, FunctionType, type)):
            _check(part, self._checked)
        elif type(part).__module__.startswith("multiprocessing"):
            raise CannotCopyError(f"{type(part).__name__} is shared between processes")
        elif isinstance(part, np.ndarray) and not part.flags.writeable:
            pass
        else:
            if isinstance(part, (Tensor, np.ndarray)) and part.nbytes > _MOST_BYTES:
                raise CannotCopyError(f"a copy would take {part.nbytes / 2**20:.0f} MB")
            return None
        self.shared.append(part)
        return len(self.shared) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(buffer)
        self._shared = shared

    def persistent_load(self, index: int) -> Any:
        return self._shared[index]


class _Bounded(io.BytesIO):
    def write(self, data: Any) -> int:
        if self.tell() + len(data) > _MOST_BYTES:
            raise CannotCopyError(f"a copy would take more than {_MOST_BYTES / 2**20:.0f} MB")
        return super().write(data)


class _Rows(Dataset[Any]):
    """Copies of the rows of a data set that is too large to copy, and that reading does not change."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return copy.deepcopy(self._rows[index])


def _is_plain(dataset: Any) -> bool:
    """Return whether reading a row of the data set runs no code of the user's and changes nothing."""
    kind = type(dataset)
    if kind is Subset:
        return _is_plain(dataset.dataset)
    if kind is ConcatDataset:
        return all(map(_is_plain, dataset.datasets))
    if kind.__module__ == "datasets.arrow_dataset" and kind.__name__ == "Dataset":
        return bool(dataset.format["type"] != "custom")  # a transform of the user's
    return kind in (list, tuple, range, Tensor, TensorDataset)


def _check(part: Any, checked: set[int]) -> None:
    """Raise unless nothing that moves can be reached through a value that is shared."""
    if id(part) in checked or isinstance(part, _CONSTANTS):
        return
    checked.add(id(part))
    if isinstance(part, (tuple, frozenset)):
        for item in part:
            _check(item, checked)
    elif isinstance(part, (staticmethod, classmethod)):
        if isinstance(part, classmethod) and _sets_attributes(part.__func__):
            raise CannotCopyError(f"{part.__qualname__} sets attributes of its class")
        _check(part.__func__, checked)
    elif isinstance(part, property):
        for accessor in (part.fget, part.fset, part.fdel):
            _check(accessor, checked)
    elif isinstance(part, (BuiltinFunctionType, MethodType)):
        owner = part.__self__
        if not (any(owner is known for known in _RESTORED) or isinstance(owner, (ModuleType, type, type(None)))):
            raise CannotCopyError(f"{part.__qualname__} is bound to an object that a copy shares")
        if isinstance(owner, type):
            _check(owner, checked)  # with its class methods, which may set its attributes
        elif isinstance(part, MethodType):
            _check(part.__func__, checked)
    elif isinstance(part, (type, FunctionType, ModuleType)):
        if isinstance(part, ModuleType) or is_installed(part):
            return  # of a module, only what code names in it is checked
        _check_class(part, checked) if isinstance(part, type) else _check_function(part, checked)
    elif not type(part).__module__.startswith("typing"):
        raise CannotCopyError(f"a copy would share a {type(part).__name__}")


def _check_class(kind: type, checked: set[int]) -> None:
    for base in kind.__mro__:
        if is_installed(base):
            continue
        for name, value in vars(base).items():
            is_code = callable(getattr(value, "__func__", value)) or isinstance(value, property)
            is_made_by_python = name.startswith("__") or name == "_abc_impl" or hasattr(type(value), "__set__")
            if is_code or not is_made_by_python:
                _check(value, checked)


def _check_function(function: FunctionType, checked: set[int]) -> None:
    codes = list(_codes(function.__code__))
    instructions = list(_instructions(function))
    names = {name for code in codes for name in code.co_names}
    cells = [cell for name, cell in inspect.getclosurevars(function).nonlocals.items() if name != "__class__"]
    named = [function.__globals__[name] for name in names if name in function.__globals__]
    if reached := names & _ANYTHING:
        raise CannotCopyError(f"{function.__qualname__} uses {min(reached)}")
    for instruction in instructions:
        kind, target = instruction.opname, instruction.argval
        if kind in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            kind in ("STORE_DEREF", "DELETE_DEREF") and target in function.__code__.co_freevars
        ):
            raise CannotCopyError(f"{function.__qualname__} sets {target}, which a copy shares")
        if kind == "IMPORT_NAME" and not is_installed(sys.modules.get(target) or ModuleType(target)):
            raise CannotCopyError(f"{function.__qualname__} imports {target}")
    is_constructor = function.__name__ in _CONSTRUCTORS
    if _sets_named_attributes(function) if is_constructor else _sets_attributes(function):
        # Of an object that is copied, or of one that is not? It is sure only where nothing of the user's is named.
        shared = [value for value in (*named, *cells) if not isinstance(value, _CONSTANTS) and not is_installed(value)]
        if shared or names & {"type", "__class__"} or "__class__" in function.__code__.co_freevars:
            raise CannotCopyError(f"{function.__qualname__} sets attributes")
    for module in [value for value in named if isinstance(value, ModuleType) and not is_installed(value)]:
        named += [getattr(module, name) for name in names if hasattr(module, name)]
    for value in (*named, *cells, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        _check(value, checked)


def _sets_attributes(function: Any) -> bool:
    is_called = any(not _SETTERS.isdisjoint(code.co_names) for code in _codes(function.__code__))
    return is_called or any(each.opname in ("STORE_ATTR", "DELETE_ATTR") for each in _instructions(function))


def _sets_named_attributes(function: Any) -> bool:
    """Return whether a constructor sets attributes of anything but its new object and what it holds in variables."""
    own = function.__code__.co_cellvars  # variables that nested code reads too
    loaded: dis.Instruction | None = None  # what the attributes loaded since are of
    for now, after in pairwise(_instructions(function)):
        is_copy = now.opname == "DUP_TOP" or (now.opname, now.arg) == ("COPY", 1)
        is_set = now.opname in ("STORE_ATTR", "DELETE_ATTR") or (is_copy and after.opname == "LOAD_ATTR")  # x.a += 1
        if is_set and loaded is not None:
            is_own = loaded.opname in ("SWAP", "ROT_TWO") or "LOAD_FAST" in loaded.opname or loaded.argval in own
            if not is_own:
                return True
        if now.opname != "LOAD_ATTR" or now.argval == "__class__":
            loaded = now
    return False


def _instructions(function: Any) -> Iterator[dis.Instruction]:
    for code in _codes(function.__code__):
        yield from dis.get_instructions(code)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
