"""Count alarms on runs in which attention has nothing to learn, or next to nothing.

    python -m benchmarks.detection.noise --set confirm --docs docs/alert-evaluation.md

trains on tokens and labels that are drawn at random, and on random walks, of which only the last position tells, with
heads of several sizes. Queries and keys drift or decay then, and no head is at fault. The first call takes about four
minutes on one core, later ones read the recordings from a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.detection.ablations import COLLECTED_BY_DEFAULT
from benchmarks.detection.document import command_line, publish
from benchmarks.detection.models import FAMILIES, Shape
from benchmarks.detection.natural import control_table
from benchmarks.detection.recording import Setting
from benchmarks.detection.runs import healthy_recordings
from benchmarks.detection.score import cached, rule_detector

SETS = {"dev": (61, 62), "dev2": (63, 64, 65), "report": (9201, 9202), "confirm": (9301, 9302, 9303, 9304)}
"""Seeds. A set is used for reporting only once: the alarms of ``report`` were looked at, and changed rules."""


def settings(name: str) -> Iterator[tuple[str, Setting]]:
    """Yield the runs of a set, each with what it trains on."""
    for seed in SETS[name]:
        for head_dim in (2, 4, 8, 16):
            shape = Shape(3, 4, head_dim, length=24)
            for family in FAMILIES:
                of_tokens = Setting(family, seed, 2e-3, shape, num_steps=300, sample_every=5, data="noise")
                yield f"random tokens, heads of size {head_dim}", of_tokens
        for family in FAMILIES:
            walk = Setting(family, seed, 2e-3, Shape(3, 4, 8, length=48), num_steps=300, sample_every=5, data="walk")
            yield "random walk", walk
        labels = Setting("vit", seed, 2e-3, Shape(3, 4, 8, vocabulary=8, length=64), num_steps=300, sample_every=5)
        yield "random labels of images", replace(labels, data="noise")


def main() -> None:
    arguments = command_line(__doc__, "noise", SETS).parse_args()
    torch.set_num_threads(1)
    runs = healthy_recordings(settings(arguments.name), arguments.cache / arguments.name)
    publish(control_table(runs, cached(rule_detector(COLLECTED_BY_DEFAULT))), "noise", arguments.docs)


if __name__ == "__main__":
    main()
