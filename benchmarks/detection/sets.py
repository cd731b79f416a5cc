"""The sets of runs: thresholds are chosen on some of them and reported on another, and they share no run.

The sets differ in seeds, sizes, learning rates, text positions, onsets and places of the faults. A set is used for
reporting only once: ``dev2`` was the reporting set of earlier rules, and today's were chosen on it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.detection.faults import FINITE_FAULTS, Fault
from benchmarks.detection.models import FAMILIES, Shape
from benchmarks.detection.recording import Recording, Setting
from benchmarks.detection.runs import recordings


@dataclass(frozen=True)
class Planned:
    """A setting, what it is an example of, and the faults of its branches."""

    kind: str  # "healthy", "control", "broken_start"
    setting: Setting
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True)
class Ingredients:
    """The seeds, shapes, rates and onsets of one set."""

    first_seed: int
    with_faults: tuple[tuple[Shape, float], ...]  # shape and learning rate of the runs that faults branch from
    healthy_rates: tuple[float, ...]  # the last is the highest that trains well
    broken: tuple[tuple[float, float], ...]  # (learning rate without warm-up, gain of the initial queries and keys)
    shape: Shape
    num_with_half: int  # of each family, how many of these have the faults at half strength as well
    onsets: tuple[int, ...] = (370, 400, 430)


SETS = {
    "dev": Ingredients(
        first_seed=0,
        with_faults=((Shape(4, 4, 16, length=96), 2e-3), (Shape(3, 6, 16, length=80), 4e-3)),
        healthy_rates=(1e-3, 8e-3),
        broken=((3e-2, 1.0), (1e-1, 1.0), (3e-3, 6.0)),
        shape=Shape(4, 4, 16, length=96),
        num_with_half=2,
    ),
    "dev2": Ingredients(
        first_seed=1000,
        with_faults=((Shape(5, 4, 16, length=88), 3e-3), (Shape(4, 4, 20, length=96), 1.5e-3)),
        healthy_rates=(1e-3, 7e-3),
        broken=((4e-2, 1.0), (8e-2, 1.0), (2e-3, 7.0)),
        shape=Shape(4, 6, 16, length=88),
        num_with_half=1,
    ),
    "report": Ingredients(
        first_seed=2000,
        with_faults=((Shape(5, 4, 16, length=80), 2.5e-3), (Shape(4, 4, 12, length=72), 5e-3)),
        healthy_rates=(1.2e-3, 3e-3, 7e-3),
        broken=((5e-2, 1.0), (9e-2, 1.0), (2.5e-3, 6.5)),
        shape=Shape(5, 4, 12, length=76),
        num_with_half=1,
        onsets=(350, 390, 440),
    ),
}


def planned_runs(name: str, families: tuple[str, ...] = FAMILIES) -> list[Planned]:
    """Return the runs of a set."""
    made_of = SETS[name]
    seed = made_of.first_seed
    runs = []
    for family in FAMILIES:
        for number, (shape, rate) in enumerate(made_of.with_faults):
            setting = Setting(family, seed := seed + 1, rate, shape)
            with_half = number < made_of.num_with_half
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
    """Return faults that grow over 50 samples: 2.8 % per sample, too slow for a short baseline."""
    draw = random.Random(setting.seed)
    layers, heads = setting.shape.num_layers, setting.shape.num_heads // 2
    return [
        Fault(kind, draw.randrange(layers), draw.randrange(heads), 1.0, onset=450, num_steps=550, ramp_steps=500)
        for kind in ("query_hot", "key_fading")
    ]


def faults_of(setting: Setting, onsets: tuple[int, ...], *, with_half: bool) -> list[Fault]:
    """Return every kind of fault at full and, where asked, half strength, each at a random place and onset."""
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


@dataclass
class RecordedSet:
    """The recordings of a set by what they are examples of."""

    clean: list[Recording] = field(default_factory=list)
    broken: list[Recording] = field(default_factory=list)
    faults: list[Recording] = field(default_factory=list)
    slow: list[Recording] = field(default_factory=list)
    jumps: list[Recording] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, cache: Path) -> RecordedSet:
        """Record the set, or read it from the cache."""
        runs = cls()
        for plan in planned_runs(name):
            run, *branches = recordings(plan.setting, list(plan.faults), cache / name)
            (runs.broken if plan.kind == "broken_start" else runs.clean).append(run)
            for branch in branches:
                is_jump, is_slow = branch.fault.kind == "learning_rate_jump", branch.fault.ramp_steps > 60
                (runs.jumps if is_jump else runs.slow if is_slow else runs.faults).append(branch)
            print(f"{plan.kind:<13} {plan.setting.family:<7} {len(branches)} faults", flush=True)
        return runs

    def faults_of(self, strength: float) -> list[Recording]:
        """Return the branches whose fault has that strength."""
        return [recording for recording in self.faults if recording.fault.strength == strength]
