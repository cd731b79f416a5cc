"""The evidence of alarms in a record: small, of the samples that count, empty in older files, refused if hostile."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from attnmonitor.record import RecordError, RecordWriter, RunRecord
from attnmonitor.sample import HeadEvidence, Sample

RUN = {"model": "GPT2LMHeadModel", "model_signature": "2x4", "probe_fingerprint": "ab12"}


def evidence_of(step: int = 0, *, token: str | None = "the", **more: Any) -> HeadEvidence:
    generator = torch.Generator().manual_seed(step)
    return HeadEvidence(
        **{
            "layer": "attn",
            "head": 1,
            "scope": "query_head",
            "global_step": step,
            "rule": "hot",
            "positions": [(123, 100_000 + at, 0.123456789, float("nan"), token) for at in range(16)],
            "attention": torch.rand(32, 32, generator=generator),
            "singular_values": 1e5 * torch.rand(16, generator=generator),
            "rows": [(123, 100_000 + at) for at in range(32)],
            "num_keys": 131072,
            **more,
        }
    )


def write(path: Path, *samples: Sample) -> Path:
    with RecordWriter(path, run=RUN) as writer:
        for sample in samples:
            writer.append(sample)
    return path


def sample(step: int, *evidence: HeadEvidence) -> Sample:
    return Sample(step, {"key_rms": {"attn": torch.ones(2)}}, evidence=list(evidence))


def test_an_alarm_takes_at_most_32_kib(tmp_path: Path) -> None:
    worst = evidence_of(3, token="\u4e16" * 24)
    path = write(tmp_path / "run.sqlite", sample(0, evidence_of(4, healthy=worst, token="\u4e16" * 24)))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        (size,) = db.execute("SELECT length(CAST(content AS BLOB)) FROM evidence").fetchone()
    assert 15_000 < size <= 2**15
    [found] = RunRecord.open(path).evidence
    assert found.healthy is not None
    assert found.positions[0][4] == "\u4e16" * 24
    too_long = evidence_of(0, token="x" * 700, healthy=evidence_of(0, token="x" * 700))
    [found] = RunRecord.open(write(tmp_path / "other.sqlite", sample(0, too_long))).evidence
    assert found.healthy is None, "what does not fit is left out, and the rest is kept"


def test_only_samples_that_count_have_evidence(tmp_path: Path) -> None:
    path = write(tmp_path / "run.sqlite", sample(0), sample(1, evidence_of(1)), sample(2, evidence_of(2)))
    assert [each.global_step for each in RunRecord.open(path).evidence] == [1, 2]
    write(path, sample(1, evidence_of(1, rule="cold")))  # a resume from before
    assert [each.rule for each in RunRecord.open(path).evidence] == ["cold"]


def test_record_without_evidence_opens_and_continues(tmp_path: Path) -> None:
    path = write(tmp_path / "run.sqlite", sample(0))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'evidence'").fetchone()
    assert RunRecord.open(path).evidence == []
    write(path, sample(1, evidence_of(1)))
    assert len(RunRecord.open(path).evidence) == 1


def test_at_most_200_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "run.sqlite", *(sample(step, evidence_of(step)) for step in range(3)))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for _ in range(9):
            db.execute("INSERT INTO evidence SELECT * FROM evidence")
    assert len(RunRecord.open(path).evidence) == 200


HOSTILE: dict[str, Any] = {
    "no attention": {"attention": None},
    "ragged attention": {"attention": [[0.5], [0.5, 0.5]]},
    "attention of texts": {"attention": [["dark"]]},
    "many rows": {"rows": [[0, 1]] * 100},
    "long positions": {"positions": [[0, 1, 0.5, 0.5, "a"]] * 1000},
    "position of text": {"positions": [["0", 1, 0.5, 0.5, "a"]]},
    "short position": {"positions": [[0, 1]]},
    "token of bytes": {"positions": [[0, 1, 0.5, 0.5, ["a"]]]},
    "step of text": {"step": "now"},
    "healthy in itself": {"healthy": [1]},
    "columns": {"columns": 10**9},
}


@pytest.mark.parametrize("change", [*HOSTILE, "not JSON", "a bomb", "a blob", "scope", "head", "columns of the table"])
def test_hostile_evidence_is_refused(change: str, tmp_path: Path) -> None:
    path = write(tmp_path / "run.sqlite", sample(0, evidence_of()))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        (content,) = db.execute("SELECT content FROM evidence").fetchone()
        if change in HOSTILE:
            content = json.dumps({**json.loads(content), **HOSTILE[change]})
        statements = {
            "not JSON": ("UPDATE evidence SET content = ?", "not JSON"),
            "a bomb": ("UPDATE evidence SET content = ?", "[" * 30_000 + "]" * 30_000),
            "a blob": ("UPDATE evidence SET content = ?", b"\xff"),
            "scope": ("UPDATE evidence SET scope = ?", "layer"),
            "head": ("UPDATE evidence SET head = ?", -1),
            "columns of the table": ("ALTER TABLE evidence ADD COLUMN more", None),
        }
        statement, value = statements.get(change, ("UPDATE evidence SET content = ?", content))
        db.execute(statement, () if value is None else (value,))
    with pytest.raises(RecordError) as raised:
        _ = RunRecord.open(path).evidence
    assert len(str(raised.value).splitlines()) == 1


def test_control_characters_of_a_token_stay_in_the_record(tmp_path: Path) -> None:
    path = write(tmp_path / "run.sqlite", sample(0, evidence_of(token="\x1b[2J", layer="a\x1b[2J", rule="b\x1b[2J")))
    [found] = RunRecord.open(path).evidence
    for text in (str(found), repr(found), found.positions_text()):
        assert "\x1b" not in text
