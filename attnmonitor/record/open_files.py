"""The files of an open record, compared with what their names lead to now.

An open file goes on when it is moved, deleted or replaced: SQLite writes to it, but its name leads elsewhere, and the
write-ahead log stays behind at the old name. Only a comparison of the files themselves shows that.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["OpenFiles", "opened_beside"]

_Files = tuple["tuple[int, int, int] | None", "tuple[int, int, int] | None"]


@contextlib.contextmanager
def opened_beside(path: Path) -> Iterator[int]:
    """Open a file for as long as SQLite has it open; create it where it is missing."""
    # Closing it drops SQLite's locks on the file (POSIX), so SQLite must have closed its own before.
    descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class OpenFiles:
    """The record file and its write-ahead log, as they were after the latest write.

    Args:
        path: The record.
        descriptor: The open file, of `opened_beside`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self._names = (path, path.with_name(f"{path.name}-wal"))
        self._descriptor = descriptor
        self._noted: _Files = (None, None)

    def note(self) -> None:
        """Remember the files as they are."""
        self._noted = self._found()

    @property
    def is_elsewhere(self) -> bool:
        """Whether the record's name leads to no file or to another one."""
        (noted, _), (found, _) = self._noted, self._found()
        return noted is not None and (found is None or found[:2] != noted[:2])

    @property
    def has_shrunk(self) -> bool:
        """Whether the record or its log lost bytes, or the log is gone: merged, or damaged."""
        pairs = zip(self._noted, self._found(), strict=True)
        return any(
            noted is not None and (found is None or found[:2] != noted[:2] or found[2] < noted[2])
            for noted, found in pairs
        )

    @property
    def is_deleted(self) -> bool:
        """Whether the open file has no name any more."""
        return os.fstat(self._descriptor).st_nlink == 0

    def remove_stale_log(self) -> None:
        """Remove the log that stayed at the old name, once it is merged: SQLite would read it into another file."""
        noted, name = self._noted[1], self._names[1]
        with contextlib.suppress(OSError):
            if noted is not None and _identity(name)[:2] == noted[:2]:
                name.unlink()
                name.with_name(f"{name.name.removesuffix('-wal')}-shm").unlink(missing_ok=True)

    def _found(self) -> _Files:
        found: list[tuple[int, int, int] | None] = []
        for name in self._names:
            try:
                found.append(_identity(name))
            except OSError:
                found.append(None)
        return found[0], found[1]


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    # A folder or pipe in the place of the file has another number, but a size that says nothing.
    return status.st_dev, status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else 0
