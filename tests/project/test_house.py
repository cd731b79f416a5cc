"""The rules of the house: rooms and contracts, sizes, names, spelling, and what may import what."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnmonitor.metrics.catalog import METRICS

ROOT = Path(__file__).parents[2]
PACKAGE = ("attnmonitor", "callbacks")
PROGRAMS = (*PACKAGE, "benchmarks", "examples")
NOT_ROOMS = {"__init__", "__main__", "_version", "py", "callbacks", "__pycache__"}

ROOMS_OF_FRAMEWORKS = {
    "lightning": {"callbacks", "cli"},  # the demo trains with Lightning
    "transformers": {"callbacks", "scan"},
    "accelerate": {"callbacks"},
    "wandb": {"loggers"},
    "matplotlib": {"plots"},
    "plotly": {"report"},
    "torchmetrics": {"metrics"},
}

BRITISH = re.compile(
    r"(?:behavio|colo|favo|flavo|harbo|hono|neighbo|rigo)ur"
    r"|cent(?:re|res|red|ring)(?![a-z])|(?<![a-z])grey|artefact|analys(?:e|ed|ing)(?![a-z])"
    r"|(?:label|model|travel|signal)l(?:ed|ing)(?![a-z])|(?<![a-z])learnt(?![a-z])|whilst|judgement|licence|(?<![a-z])fibre"
    r"|(?:character|emphas|equal|factor|final|general|initial|local|material|maxim|memor|minim|normal|optim|organ|param"
    r"etr|parameter|penal|quant|random|real|recogn|regular|serial|special|stabil|standard|summar|synchron|util|visual)"
    r"is(?:e|es|ed|er|ers|ing|ation)(?![a-z])",
    re.IGNORECASE,
)


def files(folders: tuple[str, ...], suffix: str = ".py") -> list[Path]:
    """Files of these folders; not those the link `attnmonitor/callbacks` shows a second time."""
    return [
        path
        for folder in folders
        for path in sorted((ROOT / folder).rglob(f"*{suffix}"))
        if (ROOT / "attnmonitor" / "callbacks") not in path.parents and "_build" not in path.parts
    ]


def nodes(folders: tuple[str, ...], *kinds: type[ast.AST]) -> Iterator[tuple[str, Any]]:
    """Yield every syntax node of these kinds with its place, ``file:line``."""
    for path in files(folders):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kinds):
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", node


def rooms() -> set[str]:
    """Names of the files and folders at the top of the package."""
    return {path.name.partition(".")[0] for path in (ROOT / "attnmonitor").iterdir()} - NOT_ROOMS


def contracts() -> list[dict[str, Any]]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found: list[dict[str, Any]] = toml.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return found


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


# -- Rooms -------------------------------------------------------------------------------------------------------------


def test_package_has_at_most_sixteen_rooms() -> None:
    assert 10 < len(rooms()) <= 16, sorted(rooms())


def test_layers_hold_every_room() -> None:
    [layered] = [contract for contract in contracts() if contract["type"] == "layers"]
    assert layered["exhaustive"]
    named = [room.strip() for layer in layered["layers"] for room in layer.split("|")]
    assert sorted(named) == sorted(rooms() | {"callbacks"})


@pytest.mark.parametrize(("framework", "allowed"), ROOMS_OF_FRAMEWORKS.items())
def test_framework_is_forbidden_outside_its_rooms(framework: str, allowed: set[str]) -> None:
    [contract] = [each for each in contracts() if framework in each.get("forbidden_modules", ())]
    forbidden = {module.removeprefix("attnmonitor.") for module in contract["source_modules"]}
    assert forbidden == (rooms() | {"callbacks"}) - allowed


def test_benchmarks_and_examples_do_not_import_from_tests() -> None:
    modules = {path.stem for path in files(("tests",))} | {"tests"}
    found = [
        f"{place} {name}"
        for place, node in nodes(("benchmarks", "examples"), ast.Import, ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.partition(".")[0] in modules
    ]
    paths = [
        place
        for place, node in nodes(("benchmarks", "examples"), ast.Attribute)
        if isinstance(node.value, ast.Name) and (node.value.id, node.attr) == ("sys", "path")
    ]
    assert not found + paths, "\n".join(found + paths)


# -- Sizes -------------------------------------------------------------------------------------------------------------


def body_lines(function: Any) -> int:
    """Lines from the first statement after the docstring to the last."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_no_function_body_is_over_60_lines() -> None:
    sizes = {f"{place} {node.name}": body_lines(node) for place, node in nodes((*PROGRAMS, "tests"), *FUNCTIONS)}
    found = [f"{place} {size}" for place, size in sizes.items() if size > 60]
    assert not found, "\n".join(found)


def test_no_file_of_the_package_is_over_400_lines() -> None:
    counted = [path for suffix in (".py", ".js", ".css", ".html") for path in files(PROGRAMS, suffix)]
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in counted}
    found = [f"{path} {size}" for path, size in sizes.items() if size > 400]
    assert not found, "\n".join(found)


# -- Names and words ---------------------------------------------------------------------------------------------------


def test_identifiers_are_under_30_characters() -> None:
    named = (
        (place, getattr(node, "arg", None) or getattr(node, "name", None))
        for place, node in nodes(PROGRAMS, ast.ClassDef, *FUNCTIONS, ast.arg)
    )
    found = [f"{place} {name}" for place, name in named if name not in METRICS and len(name or "") >= 30]
    assert not found, "\n".join(found)


def test_test_names_are_under_60_characters() -> None:
    names = [(place, node.name) for place, node in nodes(("tests",), *FUNCTIONS) if node.name.startswith("test")]
    assert len(names) > 500
    found = [f"{place} {name}" for place, name in names if len(name) >= 60]
    assert not found, "\n".join(found)


def test_spelling_is_american() -> None:
    written = [path for suffix in (".py", ".md", ".js", ".css") for path in files((*PROGRAMS, "tests", "docs"), suffix)]
    written += ROOT.glob("*.md")
    found = [
        f"{path.relative_to(ROOT)}:{number} {word.group()}"
        for path in written
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for word in BRITISH.finditer(line)
    ]
    assert not found, "\n".join(found)


def test_docstrings_open_with_at_most_20_words() -> None:
    found = []
    for place, node in nodes(PROGRAMS, ast.Module, ast.ClassDef, *FUNCTIONS):
        opening = (ast.get_docstring(node) or "").partition("\n\n")[0]
        if len(opening.split()) > 20:
            found.append(f"{place} {len(opening.split())} words: {opening[:60]}")
    assert not found, "\n".join(found)


# -- Tests use public names --------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_repr_html_"  # notebooks call it


def private_names() -> set[str]:
    """Functions, classes, methods, attributes and module variables of the package that begin with an underscore."""
    found = {node.name for _, node in nodes(PACKAGE, ast.ClassDef, *FUNCTIONS)}
    for _, node in nodes(PACKAGE, ast.Attribute):
        if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            found.add(node.attr)
    for _, module in nodes(PACKAGE, ast.Module, ast.ClassDef):
        for statement in module.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if is_private(name)}


def test_test_files_do_not_import_each_other() -> None:
    """Which of them can be imported depends on the folders of the same run."""
    imports = nodes(("tests",), ast.ImportFrom)
    assert not [place for place, node in imports if (node.module or "").startswith("test_")]


def test_tests_import_nothing_private() -> None:
    found = [
        f"{place} {node.module}.{alias.name}"
        for place, node in nodes(("tests", "benchmarks", "examples"), ast.ImportFrom)
        if (node.module or "").startswith("attnmonitor")
        for alias in node.names
        if any(is_private(part) for part in [*str(node.module).split("."), alias.name])
    ]
    assert not found, "\n".join(found)


def test_tests_touch_no_private_member() -> None:
    """Also not through an instance, a module under another name, or the string that a monkeypatch takes."""
    private = private_names()
    assert len(private) > 100
    found = [
        f"{place} .{node.attr}"
        for place, node in nodes(("tests", "benchmarks", "examples"), ast.Attribute)
        if node.attr in private and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]
    by_name = ("setattr", "getattr", "delattr", "hasattr", "patch", "object")
    found += [
        f"{place} {argument.value!r}"
        for place, node in nodes(("tests", "benchmarks", "examples"), ast.Call)
        if getattr(node.func, "attr", None) in by_name or getattr(node.func, "id", None) in by_name
        for argument in node.args
        if isinstance(argument, ast.Constant) and str(argument.value).split(".")[-1] in private
    ]
    assert not found, "\n".join(found)
