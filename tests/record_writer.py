"""A process that writes a record as training does, one sample for each line it is sent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from synthetic_runs import SyntheticRun

RUN = SyntheticRun(2, 4, 40, faulty=(1, 2))
SAMPLES = list(RUN.samples())

_PROGRAM = """
import sys
from record_writer import RUN, SAMPLES
from attnmonitor.record import RecordWriter
with RecordWriter(sys.argv[1], run=RUN.config) as record:
    print("open", flush=True)
    for line in sys.stdin:
        record.log([(SAMPLES[int(line)].global_step, "loss", 4.0 - int(line) / 20)])
        record.append(SAMPLES[int(line)])
        print("written" if not record.failed_writes else "failed", flush=True)
"""


class WriterProcess:
    """A run that writes ``path``: it has begun when this returns, and ends with `end` or `kill`."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{_PROGRAM}", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "open"

    def sample(self, index: int) -> None:
        """Take one sample, at step 50 × index."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{index}\n")
        self._process.stdin.flush()
        assert self._answer() == "written"

    def end(self) -> None:
        """Close the record, as a run does that is over."""
        self._process.communicate(timeout=30)
        assert self._process.returncode == 0

    def kill(self) -> None:
        """Kill the process, as ``kill -9`` does."""
        self._process.kill()
        self._process.communicate(timeout=30)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
