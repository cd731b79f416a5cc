"""A record is followed from before its run begins, through kill and resume, and its writer does not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from record_writer import RUN, SAMPLES, WriterProcess

from attnmonitor.record import RecordError, RecordWriter
from attnmonitor.record.follow import FollowedRecord


def steps(followed: FollowedRecord) -> list[int] | None:
    record = followed.read()
    return None if record is None else record.steps.tolist()


def test_run_is_followed_through_kill_and_resume(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    followed = FollowedRecord(path)
    assert steps(followed) is None
    assert followed.progress == f"{path} is not there yet: waiting for the run"
    writer = WriterProcess(path)
    assert steps(followed) == []
    assert followed.progress == "the run has begun, no sample yet"
    seen = set()
    for index in range(3):
        writer.sample(index)
        seen.add(followed.version)
        assert steps(followed) == [50 * at for at in range(index + 1)]
    assert len(seen) == 3
    assert followed.version in seen, "nothing new is no new version"
    assert followed.read() is followed.read()
    writer.kill()
    assert steps(followed) == [0, 50, 100]
    assert followed.progress.startswith("step 100, written ")
    writer = WriterProcess(path)  # resumed from an older checkpoint: one sample is taken again
    writer.sample(2)
    writer.sample(3)
    assert steps(followed) == [0, 50, 100, 150]
    writer.end()
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"], "a follower leaves no file"
    record = followed.read()
    assert record is not None
    assert record.steps.tolist() == [0, 50, 100, 150]
    for metric in record.metrics:  # the writer, which lost nothing, has noticed nothing
        for layer, heads in record.trajectories(metric).items():
            assert heads.tolist() == [sample.values[metric][layer].tolist() for sample in SAMPLES[:4]]
    assert [step for step, _ in record.logged["loss"]] == [0, 50, 100, 150]
    assert followed.progress.endswith("the run has ended; if it is resumed, this goes on")
    path.unlink()
    assert steps(followed) == [0, 50, 100, 150], "what was read stays"
    assert followed.progress == f"{path} is gone: waiting for the run"


def test_newest_record_of_a_folder_is_followed(tmp_path: Path) -> None:
    followed = FollowedRecord(tmp_path)
    assert steps(followed) is None
    assert "not there yet" in followed.progress
    with RecordWriter(tmp_path / "run.sqlite", run=RUN.config) as record:
        record.append(SAMPLES[0])
        assert steps(followed) == [0]
    assert followed.path == tmp_path / "run.sqlite"


def test_file_that_is_no_record_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "notes.sqlite").write_text("not a database, " * 100)
    with pytest.raises(RecordError, match=r"notes\.sqlite"):
        FollowedRecord(tmp_path / "notes.sqlite")
