"""Tables in Markdown, and the sections of a document that a benchmark writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def share(count: int, total: int) -> str:
    """Return "3 of 24"."""
    return f"{count} of {total}"


def share_and_interval(count: int, total: int) -> str:
    """Return "3 of 24 (4 to 31 %)": the share, and its 95 % interval after Wilson."""
    if not total:
        return share(count, total)
    z = 1.96
    found, spread = count / total, z**2 / total
    center = (found + spread / 2) / (1 + spread)
    half = z * math.sqrt(found * (1 - found) / total + spread / (4 * total)) / (1 + spread)
    return f"{share(count, total)} ({100 * (center - half):.0f} to {100 * (center + half):.0f} %)"


def publish(section: str, name: str, document: Path | None) -> None:
    """Write a section between the marks ``<!-- name: begin -->`` and ``<!-- name: end -->``, or print it."""
    if document is None:
        print(section)
        return
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")
