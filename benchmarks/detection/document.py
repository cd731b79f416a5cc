"""Tables in Markdown, and the sections of a document that a benchmark writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def share(count: int, total: int) -> str:
    """Return "3 of 24"."""
    return f"{count} of {total}"


def publish(section: str, name: str, document: Path | None) -> None:
    """Write a section between the marks ``<!-- name: begin -->`` and ``<!-- name: end -->``, or print it."""
    if document is None:
        print(section)
        return
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = document.read_text(encoding="utf-8").split(begin)
    after = rest.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")
