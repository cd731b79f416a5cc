"""The session for a GPU runs here in its smoke mode, and a part that fails or hangs costs only itself."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from benchmarks.cost.gpu.__main__ import PARTS
from benchmarks.cost.gpu.session import Part, Rows, run_session


def test_every_part_runs_in_smoke_mode(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    run_session(PARTS, minutes=5, smoke=True, path=path)
    parts = json.loads(path.read_text())["parts"]
    assert list(parts) == [part.name for part in PARTS]
    assert {name: part["state"] for name, part in parts.items()} == dict.fromkeys(parts, "complete")
    assert all(part["rows"] for part in parts.values())
    assert {row["outcome"] for row in parts["correctness"]["rows"]} == {"passed"}


def test_shares_of_the_session_add_up() -> None:
    assert abs(sum(part.share for part in PARTS) - 1) < 1e-9


def found(device: str, rows: Rows) -> None:
    rows.add(number=1)


def fails(device: str, rows: Rows) -> None:
    rows.add(number=2)
    raise RuntimeError("illegal memory access")


def test_failing_part_keeps_its_rows_and_the_others(tmp_path: Path) -> None:
    parts = [Part("first", 0.5, fails), Part("second", 0.5, found)]
    path = tmp_path / "gpu.json"
    run_session(parts, minutes=1, smoke=True, path=path)
    kept = json.loads(path.read_text())["parts"]
    assert kept["first"]["state"] == "failed: RuntimeError: illegal memory access"
    assert kept["first"]["rows"] == [{"number": 2}]
    assert kept["second"]["state"] == "complete"


CHILD = """
import sys, pathlib, time, os
name, seconds, rows = sys.argv[1:]
pathlib.Path(rows).write_text('{"number": 3}\\n')
time.sleep(60) if name == "hangs" else os.abort() if name == "crashes" else None
"""


def test_part_that_hangs_or_crashes_is_ended(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.cost.gpu.session.START_SECONDS", 0.5)
    (tmp_path / "child.py").write_text(CHILD)
    parts = [Part("hangs", 0.02, found), Part("crashes", 0.49, found), Part("works", 0.49, found)]
    started = time.monotonic()
    kept = run_session(
        parts,
        minutes=1,
        smoke=False,
        path=tmp_path / "gpu.json",
        command=[sys.executable, str(tmp_path / "child.py")],
    )["parts"]
    assert time.monotonic() - started < 30
    assert kept["hangs"]["state"].startswith("cut off")
    assert kept["crashes"]["state"].startswith("failed with exit code")
    assert kept["works"]["state"] == "complete"
    assert all(part["rows"] == [{"number": 3}] for part in kept.values())


def test_part_without_time_is_named(tmp_path: Path) -> None:
    kept = run_session([Part("late", 1.0, found)], minutes=0, smoke=True, path=tmp_path / "gpu.json")["parts"]
    assert kept["late"] == {**kept["late"], "state": "no time was left", "rows": []}
