"""The run record keeps every sample, survives what happens to files, and never disturbs training."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import resource
import shutil
import sqlite3
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_runs import SyntheticRun

from attnmonitor.record import RecordError, RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample

RUN = {"model": "GPT2LMHeadModel", "model_signature": "2x4", "probe_fingerprint": "ab12"}


def one_value(step: int, value: float | None = None, **more: object) -> Sample:
    return Sample(step, {"energy_rms": {"attn": torch.tensor([float(step if value is None else value)])}}, **more)


def write(path: Path, steps: range, run: dict[str, object] = RUN) -> None:
    with RecordWriter(path, run=run) as record:
        for step in steps:
            record.append(one_value(step))


def test_a_run_reads_back_as_it_was_sampled(tmp_path: Path) -> None:
    run = SyntheticRun(num_layers=3, num_heads=[4, 8, 6], num_samples=20, faulty=(1, 5), group=2)
    samples = list(run.samples())
    with RecordWriter(tmp_path / "deep" / "er" / "run.sqlite", run=run.config) as record:
        for sample in samples:
            record.append(sample)
    read = RunRecord.open(tmp_path / "deep" / "er" / "run.sqlite")
    assert read.steps.tolist() == [sample.global_step for sample in samples]
    assert read.metrics == tuple(run.metrics)
    assert read.config == run.config
    assert dict(read.coverage) == dict(samples[0].coverage)
    assert read.events == [event for sample in samples for event in sample.events]
    assert len(read.events) == 3
    assert set(read.diagnostics) == {"certified_fraction", "invariant_residual", "overhead"}
    for metric in run.metrics:
        trajectories, spreads = read.trajectories(metric), read.spreads(metric)
        assert list(trajectories) == run.layers
        for layer in run.layers:
            expected = torch.stack([sample.values[metric][layer] for sample in samples]).numpy()
            assert trajectories[layer].dtype == np.float32
            np.testing.assert_array_equal(trajectories[layer], expected)
            np.testing.assert_allclose(spreads[layer], 0.1 * expected, rtol=2**-8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_every_float32_survives_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, rows: list[list[float]]) -> None:
    path = tmp_path_factory.mktemp("floats") / "run.sqlite"
    with RecordWriter(path, run=RUN) as record:
        for step, row in enumerate(rows):
            record.append(Sample(step, {"key_rms": {"attn": torch.tensor(row)}}))
    np.testing.assert_array_equal(RunRecord.open(path).trajectories("key_rms")["attn"], np.array(rows, np.float32))


def test_unmeasured_values_read_as_nan(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    with RecordWriter(path, run=RUN) as record:
        record.append(
            Sample(0, {"key_rms": {"a": torch.ones(2), "b": torch.ones(3)}, "spectral_gap": {"a": torch.ones(2)}})
        )
        record.append(Sample(10, {}, failures=1, failure="OutOfMemoryError: …"))
        record.append(Sample(20, {"key_rms": {"b": torch.full((3,), 2.0)}}, failures=1))
    read = RunRecord.open(path)
    assert read.samples[1].failure == "OutOfMemoryError: …"
    assert math.isnan(read.samples[1].seconds)
    np.testing.assert_array_equal(read.trajectories("key_rms")["a"], [[1, 1], [np.nan] * 2, [np.nan] * 2])
    np.testing.assert_array_equal(read.trajectories("key_rms")["b"], [[1] * 3, [np.nan] * 3, [2] * 3])
    np.testing.assert_array_equal(read.trajectories("spectral_gap")["a"], [[1, 1], [np.nan] * 2, [np.nan] * 2])
    assert np.isnan(read.spreads("key_rms")["b"]).all()
    with pytest.raises(ValueError, match=r"no metric 'key_rmss'.*recorded: key_rms, spectral_gap"):
        read.trajectories("key_rmss")


def test_events_and_coverage_keep_nan_none_and_tuples(tmp_path: Path) -> None:
    event = AlertEvent(
        "non_finite", "nan", "run", None, None, math.nan, math.nan, 5, "firing", "critical", None, "it's ü"
    )
    coverage = {
        "seen": LayerCoverage("seen", "traced", "cross", 4, 2, 64, 0.125, 1e-6, ("softcap", "bias")),
        "unseen": LayerCoverage("unseen", reason="flash kernel <hidden>"),
    }
    with RecordWriter(tmp_path / "run.sqlite", run=RUN) as record:
        record.append(one_value(5, events=[event], coverage=coverage))
    read = RunRecord.open(tmp_path / "run.sqlite")
    np.testing.assert_equal(asdict(read.events[0]), asdict(event))
    np.testing.assert_equal(
        {k: asdict(v) for k, v in read.coverage.items()}, {k: asdict(v) for k, v in coverage.items()}
    )


def test_resumed_run_supersedes_samples_without_deleting(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    write(path, range(0, 50, 10))
    event = AlertEvent("hot", "logit_blowup", "query_head", "attn", 0, 1.0, 1.0, 30, "firing")
    with RecordWriter(path, run=RUN) as record:  # resumed from the checkpoint of step 20
        for step in (20, 30):
            record.append(one_value(step, -step, events=[event]))
    read = RunRecord.open(path)
    assert read.steps.tolist() == [0, 10, 20, 30]
    assert read.trajectories("energy_rms")["attn"].ravel().tolist() == [0, 10, -20, -30]
    assert len(read.segments) == 1
    assert len(read.events) == 2
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        assert db.execute("SELECT count(*) FROM sample").fetchone() == (7,)
    db.close()


def test_other_probe_or_model_starts_a_segment_with_warning(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    write(path, range(0, 30, 10))
    with pytest.warns(UserWarning, match="probe_fingerprint was 'ab12' and is 'cd34'. A new segment begins"):
        record = RecordWriter(path, run={**RUN, "probe_fingerprint": "cd34"})
    record.append(Sample(30, {"energy_rms": {"attn": torch.ones(3)}}))
    record.close()
    read = RunRecord.open(path)
    assert [segment.config["probe_fingerprint"] for segment in read.segments] == ["ab12", "cd34"]
    assert [sample.segment for sample in read.samples] == [0, 0, 0, 1]
    values = read.trajectories("energy_rms")["attn"]
    np.testing.assert_array_equal(values, [[0, np.nan, np.nan], [10, np.nan, np.nan], [20, np.nan, np.nan], [1, 1, 1]])


def test_other_settings_continue_the_segment_and_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "run.sqlite", range(1))
    write(tmp_path / "run.sqlite", range(1, 2), {**RUN, "schedule": 7, "device": torch.device("cpu")})
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert len(read.segments) == 1
    assert read.config["schedule"] == 7
    assert read.config["device"] == "cpu"


def start(target: Callable[..., None], *arguments: object) -> tuple[multiprocessing.Process, Connection]:
    """Run ``target(*arguments, send)`` in a process of its own; a fork, because importing torch again takes seconds."""
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=target, args=(*arguments, send))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in forked children
        process.start()
    send.close()
    return process, receive


def write_for_ever(path: Path, first_step: int, send: Connection) -> None:
    record = RecordWriter(path, run=RUN)
    for step in itertools.count(first_step):
        layers = {f"layer.{i}": torch.full((64,), float(step)) for i in range(8)}
        record.append(Sample(step, {"key_rms": layers, "query_rms": layers}))
        send.send(step)


def received(pipe: Connection) -> list[int]:
    """Everything that was sent until the sender died."""
    sent = []
    with contextlib.suppress(EOFError):
        while True:
            sent.append(pipe.recv())
    pipe.close()
    return sent


def test_kill_loses_at_most_the_sample_being_written(tmp_path: Path) -> None:
    path, first_step = tmp_path / "run.sqlite", 0
    for kill in range(6):
        writer, pipe = start(write_for_ever, path, first_step)
        lengths = []
        for _ in range(8):  # reading while training writes sees whole samples, ever more of them
            confirmed = pipe.recv()
            read = RunRecord.open(path)
            for metric in ("key_rms", "query_rms"):
                for values in read.trajectories(metric).values():
                    np.testing.assert_array_equal(values, np.repeat(read.steps[:, None], 64, axis=1))
            lengths.append(len(read.steps))
        assert lengths == sorted(lengths)
        time.sleep(0.002 * kill)
        writer.kill()
        writer.join()
        confirmed = [confirmed, *received(pipe)][-1]
        read = RunRecord.open(path)
        assert read.steps.tolist() == list(range(len(read.steps)))
        assert read.steps[-1] - confirmed in (0, 1), "the last append may be done and not yet told"
        assert np.isfinite(read.trajectories("query_rms")["layer.7"]).all()
        first_step = int(read.steps[-1]) + 1


def test_second_process_records_in_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    writer, pipe = start(write_for_ever, path, 0)
    pipe.recv()
    beside = r"another run is writing this record. This run is recorded in .*run-2\.sqlite"
    with pytest.warns(UserWarning, match=beside):
        record = RecordWriter(path, run=RUN)
    for step in range(5):
        record.append(one_value(step))
    record.close()
    writer.kill()
    writer.join()
    last = received(pipe)[-1]
    assert RunRecord.open(tmp_path / "run-2.sqlite").steps.tolist() == list(range(5))
    assert RunRecord.open(path).steps.tolist()[: last + 1] == list(range(last + 1))
    with RecordWriter(path, run=RUN) as record:  # the writer is dead: its lock is gone with it
        record.append(one_value(10**6))
    assert 10**6 in RunRecord.open(path).steps


def test_closed_or_lost_writer_leaves_only_the_record(tmp_path: Path) -> None:
    write(tmp_path / "run.sqlite", range(2))
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"]
    record = RecordWriter(tmp_path / "run.sqlite", run=RUN)
    record.append(one_value(2))
    del record  # a user who never closes
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"]
    write(tmp_path / "run.sqlite", range(3, 4))
    assert RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == [0, 1, 2, 3]


def test_forked_child_leaves_record_and_lock_alone(tmp_path: Path) -> None:
    record = RecordWriter(tmp_path / "run.sqlite", run=RUN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in forked children
        child = os.fork()
    if child == 0:
        record.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.warns(UserWarning, match="another run is writing"):
        RecordWriter(tmp_path / "run.sqlite", run=RUN).close()
    record.append(one_value(0))
    record.close()
    assert RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == [0]


def test_forked_child_writes_to_a_file_beside(tmp_path: Path) -> None:
    record = RecordWriter(tmp_path / "run.sqlite", run=RUN)
    record.append(one_value(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads in forked children
        child = os.fork()
    if child == 0:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record.append(one_value(100))
            record.close()
        os._exit(0)
    record.append(one_value(1))
    assert os.waitpid(child, 0)[1] == 0
    record.append(one_value(2))
    record.close()
    assert RunRecord.open(tmp_path / "run.sqlite").steps.tolist() == [0, 1, 2]
    assert RunRecord.open(tmp_path / "run-2.sqlite").steps.tolist() == [100]


def fill_the_disk(path: Path, send: Connection) -> None:
    # A busy machine may take so long to write that samples wait without a failure.
    never = mock.patch("attnmonitor.record.writer.SLOW_SECONDS", math.inf)
    with never, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        record = RecordWriter(path, run=RUN)
        for step in range(120):
            if step == 20:
                resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
            record.append(Sample(step, {"key_rms": {"layer": torch.full((2000,), float(step))}}))
        waiting, failed = len(record.unwritten), record.failed_writes
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        record.append(Sample(120, {"key_rms": {"layer": torch.full((2000,), 120.0)}}))
        send.send((waiting, failed, len(record.unwritten), [str(warning.message) for warning in caught]))
        record.close()


def test_full_disk_costs_one_warning_and_no_sample(tmp_path: Path) -> None:
    child, pipe = start(fill_the_disk, tmp_path / "run.sqlite")
    waiting, failed, waiting_after, messages = pipe.recv()
    child.join()
    pipe.close()
    assert waiting == failed > 50
    assert waiting_after == 0
    (message,) = messages
    assert "run.sqlite: the run record cannot be written" in message
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert read.steps.tolist() == list(range(121))
    np.testing.assert_array_equal(read.trajectories("key_rms")["layer"][:, 7], np.arange(121))


def test_unwritable_folder_costs_one_warning_and_is_retried(tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be written"):
        record = RecordWriter(blocker / "run.sqlite", run=RUN)
    for step in range(3):
        record.append(one_value(step))  # a second warning would be an error
    assert record.failed_writes == 4
    blocker.unlink()
    record.close()
    assert RunRecord.open(blocker / "run.sqlite").steps.tolist() == [0, 1, 2]


def test_unwritten_samples_are_bounded_and_lost_ones_counted(tmp_path: Path) -> None:
    blocker = tmp_path / "runs"
    blocker.write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="the latest 1,000 of them"):
        record = RecordWriter(blocker / "run.sqlite", run=RUN)
    for step in range(1050):
        record.append(one_value(step))
    assert (len(record.unwritten), record.num_lost) == (1000, 50)
    blocker.unlink()
    record.append(one_value(1050))
    record.close()
    assert (len(record.unwritten), record.num_lost) == (0, 50)
    assert RunRecord.open(blocker / "run.sqlite").steps.tolist() == list(range(50, 1051))


def test_a_read_only_file_system_is_not_an_error() -> None:
    with pytest.warns(UserWarning, match="cannot be written"):
        record = RecordWriter("/proc/attnmonitor/run.sqlite", run=RUN)
    record.append(one_value(0))
    record.close()
    assert len(record.unwritten) == 1


def test_file_deleted_under_the_writer_is_created_again(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    record = RecordWriter(path, run=RUN)
    record.append(one_value(0))
    path.unlink()
    record.append(one_value(1))
    record.close()
    assert RunRecord.open(path).steps.tolist() == [1]


def damaged_files(folder: Path) -> dict[str, tuple[Path, str]]:
    whole = folder / "whole.sqlite"
    write(whole, range(0, 3000, 100))
    for name, statement in {
        "newer": "PRAGMA user_version = 99",
        "older": "PRAGMA user_version = 0",
        "foreign": "PRAGMA application_id = 7",
    }.items():
        shutil.copy(whole, folder / f"{name}.sqlite")
        with contextlib.closing(sqlite3.connect(folder / f"{name}.sqlite")) as db, db:
            db.execute(statement)
        db.close()
    (folder / "cut.sqlite").write_bytes(whole.read_bytes()[:-40000])
    (folder / "stub.sqlite").write_bytes(whole.read_bytes()[:50])
    (folder / "text.sqlite").write_text("step,loss\n" * 500)
    overwritten = bytearray(whole.read_bytes())
    overwritten[200:] = bytes(len(overwritten) - 200)
    (folder / "zeros.sqlite").write_bytes(overwritten)
    reasons = {
        "newer": "written by a newer attnmonitor .schema 99; this one has schema 2",
        "older": "written by an older attnmonitor .schema 0",
        "foreign": "not a run record of attnmonitor",
        "cut": "truncated.*malformed",
        "stub": "not a run record",
        "text": "not a database",
        "zeros": "not a run record",
    }
    return {name: (folder / f"{name}.sqlite", reason) for name, reason in reasons.items()}


@pytest.mark.parametrize("name", ["newer", "older", "foreign", "cut", "stub", "text", "zeros"])
def test_unusable_file_is_kept_and_another_one_written(tmp_path: Path, name: str) -> None:
    path, reason = damaged_files(tmp_path)[name]
    before = path.read_bytes()
    with pytest.raises(RecordError, match=reason) as raised:
        RunRecord.open(path)
    assert str(path) in str(raised.value)
    with pytest.warns(UserWarning, match=f"This run is recorded in .*{name}-2.sqlite instead"):
        record = RecordWriter(path, run=RUN)
    record.append(one_value(3))
    record.close()
    assert path.read_bytes() == before
    assert RunRecord.open(record.path).steps.tolist() == [3]


def test_missing_and_empty_file_give_different_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such run record"):
        RunRecord.open(tmp_path / "none.sqlite")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(RecordError, match="an empty file"):
        RunRecord.open(tmp_path / "empty.sqlite")
    write(tmp_path / "empty.sqlite", range(1))
    assert len(RunRecord.open(tmp_path / "empty.sqlite").steps) == 1


def test_folder_of_records_names_its_newest(tmp_path: Path) -> None:
    for name, age in (("b", 0), ("a", 60)):
        write(tmp_path / f"{name}.sqlite", range(1))
        os.utime(tmp_path / f"{name}.sqlite", (1e9 - age, 1e9 - age))
    with pytest.raises(FileNotFoundError, match=f"newest in it is {re.escape(str(tmp_path / 'b.sqlite'))}"):
        RunRecord.open(tmp_path)
    with RecordWriter(tmp_path / "a.sqlite", run=RUN) as running:
        running.append(one_value(5))
        os.utime(tmp_path / "a.sqlite", (1e9 - 60, 1e9 - 60))  # what is added is in the log beside it
        with pytest.raises(FileNotFoundError, match=f"newest in it is {re.escape(str(tmp_path / 'a.sqlite'))}"):
            RunRecord.open(tmp_path)


def test_a_record_without_samples_reads_as_empty(tmp_path: Path) -> None:
    write(tmp_path / "run.sqlite", range(0))
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert len(read.steps) == len(read.events) == len(read.metrics) == len(read.coverage) == 0
    assert read.to_dataframe().empty


def test_reading_leaves_the_file_alone(tmp_path: Path) -> None:
    write(tmp_path / "run.sqlite", range(3))
    before = (tmp_path / "run.sqlite").read_bytes()
    read = RunRecord.open(tmp_path / "run.sqlite")
    read.trajectories("energy_rms")
    assert (tmp_path / "run.sqlite").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run.sqlite"]


def test_a_dataframe_has_one_row_per_head_and_sample(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    run = SyntheticRun(num_layers=2, num_heads=3, num_samples=4, metrics=("energy_rms", "key_rms"))
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in run.samples():
            record.append(sample)
    read = RunRecord.open(tmp_path / "run.sqlite")
    frame = read.to_dataframe()
    assert len(frame) == 2 * 3 * 4 * 2
    chosen = frame[(frame.metric == "key_rms") & (frame.layer == run.layers[1]) & (frame["head"] == 2)]
    np.testing.assert_array_equal(chosen.value, read.trajectories("key_rms")[run.layers[1]][:, 2])
    np.testing.assert_array_equal(chosen.global_step, read.steps)


def test_a_7b_class_run_stays_small_and_opens_fast(tmp_path: Path) -> None:
    path, layers, metrics = tmp_path / "run.sqlite", [f"model.layers.{i}.self_attn" for i in range(32)], 10
    run = SyntheticRun(num_layers=32, num_heads=32, num_samples=1)
    sample = next(run.samples())
    sample = replace(sample, values=dict(list(sample.values.items())[:metrics]))
    with RecordWriter(path, run=run.config) as record:
        for step in range(2000):
            record.append(replace(sample, global_step=step))
    size_bytes = path.stat().st_size
    assert size_bytes < 150e6
    assert size_bytes > 2000 * metrics * 1024 * 4, "all values are there"
    began = time.perf_counter()
    read = RunRecord.open(path)
    opened_seconds = time.perf_counter() - began
    assert opened_seconds < 1.0
    assert len(read.steps) == 2000
    assert read.trajectories("key_incoherence")[layers[31]].shape == (2000, 32)


def test_record_of_the_schema_before_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    event = AlertEvent("hot", "logit_blowup", "query_head", "attn", 0, 1.0, 1.0, 0, "firing")
    with RecordWriter(path, run=RUN) as record:
        record.append(one_value(0, events=[event]))
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        for column in ("metric", "now", "worst", "distance"):
            db.execute(f"ALTER TABLE event DROP COLUMN {column}")
        db.execute("ALTER TABLE segment DROP COLUMN firing")
        db.execute("PRAGMA user_version = 1")
    db.close()
    old = RunRecord.open(path)
    assert old.events == old.firing == [event]
    assert (old.state, math.isnan(old.firing[0].now)) == ("alarm", True)
    alarm = replace(event, metric="query_rms", now=3.0, worst=4.0, distance=1.5)
    with RecordWriter(path, run=RUN) as record:
        record.append(one_value(10, events=[replace(alarm, global_step=10)], firing=[alarm]))
    [present] = RunRecord.open(path).firing
    assert (present.value, present.now, present.worst, present.distance) == (1.0, 3.0, 4.0, 1.5)
    assert [each.metric for each in RunRecord.open(path).events] == ["", "query_rms"]


def test_event_without_baseline_equals_its_copy(tmp_path: Path) -> None:
    event = AlertEvent("dead", "dead_head", "query_head", "attn", 0, 0.0, math.nan, 3, "firing")
    writer = RecordWriter(tmp_path / "run.sqlite", run={})
    writer.append(Sample(3, {"key_rms": {"attn": torch.ones(1)}}, events=[event]))
    writer.close()
    [read] = RunRecord.open(writer.path).events
    assert read == event
    assert hash(read) == hash(event)
    assert read != replace(event, value=1.0)
