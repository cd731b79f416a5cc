"""What holds for every function and every value of the package, so that nobody has to look it up for one."""

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
    """Functions, classes and methods under the name they are defined by."""
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.startswith(SCRIPTS):
            continue
        module = importlib.import_module(found.name)
        for name, one in vars(module).items():
            if getattr(one, "__module__", None) == found.name:
                yield f"{found.name}.{name}", one
                if inspect.isclass(one):
                    yield from ((f"{found.name}.{name}.{each}", method) for each, method in vars(one).items())


def written(function: Any) -> bool:
    """By a person, not by `dataclass` or `NamedTuple`."""
    return not function.__code__.co_filename.startswith("<") and "/collections/" not in function.__code__.co_filename


def test_every_argument_can_be_given_by_name() -> None:
    functions = {name: one for name, one in defined_in(attnmonitor) if inspect.isfunction(one) and written(one)}
    assert len(functions) > 500
    nameless = [
        name
        for name, function in functions.items()
        if any(each.kind is each.POSITIONAL_ONLY for each in inspect.signature(function).parameters.values())
    ]
    assert nameless == []


def test_what_was_computed_and_what_fired_cannot_be_changed_afterwards() -> None:
    values = {name: one for room in (functional, alerts) for name, one in defined_in(room) if inspect.isclass(one)}
    values = {name: one for name, one in values.items() if dataclasses.is_dataclass(one)}
    assert len(values) > 15
    assert [name for name, one in values.items() if not one.__dataclass_params__.frozen] == []  # type: ignore[attr-defined]
