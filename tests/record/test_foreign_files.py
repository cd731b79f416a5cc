"""Files that somebody else made or damaged: one error of one sentence, in bounded time, and nothing in them is run."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from attnmonitor.cli import main
from attnmonitor.record import RecordError, RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

RUN = {"model": "GPT2LMHeadModel", "model_signature": "2x4", "probe_fingerprint": "ab12"}
COLUMNS = {
    "segment": "id, started_at, run, coverage",
    "layout": "id, layers",
    "sample": "id, segment_id, global_step, recorded_at, seconds, failures, failure, diagnostics, superseded_by",
    "value": "sample_id, metric, layout_id, mean_float32, spread_bfloat16",
    "event": f"sample_id, {', '.join(field.name for field in fields(AlertEvent))}",
}


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "run.sqlite"
    coverage = {"attn": LayerCoverage("attn", "sdpa", "self", 2, 2, 8, 0.3)}
    with RecordWriter(path, run=RUN) as writer:
        for step in range(3):
            event = AlertEvent("hot", "logit_blowup", "query_head", "attn", 0, 1.0, 1.0, step, "firing")
            values = {"key_rms": {"attn": torch.ones(2)}, "query_rms": {"attn": torch.ones(2)}}
            writer.append(Sample(step, values, spread=values, events=[event], coverage=coverage))
    return path


def change(path: Path, script: str, *values: Any) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA writable_schema = ON")
    if values:
        db.execute(script, values)
    else:
        db.executescript(script)
    db.close()


def read_all(path: Path) -> RunRecord:
    run = RunRecord.open(path)
    for metric in run.metrics:
        run.trajectories(metric)
        run.spreads(metric)
    _ = run.events, run.coverage, run.config, run.diagnostics, run.steps, run.seconds
    return run


def is_refused(path: Path, capsys: pytest.CaptureFixture[str], match: str | None = None) -> None:
    """Check that the library raises a RecordError of one line and that both commands print it and exit with 2."""
    started = time.monotonic()
    with pytest.raises(RecordError, match=match) as raised:
        read_all(path)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 600
    for command in ("report", "replay"):
        assert main([command, str(path)]) == 2
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        assert "Traceback" not in err
        assert "\x1b" not in err
    assert time.monotonic() - started < 10


ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT {} FROM c"


@pytest.mark.parametrize("table", COLUMNS)
def test_view_in_the_place_of_a_table_is_refused(table: str, record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = ", ".join(f"n AS {name}" for name in COLUMNS[table].split(", "))
    change(record, f"ALTER TABLE {table} RENAME TO hidden; CREATE VIEW {table} AS {ENDLESS.format(columns)};")
    is_refused(record, capsys, "it has a view")


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("CREATE TRIGGER t AFTER INSERT ON sample BEGIN DELETE FROM value; END", "it has a trigger"),
        ("CREATE VIEW extra AS SELECT 1", "it has a view"),
        ("CREATE VIRTUAL TABLE extra USING fts5(x)", "it has a virtual table"),
        ("ALTER TABLE event ADD COLUMN more AS (1)", "'event' is missing or has other columns"),
        ("ALTER TABLE sample ADD COLUMN more", "'sample' is missing or has other columns"),
        ("ALTER TABLE sample RENAME COLUMN seconds TO minutes", "'sample' is missing or has other columns"),
        ("DROP TABLE event", "'event' is missing"),
    ],
)
def test_schema_that_is_not_a_records_is_refused(
    script: str, match: str, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(record, script)
    is_refused(record, capsys, match)


def test_writer_runs_no_trigger_of_a_file_it_continues(record: Path) -> None:
    change(record, "CREATE TRIGGER t AFTER INSERT ON sample BEGIN DELETE FROM value; END")
    before = record.read_bytes()
    with pytest.warns(UserWarning, match="it has a trigger"), RecordWriter(record, run=RUN) as writer:
        writer.append(Sample(9, {"key_rms": {"attn": torch.ones(2)}}))
    assert record.read_bytes() == before
    assert RunRecord.open(writer.path).steps.tolist() == [9]


BOMB = "[" * 200_000 + "]" * 200_000


@pytest.mark.parametrize(
    ("statement", "value"),
    [
        ("UPDATE layout SET layers = ?", '[["attn", -2]]'),
        ("UPDATE layout SET layers = ?", '[["attn", 1000000000000]]'),
        ("UPDATE layout SET layers = ?", '[["attn", 9000000]]'),
        ("UPDATE layout SET layers = ?", '[["attn", 1.5]]'),
        ("UPDATE layout SET layers = ?", '[["attn", true]]'),
        ("UPDATE layout SET layers = ?", '[["attn"]]'),
        ("UPDATE layout SET layers = ?", '{"attn": 2}'),
        ("UPDATE layout SET layers = ?", '[["attn", 1], ["attn", 5]]'),
        ("UPDATE layout SET layers = ?", BOMB),
        ("UPDATE layout SET layers = ?", "not JSON"),
        ("UPDATE layout SET layers = ?", 3),
        ("UPDATE layout SET id = ?", 77),
        ("UPDATE segment SET run = ?", BOMB),
        ("UPDATE segment SET run = ?", "[1]"),
        ("UPDATE segment SET run = ?", b"\xff\xfe"),
        ("UPDATE segment SET coverage = ?", "[3]"),
        ("UPDATE segment SET coverage = ?", '[{"layer": 3, "outside": []}]'),
        ("UPDATE segment SET coverage = ?", '[{"layer": "a", "num_query_heads": 1e99, "outside": []}]'),
        ("UPDATE segment SET coverage = ?", '[{"layer": "a", "num_query_heads": 99999999999, "outside": []}]'),
        ("UPDATE segment SET coverage = ?", '[{"layer": "a", "num_query_heads": 4, "outside": []}]'),
        ("UPDATE segment SET coverage = ?", '[{"layer": "a", "outside": [], "unknown": 1}]'),
        ("UPDATE segment SET id = ?", 99),
        ("UPDATE sample SET global_step = ?", "ten"),
        ("UPDATE sample SET global_step = ?", 1.5),
        ("UPDATE sample SET seconds = ?", "soon"),
        ("UPDATE sample SET failures = ?", b"1"),
        ("UPDATE sample SET failure = ?", b"1"),
        ("UPDATE sample SET diagnostics = ?", '{"overhead": "much"}'),
        ("UPDATE sample SET diagnostics = ?", "[]"),
        ("UPDATE value SET mean_float32 = ?", b"123"),
        ("UPDATE value SET mean_float32 = ?", b""),
        ("UPDATE value SET mean_float32 = ?", "text"),
        ("UPDATE value SET spread_bfloat16 = ?", b"12345678"),
        ("UPDATE value SET metric = ?", b"key_rms"),
        ("UPDATE event SET head = ?", "first"),
        ("UPDATE event SET value = ?", "high"),
        ("UPDATE event SET layer = ?", 7),
        ("UPDATE event SET rule = ?", None),
        ("UPDATE event SET global_step = ?", None),
    ],
)
def test_content_of_a_wrong_kind_is_refused(
    statement: str, value: Any, record: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(record, statement, value)
    with pytest.raises(RecordError, match=r"not that of a record|malformed") as raised:
        read_all(record)
    assert len(str(raised.value).splitlines()) == 1
    for command in ("report", "replay"):  # replay may do without what is wrong
        assert main([command, str(record)]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_texts_that_are_not_utf8_are_read_with_replacements(record: Path) -> None:
    change(
        record, "UPDATE event SET message = CAST(x'ff61' AS TEXT); UPDATE segment SET run = '{\"name\": \"\\ud800\"}'"
    )
    run = read_all(record)
    assert run.events[0].message == "\ufffda"
    assert run.config == {"name": "?"}


def test_duplicate_keys_and_unused_layouts_are_harmless(record: Path) -> None:
    change(record, 'UPDATE segment SET run = \'{"a": 1, "a": 2}\'; INSERT INTO layout VALUES (50, \'[["x", 9999]]\')')
    assert read_all(record).config == {"a": 2}


def test_claimed_length_of_a_huge_blob_is_refused(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(record, "UPDATE value SET mean_float32 = zeroblob(100000000) WHERE sample_id = 1")
    is_refused(record, capsys)


def test_damaged_pages_are_refused_wherever_they_are(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = record.read_bytes()
    for start in range(32768, len(whole), 32768):
        record.write_bytes(whole[:start] + os.urandom(4000) + whole[start + 4000 :])
        is_refused(record, capsys)


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b" * 5000)


@pytest.mark.parametrize(
    "make",
    [
        Path.touch,
        os.mkfifo,
        as_zip,
        lambda path: path.write_bytes(os.urandom(9000)),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.write_bytes(b"SQLite format 3\0" + bytes(5000)),
    ],
    ids=["empty", "pipe", "zip", "noise", "device", "header"],
)
def test_file_of_another_kind_is_refused_at_once(
    make: Callable[[Path], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "run.sqlite")
    is_refused(tmp_path / "run.sqlite", capsys)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path)], ids=["folder", "circle"])
def test_folder_or_broken_link_has_no_record(make: Callable[[Path], Any], tmp_path: Path) -> None:
    make(tmp_path / "run.sqlite")
    assert main(["report", str(tmp_path / "run.sqlite")]) == 2


def test_interrupt_ends_a_long_read(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnmonitor.record.foreign import time_limit

    db = sqlite3.connect(":memory:")
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    # A process that a shell has started in the background ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), time_limit(db, record, 20.0):
            db.execute(ENDLESS.format("max(n)")).fetchone()
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(RecordError, match=r"longer than 0\.2 s"), time_limit(db, record, 0.2):
        db.execute(ENDLESS.format("max(n)")).fetchone()
    assert time.monotonic() - started < 10
    timer.join()
    db.close()


def test_control_characters_never_reach_the_terminal(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2Jlayer\r\nhealthy\u202e\x9b"
    change(record, "UPDATE layout SET layers = ?", json.dumps([[evil, 2]]))
    coverage = [{"layer": evil, "outside": [], "reason": evil, "how": evil}]
    change(record, "UPDATE segment SET coverage = ?", json.dumps(coverage))
    change(record, "UPDATE event SET layer = ?1, rule = ?1, message = ?1, kind = ?1", evil)
    rules = record.with_name("rules.json")
    rules.write_text(
        json.dumps(
            [
                {
                    "name": evil,
                    "kind": evil,
                    "scope": "query_head",
                    "when": {"metric": "query_rms", "signal": "value", "fire_above": -9.0, "clear_below": -10.0},
                    "patience": 1,
                    "grace": 0,
                }
            ]
        )
    )
    for arguments in (["report", record], ["replay", record], ["replay", record, "--rules", rules]):
        main([str(argument) for argument in arguments])
        shown = "".join(capsys.readouterr())
        assert not {"\x1b", "\x07", "\r", "\u202e", "\x9b"} & set(shown), shown
        assert not any(line.startswith("healthy") for line in shown.splitlines())
