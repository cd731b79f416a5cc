"""The cost of a sample of a large model: compute, memory and collectives, from a formula and counted.

    python -m benchmarks.cost.scale            # prints the tables of docs/cost.md

Each figure is found in two ways. Formulas of a few lines give the products and bytes of one sample. And the real
measurement code runs on layers of the real shapes with torch's fake tensors, which have shapes but no contents: torch's
counter counts the products, and the bytes that are kept are added up. All layers of a model are alike, so one is run
and the counts are scaled. A small model also runs on real tensors, counted in the same way and timed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from attnmonitor import DEFAULT_METRICS
from attnmonitor.capture import AttentionCall, Layout, capture_attention
from attnmonitor.capture.verify import NUM_CHECKED_ROWS
from attnmonitor.functional import query_gram
from attnmonitor.functional.values import Values
from attnmonitor.measurement.attention_values import kept_rows
from attnmonitor.measurement.reduction import LARGEST_BATCH_ELSEWHERE
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.metrics.statistics import LayerHeads, head_statistics
from benchmarks.cost.overhead import interleaved, ratio

SEQUENCES, LENGTH = 4, 2048
BF16_PEAK, FLOAT64_PEAK = 989, 67  # TFLOP/s of an H100, dense; its float32 without TF32 is as fast as its float64


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-like model, and how many processes share its heads."""

    name: str
    num_layers: int
    width: int
    num_query_heads: int
    num_kv_heads: int
    hidden: int
    vocabulary: int
    tensor_parallel: int = 1
    head_dim: int = 128

    @property
    def layer_weights(self) -> int:
        """Entries of the weights of one layer."""
        attention = 2 * self.width * self.head_dim * (self.num_query_heads + self.num_kv_heads)
        return attention + 3 * self.width * self.hidden

    @property
    def weights(self) -> int:
        """Entries of all weights, embedding and head among them."""
        return self.num_layers * self.layer_weights + 2 * self.vocabulary * self.width


SHAPES = (
    Shape("LLaMA-2-7B", 32, 4096, 32, 32, 11008, 32000),
    Shape("LLaMA-3-70B", 80, 8192, 64, 8, 28672, 128256, tensor_parallel=8),
    Shape("LLaMA-3.1-405B", 126, 16384, 128, 8, 53248, 128256, tensor_parallel=8),
)
SMALL = Shape("one layer of width 512", 1, 512, 8, 2, 1408, 1000, head_dim=64)


# The formulas: products and bytes of the whole model.


def forward_products(shape: Shape) -> float:
    """Return the operations of the forward: every weight once per token, every pair of positions twice."""
    pairs = 4 * shape.num_query_heads * shape.head_dim * LENGTH
    return shape.num_layers * SEQUENCES * LENGTH * (2 * shape.layer_weights + pairs)


def measured_products(shape: Shape) -> float:
    """Return the operations of the measurement's passes over q and k."""
    # A Gram matrix each in float64, the keys' left basis and the shares in float32.
    return 4 * SEQUENCES * LENGTH * shape.num_layers * (shape.num_query_heads + shape.num_kv_heads) * shape.head_dim**2


def kept_bytes(shape: Shape, key_bytes: int = 2) -> float:
    """Return the bytes kept of all layers: a d×d float64 matrix per query head, keys, values and a few rows."""
    keys = key_bytes * LENGTH * shape.num_kv_heads * shape.head_dim
    row = (4 + 1) * LENGTH + key_bytes * shape.head_dim  # logits, which of them are hidden, output
    per_query_head = 8 * shape.head_dim**2 + NUM_CHECKED_ROWS * row
    return SEQUENCES * shape.num_layers * (shape.num_query_heads * per_query_head + 2 * keys)


def pending_bytes(shape: Shape) -> float:
    """Return the most bytes pending on one process: all its layers, or a full batch and one layer."""
    everything = kept_bytes(shape) / shape.tensor_parallel
    return min(everything, LARGEST_BATCH_ELSEWHERE + everything / shape.num_layers)


# The counts: the real code on layers of the real shapes.


class Layer(nn.Module):
    """Grouped-query attention and a gated MLP, as in LLaMA; norms and rotations multiply no matrices."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        linear = partial(nn.Linear, bias=False, dtype=dtype)
        query, key = shape.num_query_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        self.q_proj, self.o_proj = linear(shape.width, query), linear(query, shape.width)
        self.k_proj, self.v_proj = (linear(shape.width, key) for _ in range(2))
        self.gate, self.up = (linear(shape.width, shape.hidden) for _ in range(2))
        self.down = linear(shape.hidden, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, L, width)`` to the same."""
        split = [
            y.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        ]
        mixed = F.scaled_dot_product_attention(*split, is_causal=True, enable_gqa=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class NoMasks(dict[str, Layout]):
    """The mask layout of every layer, already known: finding it reads values, which fake tensors do not have."""

    def __bool__(self) -> bool:
        """Return that layers are known already."""
        return True

    def get(self, *_: Any) -> Layout:
        """Return that no layer has a mask."""
        return Layout()


def counted(shape: Shape, dtype: torch.dtype, *, real: bool = False) -> dict[str, float]:
    """Run one sample on one layer, and return its counts scaled to the whole model."""
    with nullcontext() if real else FakeTensorMode(), torch.no_grad():
        layer = Layer(shape, dtype)
        x = torch.zeros(SEQUENCES, LENGTH, shape.width, dtype=dtype).normal_()
        kept: list[LayerHeads] = []

        def emit(call: AttentionCall) -> None:
            assert call.value is not None
            values = Values(call.value, call.key_mask, call.key.shape[1])  # a CPU keeps their moments
            kept[:] = [LayerHeads(query_gram(call.query), call.key, call.scale, values=values, rows=kept_rows(call))]

        def sample() -> None:
            with capture_attention(layer, emit, layouts=NoMasks()):
                layer(x)
            head_statistics([as_on_a_gpu(layer) for layer in kept], DEFAULT_METRICS, method="randomized")

        found = {"forward": products(lambda: layer(x)), "sample": products(sample)}
        found["kept bytes"] = sum(x.numel() * x.element_size() for x in tensors(kept[0]))
        found = {name: figure * shape.num_layers for name, figure in found.items()}
        if real:
            seconds = interleaved({"forward": lambda: layer(x), "sample": sample}, repeats=3)
            found["share of time"] = ratio(seconds["sample"], seconds["forward"]) - 1
    return found


def as_on_a_gpu(layer: LayerHeads) -> LayerHeads:
    """The layer in float64, where a CPU decides nothing by its values, as a GPU does not."""
    assert layer.key is not None
    assert layer.rows is not None
    assert isinstance(layer.values, Values)
    output = None if layer.rows.output is None else layer.rows.output.double()
    return replace(
        layer,
        key=layer.key.double(),
        values=replace(layer.values, value=layer.values.value.double()),
        rows=replace(layer.rows, logits=layer.rows.logits.double(), output=output),
    )


def products(work: Callable[[], object]) -> float:
    """Return the floating-point operations of all matrix products."""
    # The two kinds that torch's counter does not count.
    known = {
        torch.ops.aten.baddbmm_: lambda _, left, right, **__: 2 * math.prod(left) * right[-1],
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, value, *_, **__: 4 * math.prod(query) * key[-2]
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops()


def tensors(record: object) -> Iterator[Tensor]:
    """Every tensor in a record of records and dictionaries."""
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, dict):
        for value in record.values():
            yield from tensors(value)
    elif is_dataclass(record):
        for field in fields(record):
            yield from tensors(getattr(record, field.name))


def table_bytes(shape: Shape) -> float:
    """Return the bytes that one tensor-parallel group gathers per sample: mean and spread of every value."""
    heads = {"query_head": shape.num_query_heads, "kv_head": shape.num_kv_heads}
    return 2 * 4 * shape.num_layers * sum(heads[METRICS[name].scope] for name in DEFAULT_METRICS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the mode for fake tensors is active in this thread only
    counts = {shape: counted(shape, torch.bfloat16) for shape in SHAPES}
    print(f"probe of {SEQUENCES} x {LENGTH} tokens; TFLOP of the whole model, GB of the whole model\n")
    print("| model | forward | counted | measurement | counted | share | in time at H100's peak |")
    for shape, found in counts.items():
        measured = found["sample"] - found["forward"]
        print(
            f"| {shape.name} | {forward_products(shape) / 1e12:,.0f} | {found['forward'] / 1e12:,.0f} "
            f"| {measured_products(shape) / 1e12:.2f} | {measured / 1e12:.2f} | {measured / found['forward']:.2%} "
            f"| {measured / found['forward'] * BF16_PEAK / FLOAT64_PEAK:.0%} |"
        )
    print("\n| model | kept of all layers | counted | processes that share a layer | each has waiting at most |")
    for shape, found in counts.items():
        print(
            f"| {shape.name} | {kept_bytes(shape) / 1e9:.2f} | {found['kept bytes'] / 1e9:.2f} "
            f"| {shape.tensor_parallel} | {pending_bytes(shape) / 1e9:.2f} |"
        )
    print("\n| model | FSDP gathers | in | tensor parallel sums | in | the monitor exchanges |")
    for shape in SHAPES:
        gathered = 2 * shape.weights / shape.tensor_parallel
        summed = 2 * shape.num_layers * SEQUENCES * LENGTH * shape.width * 2 * (shape.tensor_parallel > 1)
        print(
            f"| {shape.name} | {gathered / 1e9:.1f} | {shape.num_layers + 1} | {summed / 1e9:.1f} "
            f"| {2 * shape.num_layers * (shape.tensor_parallel > 1)} | {table_bytes(shape) / 1e6:.2f} MB |"
        )
    found = counted(SMALL, torch.float32, real=True)
    measured = found["sample"] - found["forward"]
    print(f"\n{SMALL.name}, real tensors on this CPU, model and count:")
    print(f"forward     {forward_products(SMALL) / 1e9:8.2f} {found['forward'] / 1e9:8.2f} GFLOP")
    print(f"measurement {measured_products(SMALL) / 1e9:8.2f} {measured / 1e9:8.2f} GFLOP")
    print(f"kept        {kept_bytes(SMALL, 4) / 1e6:8.2f} {found['kept bytes'] / 1e6:8.2f} MB")
    print(f"in time the measurement takes {found['share of time']:.0%} of the forward")


if __name__ == "__main__":
    main()
