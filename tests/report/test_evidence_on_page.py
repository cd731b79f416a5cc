"""The evidence of alarms on the page and as a picture: complete, escaped, and found by the heads that it is about."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from attnmonitor.plots import evidence as evidence_figure
from attnmonitor.plots.style import pixels
from attnmonitor.record import RecordWriter, RunRecord
from attnmonitor.report import write_report
from attnmonitor.report.evidence import evidence_fragment, evidence_section
from attnmonitor.sample import HeadEvidence, LayerCoverage, Sample

pytest.importorskip("plotly")
Image = pytest.importorskip("PIL.Image")

HOSTILE = "<img src=x onerror=alert(1)>'\"\x1b"
COVERAGE = {"attn": LayerCoverage("attn", "sdpa", "self", 4, 2, 8, 0.35)}


def evidence_of(step: int = 100, **more: object) -> HeadEvidence:
    attention = torch.rand(8, 24, generator=torch.Generator().manual_seed(step))
    attention[3, 5] = torch.nan
    values = {
        "layer": "attn",
        "head": 1,
        "scope": "query_head",
        "global_step": step,
        "rule": "hot",
        "positions": [(0, 7, 0.9, 0.5, "$x$"), (1, 3, 0.2, float("nan"), "\u4e16\n"), (1, 4, 0.1, 0.1, None)],
        "attention": attention,
        "singular_values": torch.tensor([3.0, 2.0]),
        "rows": [(row // 4, row) for row in range(8)],
        "num_keys": 24,
    }
    return HeadEvidence(**{**values, **more})  # type: ignore[arg-type]


def record_of(folder: Path, *evidence: HeadEvidence, coverage: dict[str, LayerCoverage] | None = None) -> RunRecord:
    path = folder / "run.sqlite"
    with RecordWriter(path, run={"model": "GPT"}) as record:
        layers = COVERAGE if coverage is None else coverage
        values = {"key_rms": {name: torch.ones(2) for name in layers}}
        record.append(Sample(100, values, coverage=layers, evidence=list(evidence)))
    return RunRecord.open(path)


def test_picture_on_the_page_has_the_attention() -> None:
    html = evidence_fragment(evidence_of(), COVERAGE, opened=True)
    [text] = re.findall(r"data:image/png;base64,([^\"]+)", html)
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("P"))
    shade = evidence_of().attention.numpy()
    assert image.shape == (8, 24)
    assert image[3, 5] == 255
    known = np.isfinite(shade)
    assert np.abs(image[known] / 254 - np.sqrt(shade[known])).max() < 1 / 254


def test_each_alarm_is_found_by_the_heads_it_is_about(tmp_path: Path) -> None:
    healthy = evidence_of(50, rule=None)
    of_keys = evidence_of(100, scope="kv_head", head=1, rule="sink", group=2, healthy=healthy)
    record = record_of(tmp_path, evidence_of(99), replace(evidence_of(100), rule="hotter"), of_keys)
    html = evidence_section(record)
    heads = re.findall(r'data-layer="attn" data-query-head="([^"]*)" data-kv-head="([^"]*)"( open)?>', html)
    assert heads == [("1", "0", " open"), ("1", "0", ""), ("2 3", "1", " open")], "of each head the first alarm is open"
    assert "Before, healthy at step 50" in html
    page = write_report(record.path).read_text()
    assert html.split("</h3>")[1][:2000] in page


def test_record_without_evidence_has_no_such_part(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    assert evidence_section(record) == ""
    assert 'class="evidence"' not in write_report(record.path).read_text()


def test_hostile_layers_rules_and_tokens_are_text(tmp_path: Path) -> None:
    layer = HOSTILE[:-1]
    layers = {layer: LayerCoverage(layer, "sdpa", "self", 4, 2, 8, 0.35)}
    hostile = evidence_of(layer=layer, rule=HOSTILE, positions=[(0, 1, 0.5, 0.5, HOSTILE)])
    page = write_report(record_of(tmp_path, replace(hostile, healthy=hostile), coverage=layers).path).read_text()
    assert "<img src=x" not in page
    assert "\x1b" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page


@pytest.mark.parametrize(
    "head",
    [
        evidence_of(healthy=evidence_of(50)),
        evidence_of(positions=[], singular_values=torch.zeros(0)),
        evidence_of(attention=torch.zeros(0, 24), rows=[]),
        evidence_of(attention=torch.full((8, 24), torch.nan)),
        evidence_of(layer=HOSTILE + "a" * 100, rule=HOSTILE),
    ],
)
def test_every_evidence_can_be_drawn(head: HeadEvidence) -> None:
    drawn = pixels(evidence_figure(head))
    assert drawn.std() > 5
    assert "<details" in evidence_fragment(head, COVERAGE, opened=True)
    assert pixels(evidence_figure([head] * 9)).shape == drawn.shape, "each head once"


def test_picture_has_at_most_four_heads() -> None:
    one, many = (pixels(evidence_figure([evidence_of(head=h) for h in range(n)])) for n in (1, 9))
    assert many.shape[0] == 4 * one.shape[0]
    assert pixels(evidence_figure([])).shape == one.shape
