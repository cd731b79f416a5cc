"""Properties of every metric in the table: a new line of the table is tried on all of them."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import reference
import torch
from drawn_layers import PADDINGS, SHAPES, padding_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_case import (
    CASES,
    CHANGES_WITH,
    CLASS_CASES,
    POWERS,
    MetricCase,
    causal_layer,
    sample_of_heads,
    sample_of_model,
    some_sequences,
)
from processes import on_processes
from reference import Layer
from torch import Tensor
from torchmetrics import MetricCollection

from attnmonitor import METRICS
from attnmonitor.metrics import METRIC_CLASSES
from attnmonitor.sample import Sample

GROUPED = (3, 4, 2, 30, 8)

every_metric = pytest.mark.parametrize("case", CASES, ids=str)
every_class = pytest.mark.parametrize("case", CLASS_CASES, ids=str)
every_class_over_positions = pytest.mark.parametrize(
    "case", [case for case in CLASS_CASES if case.sees_positions], ids=str
)


@every_metric
def test_metric_has_a_twin(case: MetricCase) -> None:
    assert callable(case.twin)


def test_missing_twin_says_what_to_add(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(reference.TWINS, "key_rank")
    with pytest.raises(pytest.fail.Exception, match=r"add TWINS\['key_rank'\] to tests/reference.py"):
        _ = MetricCase("key_rank").twin


def test_every_metric_but_the_ratio_has_a_class() -> None:
    assert set(METRIC_CLASSES) == set(METRICS) - {"spectral_gap"}
    assert all(cls.name == name for name, cls in METRIC_CLASSES.items())


def test_twins_and_exceptions_name_known_metrics() -> None:
    assert set(reference.TWINS) == set(METRICS)
    assert set(POWERS).union(*CHANGES_WITH.values()) <= set(METRICS)


# Values


@cache
def drawn(shape: str, dtype: torch.dtype, padding: str) -> Layer:
    """One layer for all metrics, so that its fields and their singular values are computed once."""
    batch, _, _, length, _ = SHAPES[shape]
    return causal_layer(SHAPES[shape], dtype, padding_mask(padding, batch, length))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("shape", SHAPES)
@every_class
def test_class_equals_its_twin(case: MetricCase, shape: str, padding: str) -> None:
    check_class(case, drawn(shape, torch.float32, padding))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@every_class
def test_class_takes_every_type(case: MetricCase, dtype: torch.dtype) -> None:
    check_class(case, drawn("grouped queries", dtype, "right padded"))


def check_class(case: MetricCase, layer: Layer) -> None:
    found = case.per_sequence(with_junk_at_padding(layer))
    assert found.dtype == torch.float32
    case.assert_equal(found, case.twin(layer))


def with_junk_at_padding(layer: Layer) -> Layer:
    """NaN and infinity where a mask hides them: what stands at padding must not matter."""
    if layer.key_mask is None:
        return layer
    padding = ~layer.key_mask[:, None, :, None]
    return replace(
        layer,
        query=layer.query.masked_fill(padding, torch.nan),
        key=layer.key.masked_fill(padding, torch.inf),
        value=None if layer.value is None else layer.value.masked_fill(padding, torch.nan),
    )


@pytest.fixture(scope="module", params=PADDINGS)
def sample_and_layers(request: pytest.FixtureRequest) -> tuple[Sample, dict[str, Layer]]:
    return sample_of_model(padding_mask(request.param, 3, 40))


@every_metric
def test_sample_equals_the_twin(case: MetricCase, sample_and_layers: tuple[Sample, dict[str, Layer]]) -> None:
    sample, layers = sample_and_layers
    assert set(sample.values[case.name]) == set(layers)
    for name, layer in layers.items():
        expected = case.twin(layer)
        assert sample.values[case.name][name].shape == (case.num_heads(layer),)
        case.assert_equal(sample.values[case.name][name], expected.mean(0))
        if case.sees_positions:
            spread = sample.spread[case.name][name].double()
            torch.testing.assert_close(spread, expected.std(0, unbiased=False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_sample_of_drawn_heads_equals_the_twins(shape: str, dtype: torch.dtype, padding: str) -> None:
    layer = drawn(shape, dtype, padding)
    metrics = [case for case in CLASS_CASES if case.source_is_field]
    sample = sample_of_heads(layer, [case.name for case in metrics])
    assert set(sample.values) == {case.name for case in metrics}
    for case in metrics:
        case.assert_equal(sample.values[case.name]["GivenHeads"], case.twin(layer).mean(0))
        assert sample.values[case.name]["GivenHeads"].dtype == torch.float32
    assert sample.diagnostics["invariant_residual"] < 1e-4


@every_class
def test_compute_is_mean_and_spread_over_sequences(case: MetricCase) -> None:
    layers = causal_layer(GROUPED), causal_layer((2, 4, 2, 41, 8), seed=1)
    for one in case.sequences(layers[0]):
        assert case.updated(one).spread().tolist() == [0] * case.num_heads(one)
    values = torch.cat([case.per_sequence(layer) for layer in layers])
    metric = case.metric(layers[1])  # the longer one decides how many rows there are
    for layer in layers:
        metric.update(**case.arguments(layer))
    assert metric.compute().shape == (case.num_heads(layers[0]),)
    torch.testing.assert_close(metric.compute(), values.mean(0))
    torch.testing.assert_close(metric.spread(), values.std(0, unbiased=False), rtol=1e-4, atol=1e-5)


@every_class_over_positions
def test_padded_equals_cut(case: MetricCase) -> None:
    layer = causal_layer((2, 4, 2, 30, 8))
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[:, 22:] = False
    padded = replace(layer, query_mask=mask, key_mask=mask)
    cut = replace(
        layer,
        **{name: getattr(layer, name)[:, :, :22] for name in ("query", "key", "value")},
        visible=torch.ones(22, 22).tril().bool(),
    )
    torch.testing.assert_close(case.updated(padded).compute(), case.updated(cut).compute())


@every_class
def test_heads_and_sequences_do_not_mix(case: MetricCase) -> None:
    layer = causal_layer(GROUPED)
    whole = case.per_sequence(layer)
    assert layer.w_q is not None
    assert layer.w_k is not None
    assert layer.projection is not None
    heads_per_group = case.num_heads(layer) // 2
    for group in range(2):
        queries = slice(2 * group, 2 * group + 2)
        alone = replace(
            layer,
            query=layer.query[:, queries],
            key=layer.key[:, group : group + 1],
            value=None if layer.value is None else layer.value[:, group : group + 1],
            w_q=layer.w_q[queries],
            w_k=layer.w_k[group : group + 1],
            projection=layer.projection.tensor_split(2, 1)[group],
        )
        part = whole[:, group * heads_per_group : (group + 1) * heads_per_group]
        torch.testing.assert_close(case.updated(alone).compute(), case.per_sequence(alone).mean(0))
        if case.name not in CHANGES_WITH["other heads"]:
            torch.testing.assert_close(case.per_sequence(alone), part)


# Invariances


few_seeds = settings(max_examples=4, deadline=None)


@every_class
@few_seeds
@given(seed=st.integers(0, 10_000))
def test_rotation_changes_nothing(case: MetricCase, seed: int) -> None:
    layer = causal_layer(GROUPED, torch.float64, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator))[0]
    assert layer.w_q is not None
    assert layer.w_k is not None
    turned = replace(
        layer,
        query=layer.query @ rotation,
        key=layer.key @ rotation,
        w_q=rotation.T @ layer.w_q,
        w_k=rotation.T @ layer.w_k,
    )
    assert_same(case.per_sequence(turned), case.per_sequence(layer))


@every_class_over_positions
@few_seeds
@given(seed=st.integers(0, 10_000))
def test_order_of_positions_changes_nothing(case: MetricCase, seed: int) -> None:
    layer = replace(causal_layer(GROUPED, torch.float64, seed=seed), visible=None)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    shuffled = replace(layer, **{name: getattr(layer, name)[:, :, order] for name in ("query", "key", "value")})
    after, before = (case.per_sequence(each) for each in (shuffled, layer))
    if case.name in CHANGES_WITH["order"]:
        assert not torch.allclose(after, before, rtol=1e-4)
    else:
        assert_same(after, before)


@every_class_over_positions
def test_vector_added_to_all_keys_changes_nothing(case: MetricCase) -> None:
    layer = causal_layer((1, 2, 2, 64, 8), torch.float64, key_offset=0.0)
    offset = 10 if case.reads_rows else 1e6  # logits are read in float32
    moved = replace(layer, key=layer.key + offset * torch.randn(8, dtype=torch.float64))
    after, before = case.per_sequence(moved), case.per_sequence(layer)
    if case.name in CHANGES_WITH["offset"]:
        assert not torch.allclose(after, before, rtol=1e-4)
    else:
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-6)


sizes = st.floats(1e-3, 1e3).filter(lambda size: abs(size - 1) > 1e-2)


@every_class
@few_seeds
@given(seed=st.integers(0, 10_000), query_size=sizes, key_size=sizes, value_size=sizes)
def test_size_enters_as_a_power(
    case: MetricCase, seed: int, query_size: float, key_size: float, value_size: float
) -> None:
    layer = causal_layer(GROUPED, torch.float64, seed=seed)
    assert layer.w_q is not None
    assert layer.w_k is not None
    assert layer.value is not None
    scaled = replace(
        layer,
        query=query_size * layer.query,
        key=key_size * layer.key,
        value=value_size * layer.value,
        w_q=query_size * layer.w_q,
        w_k=key_size * layer.w_k,
    )
    after, before = case.per_sequence(scaled), case.per_sequence(layer)
    if case.name in CHANGES_WITH["size"]:
        assert not torch.allclose(after, before, rtol=1e-6)
    else:
        powers = POWERS.get(case.name, (0, 0, 0))
        grown = math.prod(size**power for size, power in zip((query_size, key_size, value_size), powers, strict=True))
        torch.testing.assert_close(after, grown * before, rtol=1e-4, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", [1e-25, 1e20])
def test_sizes_whose_squares_leave_float32_count(size: float) -> None:
    layer = causal_layer(GROUPED)
    for case in (MetricCase(name) for name in METRICS if METRICS[name].summary in ("values", "checked_rows")):
        scaled = "value" if "value" in case.inputs else "query"
        after = case.per_sequence(replace(layer, **{scaled: size * getattr(layer, scaled)}))
        grown = size if case.name in (*POWERS, "output_rms") else 1
        torch.testing.assert_close(after, grown * case.per_sequence(layer), rtol=1e-5, atol=0, msg=case.name)


@every_metric
def test_scale_free_is_what_no_size_changes(case: MetricCase) -> None:
    moves = case.name in POWERS or case.name in CHANGES_WITH["size"]
    assert METRICS[case.name].scale_free == (case.sees_positions and not moves)


def assert_same(after: Tensor, before: Tensor) -> None:
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


# Heads that are broken or dead


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@every_class
def test_head_that_is_not_finite_is_nan_alone(case: MetricCase, bad: float) -> None:
    layer = causal_layer((2, 4, 2, 40, 16))
    before = case.per_sequence(layer)
    broken = replace(
        layer,
        query=layer.query.clone(),
        key=layer.key.clone(),
        value=None if layer.value is None else layer.value.clone(),
        w_q=None if layer.w_q is None else layer.w_q.clone(),
        w_k=None if layer.w_k is None else layer.w_k.clone(),
    )
    for tensor in (broken.query[0], broken.w_q):
        assert tensor is not None
        tensor[1, 9, 3] = bad  # a row that sees enough keys for every metric
    assert broken.value is not None
    for tensor in (broken.key[1], broken.value[1], broken.w_k):
        assert tensor is not None
        tensor[1, 7, 2] = bad
    expected = torch.zeros(2, 4, dtype=torch.bool)
    if METRICS[case.name].scope == "kv_head":
        expected = torch.tensor([[False, False], [False, True]])
    else:
        expected[0, 1] = bool({"query", "w_q"} & case.inputs)
        expected[1, 2:] = bool({"key", "value", "w_k"} & case.inputs)
    if not case.sees_positions:
        expected = expected.any(0, keepdim=True)
    after, mean = case.per_sequence(broken), case.updated(broken).compute()
    assert after.isnan().tolist() == expected.tolist()
    assert after[~expected].isfinite().all()
    if case.name not in CHANGES_WITH["other heads"]:
        assert torch.equal(after[~expected], before[~expected]), "bit by bit"
    assert mean.isnan().tolist() == expected.any(0).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_class
def test_dead_head_equals_its_twin(case: MetricCase, dtype: torch.dtype) -> None:
    layer = causal_layer((1, 2, 2, 33, 8), dtype)
    assert layer.w_q is not None
    assert layer.w_k is not None
    layer.query[0, 0] = layer.w_q[0] = 0
    layer.key[0, 1] = 0.1  # all equal: their mean is not exactly 0.1 in floating point
    layer.w_k[1] = 0
    case.assert_equal(case.per_sequence(layer), case.twin(layer))


# What torchmetrics offers


def test_collection_gives_what_each_gives_alone() -> None:
    first, second = causal_layer(GROUPED), causal_layer(GROUPED, seed=1)
    collection = MetricCollection({case.name: case.metric(first) for case in CLASS_CASES})
    for layer in (first, second):
        collection.update(**{name: value for case in CLASS_CASES for name, value in case.arguments(layer).items()})
    found = collection.compute()
    assert set(found) == set(METRIC_CLASSES)
    for case in CLASS_CASES:
        assert torch.equal(found[case.name], case.updated(first, second).compute()), case.name


@every_class
def test_accumulated_values_give_what_updates_give(case: MetricCase) -> None:
    layer = causal_layer(GROUPED)
    metric = case.metric(layer)
    metric.accumulate(case.per_sequence(layer))
    torch.testing.assert_close(metric.compute(), case.updated(layer).compute())


@every_class
def test_one_head_keeps_its_axis(case: MetricCase) -> None:
    metric = METRIC_CLASSES[case.name](num_heads=1)
    metric.accumulate(torch.ones(3, 1))
    assert pickle.loads(pickle.dumps(metric)).compute().tolist() == metric.compute().tolist() == [1]
    assert metric.clone()(**case.arguments(causal_layer((1, 1, 1, 5, 2)))).ndim == 1


@every_class
def test_clone_pickle_state_dict_and_reset(case: MetricCase) -> None:
    layer, other = causal_layer(GROUPED), causal_layer(GROUPED, seed=5)
    metric = case.updated(layer)
    expected = metric.compute()
    assert torch.equal(metric.clone().compute(), expected)
    assert torch.equal(pickle.loads(pickle.dumps(metric)).compute(), expected)
    metric.persistent(True)
    restored = case.metric(layer)
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    for each in (metric, restored):
        each.update(**case.arguments(other))
    assert torch.equal(restored.compute(), metric.compute())
    assert torch.equal(restored.compute(), case.updated(layer, other).compute())
    metric.reset()
    metric.update(**case.arguments(other))
    assert torch.equal(metric.compute(), case.updated(other).compute())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_class
def test_half_precision_does_not_round_the_sums(case: MetricCase, dtype: torch.dtype) -> None:
    layer = causal_layer(GROUPED, dtype)
    metric = case.metric(layer).half()
    metric.update(**case.arguments(layer))
    case.assert_equal(metric.compute(), case.twin(layer).mean(0))
    assert metric.to("cpu").compute().shape == (case.num_heads(layer),)


@every_class
def test_plot_draws_heads_now_and_over_time(case: MetricCase) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib import pyplot
    from matplotlib.figure import Figure

    metric = case.updated(causal_layer(GROUPED))
    figure, axes = metric.plot()
    assert axes.has_data()
    pyplot.close(figure)
    given = Figure().add_subplot()
    _, axes = metric.plot([metric.compute(), 2 * metric.compute()], ax=given)
    assert axes is given
    assert given.has_data()


@every_class
def test_wrong_number_of_heads_is_an_error(case: MetricCase) -> None:
    with pytest.raises(ValueError, match="num_heads=0"):
        METRIC_CLASSES[case.name](0)
    layer = causal_layer(GROUPED)
    heads = case.num_heads(layer)
    with pytest.raises(ValueError, match=rf"num_heads=3.*\(\d, {heads}\).*expected \(sequences, 3\)"):
        METRIC_CLASSES[case.name](3).update(**case.arguments(layer))


# Two processes


def shard_and_sync(rank: int) -> dict[str, Tensor]:
    """One of two processes: its share of the sequences, 5 and 2, then `compute` over both."""
    share = some_sequences(causal_layer((7, 4, 2, 30, 8)), slice(0, 5) if rank == 0 else slice(5, 7))
    return {case.name: case.updated(share).compute() for case in CLASS_CASES}


def test_two_unequal_processes_equal_one(tmp_path: Path) -> None:
    layer = causal_layer((7, 4, 2, 30, 8))
    for found in on_processes(tmp_path, shard_and_sync):
        assert set(found) == set(METRIC_CLASSES)
        for case in CLASS_CASES:
            torch.testing.assert_close(found[case.name], case.updated(layer).compute(), msg=case.name)
