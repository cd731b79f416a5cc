"""``attnmonitor watch`` as a program: a line for each sample, a screen in a terminal, and a clean end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from record_writer import WriterProcess

pty = pytest.importorskip("pty", reason="there are no pseudo-terminals")


@contextmanager
def watching(path: Path, *, terminal: bool) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yield the program that watches a record, and where its output can be read."""
    output, program_side = pty.openpty() if terminal else os.pipe()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TERM": "xterm",
        "COLUMNS": "90",
        "LINES": "40",
    }
    program = subprocess.Popen(
        [sys.executable, "-m", "attnmonitor", "watch", str(path)],
        stdout=program_side,
        stderr=subprocess.PIPE,
        env=environment,
    )
    os.close(program_side)
    try:
        yield program, output
    finally:
        program.kill()
        program.wait()
        os.close(output)


def read_until(output: int, text: str, seconds: float) -> str:
    """Return the output up to ``text``, which must come within some seconds."""
    os.set_blocking(output, False)
    ends, read = time.monotonic() + seconds, ""
    while text not in read:
        assert time.monotonic() < ends, f"{text!r} did not come: {read[-2000:]!r}"
        with suppress(BlockingIOError):
            read += os.read(output, 65536).decode(errors="replace")
        time.sleep(0.02)
    return read


def test_watch_shows_each_sample_and_ends_cleanly(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with watching(path, terminal=False) as (lines, line_output), watching(path, terminal=True) as (screen, pixels):
        for output in (line_output, pixels):
            read_until(output, "waiting", 60)
        writer = WriterProcess(path)
        for output in (line_output, pixels):
            read_until(output, "no sample yet", 10)
        for index in range(2):
            writer.sample(index)
            written = time.monotonic()
            for output in (line_output, pixels):
                read_until(output, f"step {50 * index}", 10)
            assert time.monotonic() - written <= 3.0
        read_until(pixels, "Ctrl-C", 10)  # the screen is drawn again and again
        shown = " ".join(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", read_until(pixels, "Ctrl-C", 10)).split())
        for text in ("8 heads in 2 layers watched over 2 samples", "loss", "steps 0–50", "layers.1"):
            assert text in shown
        writer.end()
        for program in (lines, screen):
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=30)
            assert (program.returncode, errors) == (0, b"")
