"""Files that are complete or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_folder_of", "whole_file"]


def check_folder_of(target: str | Path) -> None:
    """Raise ValueError when the folder of a file that is to be written does not exist."""
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{target}: there is no folder {folder} to write it to")


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Yield a path beside ``target`` to write to; it becomes ``target`` on success and is removed on failure."""
    # Same suffix, because some writers take their format from it.
    unfinished = target.with_name(f".{target.stem}-{os.getpid()}{target.suffix}")
    try:
        yield unfinished
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
