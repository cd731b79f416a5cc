"""Short training runs with a known truth: healthy ones, ones that are broken from the start, and single faults.

A *trunk* is one healthy run. A *branch* leaves its trunk at the onset step, with the model and optimizer as they were,
and carries one fault of known kind, place and strength; it is recorded together with the trunk's samples before onset,
as if it had been a run of its own. What a fault does is prescribed, not pushed: at every step after onset the size (or
rank) of what it concerns is set to its value at onset times a ramp, so that training cannot quietly heal it.
"""

from __future__ import annotations

import argparse as _source_of_code
import copy
import functools
import hashlib
import json
import pydoc_data.topics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from attnmonitor import AttentionMonitor
from attnmonitor.functional import interaction_participation_ratio
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from attnmonitor.metrics.catalog import METRICS as CATALOG
from benchmarks.detection.models import Attention, Shape, TinyLM

SAMPLE_EVERY = 10
SampleValues = dict[str, dict[str, Tensor]]  # metric -> layer -> (num_heads,)
LEARNED = "interaction_participation_ratio"
METRICS = (*DEFAULT_METRICS, "max_logit", "attention_entropy")

FULL_STRENGTH = {
    "query_hot": 4.0,  # factor on the size of one head's queries
    "query_fading": 0.25,
    "key_fading": 0.25,
    "layer_hot": 4.0,  # factor on the queries of all heads of one layer
    "layer_cold": 0.25,
    "key_takeover": 2.0,  # key norms added to one position of one KV head
    "key_rank_1": 0.02,  # factor on all but the largest singular value of one head's key projection
}
FINITE_FAULTS = tuple(FULL_STRENGTH)
"""Half strength is half the logarithm of a factor (x2 for x4), half of the added norm, and rank loss half way."""


@dataclass(frozen=True)
class Setting:
    """A healthy way of training, or one that is broken from its first step."""

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


@dataclass(frozen=True)
class Fault:
    """What is broken in a branch: kind, place, strength in (0, 1], onset."""

    kind: str
    layer: int
    head: int  # a query head, or a KV head where the fault is in the keys
    strength: float
    onset: int
    num_steps: int = 160  # after onset
    ramp_steps: int = 60


@dataclass(frozen=True)
class Recorded:
    """That a sample did not fail."""

    failure: None = None


@dataclass
class Recording:
    """A run as it was measured; it has what `attnmonitor.alerts.replay` asks of a record."""

    setting: Setting
    fault: Fault | None
    steps: NDArray[np.int64]
    values: dict[str, dict[str, NDArray[np.float32]]]  # metric -> layer -> (num_samples, num_heads)
    loss: NDArray[np.float32]  # per optimizer step
    gradient_norm: NDArray[np.float32]
    seconds: float = 0.0
    trunk: Recording | None = None  # the same run without the fault

    @property
    def samples(self) -> list[Recorded]:
        """One per step in `steps`."""
        return [Recorded()] * len(self.steps)

    def trajectories(self, metric: str) -> dict[str, NDArray[np.float32]]:
        """(num_samples, num_heads) per layer."""
        return self.values[metric]

    @property
    def metrics(self) -> tuple[str, ...]:
        """What was measured."""
        return tuple(self.values)


# -- Text --------------------------------------------------------------------------------------------------------------


@functools.cache
def texts(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return prose and program text as characters."""
    prose = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    code = Path(_source_of_code.__file__).read_text(encoding="utf-8")
    return tuple(torch.tensor([min(ord(c), vocabulary - 1) for c in text]) for text in (prose, code))


def batch_at(text: Tensor, setting: Setting, step: int) -> Tensor:
    """Return (B, L + 1) characters that depend on nothing but seed and step."""
    draw = torch.Generator().manual_seed(setting.seed * 100_003 + step)
    starts = torch.randint(len(text) - setting.shape.length - 1, (setting.batch_size,), generator=draw)
    return torch.stack([text[start : start + setting.shape.length + 1] for start in starts.tolist()])


# -- Faults ------------------------------------------------------------------------------------------------------------


class Breakable(Protocol):
    """An attention that lets one head be broken."""

    shape: Shape
    num_kv_heads: int
    extra_key: Tensor | None

    def slices(self, side: str, head: int) -> list[Tensor]:
        """Return views of what sets the size of one head's queries or keys."""

    def key_matrix(self, head: int) -> Tensor:
        """Return a view of the (d, D) key projection of one KV head."""


class Injection:
    """Holds one fault at its prescribed size; made at onset, applied after every optimizer step."""

    def __init__(self, attention: Breakable, fault: Fault) -> None:
        self.fault = fault
        self.attention = attention
        side = "key" if fault.kind.startswith("key") else "query"
        whole_layer = fault.kind.startswith("layer")
        heads = range(self.attention.shape.num_heads) if whole_layer else [fault.head]
        self.slices = [tensor for head in heads for tensor in self.attention.slices(side, head)]
        self.sizes = [tensor.norm().item() for tensor in self.slices]
        if fault.kind == "key_takeover":
            shape = self.attention.shape
            direction = torch.randn(
                shape.head_dim, generator=torch.Generator().manual_seed(fault.head + 7 * fault.layer)
            )
            self.direction = direction / direction.norm()
            self.position = shape.length // 3

    def apply(self, steps_since_onset: int) -> None:
        """Set what is at fault to what is prescribed for this step, counted from 1."""
        ramp = min(steps_since_onset / self.fault.ramp_steps, 1.0) * self.fault.strength
        kind = self.fault.kind
        if kind == "non_finite":
            if steps_since_onset == 1:
                self.slices[0].fill_(torch.nan)
        elif kind == "key_takeover":
            self._take_over(FULL_STRENGTH[kind] * ramp)
        elif kind == "key_rank_1":
            self._flatten(FULL_STRENGTH[kind] ** ramp if ramp == 1 else 1 - ramp)
        elif kind != "learning_rate_jump":
            for tensor, size in zip(self.slices, self.sizes, strict=True):
                tensor *= size * FULL_STRENGTH[kind] ** ramp / max(tensor.norm().item(), 1e-12)

    def _take_over(self, key_norms: float) -> None:
        attention, head = self.attention, self.fault.head
        extra = torch.zeros(attention.num_kv_heads, attention.shape.length, attention.shape.head_dim)
        extra[head, self.position] = key_norms * self.key_norm * self.direction
        attention.extra_key = extra

    def _flatten(self, tail_factor: float) -> None:
        """Shrink all singular values but the first, and keep the size of the projection."""
        matrix = self.attention.key_matrix(self.fault.head)
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        if not hasattr(self, "tail"):
            self.tail, self.size = sigma[1:] / sigma[0], sigma.norm()
        sigma = torch.cat([sigma[:1], sigma[0] * self.tail * tail_factor])
        matrix.copy_(left * (sigma * self.size / sigma.norm()) @ right)

    def measure_keys(self, sample_values: SampleValues) -> None:
        """Take the norm of an ordinary key from the last sample before onset."""
        layer = list(sample_values["key_rms"])[self.fault.layer]
        rms = sample_values["key_rms"][layer][self.fault.head].item()
        self.key_norm = rms * self.attention.shape.head_dim**0.5


# -- Training ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training run that can be left and branched off."""

    setting: Setting
    model: TinyLM
    optimizer: torch.optim.Optimizer
    samples: list[tuple[int, SampleValues]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)

    @classmethod
    def start(cls, setting: Setting) -> Run:
        """Return a run before its first step."""
        torch.manual_seed(setting.seed)
        model = TinyLM(setting.family, setting.shape, query_key_gain=setting.query_key_gain)
        return cls(setting, model, torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98)))

    def branch(self) -> Run:
        """Return a copy that goes its own way."""
        return copy.deepcopy(self)

    def train(self, until: int, injection: Injection | None = None) -> None:
        """Train to step ``until``, sampling on the way; a step whose loss is not finite is skipped, as is customary."""
        prose, code = texts(self.setting.shape.vocabulary)
        probe = torch.stack([batch_at(prose, Setting("", -1, 0.0, self.setting.shape), i)[0, :-1] for i in range(8)])
        monitor = AttentionMonitor(
            self.model,
            probe,
            metrics=METRICS,
            alerts=None,
            record=None,
        )
        begin = len(self.loss)
        if not self.samples:
            self.samples.append((0, self._measure(monitor, 0)))
        for step in range(begin, until):
            is_new = self.setting.new_text_at is not None and step >= self.setting.new_text_at
            self._step(batch_at(code if is_new else prose, self.setting, step), step, injection)
            if injection is not None:
                with torch.no_grad():
                    injection.apply(step + 1 - begin)
            if (step + 1) % SAMPLE_EVERY == 0:
                self.samples.append((step + 1, self._measure(monitor, step + 1)))
        monitor.close()

    def _measure(self, monitor: AttentionMonitor, step: int) -> SampleValues:
        """Return the monitor's values, and the participation ratio of every head's learned interaction."""
        learned = {}
        with torch.no_grad():
            for name, module in self.model.named_modules():
                if isinstance(module, Attention):
                    query, key = (
                        p.weight.unflatten(0, (-1, module.shape.head_dim)) for p in (module.query, module.key)
                    )
                    key = key.repeat_interleave(len(query) // len(key), dim=0)
                    is_finite = bool(query.isfinite().all() and key.isfinite().all())
                    unknown = torch.full((len(query),), torch.nan)
                    learned[name] = interaction_participation_ratio(query, key).float() if is_finite else unknown
        return {**monitor.sample(step).values, LEARNED: learned}

    def _step(self, batch: Tensor, step: int, injection: Injection | None) -> None:
        loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.loss.append(loss.item())
        self.gradient_norm.append(norm.item())
        half = self.setting.num_steps // 2
        rate = self.setting.learning_rate * min(1.0, (step + 1) / max(self.setting.warmup_steps, 1))
        rate *= 1 + (self.setting.final_rate_factor - 1) * max(0.0, (step - half) / half)
        if injection is not None and injection.fault.kind == "learning_rate_jump":
            rate *= 10**injection.fault.strength
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if loss.isfinite() and norm.isfinite():
            self.optimizer.step()

    def recording(self, fault: Fault | None, seconds: float) -> Recording:
        """Return what was measured so far."""
        return recording_of(self.samples, self.setting, fault, (self.loss, self.gradient_norm), seconds)


def recording_of(
    samples: list[tuple[int, SampleValues]],
    setting: Setting,
    fault: Fault | None,
    curves: tuple[list[float], list[float]],  # loss and gradient norm per optimizer step
    seconds: float,
) -> Recording:
    """Return what was measured in these samples, each with its step."""
    metrics = {metric for _, values in samples for metric in values}
    layers = list(samples[0][1]["query_rms"])
    values = {}
    for metric in (name for name in CATALOG if name in metrics):
        nothing = torch.full((len(samples[0][1][metric][layers[0]]),), torch.nan)
        rows = [[sample.get(metric, {}).get(layer, nothing) for layer in layers] for _, sample in samples]
        values[metric] = {layer: np.stack([row[i].numpy() for row in rows]) for i, layer in enumerate(layers)}
    steps = np.array([step for step, _ in samples])
    loss, gradient_norm = (np.array(curve, np.float32) for curve in curves)
    return Recording(setting, fault, steps, values, loss, gradient_norm, seconds=seconds)


# -- Recordings in a cache ---------------------------------------------------------------------------------------------


def recordings(setting: Setting, faults: list[Fault], cache: Path) -> Iterator[Recording]:
    """Yield the trunk's recording and then one per fault, from the cache where they are there."""
    paths = [cache / f"{cache_name(setting, fault)}.npz" for fault in [None, *faults]]
    if not all(path.exists() for path in paths):
        _record(setting, faults, paths)
    trunk = load(paths[0])
    yield trunk
    yield from (replace(load(path), trunk=trunk) for path in paths[1:])


def _record(setting: Setting, faults: list[Fault], paths: list[Path]) -> None:
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    trunk = Run.start(setting)
    onsets = sorted({fault.onset for fault in faults})
    at_onset = {}
    for onset in onsets:
        trunk.train(onset)
        at_onset[onset] = trunk.branch()
    trunk.train(setting.num_steps)
    save(trunk.recording(None, time.perf_counter() - begin), paths[0])
    for fault, path in zip(faults, paths[1:], strict=True):
        if path.exists():
            continue
        begin = time.perf_counter()
        run = at_onset[fault.onset].branch()
        injection = Injection(run.model.blocks[fault.layer].attention, fault)
        if fault.kind == "key_takeover":
            injection.measure_keys(run.samples[-1][1])
        run.train(fault.onset + fault.num_steps, injection)
        save(run.recording(fault, time.perf_counter() - begin), path)


def cache_name(setting: Setting, fault: Fault | None) -> str:
    """Return the name that a recording has in a cache."""
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
