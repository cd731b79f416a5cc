"""One training run as it was measured, with its setting and fault; one file of the cache."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attnmonitor.metrics.catalog import METRICS as CATALOG
from attnmonitor.sample import LayerCoverage
from benchmarks.detection.faults import Fault
from benchmarks.detection.models import Layout, Shape

SampleValues = dict[str, dict[str, Tensor]]  # metric -> layer -> (num_heads,)


@dataclass(frozen=True)
class Setting:
    """How a run trains: healthy, or broken from its first step."""

    family: str
    seed: int
    learning_rate: float
    shape: Shape
    warmup_steps: int = 60
    num_steps: int = 600
    query_key_gain: float = 1.0
    final_rate_factor: float = 1.0  # linear change of the rate over the second half
    new_text_at: int | None = None  # step from which the text is of another kind
    batch_size: int = 4
    layout: Layout = "pre_norm"
    data: Literal["text", "noise", "walk"] = "text"
    change: str = ""  # name of what training does differently, from `changes.CHANGES`
    change_at: int = 300
    sample_every: int = 10


@dataclass(frozen=True)
class Sampled:
    """One sample as `replay` asks for it: none of these failed."""

    failure: None = None


@dataclass
class Recording:
    """A run as it was measured; `attnmonitor.alerts.replay` takes it in place of a record."""

    setting: Setting
    fault: Fault | None
    steps: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float32]]]  # metric -> layer -> (num_samples, num_heads)
    loss: NDArray[np.float32]  # per optimizer step
    gradient_norm: NDArray[np.float32]
    seconds: float = 0.0
    without_fault: Recording | None = None  # the same run without the fault

    @property
    def samples(self) -> list[Sampled]:
        """One per step in `steps`."""
        return [Sampled()] * len(self.steps)

    def trajectories(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """Return (num_samples, num_heads) per layer."""
        return self.values[metric]

    @property
    def coverage(self) -> dict[str, LayerCoverage]:
        """What the rules need to know of each layer: the size of its heads."""
        return {layer: LayerCoverage(layer, head_dim=self.setting.shape.head_dim) for layer in self.values["query_rms"]}

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that were measured."""
        return tuple(self.values)


def recording_of(
    samples: list[tuple[int, SampleValues]],
    setting: Setting,
    fault: Fault | None,
    curves: tuple[list[float], list[float]],  # loss and gradient norm per optimizer step
    seconds: float,
) -> Recording:
    """Return the recording of these samples, each given with its step."""
    metrics = {metric for _, values in samples for metric in values}
    layers = list(samples[0][1]["query_rms"])
    values = {}
    for metric in (name for name in CATALOG if name in metrics):
        missing = torch.full((len(samples[0][1][metric][layers[0]]),), torch.nan)
        rows = [[sample.get(metric, {}).get(layer, missing) for layer in layers] for _, sample in samples]
        values[metric] = {layer: np.stack([row[i].numpy() for row in rows]) for i, layer in enumerate(layers)}
    steps = np.array([step for step, _ in samples])
    loss, gradient_norm = (np.array(curve, np.float32) for curve in curves)
    return Recording(setting, fault, steps, values, loss, gradient_norm, seconds=seconds)


def cache_name(setting: Setting, fault: Fault | None) -> str:
    """Return the name of a recording in a cache."""
    plain = json.dumps([asdict(setting), None if fault is None else asdict(fault)], sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def save(recording: Recording, path: Path) -> None:
    """Write a recording as one .npz."""
    about = {"setting": asdict(recording.setting), "fault": recording.fault and asdict(recording.fault)}
    arrays: dict[str, Any] = {
        f"{metric}|{layer}": rows for metric, layers in recording.values.items() for layer, rows in layers.items()
    }
    np.savez_compressed(
        path,
        about=np.array(json.dumps(about)),
        steps=recording.steps,
        loss=recording.loss,
        gradient_norm=recording.gradient_norm,
        seconds=np.array(recording.seconds),
        **arrays,
    )


def load(path: Path) -> Recording:
    """Read a recording back."""
    with np.load(path) as stored:
        about = json.loads(str(stored["about"]))
        setting = Setting(**{**about["setting"], "shape": Shape(**about["setting"]["shape"])})
        fault = Fault(**about["fault"]) if about["fault"] else None
        values: dict[str, dict[str, NDArray[np.float32]]] = {}
        for name in stored.files:
            if "|" in name:
                metric, layer = name.split("|")
                values.setdefault(metric, {})[layer] = stored[name]
        curves = (stored["loss"], stored["gradient_norm"])
        return Recording(setting, fault, stored["steps"], values, *curves, seconds=float(stored["seconds"]))
