"""What the measurement costs the device: no wait, no L×L memory, full precision whatever the caller's settings."""

from __future__ import annotations

import threading

import pytest
import torch
from reference import FIELD_METRICS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor.capture import Layout, capture_attention
from attnmonitor.capture.layouts import OutputPlace
from attnmonitor.functional import attention_row_statistics, query_gram, row_logits, value_rms, value_spread
from attnmonitor.functional.attention import ROW_STATISTICS
from attnmonitor.functional.checked_rows import projected_rows
from attnmonitor.functional.eigenvalues import Solvable, solve
from attnmonitor.functional.row_statistics import CHECKED_STATISTICS
from attnmonitor.measurement.collected import collected
from attnmonitor.measurement.reduction import Reduction
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import LayerHeads, head_statistics
from benchmarks.cost.gpu.launches import CountLaunches
from benchmarks.cost.scale import SHAPES, NoMasks, counted, forward_products, kept_bytes, measured_products

pytestmark = pytest.mark.usefixtures("one_thread")


@Solvable
def measure_everything(query, key, mask, method):
    """The whole way from one layer's queries and keys to every statistic."""
    layer = LayerHeads(query_gram(query, mask), key, 0.25, mask)
    statistics = yield from head_statistics.steps([layer, layer], DEFAULT_METRICS, method=method)
    logits, query_mask = row_logits(query, key, mask=mask)
    masks = {"query_mask": query_mask, "key_mask": mask}
    rows = attention_row_statistics(logits, query.shape[2], device=query.device, **masks)
    projection = query.new_ones(8, query.shape[1] * query.shape[3])
    checked = projected_rows(query, key, key, projection, mask=mask)
    few = {name: statistic(checked) for name, statistic in CHECKED_STATISTICS.items()}
    few |= {"value_rms": value_rms(key, mask=mask), "value_spread": value_spread(key, mask=mask)}
    return {**statistics[0].values, **rows, **few, "certified": statistics[1].certified}


def answered_elsewhere(steps, answer):
    """Run a computation to its end; its eigenproblems are answered outside of any mode; return their number as well."""
    count = 0
    try:
        problem = next(steps)
        while True:
            count += 1
            problem = steps.send(answer(problem))
    except StopIteration as end:
        return end.value, count


def no_contents(problem):
    """A solution of the right shapes, as fake tensors have it."""
    matrices = problem.matrices
    return torch.empty_like(matrices[..., 0]), torch.empty_like(matrices) if problem.vectors else None


def inputs(length=64, head_dim=32, device="cpu", dtype=torch.float32):
    query = torch.randn(2, 4, length, head_dim, device=device, dtype=dtype)
    key = torch.randn(2, 2, length, head_dim, device=device, dtype=dtype)
    return query, key


@pytest.mark.parametrize("method", ["auto", "randomized", "exact"])
@pytest.mark.parametrize("masked", [False, True])
def test_only_eigensolvers_wait_for_the_device(method, masked):
    """Each of them once for all layers, after the forward; and none where they are solved elsewhere."""
    query, key = inputs(
        dtype=torch.float64
    )  # on a CPU the values of shorter ones are looked at, for which nothing waits
    mask = torch.ones(2, 64, dtype=torch.bool) if masked else None
    with CountLaunches("cpu") as count:
        measure_everything(query, key, mask, method)
    assert count.waits == ["_linalg_eigh", "_linalg_eigh"]

    with CountLaunches("cpu") as count:

        def answer(problem):
            waits = len(count.waits)
            solution = solve(problem)
            del count.waits[waits:]  # on the host's cores it is no wait
            return solution

        _, problems = answered_elsewhere(measure_everything.steps(query, key, mask, method), answer)
    assert (count.waits, problems) == ([], 2)


def test_waits_are_seen():
    with CountLaunches("cpu") as count:
        torch.ones(3).sum().item()
        torch.ones(3).nonzero()
        torch.linalg.eigvalsh(torch.eye(3))
        torch.linalg.eigh(torch.eye(3)[None])
        torch.ones(3).to("cpu", torch.float64)
        torch.ones(3).to("cpu", torch.float64, non_blocking=True)
        torch.ones(3)[torch.ones(3) > 0]
        torch.ones(3)[torch.arange(2)]
    assert count.waits == ["_local_scalar_dense", "nonzero", "_linalg_eigh", "_linalg_eigh", "_to_copy", "index"]
    with FakeTensorMode(), IndexByOperations(), CountLaunches("cuda") as count:
        on_host, on_device = torch.ones(3), torch.ones(3, device="cuda")
        torch.tensor([1.0, 2.0], device="cuda")
        on_device.copy_(on_host)
        torch.ops.aten.copy_(on_device, on_host, True)
        on_device[torch.arange(2)]
        on_device[torch.arange(2, device="cuda")]
    assert count.waits == ["_to_copy", "copy_", "index"]


class Attend(nn.Module):
    def forward(self, query, key, value, weight):
        output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return nn.functional.linear(output.transpose(1, 2).flatten(2), weight)


class NoFacts(NoMasks):
    """What is known of every layer: no mask, and an output projection that is the first weight after the attention."""

    def get(self, *_):
        return Layout(output_at=OutputPlace(0))

    def __getitem__(self, _):
        return self.get()


class Layers(nn.ModuleList):
    def forward(self, *heads):
        for layer in self:
            layer(*heads)


def test_launches_are_few_on_a_fake_gpu(monkeypatch):
    """Of SmolLM2-135M: of each layer while the forward runs, and of all layers at its end; and nothing waits."""
    monkeypatch.setattr("attnmonitor.functional.eigenvalues.solve", no_contents)
    monkeypatch.setattr("attnmonitor.capture.applied_weights.Tensor", FakeTensor)  # reads no weight of another type
    with FakeTensorMode(), IndexByOperations(), torch.no_grad():
        model = Layers(Attend() for _ in range(30))
        heads = [torch.empty(4, number, 512, 64, device="cuda", dtype=torch.bfloat16) for number in (9, 3, 3)]
        heads.append(torch.empty(576, 576, device="cuda", dtype=torch.bfloat16))
        with CountLaunches("cuda") as bare:
            model(*heads)
        counts = {}
        for name, metrics in {"capture": (), "fields": FIELD_METRICS, "all": DEFAULT_METRICS}.items():
            reduction = Reduction(metrics, {}, strict=True)
            with capture_attention(model, reduction.take, layouts=NoFacts()), CountLaunches("cuda") as count:
                model(*heads)
            assert (len(reduction.layers), count.waits) == (30, [])
            counts[name] = (count.launches - bare.launches) / 30
        with CountLaunches("cuda") as at_the_end:
            reduction.finish()
            sent = collected(reduction, DEFAULT_METRICS)
        # Layers that hold more than a batch wait for the end as well, in memory that the allocator has idle.
        monkeypatch.setattr("attnmonitor.measurement.reduction.LARGEST_BATCH_ELSEWHERE", 0)
        for idle, is_pending in ((2**36, True), (0, False)):
            monkeypatch.setattr("torch.cuda.memory_reserved", lambda device, idle=idle: idle)
            reduction = Reduction(DEFAULT_METRICS, {}, strict=True)
            with capture_attention(model, reduction.take, layouts=NoFacts()):
                model(*heads)
            assert bool(reduction.statistics) is not is_pending
    assert (counts["capture"] <= 20, counts["fields"] <= 26, counts["all"] <= 40) == (True, True, True), counts
    assert all(layer.has_written for layer in reduction.layers.values())
    assert at_the_end.launches <= 400
    assert at_the_end.waits == []
    assert {
        ("mean", "output_share", "Layers"),
        ("error", "Layers"),
        ("mean", "output_rms", "Layers#30"),
        ("certified", "Layers#30"),
    } <= sent.keys()


class IndexByOperations(TorchFunctionMode):
    """Indexing and copying written as operations: a torch built without CUDA can do neither, even to fake tensors."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            tensor, tensors = self._narrowed(*args)
            return torch.ops.aten.index(tensor, tensors) if any(each is not None for each in tensors) else tensor
        if function is torch.Tensor.__setitem__:
            tensor, key, value = args
            view, tensors = self._narrowed(tensor, key)
            return torch.ops.aten.index_put_(view, tensors, value)
        if function is torch.Tensor.copy_:
            return torch.ops.aten.copy_(*args)
        if function is scaled_dot_product_attention:  # a torch built with CUDA asks the driver which kernel is best
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _narrowed(tensor, key):
        """Apply the slices and new axes of an index; return the view and the index tensors per axis."""
        parts = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in [part for part in parts if not isinstance(part, torch.Tensor)]:
            place = next(i for i, part in enumerate(parts) if part is Ellipsis)
            given = sum(part is not None and part is not Ellipsis for part in parts)
            parts[place : place + 1] = [slice(None)] * (tensor.ndim - given)
        axis, tensors = 0, []
        for part in parts:
            if part is None:
                tensor = tensor.unsqueeze(axis)
            elif isinstance(part, int):
                tensor = tensor.select(axis, part)
                continue
            elif isinstance(part, slice):
                tensor = torch.ops.aten.slice(tensor, axis, part.start, part.stop)
            tensors.append(part if isinstance(part, torch.Tensor) else None)
            axis += 1
        return tensor, tensors


@pytest.mark.parametrize("method", ["auto", "randomized"])
@pytest.mark.parametrize("masked", [False, True])
def test_measurement_runs_off_the_cpu(method, masked):
    """Under fake tensors an operation on tensors of two devices, or one that needs a value, raises."""
    with FakeTensorMode(), IndexByOperations():
        query, key = inputs(device="cuda", head_dim=16, dtype=torch.bfloat16)
        mask = torch.ones(2, 64, dtype=torch.bool, device="cuda") if masked else None
        found, _ = answered_elsewhere(measure_everything.steps(query, key, mask, method), no_contents)
    assert set(found) == {
        *FIELD_METRICS,
        *CHECKED_STATISTICS,
        "value_rms",
        "value_spread",
        *ROW_STATISTICS,
        "certified",
    }
    assert {value.device.type for value in found.values()} == {"cuda"}


def test_counts_of_a_large_model_are_near_its_formulas():
    """The real code on fake tensors, as `benchmarks.cost.scale` prints it."""
    shape = SHAPES[-1]
    found = counted(shape, torch.bfloat16)
    assert found["forward"] == pytest.approx(forward_products(shape), rel=1e-3)
    assert found["kept bytes"] == pytest.approx(kept_bytes(shape), rel=1e-3)
    assert 1 <= (found["sample"] - found["forward"]) / measured_products(shape) < 1.15


def peak_bytes(length: int) -> int:
    """Most memory held at once beyond the inputs, as the CPU allocator saw it."""
    query, key = torch.randn(1, 8, length, 32), torch.randn(1, 8, length, 32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        head_statistics([LayerHeads(query_gram(query), key, 0.2)], DEFAULT_METRICS)
    held = highest = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_memory_grows_with_length_not_its_square():
    short, long = peak_bytes(2048), peak_bytes(8192)
    layer = 2 * 8 * 8192 * 32 * 4
    assert 0 < long < 2 * layer
    assert long < 4.2 * short
    assert long < 8 * 8192 * 8192 * 4 / 50, "an L×L matrix of one head alone would be that large"


def test_no_tensor_exceeds_a_block_or_the_inputs():
    query, key = torch.randn(1, 4, 4096, 16), torch.randn(1, 4, 4096, 16)
    with CountLaunches("cpu") as count:
        head_statistics([LayerHeads(query_gram(query), key, 0.2)], DEFAULT_METRICS)
    assert count.largest <= max(2**18 * 8, query.nbytes)


def test_statistics_keep_neither_queries_nor_keys():
    query, key = inputs()
    held = {query.untyped_storage().data_ptr(), key.untyped_storage().data_ptr()}
    [found] = head_statistics([LayerHeads(query_gram(query), key, 0.25)], DEFAULT_METRICS)
    kept = [found.certified, found.invariant_residual, *found.values.values()]
    assert all(each.untyped_storage().data_ptr() not in held for each in kept)
    assert all(64 not in each.shape for each in kept), "nothing kept may have the length of the sequence"


@pytest.fixture
def tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_full_precision_is_set_and_restored(tf32, monkeypatch):
    query, key = inputs()
    seen = set()

    class Precision(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "mm" in operation.overloadpacket.__name__:
                seen.add(torch.get_float32_matmul_precision())
            return operation(*args, **(kwargs or {}))

    with Precision():
        [found] = head_statistics([LayerHeads(query_gram(query), key, 0.25)], DEFAULT_METRICS)
    assert seen == {"highest"}
    assert torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(ValueError, match="multiple"):
        head_statistics([LayerHeads(query_gram(query[:, :3]), key, 0.25)], DEFAULT_METRICS)
    assert torch.get_float32_matmul_precision() == "medium", "restored after an error too"
    assert found.values["energy_delocalization"].isfinite().all()


def test_autocast_changes_nothing():
    query, key = inputs()
    plain = measure_everything(query, key, None, "auto")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = measure_everything(query, key, None, "auto")
    for name, value in plain.items():
        assert torch.equal(cast[name], value), name


def test_threads_get_the_same_numbers():
    query, key = inputs()
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(measure_everything(query, key, None, "randomized")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
