"""What the runs train on: Python's documentation and source, noise, random walks, drawn images; never a download."""

from __future__ import annotations

import argparse as _source_of_code
import functools
import pydoc_data.topics
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.detection.recording import Setting

Batch = Tensor | tuple[Tensor, Tensor]
"""(B, L + 1) characters, or (B, L, 16) patches with (B,) labels."""


@functools.cache
def texts(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return prose and program text as characters."""
    prose = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    code = Path(_source_of_code.__file__).read_text(encoding="utf-8")
    return tuple(torch.tensor([min(ord(c), vocabulary - 1) for c in text]) for text in (prose, code))


def batch_at(setting: Setting, step: int) -> Batch:
    """Return the batch of a step; it depends on seed and step only."""
    draw = torch.Generator().manual_seed(setting.seed * 100_003 + step)
    if setting.family == "vit":
        return _images(setting, draw)
    if setting.data != "text":
        shape, vocabulary = (setting.batch_size, setting.shape.length + 1), setting.shape.vocabulary
        drawn = torch.randint(vocabulary, shape, generator=draw)
        return drawn if setting.data == "noise" else (drawn % 5 - 2).cumsum(dim=1) % vocabulary
    prose, code = texts(setting.shape.vocabulary)
    is_new = setting.new_text_at is not None and step >= setting.new_text_at
    text = code if is_new else prose
    starts = torch.randint(len(text) - setting.shape.length - 1, (setting.batch_size,), generator=draw)
    return torch.stack([text[start : start + setting.shape.length + 1] for start in starts.tolist()])


def probe_of(setting: Setting) -> Tensor:
    """Return eight examples, the same for all settings of a shape."""
    apart = replace(setting, seed=-1, batch_size=4, new_text_at=None)
    batches = [batch_at(apart, index) for index in range(8)]
    return torch.cat([batch[0][:1] if isinstance(batch, tuple) else batch[:1, :-1] for batch in batches])


def _images(setting: Setting, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return striped images under noise as patches, and the class of their direction of stripes, or a class drawn."""
    side = round(setting.shape.length**0.5)
    labels = torch.randint(setting.shape.vocabulary, (setting.batch_size,), generator=draw)
    angle = labels[:, None, None] * torch.pi / setting.shape.vocabulary
    phase = 6.3 * torch.rand(setting.batch_size, 1, 1, generator=draw)
    down, right = torch.meshgrid(torch.arange(4.0 * side), torch.arange(4.0 * side), indexing="ij")
    stripes = (0.8 * (down * angle.cos() + right * angle.sin()) + phase).sin()
    images = stripes + 0.5 * torch.randn(stripes.shape, generator=draw)
    if setting.data == "noise":
        labels = torch.randint(setting.shape.vocabulary, (setting.batch_size,), generator=draw)
    return images.unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2).contiguous(), labels
