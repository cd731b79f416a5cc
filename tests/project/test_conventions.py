"""Conventions that hold for every function and every value class of the package."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import attnmonitor
from attnmonitor import alerts, functional

SCRIPTS = ("attnmonitor.__main__", "examples.")


def defined_in(package: Any) -> Iterator[tuple[str, Any]]:
    """Yield functions, classes and methods with the name under which they are defined."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.startswith(SCRIPTS):
            continue
        module = importlib.import_module(found.name)
        for name, one in vars(module).items():
            if getattr(one, "__module__", None) == found.name:
                yield f"{found.name}.{name}", one
                if inspect.isclass(one):
                    yield from ((f"{found.name}.{name}.{each}", method) for each, method in vars(one).items())


def is_written(function: Any) -> bool:
    """Whether it is in a source file, not made by `dataclass` or `NamedTuple`."""
    file = function.__code__.co_filename
    return not file.startswith("<") and "/collections/" not in file and not file.endswith("/dataclasses.py")


def test_no_argument_is_positional_only() -> None:
    functions = {name: one for name, one in defined_in(attnmonitor) if inspect.isfunction(one) and is_written(one)}
    assert len(functions) > 500
    positional_only = [
        name
        for name, function in functions.items()
        if any(each.kind is each.POSITIONAL_ONLY for each in inspect.signature(function).parameters.values())
    ]
    assert positional_only == []


def test_value_classes_are_frozen() -> None:
    values = {name: one for room in (functional, alerts) for name, one in defined_in(room) if inspect.isclass(one)}
    values = {name: one for name, one in values.items() if dataclasses.is_dataclass(one)}
    assert len(values) > 15
    assert [name for name, one in values.items() if not one.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]
