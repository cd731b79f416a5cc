"""What is said about a run in words: true, short, and about the right heads."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic_runs import SyntheticRun

from attnmonitor.alerts.firing import still_firing
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample
from attnmonitor.summary.names import short_layer_names
from attnmonitor.summary.outliers import outlier_heads
from attnmonitor.summary.tables import layer_table, print_layer_table
from attnmonitor.summary.verdict import verdict, verdict_of_record


def coverage(num_layers: int = 2, num_heads: int = 4) -> dict[str, LayerCoverage]:
    names = [f"model.layers.{index}.self_attn" for index in range(num_layers)]
    return {name: LayerCoverage(name, "sdpa", "self", num_heads, num_heads, 64, 0.125) for name in names}


def event(head: int | None = 1, layer: int | None = 0, **changes: object) -> AlertEvent:
    place = None if layer is None else f"model.layers.{layer}.self_attn"
    plain = AlertEvent("key_sink", "key_sink", "query_head", place, head, 9.0, 2.0, 500, "firing", since_step=400)
    return replace(plain, **changes)


positive_heads = st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=40)


@given(positive_heads, st.floats(0.01, 100))
def test_distances_of_ratio_metrics_do_not_depend_on_the_unit(heads: list[float], unit: float) -> None:
    found = outlier_heads({"a": heads}, "energy_rms", 3)
    scaled = outlier_heads({"a": [unit * head for head in heads]}, "energy_rms", 3)
    np.testing.assert_allclose([h.distance for h in found], [h.distance for h in scaled], atol=1e-6)


@given(positive_heads, st.integers(0, 50))
def test_the_furthest_come_first_and_no_more_than_asked_for(heads: list[float], k: int) -> None:
    values = {"a": heads[:3], "b": heads[3:]}
    found = outlier_heads(values, "key_incoherence", k)
    assert len(found) == min(k, len(heads))
    sizes = [abs(head.distance) for head in found]
    assert sizes == sorted(sizes, reverse=True)
    assert all(values[head.layer][head.head] == head.value for head in found)


@pytest.mark.parametrize("metric", ["energy_rms", "energy_effective_rank", "key_leverage_max"])
def test_a_head_far_out_is_found_and_does_not_hide_behind_the_scale_it_makes(metric: str) -> None:
    heads = torch.linspace(0.9, 1.1, 32).reshape(4, 8)
    heads[2, 5] = 40.0
    found = outlier_heads({f"layers.{i}": heads[i] for i in range(4)}, metric, 2)
    assert (found[0].layer, found[0].head) == ("layers.2", 5)
    assert found[0].distance > 20 * abs(found[1].distance)


def test_a_dead_head_stands_out_most_and_an_unmeasured_one_not_at_all() -> None:
    found = outlier_heads({"a": torch.tensor([1.0, 2.0, 0.0, math.nan, 1.5])}, "energy_rms", 5)
    assert found[0].head == 2
    assert found[0].distance == -math.inf
    assert 3 not in [head.head for head in found]
    assert outlier_heads({"a": [math.nan]}, "energy_rms", 3) == []
    assert outlier_heads({}, "energy_rms", 3) == []


def test_equal_heads_do_not_stand_out_by_a_trifle() -> None:
    found = outlier_heads({"a": [8.0] * 20 + [8.01]}, "energy_effective_rank", 1)
    assert abs(found[0].distance) < 0.1


def test_an_alarm_fires_until_it_clears_and_may_fire_again() -> None:
    began, held = event(), event(severity="critical", global_step=900)
    cleared, again = event(state="cleared", global_step=1000), event(global_step=1200, since_step=1100)
    assert still_firing([began]) == [began]
    assert still_firing([began, held]) == [held]
    assert still_firing([began, event(head=2), cleared]) == [event(head=2)]
    assert still_firing([began, cleared, again]) == [again]


def test_the_line_says_healthy_only_where_somebody_watched() -> None:
    assert verdict(coverage(), num_samples=1, firing=[]) == "8 heads in 2 layers watched over 1 sample: healthy"
    unwatched = verdict(coverage(), num_samples=3, firing=[], watched=False)
    assert unwatched == "8 heads in 2 layers watched over 3 samples: no alert rule was on"


def test_the_line_does_not_say_healthy_while_rules_still_wait() -> None:
    early = "8 heads in 2 layers watched over 25 samples: no alarm, but some rules first wait for 25 samples"
    assert verdict(coverage(), num_samples=25, firing=[], grace=25) == early
    assert verdict(coverage(), num_samples=26, firing=[], grace=25).endswith("26 samples: healthy")
    assert verdict(coverage(), num_samples=3, firing=[event()], grace=25).startswith("1 head needs a look")


def test_the_line_names_who_what_and_since_when() -> None:
    both = [
        event(),
        event(kind="logit_blowup", rule="energy_hot", since_step=450),
        event(head=3, scope="kv_head", layer=1),
    ]
    assert verdict(coverage(), num_samples=9, firing=both, num_cleared=1) == (
        "2 heads need a look: layers.0 head 1 (key sink since step 400, logit blowup since step 450),"
        " layers.1 KV head 3 (key sink since step 400); 1 alarm came and went"
    )


def test_the_line_stays_a_line_when_everything_fires_and_names_the_worst() -> None:
    firing = [event(head=head, layer=layer) for layer in range(2) for head in range(4)]
    firing[6] = replace(firing[6], severity="critical")
    line = verdict(coverage(), num_samples=9, firing=firing)
    assert line.startswith("8 heads need a look: layers.1 head 2 (key sink since step 400), layers.0 head 0")
    assert line.endswith("and 5 more")
    run = verdict(coverage(), num_samples=9, firing=[*firing, event(None, None, kind="mass", scope="run")])
    assert run.startswith("the run needs a look (mass since step 400), and so do 8 heads: layers.1 head 2 (key sink")
    assert "\n" not in run
    alone = [event(None, None, kind="mass", scope="run"), event(None, 1, scope="layer", rule="mass")]
    assert verdict(coverage(), num_samples=9, firing=alone[:1]) == "the run needs a look (mass since step 400)"
    assert (
        verdict(coverage(), num_samples=9, firing=alone[1:])
        == "1 layer needs a look: layers.1 (key sink since step 400)"
    )


def test_a_query_head_and_the_kv_head_that_it_alone_reads_are_one_head() -> None:
    both = [event(scope="kv_head"), event(rule="energy_hot", kind="logit_blowup", since_step=450)]
    assert verdict(coverage(), num_samples=9, firing=both) == (
        "1 head needs a look: layers.0 KV head 1 (key sink since step 400, logit blowup since step 450)"
    )
    shared = {name: replace(layer, num_kv_heads=2) for name, layer in coverage().items()}
    assert verdict(shared, num_samples=9, firing=both).startswith("2 heads need a look")


def test_what_several_rules_agree_on_comes_first_and_each_fault_is_named_once() -> None:
    firing = [event(head=0), event(head=3), event(head=3, rule="key_rank", since_step=350)]
    assert verdict(coverage(), num_samples=9, firing=firing).startswith(
        "2 heads need a look: layers.0 head 3 (key sink since step 350), layers.0 head 0"
    )


def test_the_line_does_not_call_a_run_healthy_that_was_not_measured() -> None:
    missed = {"attn": LayerCoverage("attn", reason="fused kernel")}
    assert "nothing measured in 1 attention layer (attn: fused kernel)" in verdict(missed, num_samples=3, firing=[])
    assert verdict({**coverage(), **missed}, num_samples=3, firing=[]).endswith("healthy; 1 layer not measured")
    assert verdict(coverage(), num_samples=0, firing=[]) == "no sample taken yet"
    failed = verdict({}, num_samples=2, firing=[], num_failed=2, failure="CUDA out of memory")
    assert failed == "nothing measured: 2 samples failed (CUDA out of memory)"


def test_a_record_gets_the_line_of_its_run(tmp_path: Path) -> None:
    for sick in (None, (3, 2)):
        run = SyntheticRun(sick=sick)
        with RecordWriter(tmp_path / f"{sick}.sqlite", run=run.config) as record:
            for sample in run.samples():
                record.append(sample)
    assert verdict_of_record(RunRecord.open(tmp_path / "None.sqlite")) == (
        "48 heads in 6 layers watched over 40 samples: healthy"
    )
    assert verdict_of_record(RunRecord.open(tmp_path / "(3, 2).sqlite")) == (
        "1 head needs a look: layers.3 KV head 2 (key sink since step 1,300); 1 alarm came and went"
    )


def test_a_record_of_failed_samples_says_so(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run.sqlite", run={}) as record:
        record.append(Sample(0, {}, failure="RuntimeError: boom", failures=1))
    assert verdict_of_record(RunRecord.open(tmp_path / "run.sqlite")) == (
        "nothing measured: 1 sample failed (RuntimeError: boom)"
    )


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["transformer.h.0.attn", "transformer.h.11.attn"], ["h.0", "h.11"]),
        (["encoder.layers.0.attn", "decoder.layers.0.attn"], ["encoder", "decoder"]),
        (["blocks.0.self", "blocks.0.cross", "blocks.1.self"], ["blocks.0.self", "blocks.0.cross", "blocks.1.self"]),
        (["attn", "attn#2"], ["attn", "attn#2"]),
        (["a.attn", "attn"], ["a.attn", "attn"]),
        (["only.one"], ["only.one"]),
        ([], []),
    ],
)
def test_short_names_drop_what_is_shared(names: list[str], short: list[str]) -> None:
    assert short_layer_names(names) == dict(zip(names, short, strict=True))


@given(st.lists(st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), unique=True))
def test_short_names_stay_unique_and_are_parts_of_the_names(names: list[str]) -> None:
    short = short_layer_names(names)
    assert len(set(short.values())) == len(names)
    assert all(part and part in name for name, part in short.items())


def test_the_table_has_a_row_per_layer_and_says_what_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    sample = list(SyntheticRun(num_layers=3, num_heads=4, num_samples=5).samples())[-1]
    sick = [event(head=2, layer=1)]
    known = {**sample.coverage, "pooler": LayerCoverage("pooler", reason="no softmax [seen]")}
    table = layer_table(sample.values, firing=sick, coverage=known)
    lines = table.splitlines()
    assert len(lines) == 3 + 4
    assert lines[0].split() == ["energy", "energy", "key"]
    assert lines[1].split()[:3] == ["layer", "effective", "rank"]
    assert lines[4].endswith("head 2: key sink since step 400")
    assert lines[6].endswith("not measured: no softmax [seen]")
    assert max(map(len, lines)) < 120
    print_layer_table(sample.values, firing=sick, coverage=known)
    printed = capsys.readouterr().out
    assert "[seen]" in printed, "a reason is shown as it is, not read as rich markup"
    assert "head 2" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_without_rich_the_plain_table_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.box", None)
    print_layer_table({"energy_rms": {"attn": [1.0, math.nan, 3.0]}})
    assert capsys.readouterr().out.splitlines()[-1].split() == ["attn", "2", "(1–3)"]
