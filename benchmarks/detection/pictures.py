"""One picture per kind of fault: a metric of every head, the alarm, and the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.detection.faults import FINITE_FAULTS
from benchmarks.detection.recording import Recording
from benchmarks.detection.runs import WEIGHT_METRIC
from benchmarks.detection.score import Detector, alarms_of_fault, heads_at_fault

SHOWN_METRIC = {
    "query_hot": "query_rms",
    "query_fading": "query_rms",
    "key_fading": "key_rms",
    "layer_hot": "query_rms",
    "layer_cold": "query_rms",
    "key_takeover": "key_leverage_max",
    "key_rank_1": WEIGHT_METRIC,
    "non_finite": "energy_rms",
}
FAULTY, OTHERS, LOSS, ONSET = "#c0392b", "#9aa5b1", "#34495e", "#2c3e50"


def picture(recording: Recording, detector: Detector, path: Path) -> None:
    """Draw every head, the faulty one in red, the first true alarm, and the loss below."""
    metric = SHOWN_METRIC[recording.fault.kind]
    faulty = heads_at_fault(recording)
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.4, 4.2), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    scope = "kv_head" if metric.startswith("key") else "query_head"
    for layer, rows in recording.values[metric].items():
        for head in range(rows.shape[1]):
            is_faulty = (scope, layer, head) in faulty
            top.plot(
                recording.steps,
                rows[:, head],
                color=FAULTY if is_faulty else OTHERS,
                linewidth=1.8 if is_faulty else 0.7,
                zorder=3 if is_faulty else 1,
            )
    alarms = [alarm for alarm in alarms_of_fault(recording, detector) if alarm.units & faulty]
    for axis in (top, bottom):
        axis.axvline(recording.fault.onset, color=ONSET, linestyle=":", linewidth=1)
        if alarms:
            axis.axvline(alarms[0].step, color=FAULTY, linestyle="--", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
    if metric not in ("key_leverage_max",):
        top.set_yscale("log")
    title = f"{recording.fault.kind.replace('_', ' ')}, {recording.setting.family}"
    alarm = f"{alarms[0].rule} at step {alarms[0].step}" if alarms else "no alarm"
    top.set_title(f"{title}: dotted onset, dashed {alarm}", fontsize=10, loc="left")
    top.set_ylabel(metric)
    bottom.plot(np.arange(1, len(recording.loss) + 1), recording.loss, color=LOSS, linewidth=0.8)
    bottom.set_ylabel("loss")
    bottom.set_xlabel("optimizer step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pictures(recordings: list[Recording], detector: Detector, folder: Path) -> list[str]:
    """Draw the first recording of each kind of one family; return the Markdown that shows the pictures."""
    lines = []
    for kind in (*FINITE_FAULTS, "non_finite"):
        shown = next((r for r in recordings if r.fault.kind == kind and r.setting.family == "llama"), None)
        if shown is not None:
            name = f"collapse_{kind}.png"
            picture(shown, detector, folder / name)
            lines.append(f"![{kind.replace('_', ' ')}](images/{name})")
    return lines
