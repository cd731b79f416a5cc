"""A notebook shows verdict, heatmap and the way to the report, of a monitor, a record and a sample."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from models import TinyGPT, token_batch
from synthetic_runs import SyntheticRun

from attnmonitor import AttentionMonitor
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.sample import LayerCoverage
from attnmonitor.summary.notebook import heatmap_png
from attnmonitor.summary.style import ALARM_COLOR, STATE_COLORS

HOSTILE = "</div><script>alert(1)</script>&\x1b[2J{}"
CELL = 14


class Tags(HTMLParser):
    """The elements of a page, and whether each is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in ("img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(html: str) -> str:
    tags = Tags()
    tags.feed(html)
    assert tags.open == []
    assert tags.seen <= {"div", "p", "pre", "img", "br", "code"}
    assert "\x1b" not in html
    return html


def pixels(html: str) -> np.ndarray:
    [picture] = re.findall(r"data:image/png;base64,([^']+)", html)
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(picture))))


@pytest.mark.parametrize("layer_name", ["model.layers.{}.self_attn", HOSTILE])
def test_record_shows_verdict_heatmap_and_command(layer_name: str, tmp_path: Path) -> None:
    run = SyntheticRun(3, 4, 20, faulty=(1, 2), group=2, layer_name=layer_name)
    with RecordWriter(tmp_path / "my run.sqlite", run=run.config) as writer:
        assert "no sample taken yet" in checked(RunRecord.open(writer.path)._repr_html_())
        for sample in run.samples():
            writer.log([(sample.global_step, "loss", 3.0)])
            writer.append(sample)
    record = RunRecord.open(tmp_path / "my run.sqlite")
    html = checked(record._repr_html_())
    assert "1 head needs a look" in html
    assert f"attnmonitor report &#x27;{tmp_path}/my run.sqlite&#x27;" in html
    assert "steps 0–950" in html
    picture = pixels(html)
    assert picture.shape == (3 * CELL, 4 * CELL, 3)
    corners = [tuple(picture[CELL, head * CELL]) for head in range(4)]
    alarm = tuple(bytes.fromhex(ALARM_COLOR[1:]))
    assert [corner == alarm for corner in corners] == [False, False, True, True], "the query heads of KV head 1"
    line = repr(record)
    assert line.startswith(
        f"<RunRecord {tmp_path}/my run.sqlite: SyntheticLM, 12 heads in 3 of 3 layers, 20 samples at"
    )
    assert line.count("\n") == 0
    assert "\x1b" not in line
    record.path.unlink()
    assert "no such run record" in checked(record._repr_html_())


def test_monitor_and_sample_show_what_they_know() -> None:
    with AttentionMonitor(TinyGPT(), token_batch(), record=None) as monitor:
        assert "unknown: no sample taken yet" in checked(monitor._repr_html_())
        sample = monitor.sample(0)
        assert monitor.summary.num_samples == 1
        assert sample.state == monitor.state == "unknown"
        for html in (checked(monitor._repr_html_()), checked(sample._repr_html_())):
            assert "unknown: 8 heads in 2 layers watched over 1 sample" in html
            assert pixels(html).shape == (2 * CELL, 4 * CELL, 3)
        assert "no record" in monitor._repr_html_()
        assert "monitor.record_path" in sample._repr_html_()
        assert "failed: boom" in checked(replace(sample, verdict="", values={}, failure="boom")._repr_html_())
        for state, color in STATE_COLORS.items():
            assert color in replace(sample, state=state, verdict="whatever it says")._repr_html_()
        assert monitor.summary.num_samples == 1, "showing measures nothing"


def test_unmeasured_layers_are_hatched_in_their_place() -> None:
    heads = {"a": torch.tensor([1.0, 2.0]), "b": (), "c": torch.tensor([torch.nan, 4.0])}
    coverage = {name: LayerCoverage(name) for name in heads}
    picture = np.asarray(PIL.Image.open(io.BytesIO(heatmap_png(heads, "key_rank", [], coverage))))
    is_gray = (picture.max(-1) == picture.min(-1)) | (np.ptp(picture.astype(int), axis=-1) < 20)
    rows = [is_gray[at * CELL : at * CELL + CELL - 1] for at in range(3)]
    assert [bool(row[:, : CELL - 1].all()) for row in rows] == [False, True, True]
    assert [bool(row[:, CELL:-1].all()) for row in rows] == [False, True, False]


def test_many_heads_are_small() -> None:
    sample = next(SyntheticRun(80, 64, 1).samples())
    assert len(sample._repr_html_()) < 120_000
