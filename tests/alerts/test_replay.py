"""Replaying a recorded run finds what the live watch found."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from synthetic_runs import SyntheticRun

from attnmonitor import DEFAULT_METRICS
from attnmonitor.alerts import DEFAULT_RULES, Alerts, Rule, Threshold, replay, replay_text
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.report import write_report
from attnmonitor.sample import AlertEvent, Sample

FAINT = Rule(
    "faint", "dead_head", "query_head", Threshold("query_rms", "value", fire_below=-2.0, clear_above=-1.0), grace=0
)


def recorded(path, samples: list[tuple[int, dict, str | None]]) -> RunRecord:
    with RecordWriter(path, run={"model": "tiny", "probe_fingerprint": "00"}) as record:
        for step, values, failure in samples:
            record.append(Sample(step, values, failure=failure))
    return RunRecord.open(path)


def sick_run(num_samples: int = 50, onset: int = 35) -> list[tuple[int, dict, None]]:
    """Nine query heads and nine KV heads with 3 % of noise; one loses its queries, then the run its numbers."""
    noise = torch.Generator().manual_seed(0)
    metrics = sorted(Alerts().required_metrics)
    run = []
    for index in range(num_samples):
        values = {
            metric: {f"layers.{i}": (0.5 * (0.03 * torch.randn(3, generator=noise)).exp()) for i in range(3)}
            for metric in metrics
        }
        values["key_participation_ratio"] = {layer: v + 8 for layer, v in values["key_participation_ratio"].items()}
        values["energy_rms"] = {layer: v + 1 for layer, v in values["energy_rms"].items()}
        values["key_norm_participation"] = {layer: v + 0.4 for layer, v in values["key_norm_participation"].items()}
        if index >= onset:
            values["query_rms"]["layers.1"][2] *= 0.2
        if index >= num_samples - 2:
            values["energy_rms"]["layers.1"][0] = math.nan
            values["energy_rms"]["layers.2"][:] = math.nan
        run.append((10 * index, values, None))
    return run


def test_replay_gives_the_live_events(tmp_path):
    run = sick_run()
    watch = Alerts()
    live = [event for step, values, _ in run for event in watch.observe(values, step)]
    assert [(event.rule, event.layer, event.head) for event in live if event.severity == "warning"] == [
        ("query_faded", "layers.1", 2)
    ]
    assert [event.rule for event in live][-1] == "non_finite"
    # As text, because a NaN baseline equals nothing.
    assert [repr(event) for event in replay(recorded(tmp_path / "run.sqlite", run))] == [repr(event) for event in live]


def test_a_replay_with_other_rules_needs_no_model(tmp_path):
    record = recorded(tmp_path / "run.sqlite", sick_run())
    [event, held] = replay(record, [FAINT])
    assert (event.layer, event.head, event.global_step) == ("layers.1", 2, 360)
    assert (held.severity, held.global_step, held.since_step) == ("critical", 460, 350)
    text = replay_text([event])
    assert "faint" in text
    assert "layers.1 head 2" in text
    assert replay_text(replay(record, [])) == "nothing would have fired"


def test_replay_line_names_head_layer_or_run():
    event = AlertEvent("faint", "x", "kv_head", "a", 3, 1.0, 2.0, 70, "firing", since_step=60, message="m")
    lines = replay_text(
        [event, replace(event, scope="layer", head=None), replace(event, layer=None, head=None, value=math.nan)]
    ).splitlines()
    assert [line.split()[:4] for line in lines] == [["step", "70", "firing", "warning"]] * 3
    assert [line.split()[4:] for line in lines] == [
        ["faint", "a", "KV", "head", "3", "m"],
        ["faint", "a", "m"],
        ["faint", "the", "whole", "run"],
    ]


def test_sampling_less_often_finds_it_later(tmp_path):
    record = recorded(tmp_path / "run.sqlite", sick_run())
    assert replay(record, [FAINT], stride=3)[0].global_step == 390


def test_failed_sample_and_unmeasured_layer_give_no_alarm(tmp_path):
    run = sick_run(num_samples=20, onset=99)[:18]
    for _, values, _ in run:
        for layers in values.values():
            layers["layers.9"] = torch.full((3,), torch.nan)
    nothing = {metric: {layer: v * torch.nan for layer, v in layers.items()} for metric, layers in run[-1][1].items()}
    run.append((180, nothing, "out of memory"))
    assert replay(recorded(tmp_path / "run.sqlite", run), DEFAULT_RULES) == []


def test_replay_continues_after_failed_samples(tmp_path):
    run = sick_run(num_samples=20, onset=99)[:18]
    for index, (_, values, _) in enumerate(run):
        for layers in values.values():
            layers["layers.9"] = layers["layers.0"] * (torch.nan if index < 5 else 1.0)
    nothing = {metric: {layer: v * torch.nan for layer, v in layers.items()} for metric, layers in run[7][1].items()}
    run[7] = (70, nothing, "out of memory")
    run[16][1]["query_rms"]["layers.9"][1] = run[17][1]["query_rms"]["layers.9"][1] = 0.001
    found = replay(recorded(tmp_path / "run.sqlite", run), [FAINT, *DEFAULT_RULES])
    assert [(event.rule, event.layer, event.head, event.global_step) for event in found] == [
        ("faint", "layers.9", 1, 170)
    ]


def test_run_that_turns_nan_gives_an_alarm(tmp_path):
    run = sick_run(num_samples=20, onset=99)[:18]
    nothing = {metric: {layer: v * torch.nan for layer, v in layers.items()} for metric, layers in run[-1][1].items()}
    events = replay(recorded(tmp_path / "run.sqlite", [*run, (180, nothing, None)]))
    assert [(event.rule, event.global_step) for event in events] == [("non_finite_run", 180)]


def test_replay_of_rare_metric_counts_its_own_samples(tmp_path):
    run = sick_run(num_samples=30, onset=99)[:28]
    for index, (_, values, _) in enumerate(run):
        if index % 5 == 0:
            values["interaction_participation_ratio"] = {
                "layers.0": torch.tensor([9.0, 9.0, 9.0 if index < 20 else 1.0])
            }
    low = Threshold("interaction_participation_ratio", "value", fire_below=1.0, clear_above=1.5)
    [event] = replay(recorded(tmp_path / "run.sqlite", run), [Rule("low", "rank_collapse", "query_head", low, grace=0)])
    assert (event.head, event.global_step) == (2, 250)


def test_rule_over_unrecorded_metric_is_an_error(tmp_path):
    record = recorded(tmp_path / "run.sqlite", sick_run(3))
    entropy = Rule("no_focus", "x", "query_head", Threshold("sink_mass", "value", fire_above=1.0, clear_below=0.5))
    rests = replace(entropy, name="rests", optional=True)
    with pytest.raises(ValueError, match=r"^rules no_focus: the run did not record sink_mass$"):
        replay(record, [FAINT, entropy, rests])
    assert replay(record, [rests]) == []


def test_record_without_later_metrics_replays_and_reports(tmp_path):
    """A record of before has none of the metrics that came after it."""
    later = {"value_rms", "output_rms", "head_similarity", "attention_tau"}
    run = SyntheticRun(3, 4, 40, faulty=(1, 2), metrics=[name for name in DEFAULT_METRICS if name not in later])
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in run.samples():
            record.append(sample)
    read = RunRecord.open(tmp_path / "run.sqlite")
    assert not later & set(read.metrics)
    of_before = [rule for rule in DEFAULT_RULES if not rule.metrics & later]
    assert replay(read, DEFAULT_RULES) == replay(read, of_before)
    page = write_report(tmp_path / "run.sqlite").read_text()
    assert "energy_rms" in page
    assert not any(name in page for name in later)
