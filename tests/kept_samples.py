"""A logger that keeps its samples."""

from __future__ import annotations

from attnmonitor import Sample


class KeptSamples:
    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def log_sample(self, sample: Sample) -> None:
        self.samples.append(sample)
