"""A session of several parts within a time limit; the rows of a part that is cut off are kept.

On a GPU each part runs in a process of its own: after a fault of a kernel nothing more can be done on the device in
that process, and a part that hangs can be ended. In smoke mode all parts run in this process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

__all__ = ["Part", "Rows", "run_part", "run_session"]

START_SECONDS = 45  # for a process to import torch and find the device, beside the part's own time


class Rows:
    """The rows that a part has found so far: printed and appended to a file one by one.

    Args:
        path: File of JSON, one row a line.
        seconds: The part's time.
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._path = path
        self._deadline = time.monotonic() + seconds
        self._columns: tuple[str, ...] = ()

    @property
    def time_left(self) -> float:
        """Seconds until the part should end."""
        return self._deadline - time.monotonic()

    def add(self, **row: Any) -> None:
        """Keep and print one row; the names of its columns are printed where they change."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if tuple(row) != self._columns:
            self._columns = tuple(row)
            print("  ".join(f"{name:>{_width(name)}}" for name in row), flush=True)
        print("  ".join(f"{_text(value):>{_width(name)}}" for name, value in row.items()), flush=True)


def _width(name: str) -> int:
    return max(10, len(name))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@dataclass(frozen=True)
class Part:
    """One part of the session.

    Attributes:
        name: Its name in the table and in the JSON.
        share: Its share of the session's time.
        measure: ``measure(device, rows)`` finds its rows; ``device`` is ``"cpu"`` in smoke mode.
        environment: Environment variables that it needs when torch is imported.
    """

    name: str
    share: float
    measure: Callable[[str, Rows], None]
    environment: Mapping[str, str] = field(default_factory=dict)


def run_part(part: Part, device: str, rows_file: Path, seconds: float) -> str:
    """Run one part in this process; return "complete", or what stopped it."""
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            part.measure(device, Rows(rows_file, seconds))
    except Exception as error:
        traceback.print_exc()
        return f"failed: {type(error).__name__}: {error}"
    return "complete"


def run_session(
    parts: Sequence[Part], *, minutes: float, smoke: bool, path: Path, command: Sequence[str] = ()
) -> dict[str, Any]:
    """Run all parts in order, and write what is known as JSON after each of them.

    A part that ends early leaves its time to the later ones.

    Args:
        parts: The parts.
        minutes: Time of the session.
        smoke: Run on the CPU and in this process.
        path: The JSON file.
        command: The command that runs one part; name, seconds and file of rows are appended to it.

    Returns:
        What was written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found: dict[str, Any] = {"minutes": minutes, "smoke": smoke, "parts": {}}
    for index, part in enumerate(parts):
        left = 60 * minutes - (time.monotonic() - started)
        seconds = max(left, 0) * part.share / sum(later.share for later in parts[index:])
        rows_file = path.with_suffix(f".{index}.jsonl")
        rows_file.unlink(missing_ok=True)
        print(f"\n== {part.name} (up to {seconds:.0f} s)", flush=True)
        begun = time.monotonic()
        if seconds < 1:
            state = "no time was left"
        elif smoke:
            state = run_part(part, "cpu", rows_file, seconds)
        else:
            state = _run_apart(part, [*command, part.name, str(seconds), str(rows_file)], seconds)
        rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
        rows_file.unlink(missing_ok=True)
        print(f"-- {part.name}: {state}, {len(rows)} rows", flush=True)
        found["parts"][part.name] = {"state": state, "seconds": time.monotonic() - begun, "rows": rows}
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        unfinished.replace(path)
    print(f"\nwritten to {path}", flush=True)
    return found


def _run_apart(part: Part, command: Sequence[str], seconds: float) -> str:
    """Run one part in a process of its own, which is ended when its time is over."""
    environment = {**os.environ, **part.environment}
    try:
        ended = subprocess.run(command, timeout=seconds + START_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return f"cut off after {seconds + START_SECONDS:.0f} s"
    return "complete" if ended.returncode == 0 else f"failed with exit code {ended.returncode}"


def part_command(module: str, *options: str) -> list[str]:
    """The command of `run_session` that runs one part of ``module``."""
    return [sys.executable, "-m", module, *options]
