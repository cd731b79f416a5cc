"""W&B runs hold the samples, under a cap of keys, without changing what the user logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from models import TinyGPT, language_loss, token_batch, train
from wandb_files import charts, curve, offline_run

from attnmonitor import DEFAULT_METRICS, METRICS, AttentionMonitor, Sample
from attnmonitor.alerts import Rule, Threshold
from attnmonitor.callbacks.pytorch import attach
from attnmonitor.loggers import WandbLogger, summary_scalars
from attnmonitor.loggers.keys import HeadScalars
from attnmonitor.metrics.catalog import head_noun
from attnmonitor.record.history import History

CURVE_METRICS = [metric for metric in DEFAULT_METRICS if METRICS[metric].head_curves]


@pytest.fixture
def run(in_own_folder: Path) -> Iterator[Any]:
    with wandb.init(project="test", dir=in_own_folder) as run:
        yield run


def attached(model: TinyGPT, run: Any, **settings: Any) -> tuple[AttentionMonitor, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loggers = WandbLogger(run, image_share=0)
    settings = {"every_n_steps": 2, "record": None, "strict": True, "loggers": loggers, **settings}
    return attach(model, optimizer, token_batch(), **settings), optimizer


def test_run_file_holds_all_trajectories_on_own_x_axis(run: Any, in_own_folder: Path) -> None:
    actions = {"critical": ["checkpoint", print]}
    monitor, optimizer = attached(TinyGPT(num_kv_heads=2), run, actions=actions)
    train(monitor.model, optimizer, 6)
    monitor.close()
    run.finish()
    logged = offline_run(in_own_folder)
    for metric in monitor.history:
        for index, trajectory in enumerate(monitor.history[metric].values()):
            for head in range(trajectory.shape[1]):
                key = f"attention/{metric}/layer_{index:02d}/head_{head:02d}"
                assert curve(logged, key) == pytest.approx(
                    dict(zip([0, 2, 4, 6], trajectory[:, head].tolist(), strict=True))
                )
                assert logged["metrics"][key] == ("attention/global_step", True)
        heads = torch.cat(list(monitor.history[metric].values()), dim=1)
        for name, expected in {
            "min": heads.amin(1),
            "median": heads.quantile(0.5, dim=1),
            "max": heads.amax(1),
        }.items():
            found = curve(logged, f"attention/{metric}/{name}")
            assert found == pytest.approx(dict(zip([0, 2, 4, 6], expected.tolist(), strict=True)), rel=1e-5)
            assert logged["metrics"][f"attention/{metric}/{name}"] == ("attention/global_step", False)
    config = logged["config"]["attention"]["default"]
    described = {name: value for name, value in monitor.describe().items() if name != "layers"}
    assert {name: config[name] for name in described} == described
    assert config["actions"] == {"critical": ["checkpoint", "print"]}
    assert (config["weights_every"], config["schedule"]) == (10, "every(2)")
    assert [layer["layer"] for layer in logged["config"]["attention"]["default"]["layers"]] == list(monitor.coverage)


def test_each_metric_has_a_first_and_last_heatmap(run: Any, in_own_folder: Path) -> None:
    monitor, optimizer = attached(TinyGPT(), run, loggers=run)
    train(monitor.model, optimizer, 6)
    monitor.close()
    run.finish()
    logged = offline_run(in_own_folder)
    for metric in monitor.history:
        images = curve(logged, f"attention/{metric}/heatmap.path")
        assert list(images) == [0, 6]
        for image in images.values():
            [path] = in_own_folder.glob(f"wandb/offline-run-*/files/{image}")
            assert path.stat().st_size > 5_000


def test_alarm_has_a_picture_of_its_evidence(run: Any, in_own_folder: Path) -> None:
    above = Threshold("query_rms", "value", "identity", fire_above=5.0, clear_below=5.0)
    alerts = [Rule(name, "logit_blowup", "query_head", above, patience=1, grace=0) for name in ("one", "two")]
    monitor, _ = attached(TinyGPT(), run, loggers=WandbLogger(run, image_share=1e-9), alerts=alerts)
    monitor.sample(0)
    with torch.no_grad():
        monitor.model.blocks[1].attn.q_proj.weight[:8] *= 100
    assert len(monitor.sample(1).evidence) == 2
    monitor.sample(2)
    monitor.close()
    run.finish()
    images = curve(offline_run(in_own_folder), "attention/evidence.path")
    assert list(images) == [1]
    [path] = in_own_folder.glob(f"wandb/offline-run-*/files/{images[1]}")
    assert path.stat().st_size > 5_000


def test_charts_of_heads_and_layers_hold_the_trajectories(run: Any, in_own_folder: Path) -> None:
    monitor, optimizer = attached(TinyGPT(num_kv_heads=2), run, loggers=WandbLogger(run, image_share=1e-9))
    train(monitor.model, optimizer, 6)
    last = monitor.last_sample
    monitor.close()
    run.finish()
    logged = offline_run(in_own_folder)
    drawn = charts(logged, in_own_folder)
    assert drawn.keys() == {f"attention/{metric}/{kind}" for metric in monitor.history for kind in ("heads", "layers")}
    for metric in monitor.history:
        noun = head_noun(metric)
        model, layers = drawn[f"attention/{metric}/heads"], drawn[f"attention/{metric}/layers"]
        assert list(model) == list(layers) == [6], "a first sample alone is no curve"
        lines = {line["name"]: list(zip(line["x"], line["y"], strict=True)) for line in model[6]["data"]}
        in_layers = str(layers[6])
        for head, curve_of_head in enumerate(monitor.history[metric]["blocks.1.attn"].T.tolist()):
            expected = [(s, pytest.approx(y, rel=1e-4)) for s, y in zip([0, 2, 4, 6], curve_of_head, strict=True)]
            assert lines.get(f"blocks.1 {noun} {head}", expected) == expected
            assert f"blocks.1 {noun} {head}" in in_layers
        assert sum(f" {noun} " in name for name in lines) == min(
            5, monitor.history[metric]["blocks.1.attn"].shape[1] * 2
        )
        assert [step for step, _ in lines["median head"]] == [0, 2, 4, 6]
        assert ("random q and k (24 × 8)" in lines) == METRICS[metric].scale_free
        # A key that a chart shows has no panel.
        assert logged["metrics"][f"attention/{metric}/max"] == ("attention/global_step", True)
        assert logged["metrics"][f"attention/{metric}/median"] == ("attention/global_step", False)
    assert last is not None
    assert logged["summary"]["attention/verdict"] == last.verdict
    assert last.verdict.startswith("unknown: 8 heads in 2 layers watched over 4 samples")


@pytest.mark.parametrize(("num_layers", "num_heads"), [(3, 4), (12, 12)])
def test_keys_in_the_run_file_stay_under_the_cap(
    num_layers: int, num_heads: int, run: Any, in_own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced: list[str] = []
    monkeypatch.setattr("wandb.termlog", announced.append)
    samples = [wide_sample(num_layers, num_heads, seed) for seed in range(2)]
    heads = {"query_head": num_heads, "kv_head": num_heads}
    history = History(dict.fromkeys(samples[0].coverage, heads), tuple(samples[0].values))
    logger = WandbLogger(run)
    logger.follow(history)
    for sample in samples:
        history.append(sample)
    logger.log_sample(samples[-1])
    logger.close()
    run.finish()
    keys = {key for row in offline_run(in_own_folder)["history"] for key in row if not key.startswith("_")}
    [num_keys] = re.findall(r"at most ([\d,]+) keys", announced[0])
    assert len(keys) <= int(num_keys.replace(",", "")) <= 2000
    # With the default metrics, 144 heads are the most of which every one has its curves.
    num_curves = len(DEFAULT_METRICS) if num_layers < 12 else len(CURVE_METRICS)
    assert sum(key.split("/")[-1].startswith("head_") for key in keys) == num_curves * num_layers * num_heads


@pytest.mark.parametrize("user", ["logs nothing", "logs with steps", "logs without steps"])
def test_rows_of_the_user_are_unchanged_by_the_monitor(user: str, in_own_folder: Path) -> None:
    rows = {}
    for watched in (False, True):
        folder = in_own_folder / str(watched)
        folder.mkdir()
        torch.manual_seed(0)
        model = TinyGPT()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with wandb.init(project="test", dir=folder) as run:
            if watched:
                monitor = attach(
                    model,
                    optimizer,
                    token_batch(),
                    every_n_steps=2,
                    record=None,
                    loggers=WandbLogger(run, image_share=0),
                )
            for step in range(7):
                loss = language_loss(model(token_batch(step)), token_batch(step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if user == "logs with steps":
                    run.log({"loss": loss.item()}, step=10 * step)
                    run.log({"twice": step}, step=10 * step)
                elif user == "logs without steps":
                    run.log({"loss": loss.item()})
            if watched:
                monitor.close()
        logged = offline_run(folder)
        rows[watched] = [
            {key: row[key] for key in ("_step", "loss", "twice") if key in row}
            for row in logged["history"]
            if "loss" in row
        ]
        if watched:
            assert list(curve(logged, "attention/energy_rms/median")) == [0, 2, 4, 6]
    assert rows[False] == rows[True]


def test_two_monitors_in_one_run_have_separate_keys(run: Any, in_own_folder: Path) -> None:
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    short = attach(
        model, optimizer, token_batch(length=8), every_n_steps=2, name="short", loggers=WandbLogger(run, image_share=0)
    )
    long = attach(
        model, optimizer, token_batch(length=32), every_n_steps=3, name="long", loggers=WandbLogger(run, image_share=0)
    )
    train(model, optimizer, 6)
    short.close(), long.close()
    run.finish()
    logged = offline_run(in_own_folder)
    for monitor, steps in ((short, [0, 2, 4, 6]), (long, [0, 3, 6])):
        prefix = f"attention/{monitor.name}"
        key = f"{prefix}/energy_rms/layer_01/head_03"
        values = monitor.history["energy_rms"]["blocks.1.attn"][:, 3].tolist()
        assert curve(logged, key, f"{prefix}/global_step") == pytest.approx(dict(zip(steps, values, strict=True)))
    assert set(logged["config"]["attention"]) == {"short", "long"}


def test_resumed_run_continues_curves_and_charts(in_own_folder: Path) -> None:
    model, state = TinyGPT(), None
    for part in ("a", "b"):
        with wandb.init(project="test", dir=in_own_folder / part, id="same", resume="allow") as run:
            monitor, optimizer = attached(model, run, loggers=run, metrics=["energy_rms", "key_incoherence"])
            if state is not None:
                monitor.load_state_dict(state)
            train(model, optimizer, 4)
            state = monitor.state_dict()
            monitor.close()
    first, second = (offline_run(in_own_folder / part) for part in ("a", "b"))
    trajectory = monitor.history["key_incoherence"]["blocks.0.attn"][:, 0].tolist()
    assert monitor.history.steps == [0, 2, 4, 6, 8]
    key = "attention/key_incoherence/layer_00/head_00"
    assert list(curve(first, key)) == [0, 2, 4]
    assert list(curve(second, key)) == [6, 8], "no step is sent twice"
    assert {**curve(first, key), **curve(second, key)} == pytest.approx(
        dict(zip([0, 2, 4, 6, 8], trajectory, strict=True))
    )
    drawn = charts(second, in_own_folder / "b")
    for metric in monitor.history:
        heads, layers = drawn[f"attention/{metric}/heads"], drawn[f"attention/{metric}/layers"]
        assert list(heads) == [6, 8]
        for step, chart in {**heads, **layers}.items():
            assert {x for trace in chart["data"] for x in trace["x"] if x is not None} == {*range(0, step + 1, 2)}
        assert list(curve(second, f"attention/{metric}/heatmap.path")) == [6, 8]
    assert first["metrics"] == {name: kind for name, kind in second["metrics"].items() if name in first["metrics"]}


def wide_sample(num_layers: int, num_heads: int, seed: int = 0) -> Sample:
    from attnmonitor import LayerCoverage

    generator = torch.Generator().manual_seed(seed)
    layers = [f"h.{index}" for index in range(num_layers)]
    values = {
        metric: {layer: torch.rand(num_heads, generator=generator) + 0.1 for layer in layers}
        for metric in DEFAULT_METRICS
    }
    return Sample(seed, values, coverage={layer: LayerCoverage(layer) for layer in layers})


@pytest.mark.parametrize(("num_layers", "num_heads"), [(2, 4), (12, 12), (12, 13), (32, 32), (80, 64), (200, 64)])
@pytest.mark.parametrize("max_keys", [520, 2000])
def test_number_of_keys_never_exceeds_the_cap(num_layers: int, num_heads: int, max_keys: int) -> None:
    seen: set[str] = set()
    head_scalars = HeadScalars(max_keys)
    for seed in range(4):
        sample = wide_sample(num_layers, num_heads, seed)
        summaries, details = summary_scalars(sample), head_scalars(sample)
        assert not summaries.keys() & details.keys()
        seen |= summaries.keys() | details.keys()
    assert len(seen) <= head_scalars.num_keys <= max_keys
    num_curves = [len(metrics) * num_layers * num_heads for metrics in (DEFAULT_METRICS, CURVE_METRICS)]
    assert head_scalars.every_head == (len(seen) - len(summaries) in num_curves)
    assert head_scalars.every_head == (num_layers * num_heads <= (144 if max_keys == 2000 else 8))


def test_table_gives_144_heads_their_curves() -> None:
    sample, head_scalars = wide_sample(12, 12), HeadScalars(2000)
    curves = head_scalars(sample)
    for metric, layers in sample.values.items():
        keys = [key for key in curves if key.startswith(f"attention/{metric}/layer_")]
        assert len(keys) == (144 if METRICS[metric].head_curves else 0), metric
        assert len(layers) == 12
    assert {"energy_rms", "key_incoherence", "energy_effective_rank"} <= set(CURVE_METRICS)


def test_outlier_heads_keep_curves_above_the_cap() -> None:
    sample = wide_sample(32, 32)
    sample.values["energy_rms"]["h.7"][5] = 1000.0
    head_scalars = HeadScalars(2000)
    assert head_scalars(sample)["attention/energy_rms/layer_07/head_05"] == 1000.0
    assert "attention/energy_rms/layer_31/median" in head_scalars(sample)
    sample.values["energy_rms"]["h.7"][5] = 0.5
    assert head_scalars(sample)["attention/energy_rms/layer_07/head_05"] == 0.5


def test_bad_arguments_are_refused(in_own_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no W&B run is live; call wandb\.init"):
        WandbLogger()
    with pytest.raises(ValueError, match="max_keys=20 is less than the 520 that summaries may need"):
        HeadScalars(20)
    with wandb.init(project="test", dir=in_own_folder), pytest.raises(ValueError, match="image_share=-1"):
        WandbLogger(image_share=-1)
