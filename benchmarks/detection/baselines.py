"""Detectors in common use today, which the rules are compared with: limits and z-scores of curves of the whole run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from benchmarks.detection.recording import Recording
from benchmarks.detection.score import Alarm, Detector, cached

Reduction = Callable[[np.ndarray], float]  # from the values of all heads to one figure


def _alarms_at(steps: Iterable[int], name: str) -> list[Alarm]:
    return [Alarm(int(step), name, name, frozenset({("run", None, None)})) for step in steps]


def _begins(is_high: np.ndarray) -> np.ndarray:
    return np.flatnonzero(is_high & ~np.concatenate([[False], is_high[:-1]]))


def _figures(recording: Recording, metric: str, reduce: Reduction) -> np.ndarray:
    rows = np.concatenate(list(recording.values[metric].values()), axis=1)
    return np.array([reduce(row) for row in rows])


def spikes(curve: str, limit: float = 5.0, window: int = 100) -> Detector:
    """Return the z-score of a per-step curve against its last ``window`` steps, as a detector."""

    def alarms(recording: Recording) -> list[Alarm]:
        values = np.nan_to_num(getattr(recording, curve).astype(float), nan=1e9, posinf=1e9)
        z = np.zeros(len(values))
        for step in range(window, len(values)):
            past = values[step - window : step]
            z[step] = (values[step] - past.mean()) / (past.std() + 1e-3 * abs(past.mean()))
        return _alarms_at(_begins(z > limit) + 1, f"{curve} z > {limit:g}")

    return alarms


def level(metric: str, reduce: Reduction, limit: float, name: str, *, above: bool) -> Detector:
    """Return an absolute limit on one figure over all heads, as a detector."""

    def alarms(recording: Recording) -> list[Alarm]:
        figures = _figures(recording, metric, reduce)
        beyond = figures > limit if above else figures < limit
        return _alarms_at(recording.steps[_begins(beyond)], name)

    return alarms


def deviation(metric: str, reduce: Reduction, name: str, limit: float = 5.0) -> Detector:
    """Return the robust z-score of one figure over all heads against its last 20 samples, as a detector."""

    def alarms(recording: Recording) -> list[Alarm]:
        figures = _figures(recording, metric, reduce)
        z = np.zeros(len(figures))
        for index in range(20, len(figures)):
            past = figures[index - 20 : index]
            spread = 1.4826 * np.median(np.abs(past - np.median(past))) + 0.02
            z[index] = abs(figures[index] - np.median(past)) / spread
        return _alarms_at(recording.steps[_begins(z > limit)], name)

    return alarms


BASELINES: dict[str, Detector] = {
    "loss, z > 5": cached(spikes("loss")),
    "gradient norm, z > 5": cached(spikes("gradient_norm")),
    "largest logit > 100": cached(level("max_logit", np.nanmax, 100.0, "largest logit", above=True)),
    "mean entropy, robust z > 5": cached(deviation("attention_entropy", np.nanmean, "mean entropy")),
    "least entropy < 0.1 nats": cached(level("attention_entropy", np.nanmin, 0.1, "least entropy", above=False)),
}
