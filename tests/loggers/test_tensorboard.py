"""TensorBoard gets a group of curves for each metric, a chart of all its heads, and verdict and alarms as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import SyntheticRun

from attnmonitor.loggers import MetricsLogger, as_logger
from attnmonitor.sample import Sample, still_firing

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.utils.tensorboard import SummaryWriter


def samples(num_samples: int = 30) -> list[Sample]:
    """A run in which two alarms begin and one clears, as a monitor hands it out."""
    found, events = [], []
    for sample in SyntheticRun(3, 4, num_samples, faulty=(1, 2), metrics=("energy_rms", "key_incoherence")).samples():
        events += sample.events
        firing = still_firing(events)
        verdict = "1 head needs a look: layers.1 head 2" if firing else f"healthy over {sample.global_step} steps"
        found.append(Sample(**{**vars(sample), "firing": firing, "verdict": verdict}))
    return found


def logged(logger: Any, folder: Path) -> tuple[EventAccumulator, Layout]:
    """Log a run; return what is in its folder, and the layout of the charts."""
    for sample in (run := samples()):
        logger.log_sample(sample)
    logger.close()
    assert run[-1].firing
    layout = EventAccumulator(str(folder / "attention")).Reload().Tensors("custom_scalars__config__")
    assert len(layout) == 1
    return EventAccumulator(str(folder)).Reload(), Layout.FromString(layout[0].tensor_proto.string_val[0])


@pytest.mark.parametrize("kind", ["lightning", "writer"])
def test_each_metric_is_a_group_with_one_chart_of_all_heads(kind: str, tmp_path: Path) -> None:
    if kind == "lightning":
        lightning = TensorBoardLogger(tmp_path)
        writer, logger = lightning.experiment, MetricsLogger(lightning, image_share=1e-9)
    else:
        writer = SummaryWriter(tmp_path / "run")
        logger = as_logger(writer)
    board, layout = logged(logger, Path(writer.log_dir))
    writer.close()
    tags = board.Tags()["scalars"]
    groups = {tag.split("/")[0] for tag in tags}
    assert {"attention.energy_rms", "attention.key_incoherence", "attention.alerts", "attention.monitor"} <= groups
    assert max(sum(tag.split("/")[0] == group for tag in tags) for group in groups) <= 3 * 4 + 5
    assert [category.title for category in layout.category] == ["attention.energy_rms", "attention.key_incoherence"]
    for category in layout.category:
        heads, model = category.chart
        [pattern] = heads.multiline.tag
        assert [tag for tag in tags if re.fullmatch(pattern, tag)] == [
            f"{category.title}/layer_{layer:02d}/head_{head:02d}" for layer in range(3) for head in range(4)
        ]
        [margin] = model.margin.series
        assert {margin.value, margin.lower, margin.upper} <= set(tags)
        pictures = board.Images(f"{category.title}/heatmap")
        assert [picture.step for picture in pictures] in ([0, 1450], [0])


def test_verdict_and_alarms_are_texts(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "run")
    board, _ = logged(MetricsLogger(writer, image_share=0), tmp_path / "run")
    writer.close()

    def texts(tag: str) -> dict[int, str]:
        found = board.Tensors(f"{tag}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in found}

    verdicts = texts("attention/verdict")
    assert next(iter(verdicts.values())) == "    healthy over 0 steps"
    assert list(verdicts.values())[1] == "    1 head needs a look: layers.1 head 2"
    assert len(verdicts) <= 4, "not one for each sample"
    [alarm, *_] = texts("attention.alerts/energy_hot").values()
    assert "attention logits blow up (energy_hot)" in alarm
    assert "model.layers.1.self_attn head 2" in alarm
    assert "Try: " in alarm
    assert all(line.startswith("    ") for line in alarm.splitlines()), "shown as it is, not as Markdown"


def test_layout_of_the_user_stays(tmp_path: Path) -> None:
    writer = SummaryWriter(tmp_path / "run")
    writer.add_custom_scalars({"mine": {"loss": ["Multiline", ["loss"]]}})
    board, _ = logged(MetricsLogger(writer, image_share=0), tmp_path / "run")
    writer.close()
    [own] = board.Tensors("custom_scalars__config__")
    assert [category.title for category in Layout.FromString(own.tensor_proto.string_val[0]).category] == ["mine"]
