"""Count false alarms on healthy runs that learn fast and are sampled often.

    python -m benchmarks.detection.early --docs docs/alert-evaluation.md

Trains the model of the demo and a smaller one on the demo's text, at its rate and at others, and replays the default
rules on every 2nd, 5th and 10th step. Samples are few optimizer steps apart, so a baseline covers little of the run,
and a head that begins to attend leaves it within few samples. Recordings are kept in a cache: only the first call takes
long (about twenty minutes on one core).
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from attnmonitor import AttentionMonitor
from attnmonitor.alerts import DEFAULT_RULES
from attnmonitor.cli.demo import SmallGPT, english, next_token_loss, windows
from attnmonitor.metrics.catalog import DEFAULT_METRICS
from benchmarks.detection.document import command_line, publish, table
from benchmarks.detection.models import Shape
from benchmarks.detection.recording import Recording, SampleValues, Setting, cache_name, load, recording_of, save
from benchmarks.detection.score import rule_detector

PACES = (2, 5, 10)
DEMO = Setting("small_gpt", 0, 1e-3, Shape(8, 8, 32), warmup_steps=30, num_steps=300, batch_size=8)
"""The demo's run, but longer."""
SMALLER = replace(DEMO, shape=Shape(4, 8, 16))

RUNS = {
    "chosen on": (
        DEMO,
        replace(SMALLER, seed=4),
        replace(SMALLER, seed=5, learning_rate=2e-3),
        replace(SMALLER, seed=6, learning_rate=4e-3),
    ),
    "held back": (
        replace(DEMO, seed=3000),
        replace(SMALLER, seed=3005, learning_rate=3e-3),
        replace(SMALLER, seed=3007, warmup_steps=0),
        replace(SMALLER, seed=3008, learning_rate=3e-3, warmup_steps=0),
    ),
}
"""The runs that the rules were chosen on, and those that were evaluated only afterwards."""


def record(setting: Setting) -> Recording:
    """Train as the demo does; return the measurements at every step that one of the paces samples."""
    begin = time.perf_counter()
    torch.manual_seed(setting.seed)
    text, vocabulary = english()
    examples, batch, shape = windows(text, setting.shape.length), setting.batch_size, setting.shape
    model = SmallGPT(
        vocabulary,
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        max_length=shape.length,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.1)
    samples: list[tuple[int, SampleValues]] = []
    loss_curve: list[float] = []
    batches = iter(DataLoader(TensorDataset(examples[4 * batch :]), batch_size=batch, shuffle=True))
    with AttentionMonitor(model, examples[:batch], metrics=DEFAULT_METRICS, alerts=False, record=None) as monitor:
        for step in range(setting.num_steps + 1):
            if any(step % pace == 0 for pace in PACES):
                samples.append((step, monitor.sample(step).values))
            for group in optimizer.param_groups:
                group["lr"] = setting.learning_rate * min(1.0, (step + 1) / max(setting.warmup_steps, 1))
            loss = next_token_loss(model, next(batches)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_curve.append(loss.item())
    return recording_of(samples, setting, None, (loss_curve, []), time.perf_counter() - begin)


def recorded(setting: Setting, cache: Path) -> Recording:
    """Return the run, recorded or read from the cache."""
    path = cache / f"{cache_name(setting, None)}.npz"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        save(record(setting), path)
    return load(path)


def at_pace(recording: Recording, pace: int) -> Recording:
    """Return the run as if it had been sampled every ``pace`` steps."""
    is_taken = recording.steps % pace == 0
    values = {
        metric: {layer: rows[is_taken] for layer, rows in layers.items()} for metric, layers in recording.values.items()
    }
    return replace(recording, steps=recording.steps[is_taken], values=values)


def measured_section(cache: Path) -> str:
    """Return the alarms of every run at every pace, as Markdown."""
    detector, rows = rule_detector(DEFAULT_RULES), []
    for role, settings in RUNS.items():
        for setting in settings:
            recording, shape = recorded(setting, cache), setting.shape
            alarms = [
                ", ".join(f"`{alarm.rule}` at {alarm.step}" for alarm in detector(at_pace(recording, pace)))
                for pace in PACES
            ]
            name = f"{shape.num_layers} x {shape.num_heads} heads, rate {setting.learning_rate:g}"
            loss = f"{recording.loss[-50:].mean():.2f}"
            rows.append((role, name, setting.warmup_steps, loss, *(each or "none" for each in alarms)))
            print(*rows[-1], f"{recording.seconds:.0f} s", sep="; ", flush=True)
    paces = (f"every {pace} steps" for pace in PACES)
    return table(("role", "run", "warm-up", "loss at the end", *paces), rows)


def main() -> None:
    arguments = command_line(__doc__, "early").parse_args()
    torch.set_num_threads(1)
    publish(measured_section(arguments.cache), "early", arguments.docs)


if __name__ == "__main__":
    main()
