"""The audit of a finished checkpoint: load it, run some text through it once, and say what each head does with it.

It is the measurement of a training run taken once, so the numbers are those a monitor logs for the same weights and
the same tokens, under the same names. One layer's queries and keys are in memory at a time, and logits over the
vocabulary, which nothing here reads, are made for one position only where the model can leave the others out.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnmonitor.measurement import Measurement
from attnmonitor.measurement.probe import Probe, default_forward
from attnmonitor.measurement.weights import LearnedSide
from attnmonitor.metrics.catalog import DEFAULT_METRICS, WEIGHT_METRICS, check_metric_names
from attnmonitor.sample import LayerCoverage
from attnmonitor.scan.checkpoint import Checkpoint

__all__ = ["Scan", "audit", "bundled_text", "scan"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction of it that is done."""


@dataclass(frozen=True, eq=False)
class Scan:
    """What an audit found.

    Attributes:
        model: The model as it was named.
        length: Tokens in each sequence.
        num_sequences: Sequences measured; values are means over them.
        probe_fingerprint: 12 hex digits that tell these tokens from others.
        values: ``values[metric][layer]``: float32 ``(num_heads,)``, layers in forward order; only layers measured.
        coverage: How each attention layer was captured, or why it has no values.
        without_projections: Layers whose weight metrics are NaN because W_Q and W_K were not found, and why.
    """

    model: str
    length: int
    num_sequences: int
    probe_fingerprint: str
    values: Mapping[str, Mapping[str, Tensor]]
    coverage: Mapping[str, LayerCoverage]
    without_projections: Mapping[str, str] = field(default_factory=dict)

    @property
    def not_measured(self) -> dict[str, str]:
        """Layers without values, and why."""
        return {name: layer.reason for name, layer in self.coverage.items() if not layer.measured}

    def heads(self, metric: str) -> Tensor:
        """All heads of the model, layer after layer, without those that have no number: ``(num_heads,)``."""
        heads = torch.cat(list(self.values[metric].values()))
        return heads[~heads.isnan()]

    def summary(self) -> dict[str, dict[str, float]]:
        """Return least, median and greatest value over all heads of the model, per metric."""
        found = {metric: self.heads(metric).double().numpy() for metric in self.values}
        return {
            metric: {"min": _short(heads.min()), "median": _short(np.median(heads)), "max": _short(heads.max())}
            for metric, heads in found.items()
            if heads.size
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain containers; a head without a number is None."""
        return {
            "model": self.model,
            "length": self.length,
            "sequences": self.num_sequences,
            "probe_fingerprint": self.probe_fingerprint,
            "layers": [
                {
                    "name": name,
                    **{metric: list(map(_or_none, self.values[metric][name].tolist())) for metric in self.values},
                }
                for name, layer in self.coverage.items()
                if layer.measured
            ],
            "not_measured": self.not_measured,
            "without_projections": dict(self.without_projections),
            "summary": self.summary(),
        }


def scan(
    model: str | Path,
    *,
    text: str | None = None,
    length: int = 512,
    batch: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    tokenizer: str | Path | None = None,
    metrics: Iterable[str] | None = None,
    trust_remote_code: bool = False,
) -> Scan:
    """Load a checkpoint and measure every attention head of it: `Checkpoint`, then `audit`."""
    checkpoint = Checkpoint(model, dtype=dtype, device=device, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    return audit(checkpoint, text=text, length=length, batch=batch, metrics=metrics)


def audit(
    checkpoint: Checkpoint,
    *,
    text: str | None = None,
    length: int = 512,
    batch: int = 4,
    metrics: Iterable[str] | None = None,
    progress: Progress = lambda doing, fraction: None,
) -> Scan:
    """Measure every attention head of a checkpoint on some text.

    Args:
        checkpoint: The model.
        text: What to run through it; by default the English help texts that come with Python (which differ between
            versions of Python: compare numbers by their ``probe_fingerprint``).
        length: Tokens in each sequence, at least 2.
        batch: Sequences at most; fewer where the text is shorter.
        metrics: Names out of `attnmonitor.METRICS`; by default all but those that need rows of the L×L matrix.
        progress: Told what is being done.

    Raises:
        ValueError: The weights cannot be loaded, the model takes no text or has no attention that can be measured, or
            the text is shorter than ``length``. The message names the thing and the way out.
    """
    names = check_metric_names(metrics or DEFAULT_METRICS + WEIGHT_METRICS)
    if length < 2 or batch < 1:
        raise ValueError(
            f"length={length}, batch={batch}: a sequence needs 2 tokens or more, a batch 1 sequence or more"
        )
    sequences = checkpoint.sequences(bundled_text() if text is None else text, length, batch)
    progress("loading", 0.0)
    model = checkpoint.model
    inputs = {"input_ids": sequences.to(next(model.parameters()).device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def forward(model: nn.Module, tokens: Mapping[str, Tensor]) -> None:
        with _counted(model, lambda fraction: progress("measuring", fraction)):
            _run(model, tokens)

    probe = Probe(model, inputs, forward=forward)
    # The energy rank comes along whatever is asked for: the learned rank is compared with it.
    from_text = dict.fromkeys([*(set(names) - set(WEIGHT_METRICS)), "energy_effective_rank"])
    measured = Measurement(model, probe, check_metric_names(from_text)).attach()
    shown = {name: layer for name, layer in measured.coverage.items() if layer.measured}
    if not shown:
        name, layer = next(iter(measured.coverage.items()))
        raise ValueError(f"model={checkpoint.name}: no attention layer could be measured; {name}: {layer.reason}")
    values = dict(measured.trusted_values())
    # Projections are told by position 0 alone, so a few tokens will do.
    few = Probe(model, {name: tokens[:, :8] for name, tokens in inputs.items()}, forward=_run)
    learned = LearnedSide(model, few, shown, WEIGHT_METRICS) if set(WEIGHT_METRICS) & set(names) else None
    if learned is not None:
        values |= learned.take(values["energy_effective_rank"])
    return Scan(
        model=checkpoint.name,
        length=length,
        num_sequences=len(sequences),
        probe_fingerprint=probe.fingerprint,
        values={metric: values[metric] for metric in names},
        coverage=measured.coverage,
        without_projections={} if learned is None else learned.reasons,
    )


def bundled_text() -> str:
    """Return the English prose that every Python brings: the help topics of ``pydoc``, half a million characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _run(model: Any, tokens: Mapping[str, Tensor]) -> None:
    can_skip_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    default_forward(model, {**tokens, "logits_to_keep": 1} if can_skip_logits else tokens)


@contextmanager
def _counted(model: nn.Module, progress: Callable[[float], None]) -> Iterator[None]:
    """Tell how far a forward is, by the modules without children that have run."""
    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    num_run = 0

    def count(*_: object) -> None:
        nonlocal num_run
        num_run += 1
        progress(min(1.0, num_run / len(leaves)))

    handles = [module.register_forward_hook(count) for module in leaves]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        progress(1.0)


def _short(value: float) -> float:
    # Seven digits are all a float32 has.
    return float(f"{value:.7g}")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else _short(value)
