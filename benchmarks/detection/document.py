"""Tables in Markdown, the sections of a document that a benchmark writes, and the arguments of its command."""

from __future__ import annotations

import argparse
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


def command_line(description: str, cache: str, sets: Iterable[str] = ()) -> argparse.ArgumentParser:
    """Return a parser of what all these commands take: the cache, the document, and the set where there are some.

    Args:
        description: The docstring of the command; its first line is shown.
        cache: Folder of the command's recordings, in that of all.
        sets: Names of the sets to choose from.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    if sets:
        parser.add_argument("--set", choices=sorted(sets), default="report", dest="name")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "attnmonitor-collapse" / cache)
    parser.add_argument("--docs", type=Path, help="document whose measured section is rewritten; else printed")
    return parser
