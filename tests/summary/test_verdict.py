"""The verdict is true, one line, and names the right heads; it is the same for a live run and its record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from synthetic_runs import SyntheticRun

from attnmonitor.alerts.firing import still_firing
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import AlertEvent, LayerCoverage, Sample
from attnmonitor.summary.run_summary import RunSummary
from attnmonitor.summary.verdict import verdict


def coverage(num_layers: int = 2, num_heads: int = 4) -> dict[str, LayerCoverage]:
    names = [f"model.layers.{index}.self_attn" for index in range(num_layers)]
    return {name: LayerCoverage(name, "sdpa", "self", num_heads, num_heads, 64, 0.125) for name in names}


def event(head: int | None = 1, layer: int | None = 0, **changes: object) -> AlertEvent:
    place = None if layer is None else f"model.layers.{layer}.self_attn"
    plain = AlertEvent("key_sink", "key_sink", "query_head", place, head, 9.0, 2.0, 500, "firing", since_step=400)
    return replace(plain, **changes)


def verdict_of(layers: dict[str, LayerCoverage], **known: Any) -> str:
    return verdict(RunSummary(layers, **known))


def test_alarm_fires_until_cleared_and_may_fire_again() -> None:
    began, held = event(), event(severity="critical", global_step=900)
    cleared, again = event(state="cleared", global_step=1000), event(global_step=1200, since_step=1100)
    assert still_firing([began]) == [began]
    assert still_firing([began, held]) == [held]
    assert still_firing([began, event(head=2), cleared]) == [event(head=2)]
    assert still_firing([began, cleared, again]) == [again]


def test_healthy_only_if_a_rule_is_on() -> None:
    assert verdict_of(coverage(), num_samples=1) == "8 heads in 2 layers watched over 1 sample: healthy"
    unwatched = verdict_of(coverage(), num_samples=3, has_rules=False)
    assert unwatched.startswith(
        "unknown: 8 heads in 2 layers watched over 3 samples: no alarm, but no alert rule was on"
    )


def test_verdict_counts_rules_that_were_turned_off() -> None:
    """Not those that miss only what is not measured by default: they are idle in most runs."""
    idle = {"dead": ["energy_rms"], "learned_rank": ["interaction_participation_ratio"]}
    line = verdict_of(coverage(), num_samples=1, idle_rules=idle)
    assert line.endswith("healthy; 1 rule cannot fire without energy_rms")
    assert verdict_of(coverage(), num_samples=1, idle_rules={"learned_rank": idle["learned_rank"]}).endswith("healthy")


def test_not_healthy_while_rules_wait() -> None:
    early = "unknown: 8 heads in 2 layers watched over 25 samples: no alarm, but some rules first wait for 25 samples"
    assert verdict_of(coverage(), num_samples=25, grace=25) == early
    assert verdict_of(coverage(), num_samples=26, grace=25).endswith("26 samples: healthy")
    assert verdict_of(coverage(), num_samples=3, firing=[event()], grace=25).startswith("1 head needs a look")


def test_verdict_names_head_fault_and_step() -> None:
    both = [
        event(),
        event(kind="logit_blowup", rule="energy_hot", since_step=450),
        event(head=3, scope="kv_head", layer=1),
    ]
    assert verdict_of(coverage(), num_samples=9, firing=both, num_cleared=1) == (
        "2 heads need a look: layers.0 head 1 (key sink since step 400, logit blowup since step 450),"
        " layers.1 head 3 (key sink since step 400); 1 alarm came and went"
    )


def test_verdict_is_one_line_with_worst_heads_first() -> None:
    firing = [event(head=head, layer=layer) for layer in range(2) for head in range(4)]
    firing[6] = replace(firing[6], severity="critical")
    line = verdict_of(coverage(), num_samples=9, firing=firing)
    assert line.startswith("8 heads need a look: layers.1 head 2 (key sink since step 400), layers.0 head 0")
    assert line.endswith("and 5 more")
    run = verdict_of(coverage(), num_samples=9, firing=[*firing, event(None, None, kind="mass", scope="run")])
    assert run.startswith(
        "the run needs a look (many heads changed at once since step 400), and so do 8 heads: layers.1 head 2 (key sink"
    )
    assert "\n" not in run
    alone = [event(None, None, kind="mass", scope="run"), event(None, 1, scope="layer", rule="mass")]
    assert (
        verdict_of(coverage(), num_samples=9, firing=alone[:1])
        == "the run needs a look (many heads changed at once since step 400)"
    )
    assert (
        verdict_of(coverage(), num_samples=9, firing=alone[1:])
        == "1 layer needs a look: layers.1 (key sink since step 400)"
    )


def test_query_head_with_own_kv_head_counts_once() -> None:
    both = [event(scope="kv_head"), event(rule="energy_hot", kind="logit_blowup", since_step=450)]
    assert verdict_of(coverage(), num_samples=9, firing=both) == (
        "1 head needs a look: layers.0 head 1 (key sink since step 400, logit blowup since step 450)"
    )
    shared = {name: replace(layer, num_kv_heads=2) for name, layer in coverage().items()}
    assert verdict_of(shared, num_samples=9, firing=both).startswith("2 heads need a look")


def test_head_with_several_alarms_comes_first() -> None:
    firing = [event(head=0), event(head=3), event(head=3, rule="key_rank", since_step=350)]
    assert verdict_of(coverage(), num_samples=9, firing=firing).startswith(
        "2 heads need a look: layers.0 head 3 (key sink since step 350), layers.0 head 0"
    )


def test_unmeasured_run_is_not_healthy() -> None:
    missed = {"attn": LayerCoverage("attn", reason="fused kernel")}
    assert "nothing measured in 1 attention layer (attn: fused kernel)" in verdict_of(missed, num_samples=3)
    part = verdict_of({**coverage(), **missed}, num_samples=3)
    assert part.startswith("unknown: 8 heads in 2 layers watched over 3 samples: no alarm, but 1 of 3 layers")
    assert "not measured: attn (fused kernel)" in part
    assert "attnmonitor.capture.capture(...)" in part
    alarm = verdict_of({**coverage(), **missed}, num_samples=3, firing=[event()])
    assert alarm.startswith("1 head needs a look")
    assert "1 of 3 layers not measured: attn (fused kernel)" in alarm
    assert verdict_of(coverage(), num_samples=0) == "unknown: no sample taken yet"
    failed = verdict_of({}, num_samples=2, num_failed=2, failure="CUDA out of memory")
    assert failed == "unknown: nothing measured: 2 samples failed (CUDA out of memory)"


def test_verdict_of_record(tmp_path: Path) -> None:
    for sick in (None, (3, 2)):
        run = SyntheticRun(faulty=sick)
        with RecordWriter(tmp_path / f"{sick}.sqlite", run=run.config) as record:
            for sample in run.samples():
                record.append(sample)
    assert verdict(RunRecord.open(tmp_path / "None.sqlite").counts) == (
        "48 heads in 6 layers watched over 40 samples: healthy"
    )
    assert verdict(RunRecord.open(tmp_path / "(3, 2).sqlite").counts) == (
        "1 head needs a look: layers.3 head 2 (key sink since step 1,300); 1 alarm came and went"
    )


def test_verdict_of_record_of_failed_samples(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "run.sqlite", run={}) as record:
        record.append(Sample(0, {}, failure="RuntimeError: boom", failures=1))
    assert verdict(RunRecord.open(tmp_path / "run.sqlite").counts) == (
        "unknown: nothing measured: 1 sample failed (RuntimeError: boom)"
    )


def test_live_run_and_its_record_give_equal_summaries(tmp_path: Path) -> None:
    run, live = SyntheticRun(faulty=(3, 2)), RunSummary()
    firing: dict[tuple[str, int | None], AlertEvent] = {}
    with RecordWriter(tmp_path / "run.sqlite", run=run.config) as record:
        for sample in [*run.samples(), Sample(2000, {}, failure="RuntimeError: boom", failures=1)]:
            for each in sample.events:
                firing[each.rule, each.head] = each
            current = [each for each in firing.values() if each.state == "firing"]
            live.add(replace(sample, firing=current, coverage=sample.coverage or live.coverage))
            record.append(sample)
    recorded = RunRecord.open(tmp_path / "run.sqlite").counts
    assert (live.num_samples, live.num_cleared, live.num_failed) == (41, 1, 1)
    assert vars(live) == vars(recorded)


def test_summary_state_continues_the_counts() -> None:
    first = RunSummary(num_samples=7, num_cleared=2, num_failed=1, failure="RuntimeError: boom", grace=3)
    resumed = RunSummary(grace=5)
    resumed.load_state_dict(first.state_dict())
    assert resumed == replace(first, grace=5)
