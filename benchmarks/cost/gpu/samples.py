"""Samples of models of known shapes: time of host and device, launches, and peak memory."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import DeviceType

from attnmonitor import DEFAULT_METRICS
from attnmonitor.capture import capture_attention
from attnmonitor.functional import query_gram
from attnmonitor.measurement import Measurement
from attnmonitor.measurement.probe import Probe
from attnmonitor.measurement.quiet import quiet
from attnmonitor.metrics.statistics import LayerHeads, head_statistics
from benchmarks.cost import spectra
from benchmarks.cost.gpu.clock import host_and_device, interleaved, median_ms
from benchmarks.cost.gpu.launches import CountLaunches
from benchmarks.cost.gpu.session import Rows
from benchmarks.cost.gpu.shapes import Shape, shapes_for

__all__ = ["launches", "layer_table", "machine", "memory", "samples"]


def machine(device: str, rows: Rows) -> None:
    """Say on what the session runs."""
    row: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }
    row |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        row |= {"GB": properties.total_memory / 1e9, "linalg": str(torch.backends.cuda.preferred_linalg_library())}
    rows.add(**row)


def _models(device: str, rows: Rows) -> Iterator[tuple[Shape, nn.Module, Probe]]:
    """Yield each shape with its model and probe while there is time, one model in memory at a time."""
    for shape in shapes_for(device):
        if rows.time_left < 0:
            return
        model = shape.model(device)
        yield shape, model, Probe(model, shape.tokens(device))
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def _bare(model: nn.Module, probe: Probe) -> Callable[[], None]:
    def run() -> None:
        with quiet(model):
            probe.run(model)

    return run


def _captured(model: nn.Module, probe: Probe) -> Callable[[], None]:
    layouts: dict[str, tuple[str, ...]] = {}

    def run() -> None:
        with quiet(model), capture_attention(model, lambda call: None, layouts=layouts):
            probe.run(model)

    return run


def samples(device: str, rows: Rows) -> None:
    """Time of the bare forward, the capture alone and a whole sample, on host and device."""
    for shape, model, probe in _models(device, rows):
        measurement = Measurement(model, probe, DEFAULT_METRICS, strict=True)
        attached, _ = host_and_device(measurement.attach, device)
        columns = {"forward": _bare(model, probe), "capture": _captured(model, probe), "sample": measurement.take}
        seconds = rows.time_left / 3
        timed = interleaved(columns, device, rows, rounds=2 if device == "cpu" else 20, seconds=seconds)
        row: dict[str, Any] = {"model": shape.name, "tokens": shape.batch * shape.length, "attach s": attached}
        for name, each in timed.items():
            row |= {f"{name} host ms": median_ms(each, 0), f"{name} ms": median_ms(each, 1)}
        for name in ("capture", "sample"):
            pairs = zip(timed[name], timed["forward"], strict=True)
            row[f"{name} / forward"] = statistics.median(over[1] / under[1] for over, under in pairs)
        rows.add(**row, rounds=len(timed["sample"]))


def launches(device: str, rows: Rows) -> None:
    """Operations dispatched in each stage, what waits in it, and the kernels that the profiler sees."""
    for shape, model, probe in _models(device, rows):
        measurement = Measurement(model, probe, DEFAULT_METRICS, strict=True)
        measurement.attach()
        stages = {"forward": _bare(model, probe), "capture": _captured(model, probe), "sample": measurement.take}
        for stage, work in stages.items():
            work()  # the first time kinds of masks are found, which waits
            with CountLaunches(device) as count:
                work()
            waits = " ".join(sorted(set(count.waits)))
            rows.add(
                model=shape.name,
                stage=stage,
                operations=count.launches,
                kernels=_kernels(work) if device == "cuda" else None,
                waits=len(count.waits),
                **{"which waits": waits},
            )


def _kernels(work: Callable[[], Any]) -> int | None:
    """Return the kernels and copies that the device ran; None where the profiler cannot see them."""
    with suppress(RuntimeError):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            work()
            torch.cuda.synchronize()
        found = sum(event.device_type == DeviceType.CUDA for event in profile.events() or ())
        return found or None
    return None


def memory(device: str, rows: Rows) -> None:
    """Peak memory of the bare forward and of a sample, beyond what the model holds."""
    for shape, model, probe in _models(device, rows):
        measurement = Measurement(model, probe, DEFAULT_METRICS, strict=True)
        measurement.attach()
        works = {"forward": _bare(model, probe), "sample": measurement.take}
        peaks = {name: _peak_bytes(work, device) for name, work in works.items()}
        row = {f"{name} MB": None if peak is None else peak / 1e6 for name, peak in peaks.items()}
        rows.add(model=shape.name, **row)


def _peak_bytes(work: Callable[[], Any], device: str) -> int | None:
    if device != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def layer_table(device: str, rows: Rows) -> None:
    """Time per head of one layer, beside the usual ways to find a field's leading spectrum."""
    for name in spectra.SHAPES:
        for length in (64,) if device == "cpu" else (512, 1024, 4096):
            query, key = spectra.draw(spectra.SHAPES[name], length, torch.float32, device)
            work: dict[str, Callable[[], Any]] = {
                "all metrics": lambda query=query, key=key: _statistics(query, key),
                "svd_lowrank": lambda query=query, key=key: torch.svd_lowrank(
                    spectra.one_field(query, key), q=spectra.SKETCH, niter=2
                ),
            }
            if rows.time_left < 0:
                return
            timed = interleaved(work, device, rows, rounds=1 if device == "cpu" else 5, seconds=rows.time_left / 4)
            row = {f"{method} ms": median_ms(each, 1) for method, each in timed.items()}
            rows.add(model=name, length=length, heads=query.shape[1], **row)


def _statistics(query: Tensor, key: Tensor) -> Any:
    with torch.no_grad():
        return head_statistics([LayerHeads(query_gram(query), key, query.shape[-1] ** -0.5)], DEFAULT_METRICS)
