"""Short training runs, recorded: healthy ones, ones that are broken from the start, and branches with one fault.

A branch starts from a healthy run at the onset step, with the model and optimizer of that moment, and carries one
fault. It is recorded with the healthy run's samples before onset, as if it had been a run of its own.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from attnmonitor import AttentionMonitor
from attnmonitor.functional import interaction_participation_ratio
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from benchmarks.detection.changes import CARELESS, CHANGES
from benchmarks.detection.data import batch_at, probe_of
from benchmarks.detection.faults import Fault, Injection
from benchmarks.detection.models import Attention, TinyLM, TinyViT
from benchmarks.detection.recording import Recording, SampleValues, Setting, cache_name, load, recording_of, save

SAMPLE_EVERY = 10
WEIGHT_METRIC = "interaction_participation_ratio"
METRICS = (*DEFAULT_METRICS, "max_logit", "attention_entropy")


@dataclass
class Run:
    """A training run that can be paused and copied."""

    setting: Setting
    model: TinyLM
    optimizer: torch.optim.Optimizer
    samples: list[tuple[int, SampleValues]] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    rate_factor: float = 1.0  # of a change of the learning rate
    largest_gradient: float = 1.0  # norm to which gradients are clipped
    average: dict[str, Tensor] = field(default_factory=dict)  # of the weights, where a change needs it

    @classmethod
    def start(cls, setting: Setting) -> Run:
        """Return a run before its first step."""
        torch.manual_seed(setting.seed)
        kind = TinyViT if setting.family == "vit" else TinyLM
        model = kind(setting.family, setting.shape, layout=setting.layout, query_key_gain=setting.query_key_gain)
        return cls(setting, model, torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.98)))

    def branch(self) -> Run:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def train(self, until: int, injection: Injection | None = None) -> None:
        """Train to step ``until``, with samples; a step whose loss is not finite is skipped, as is usual."""
        probe = probe_of(self.setting)
        monitor = AttentionMonitor(self.model, probe, metrics=METRICS, alerts=None, record=None)
        begin = len(self.loss)
        if not self.samples:
            self.samples.append((0, self._measure(monitor, 0)))
        for step in range(begin, until):
            self._step(step, injection)
            if injection is not None:
                with torch.no_grad():
                    injection.apply(step + 1 - begin)
            if (step + 1) % self.setting.sample_every == 0:
                self.samples.append((step + 1, self._measure(monitor, step + 1)))
        monitor.close()

    def _measure(self, monitor: AttentionMonitor, step: int) -> SampleValues:
        """Return the monitor's values, and the participation ratio of every head's query and key weights."""
        of_weights = {}
        with torch.no_grad():
            for name, module in self.model.named_modules():
                if isinstance(module, Attention):
                    query, key = (
                        p.weight.unflatten(0, (-1, module.shape.head_dim)) for p in (module.query, module.key)
                    )
                    key = key.repeat_interleave(len(query) // len(key), dim=0)
                    is_finite = bool(query.isfinite().all() and key.isfinite().all())
                    unknown = torch.full((len(query),), torch.nan)
                    of_weights[name] = interaction_participation_ratio(query, key).float() if is_finite else unknown
        return {**monitor.sample(step).values, WEIGHT_METRIC: of_weights}

    def _step(self, step: int, injection: Injection | None) -> None:
        batch = batch_at(self.setting, step)
        if self.setting.change:
            batch = (CHANGES | CARELESS)[self.setting.change](self, step - self.setting.change_at, batch)
        loss = self.model.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.largest_gradient)
        self.loss.append(loss.item())
        self.gradient_norm.append(norm.item())
        half = self.setting.num_steps // 2
        rate = self.setting.learning_rate * min(1.0, (step + 1) / max(self.setting.warmup_steps, 1))
        rate *= 1 + (self.setting.final_rate_factor - 1) * max(0.0, (step - half) / half)
        if injection is not None and injection.fault.kind == "learning_rate_jump":
            rate *= 10**injection.fault.strength
        for group in self.optimizer.param_groups:
            group["lr"] = rate * self.rate_factor * group.get("rate_factor", 1.0)
        if loss.isfinite() and norm.isfinite():
            self.optimizer.step()

    def recording(self, fault: Fault | None, seconds: float) -> Recording:
        """Return the run so far."""
        return recording_of(self.samples, self.setting, fault, (self.loss, self.gradient_norm), seconds)


def recordings(setting: Setting, faults: list[Fault], cache: Path) -> Iterator[Recording]:
    """Yield the healthy run and then one branch per fault; what the cache does not hold is trained first."""
    paths = [cache / f"{cache_name(setting, fault)}.npz" for fault in [None, *faults]]
    if not all(path.exists() for path in paths):
        _record(setting, faults, paths)
    healthy = load(paths[0])
    yield healthy
    yield from (replace(load(path), without_fault=healthy) for path in paths[1:])


def healthy_recordings(titled: Iterable[tuple[str, Setting]], cache: Path) -> dict[str, list[Recording]]:
    """Return the recordings of runs without a fault, by what is unusual about them."""
    found: dict[str, list[Recording]] = {}
    for title, setting in titled:
        found.setdefault(title, []).extend(recordings(setting, [], cache))
        print(title, setting.family, setting.seed, flush=True)
    return found


def _record(setting: Setting, faults: list[Fault], paths: list[Path]) -> None:
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    healthy = Run.start(setting)
    onsets = sorted({fault.onset for fault in faults})
    at_onset = {}
    for onset in onsets:
        healthy.train(onset)
        at_onset[onset] = healthy.branch()
    healthy.train(setting.num_steps)
    save(healthy.recording(None, time.perf_counter() - begin), paths[0])
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
