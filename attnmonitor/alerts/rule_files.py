"""Rules as JSON files.

A file leaves out what is at its default, so it stays short; a default must therefore never change.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from attnmonitor.alerts.rules import (
    GROUP_KEYS,
    AllOf,
    AnyOf,
    Condition,
    FiringShare,
    Rule,
    Threshold,
    check_rules,
)
from attnmonitor.messages import nearest

__all__ = ["load_rules", "save_rules", "to_plain"]


def to_plain(item: Rule | Condition) -> dict[str, Any]:
    """Return a rule or condition as plain containers, without the fields that have their default."""
    if isinstance(item, (AllOf, AnyOf)):
        return {GROUP_KEYS[type(item)]: [to_plain(part) for part in item.conditions]}
    plain: dict[str, Any] = {}
    for spec in dataclasses.fields(item):
        value = getattr(item, spec.name)
        if spec.default is dataclasses.MISSING or value != spec.default:
            plain[spec.name] = to_plain(value) if spec.name == "when" else value
    return {"firing_share": plain} if isinstance(item, FiringShare) else plain


def save_rules(rules: Sequence[Rule], path: str | PathLike[str]) -> None:
    """Write rules as JSON, for example to edit them by hand."""
    Path(path).write_text(
        json.dumps([to_plain(rule) for rule in check_rules(rules)], indent=2) + "\n", encoding="utf-8"
    )


def load_rules(path: str | PathLike[str]) -> tuple[Rule, ...]:
    """Read rules from a JSON file: a list of objects with the fields of `Rule`.

    A condition is an object with the fields of `Threshold`, or ``{"all_of": [...]}``, ``{"any_of": [...]}`` or
    ``{"firing_share": {...}}``.

    Raises:
        ValueError: The file is not JSON, or a rule has an unknown, missing or invalid field; the message names it.
    """
    try:
        plain = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"rules file {path}: not JSON: {error}") from None
    if not isinstance(plain, list):
        raise ValueError(f"rules file {path}: expected a list of rules, got {type(plain).__name__}")
    return check_rules(_rule_from_plain(item, position) for position, item in enumerate(plain))


def _rule_from_plain(plain: object, position: int) -> Rule:
    name = plain.get("name", f"number {position}") if isinstance(plain, Mapping) else f"number {position}"
    try:
        fields = _fields_of(Rule, plain)
        fields["when"] = _condition_from_plain(fields["when"])
    except ValueError as error:
        raise ValueError(f"rule {name!r}: {error}") from None
    return Rule(**fields)


def _condition_from_plain(plain: object) -> Condition:
    if isinstance(plain, Mapping) and len(plain) == 1:
        ((key, content),) = plain.items()
        for group, group_key in GROUP_KEYS.items():
            if key == group_key:
                if not isinstance(content, list):
                    raise ValueError(f"{key}: expected a list of conditions, got {content!r}")
                return group(*(_condition_from_plain(part) for part in content))
        if key == "firing_share":
            return FiringShare(**_fields_of(FiringShare, content))
    return Threshold(**_fields_of(Threshold, plain))


def _fields_of(record: type[Rule | Threshold | FiringShare], plain: object) -> dict[str, Any]:
    if not isinstance(plain, Mapping):
        raise ValueError(f"expected an object with the fields of {record.__name__}, got {plain!r}")
    known = {spec.name: spec.default is dataclasses.MISSING for spec in dataclasses.fields(record)}
    unknown = sorted(set(plain) - set(known))
    missing = [name for name, required in known.items() if required and name not in plain]
    if unknown:
        near = nearest(unknown[0], known)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(f"unknown field {unknown[0]!r}; {hint}{record.__name__} has {', '.join(known)}")
    if missing:
        raise ValueError(f"{record.__name__} lacks the field {missing[0]!r}")
    return dict(plain)
