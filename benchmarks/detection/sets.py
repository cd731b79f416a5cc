"""Which runs there are: sets to choose thresholds on, another to report on, with nothing in common.

The sets differ in seeds, sizes, learning rates, text positions, onsets and places of the faults. A set that was
reported on once has been seen: ``dev2`` was the reporting set of earlier rules, and tunes today's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from benchmarks.detection.models import FAMILIES, Shape
from benchmarks.detection.runs import FINITE_FAULTS, Fault, Setting


@dataclass(frozen=True)
class Planned:
    """A setting, what it is an example of, and the faults that branch off it."""

    kind: str  # "healthy", "control", "broken_start"
    setting: Setting
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Ingredients:
    """What one set is made of."""

    first_seed: int
    trunks: tuple[tuple[Shape, float], ...]  # shape and learning rate of runs that carry faults
    healthy_rates: tuple[float, ...]  # the last is the best high rate
    broken: tuple[tuple[float, float], ...]  # (learning rate without warm-up, gain of the initial queries and keys)
    shape: Shape
    half_strength_trunks: int  # of each family, how many carry the faults at half strength as well
    onsets: tuple[int, ...] = (370, 400, 430)


SETS = {
    "dev": Ingredients(
        first_seed=0,
        trunks=((Shape(4, 4, 16, length=96), 2e-3), (Shape(3, 6, 16, length=80), 4e-3)),
        healthy_rates=(1e-3, 8e-3),
        broken=((3e-2, 1.0), (1e-1, 1.0), (3e-3, 6.0)),
        shape=Shape(4, 4, 16, length=96),
        half_strength_trunks=2,
    ),
    "dev2": Ingredients(
        first_seed=1000,
        trunks=((Shape(5, 4, 16, length=88), 3e-3), (Shape(4, 4, 20, length=96), 1.5e-3)),
        healthy_rates=(1e-3, 7e-3),
        broken=((4e-2, 1.0), (8e-2, 1.0), (2e-3, 7.0)),
        shape=Shape(4, 6, 16, length=88),
        half_strength_trunks=1,
    ),
    "report": Ingredients(
        first_seed=2000,
        trunks=((Shape(5, 4, 16, length=80), 2.5e-3), (Shape(4, 4, 12, length=72), 5e-3)),
        healthy_rates=(1.2e-3, 3e-3, 7e-3),
        broken=((5e-2, 1.0), (9e-2, 1.0), (2.5e-3, 6.5)),
        shape=Shape(5, 4, 12, length=76),
        half_strength_trunks=1,
        onsets=(350, 390, 440),
    ),
}


def planned_runs(name: str, families: tuple[str, ...] = FAMILIES) -> list[Planned]:
    """Return the runs of a set."""
    made_of = SETS[name]
    seed = made_of.first_seed
    runs = []
    for family in FAMILIES:
        for number, (shape, rate) in enumerate(made_of.trunks):
            setting = Setting(family, seed := seed + 1, rate, shape)
            with_half = number < made_of.half_strength_trunks
            runs.append(Planned("healthy", setting, tuple(faults_of(setting, made_of.onsets, with_half=with_half))))
        base = Setting(family, seed, 2e-3, made_of.shape)
        rates = [replace(base, seed=(seed := seed + 1), learning_rate=rate) for rate in made_of.healthy_rates]
        runs += [Planned("healthy", setting) for setting in rates]
        runs.append(Planned("control", replace(base, seed=(seed := seed + 1), final_rate_factor=3.0)))
        runs.append(Planned("control", replace(base, seed=(seed := seed + 1), new_text_at=400)))
        for rate, gain in made_of.broken:
            broken = replace(base, learning_rate=rate, query_key_gain=gain, warmup_steps=0, num_steps=150)
            runs.append(Planned("broken_start", replace(broken, seed=(seed := seed + 1))))
    for family in FAMILIES:
        slow = Setting(family, seed := seed + 1, 2e-3, made_of.shape, num_steps=1000)
        runs.append(Planned("healthy", slow, tuple(slow_faults_of(slow))))
    return [run for run in runs if run.setting.family in families]


def slow_faults_of(setting: Setting) -> list[Fault]:
    """Return faults that take 50 samples to unfold: 2.8 % per sample, which no short baseline notices."""
    draw = random.Random(setting.seed)
    layers, heads = setting.shape.num_layers, setting.shape.num_heads // 2
    return [
        Fault(kind, draw.randrange(layers), draw.randrange(heads), 1.0, onset=450, num_steps=550, ramp_steps=500)
        for kind in ("query_hot", "key_fading")
    ]


def faults_of(setting: Setting, onsets: tuple[int, ...], *, with_half: bool) -> list[Fault]:
    """Return every kind of fault, at full and perhaps half strength, each at a place and onset of its own."""
    draw = random.Random(setting.seed)
    num_kv_heads = setting.shape.num_heads // 2 if setting.family == "llama" else setting.shape.num_heads
    faults = []
    for kind in (*FINITE_FAULTS, "non_finite", "learning_rate_jump"):
        for strength in (1.0,) if kind in ("non_finite", "learning_rate_jump") else (1.0, 0.5):
            heads = num_kv_heads if kind.startswith("key") else setting.shape.num_heads
            onset = draw.choice(onsets)
            place = draw.randrange(setting.shape.num_layers), draw.randrange(heads)
            if strength == 1.0 or with_half:
                faults.append(Fault(kind, *place, strength, onset))
    return faults
