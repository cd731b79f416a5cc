"""Faults of a record's folder, file and samples while a run writes: one warning, nothing endless, nothing silent."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

RUN = {"model": "GPT2LMHeadModel", "model_signature": "2x4", "probe_fingerprint": "ab12"}


def one_value(step: Any, **more: Any) -> Sample:
    return Sample(step, {"energy_rms": {"attn": torch.full((400,), float(step))}}, **more)


@contextmanager
def caught_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


# A file system that grants no locks

SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#define WRAP(NAME) int NAME(int fd, int command, ...) { \\
    va_list list; va_start(list, command); void *arg = va_arg(list, void *); va_end(list); \\
    const char *code = getenv("LOCK_ERRNO"); \\
    if (code && (command == F_SETLK || command == F_SETLKW)) { errno = atoi(code); return -1; } \\
    int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #NAME); return real(fd, command, arg); }
WRAP(fcntl)
WRAP(fcntl64)
"""

WITHOUT_LOCKS = """
import errno, json, os, sys, time, warnings
from pathlib import Path
import torch
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import Sample
warnings.simplefilter("always")
for name in ("ENOLCK", "EACCES", "EINTR", "EIO", "ENOSYS", "EROFS", "ENOSPC", "EPERM"):
    folder = Path(sys.argv[1], name)
    os.environ["LOCK_ERRNO"] = str(getattr(errno, name))
    with warnings.catch_warnings(record=True) as caught:
        started = time.monotonic()
        record = RecordWriter(folder / "run.sqlite", {})
        for step in range(4):
            record.append(Sample(step, {"key_rms": {"a": torch.ones(2)}}))
        record.close()
    seconds, lost, files = time.monotonic() - started, record.num_lost, len(os.listdir(folder))
    del os.environ["LOCK_ERRNO"]
    record.append(Sample(4, {"key_rms": {"a": torch.ones(2)}}))
    record.close()
    steps = RunRecord.open(record.path).steps.tolist()
    print(json.dumps([name, len(caught), seconds, lost, files, steps, record.num_lost]))
"""


def test_refused_locks_cost_one_warning_and_little_time(tmp_path: Path) -> None:
    if sys.platform != "linux" or shutil.which("gcc") is None:
        pytest.skip("needs a C compiler, to make fcntl fail")
    (tmp_path / "shim.c").write_text(SHIM)
    library = ["gcc", "-shared", "-fPIC", "-o", tmp_path / "shim.so", tmp_path / "shim.c", "-ldl"]
    subprocess.run(library, check=True)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LOCKS, tmp_path],
        env={**os.environ, "LD_PRELOAD": str(tmp_path / "shim.so")},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 8
    for name, num_warnings, seconds, lost, num_files, steps_once_granted, lost_once_granted in results:
        assert (name, num_warnings, lost) == (name, 1, 4)
        assert seconds < 6
        assert num_files <= 2
        assert (steps_once_granted, lost_once_granted) == ([0, 1, 2, 3, 4], 0)


def test_lock_of_another_run_still_moves_beside(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run.sqlite", run=RUN) as first:
        first.append(one_value(0))
        with caught_warnings() as messages, RecordWriter(tmp_path / "run.sqlite", run=RUN) as second:
            second.append(one_value(1))
    assert second.path == tmp_path / "run-2.sqlite"
    assert len(messages) == 1
    assert "another run is writing" in messages[0]


def test_number_of_files_beside_is_bounded(tmp_path: Path) -> None:
    for number in range(1, 120):
        name = "run.sqlite" if number == 1 else f"run-{number}.sqlite"
        (tmp_path / name).write_text("not a record" * 100)
    before = len(list(tmp_path.iterdir()))
    with caught_warnings() as messages:
        record = RecordWriter(tmp_path / "run.sqlite", run=RUN)
        for step in range(3):
            record.append(one_value(step))
        record.close()
    assert (len(messages), record.num_lost) == (1, 3)
    assert len(list(tmp_path.iterdir())) == before


# Values that cannot be stored as they are

LONE, NUL, HUGE = "shard-\udcff.bin", "a\0b", "x" * 3_000_000


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("text", [LONE, NUL, HUGE, b"\xff".decode("latin-1"), "\x1b[31m"], ids=range(5))
def test_any_text_is_stored_everywhere(text: str, tmp_path: Path) -> None:
    event = AlertEvent("hot" + text, "kind", "query_head", text, 0, 1.0, 1.0, 1, "firing", message=text)
    coverage = {text: LayerCoverage(text, reason=text, outside=(text,))}
    with RecordWriter(tmp_path / "run.sqlite", run={**RUN, "name": text, text: [text]}) as record:
        record.append(one_value(0, failure=text, events=[event], coverage=coverage, diagnostics={text: 1.0}))
        record.append(Sample(1, {"energy_rms": {text: torch.ones(2)}, "own" + text: {"a": torch.ones(1)}}))
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert (read.steps.tolist(), record.num_lost, record.failed_writes) == ([0, 1], 0, 0)
    [shown] = read.events
    for stored in (read.samples[0].failure, shown.message, shown.layer, read.config["name"], *read.metrics):
        assert stored is not None
        stored.encode("utf-8")
        assert "\0" not in stored
        assert len(stored) < 30_000
    assert len(read.trajectories("energy_rms")) == 2
    assert (tmp_path / "run.sqlite").stat().st_size < 2_000_000


def test_any_object_in_the_configuration_is_stored(tmp_path: Path) -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"more": deep}
    run = {
        **RUN,
        "bytes": b"\xff",
        "unprintable": Unprintable(),
        "circle": circle,
        "deep": deep,
        "huge": 10**5000,
        "tuple keys": {(1, 2): 3},
        "tensor": torch.ones(2),
        "nan": float("nan"),
        3: {4},
    }
    with RecordWriter(tmp_path / "run.sqlite", run=run) as record:
        record.append(one_value(0))
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert read.steps.tolist() == [0]
    assert read.config["unprintable"] == "<Unprintable: RuntimeError>"
    assert read.config["tuple keys"] == {"(1, 2)": 3}
    assert read.config["tensor"] == "tensor([1., 1.])"


@pytest.mark.parametrize(
    "bad",
    [
        lambda: one_value(2, failures=float("inf")),
        lambda: one_value(2, failures=2**80),
        lambda: Sample(2**70, {}),
        lambda: one_value(2, seconds="soon"),
        lambda: one_value(2, diagnostics={"a": ["b"]}),
        lambda: one_value(2, events=[3]),
        lambda: Sample(2, {"energy_rms": {"attn": "text"}}),
        lambda: Sample(2, {"energy_rms": None}),
        lambda: one_value(2, failure=Unprintable(), coverage={"a": 3}),
    ],
)
def test_unencodable_sample_costs_itself(bad: Callable[[], Sample], tmp_path: Path) -> None:
    with caught_warnings() as messages, RecordWriter(tmp_path / "run.sqlite", run=RUN) as record:
        for step in range(5):
            record.append(bad() if step in (2, 3) else one_value(step))
    assert RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == [0, 1, 4]
    assert (record.num_lost, record.failed_writes, len(messages)) == (2, 2, 1)
    assert "a sample cannot be recorded" in messages[0]
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"]


# A file that is changed under the writer


def live(folder: Path, num_samples: int = 4) -> RecordWriter:
    folder.mkdir()
    record = RecordWriter(folder / "run.sqlite", run=RUN)
    for step in range(num_samples):
        record.append(one_value(step))
    return record


@pytest.mark.parametrize("num_before", [4, 2000])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_moved_record_is_complete_and_the_run_goes_on(what: str, num_before: int, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with caught_warnings() as messages:
        record = live(folder, num_before)
        if what == "file":
            moved = (folder / "run.sqlite").rename(tmp_path / "moved.sqlite")
        else:
            moved = folder.rename(tmp_path / "older") / "run.sqlite"
        for step in range(num_before, num_before + 3):
            record.append(one_value(step))
        record.close()
    assert RunRecord.open(moved).steps.tolist() == list(range(num_before))
    assert RunRecord.open(folder / "run.sqlite").steps.tolist() == [num_before, num_before + 1, num_before + 2]
    assert [file.name for file in folder.iterdir()] == ["run.sqlite"]
    assert (len(messages), record.failed_writes, record.num_lost) == (1, 1, 0)
    assert "was moved" in messages[0]


def test_record_moved_after_its_last_sample_is_complete(tmp_path: Path) -> None:
    with caught_warnings() as messages:
        record = live(tmp_path / "runs")
        moved = record.path.rename(tmp_path / "moved.sqlite")
        record.close()
    assert RunRecord.open(moved).steps.tolist() == [0, 1, 2, 3]
    assert list((tmp_path / "runs").iterdir()) == []
    assert len(messages) == 1


@pytest.mark.parametrize("what", ["file", "folder"])
def test_samples_of_a_deleted_record_are_counted_as_lost(what: str, tmp_path: Path) -> None:
    with caught_warnings() as messages:
        record = live(tmp_path / "runs")
        if what == "file":
            record.path.unlink()
        else:
            shutil.rmtree(tmp_path / "runs")
        for step in (4, 5):
            record.append(one_value(step))
        record.close()
    assert RunRecord.open(record.path).steps.tolist() == [4, 5]
    assert (len(messages), record.failed_writes, record.num_lost) == (1, 1, 4)
    assert "was deleted, and 4 samples with it" in messages[0]


@pytest.mark.parametrize("other", ["text", "record", "folder", "pipe"])
def test_file_in_the_place_of_a_record_is_left_alone(other: str, tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "other.sqlite", run=RUN) as written:
        written.append(one_value(77))
    before = (tmp_path / "other.sqlite").read_bytes()
    with caught_warnings() as messages:
        record = live(tmp_path / "runs")
        asked = record.path
        asked.rename(tmp_path / "moved.sqlite")
        if other == "record":
            shutil.copy(tmp_path / "other.sqlite", asked)
        elif other == "text":
            asked.write_text("mine")
        else:
            asked.mkdir() if other == "folder" else os.mkfifo(asked)
        for step in (4, 5):
            record.append(one_value(step))
        record.close()
    assert record.path == tmp_path / "runs" / "run-2.sqlite"
    assert RunRecord.open(record.path).steps.tolist() == [4, 5]
    assert RunRecord.open(tmp_path / "moved.sqlite").steps.tolist() == [0, 1, 2, 3]
    assert other != "text" or asked.read_text() == "mine"
    assert other != "record" or asked.read_bytes() == before
    assert len(messages) == 1


@pytest.mark.parametrize("file", ["run.sqlite", "run.sqlite-wal"])
@pytest.mark.parametrize("rest", [0, 40_000])
def test_cut_file_costs_one_warning_and_lost_ones_are_counted(file: str, rest: int, tmp_path: Path) -> None:
    with caught_warnings() as messages:
        record = live(tmp_path / "runs", 700)
        os.truncate(tmp_path / "runs" / file, rest)
        for step in range(700, 720):
            record.append(one_value(step))
        record.close()
    kept = RunRecord.open(record.path).steps.tolist()
    assert kept[-20:] == list(range(700, 720))
    assert len(kept) + record.num_lost == 720
    assert record.num_lost > 0
    assert 1 <= len(messages) <= 2
    assert len(list((tmp_path / "runs").iterdir())) <= 2


def test_log_merged_from_outside_is_no_loss(tmp_path: Path) -> None:
    record = live(tmp_path / "runs")
    other = sqlite3.connect(record.path)
    other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    other.close()
    record.append(one_value(4))  # a warning would be an error
    record.close()
    assert RunRecord.open(record.path).steps.tolist() == [0, 1, 2, 3, 4]
    assert (record.num_lost, record.failed_writes) == (0, 0)


def test_record_that_is_always_replaced_stays_bounded(tmp_path: Path) -> None:
    with caught_warnings() as messages:
        record = live(tmp_path / "runs", 1)
        for step in range(1, 120):
            if record.path.exists():
                record.path.unlink()
                record.path.write_text("mine")
            record.append(one_value(step))
        record.close()
    assert len(list((tmp_path / "runs").iterdir())) <= 100
    assert record.num_lost == 120
    assert len(messages) <= 2
