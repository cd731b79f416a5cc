"""torchmetrics classes: thin over the functions, and the same on one process and on two."""

from __future__ import annotations

import pickle

import pytest
import torch
from processes import on_processes
from torchmetrics import MetricCollection

from attnmonitor.functional import (
    energy_effective_rank,
    energy_spectrum,
    head_cores,
    head_statistics,
    key_incoherence,
    query_gram,
)
from attnmonitor.metrics import (
    METRIC_CLASSES,
    EnergyEffectiveRank,
    EnergyParticipationRatio,
    InteractionEffectiveRank,
    InteractionParticipationRatio,
    KeyIncoherence,
    KeyRank,
    MaxLogit,
    SinkMass,
)
from attnmonitor.metrics.catalog import METRICS

NUM_HEADS = {"query_head": 4, "kv_head": 2}
LAYER_METRICS = [name for name in METRIC_CLASSES if not name.startswith("interaction")]


def layer(num_sequences=3, length=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_sequences, 4, length, 8, generator=generator) * torch.logspace(0, -1, 8)
    key = torch.randn(num_sequences, 2, length, 8, generator=generator) + 1
    return {"query": query, "key": key}


def metric_of(name, **keywords):
    return METRIC_CLASSES[name](num_heads=NUM_HEADS[METRICS[name].scope], **keywords)


def update(metric, tensors):
    metric.update(**metric._filter_kwargs(**tensors))
    return metric


def test_every_metric_of_the_catalog_but_the_ratio_has_a_class_of_its_name():
    assert set(METRIC_CLASSES) == set(METRICS) - {"spectral_gap"}
    assert all(cls.name == name for name, cls in METRIC_CLASSES.items())


@pytest.mark.parametrize("name", LAYER_METRICS)
def test_compute_is_the_mean_and_spread_the_deviation_over_all_sequences_seen(name):
    first, second = layer(3), layer(2, length=41, seed=1)
    metric = update(update(metric_of(name), first), second)
    one_by_one = []
    for tensors in (first, second):
        for index in range(len(tensors["key"])):
            alone = update(metric_of(name), {part: value[index : index + 1] for part, value in tensors.items()})
            assert alone.spread().tolist() == [0] * alone.num_heads
            one_by_one.append(alone.compute())
    values = torch.stack(one_by_one)
    assert metric.compute().shape == (metric.num_heads,)
    torch.testing.assert_close(metric.compute(), values.mean(0))
    torch.testing.assert_close(metric.spread(), values.std(0, unbiased=False), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYER_METRICS)
def test_padding_is_left_out(name):
    tensors = layer(2)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 22:] = False
    short = {part: value[:, :, :22] for part, value in tensors.items()}
    keywords = {"num_rows": 30} if METRIC_CLASSES[name].__module__.endswith("rows") else {}
    padded = update(metric_of(name, **keywords), {**tensors, "mask": mask})
    torch.testing.assert_close(padded.compute(), update(metric_of(name, **keywords), short).compute())


def test_accumulating_the_monitors_values_gives_what_updating_gives():
    tensors = layer()
    cores = head_cores(query_gram(tensors["query"]), tensors["key"], scale=8**-0.5, metrics=LAYER_METRICS)
    statistics = head_statistics([cores])[0]
    for name, values in statistics.values.items():
        metric = metric_of(name)
        metric.accumulate(values)
        torch.testing.assert_close(metric.compute(), update(metric_of(name), tensors).compute(), msg=name)


@pytest.mark.parametrize("name", LAYER_METRICS)
def test_a_layer_with_one_head_has_an_axis_of_one_head(name):
    metric = METRIC_CLASSES[name](num_heads=1)
    metric.accumulate(torch.ones(3, 1))
    assert pickle.loads(pickle.dumps(metric)).compute().tolist() == metric.compute().tolist() == [1]
    assert metric.clone()(**metric._filter_kwargs(query=torch.ones(1, 1, 5, 2), key=torch.ones(1, 1, 5, 2))).ndim == 1


def test_arguments_reach_the_functions():
    tensors = layer()
    query, key = tensors["query"], tensors["key"]
    half = EnergyEffectiveRank(2, fraction=0.5, per="kv_head", method="randomized")
    half.update(query, key)
    expected = energy_effective_rank(query, key, fraction=0.5, per="kv_head").mean(0).float()
    torch.testing.assert_close(half.compute(), expected)
    sharp = METRIC_CLASSES["energy_rms"](4, scale=3.0)
    sharp.update(query, key)
    torch.testing.assert_close(sharp.compute(), energy_spectrum(query, key, scale=3.0).energy_rms.mean(0).float())
    full = KeyIncoherence(2, energy=1.0)
    full.update(key)
    torch.testing.assert_close(full.compute(), key_incoherence(key, energy=1.0).mean(0).float())
    every, few = MaxLogit(4, num_rows=30), MaxLogit(4, num_rows=2)
    every.update(query, key)
    few.update(query, key)
    assert (few.compute() <= every.compute()).all()
    both_ways = SinkMass(4, num_rows=30)
    both_ways.update(query, key, causal=False)
    attention = (8**-0.5 * query @ key.repeat_interleave(2, 1).mT).softmax(-1)
    torch.testing.assert_close(both_ways.compute(), attention[..., 0].mean((0, 2)))


def test_weights_are_measured_once_per_update():
    for metric in (InteractionEffectiveRank(num_heads=3), InteractionParticipationRatio(num_heads=3)):
        metric.update(torch.eye(6).expand(3, 6, 6), torch.eye(6).expand(3, 6, 6))
        assert metric.compute().tolist() == [6, 6, 6]


def test_a_nan_head_makes_that_head_nan_only():
    tensors = layer()
    tensors["key"][0, 1, 3] = torch.nan
    metric = update(metric_of("key_rank"), tensors)
    assert metric.compute().isnan().tolist() == [False, True]


def test_a_collection_never_takes_one_metric_for_another():
    """After a first update with equal numbers torchmetrics merges metrics whose states look alike."""
    rank_one = {"query": torch.ones(1, 2, 9, 4), "key": torch.arange(9.0)[None, None, :, None].expand(1, 2, 9, 4)}
    collection = MetricCollection(
        {
            "rank": EnergyEffectiveRank(2),
            "to_half": EnergyEffectiveRank(2, fraction=0.5),
            "smooth": EnergyParticipationRatio(2),
            "key_rank": KeyRank(2),
        }
    )
    collection.update(**rank_one)
    assert all(value.round().tolist() == [1, 1] for value in collection.compute().values())
    spread_out = layer(1)
    spread_out = {"query": spread_out["query"][:, :2], "key": spread_out["key"]}
    collection.reset()
    collection.update(**rank_one)
    collection.update(**spread_out)
    found = {name: value.tolist() for name, value in collection.compute().items()}
    alone = {name: type(metric)(2) for name, metric in collection.items() if name != "to_half"}
    alone["to_half"] = EnergyEffectiveRank(2, fraction=0.5)
    for metric in alone.values():
        update(update(metric, rank_one), spread_out)
    assert found == {name: metric.compute().tolist() for name, metric in alone.items()}
    assert found["rank"] != found["to_half"]


@pytest.mark.parametrize("name", ["energy_effective_rank", "key_incoherence"])
def test_clone_pickle_state_dict_and_reset(name):
    metric = update(metric_of(name), layer())
    expected = metric.compute()
    assert torch.equal(metric.clone().compute(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), expected)
    metric.persistent(True)
    restored = metric_of(name)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    restored._update_count = 1
    assert torch.equal(restored.compute(), expected)
    metric.reset()
    update(metric, layer(seed=5))
    assert torch.equal(metric.compute(), update(metric_of(name), layer(seed=5)).compute())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tensors_are_taken_and_half_keeps_the_sums(dtype):
    tensors = layer()
    exact = update(metric_of("energy_stable_rank"), tensors).compute()
    metric = metric_of("energy_stable_rank").half()
    update(metric, {part: value.to(dtype) for part, value in tensors.items()})
    torch.testing.assert_close(metric.compute(), exact, rtol=2e-2, atol=0)
    assert metric.to("cpu").compute().shape == (4,)


def test_plot_draws_the_heads_now_and_over_time_also_into_given_axes():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    metric = update(metric_of("key_incoherence"), layer())
    _, axes = metric.plot()
    assert axes.has_data()
    given = Figure().add_subplot()
    _, axes = metric.plot([metric.compute(), 2 * metric.compute()], ax=given)
    assert axes is given
    assert given.has_data()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KeyIncoherence(0), r"num_heads=0"),
        (lambda: KeyIncoherence(2, energy=0), r"energy=0: must be in"),
        (lambda: EnergyEffectiveRank(2, fraction=2), r"fraction=2: must be in"),
        (lambda: KeyIncoherence(3).update(layer()["key"]), r"num_heads=3.*\(3, 2\).*expected \(sequences, 3\)"),
        (lambda: EnergyEffectiveRank(2).update(**layer()), r"num_heads=2.*\(3, 4\)"),
    ],
)
def test_errors_quote_what_arrived(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def shard_and_sync(rank):
    """One of two processes: its share of the sequences, 5 and 2, then `compute` over both."""
    tensors = layer(7)
    share = slice(0, 5) if rank == 0 else slice(5, 7)
    return {
        name: update(metric_of(name), {part: value[share] for part, value in tensors.items()}).compute()
        for name in LAYER_METRICS
    }


def test_two_processes_with_unequal_shards_compute_what_one_computes(tmp_path):
    tensors = layer(7)
    for found in on_processes(tmp_path, shard_and_sync):
        for name in LAYER_METRICS:
            torch.testing.assert_close(found[name], update(metric_of(name), tensors).compute(), msg=name)
