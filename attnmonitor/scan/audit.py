"""The audit of a checkpoint: load it, run some text through it once, and measure every attention head.

It is one measurement as a monitor takes it during training, so the numbers are those a monitor logs for the same
weights and tokens, under the same names. Queries and keys of one layer are in memory at a time. Logits over the
vocabulary are not needed; where the model allows it, they are computed for one position only.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnmonitor.measurement import Measurement
from attnmonitor.measurement.probe import Probe, default_forward
from attnmonitor.measurement.weights import WeightMeasurement
from attnmonitor.messages import whole_argument
from attnmonitor.metrics.catalog import DEFAULT_METRICS, WEIGHT_METRICS, check_metric_names
from attnmonitor.sample import LayerCoverage
from attnmonitor.scan.checkpoint import Checkpoint

__all__ = ["Progress", "Scan", "audit", "audit_all", "bundled_text", "scan"]

Progress = Callable[[str, float], None]
"""Called with the present activity and the fraction of it that is done."""


@dataclass(frozen=True, eq=False)
class Scan:
    """The result of an audit.

    Attributes:
        model: The model as the caller named it.
        length: Tokens in each sequence.
        num_sequences: Sequences measured; values are means over them.
        probe_fingerprint: 12 hex digits that identify the tokens.
        values: ``values[metric][layer]``: float32 ``(num_heads,)``, layers in forward order; measured layers only.
        coverage: How each attention layer was captured, or why it was not.
        without_projections: Layers whose weight metrics are NaN because W_Q and W_K were not found, and why.
        notes: What is to be said about the checkpoint's tensors: names that were mended, tensors that were not used.
        weight_notes: Layers whose weight metrics leave something out beside rotary embedding and biases, and what.
    """

    model: str
    length: int
    num_sequences: int
    probe_fingerprint: str
    values: Mapping[str, Mapping[str, Tensor]]
    coverage: Mapping[str, LayerCoverage]
    without_projections: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    weight_notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def not_measured(self) -> dict[str, str]:
        """Layers without values, and why."""
        return {name: layer.reason for name, layer in self.coverage.items() if not layer.measured}

    def heads(self, metric: str) -> Tensor:
        """Return the values of all heads of the model, layer after layer, without NaN: ``(num_heads,)``."""
        heads = torch.cat(list(self.values[metric].values()))
        return heads[~heads.isnan()]

    def summary(self) -> dict[str, dict[str, float]]:
        """Return minimum, median and maximum over all heads of the model, per metric."""
        found = {metric: self.heads(metric).double().numpy() for metric in self.values}
        return {
            metric: {
                "min": _seven_digits(heads.min()),
                "median": _seven_digits(np.median(heads)),
                "max": _seven_digits(heads.max()),
            }
            for metric, heads in found.items()
            if heads.size
        }

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain containers; a head without a value is None."""
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
            "weight_notes": dict(self.weight_notes),
            "notes": list(self.notes),
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
    progress: Progress = lambda activity, fraction: None,
) -> Scan:
    """Measure every attention head of a checkpoint on some text.

    Args:
        checkpoint: The model.
        text: Text to run through it; by default the English help texts that come with Python (which differ between
            versions of Python: compare numbers only where ``probe_fingerprint`` is the same).
        length: Tokens in each sequence, at least 2.
        batch: Maximum number of sequences; fewer where the text is shorter.
        metrics: Names from `attnmonitor.METRICS`; by default those of a monitor and those of the weights.
        progress: Called during the work.

    Raises:
        ValueError: The weights cannot be loaded, the model takes no text or has no attention that can be measured, or
            the text is shorter than ``length``. The message says what to do.
    """
    names = check_metric_names(metrics or DEFAULT_METRICS + WEIGHT_METRICS)
    num_tokens, num_sequences = whole_argument(length, least=2), whole_argument(batch, least=1)
    if num_tokens is None or num_sequences is None:
        raise ValueError(
            f"length={length!r}, batch={batch!r}: a sequence needs 2 tokens or more, a batch 1 sequence or more"
        )
    sequences = checkpoint.sequences(bundled_text() if text is None else text, num_tokens, num_sequences)
    progress("loading", 0.0)
    model = checkpoint.model
    inputs = {"input_ids": sequences.to(next(model.parameters()).device)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]

    def forward(model: nn.Module, tokens: Mapping[str, Tensor]) -> None:
        with _forward_progress(model, lambda fraction: progress("measuring", fraction)):
            _run(model, tokens)

    probe = Probe(model, inputs, forward=forward)
    of_weights = [name for name in names if name in WEIGHT_METRICS]
    of_probe = [name for name in names if name not in WEIGHT_METRICS]
    if "spectral_gap" in of_weights:  # the ratio of the learned rank to this one
        of_probe.append("energy_effective_rank")
    measured = Measurement(model, probe, check_metric_names(of_probe)).find_layers()
    shown = {name: layer for name, layer in measured.coverage.items() if layer.measured}
    if not shown:
        name, layer = next(iter(measured.coverage.items()))
        raise ValueError(f"model={checkpoint.name}: no attention layer could be measured; {name}: {layer.reason}")
    values = dict(measured.trusted_values())
    # Projections are found from position 0 alone, so a few tokens are enough.
    few = Probe(model, {name: tokens[:, :8] for name, tokens in inputs.items()}, forward=_run)
    weights = WeightMeasurement(model, few, shown, of_weights) if of_weights else None
    if weights is not None:
        values |= weights.take(values.get("energy_effective_rank"))
    return Scan(
        model=checkpoint.name,
        length=num_tokens,
        num_sequences=len(sequences),
        probe_fingerprint=probe.fingerprint,
        values={metric: values[metric] for metric in names},
        coverage=measured.coverage,
        without_projections={} if weights is None else weights.reasons,
        weight_notes={} if weights is None else weights.notes,
        notes=checkpoint.notes,
    )


def audit_all(
    models: Sequence[str | Path],
    *,
    lengths: Sequence[int] = (512,),
    progress: Callable[[str], AbstractContextManager[Progress]],
    text: str | None = None,
    batch: int = 4,
    metrics: Iterable[str] | None = None,
    **loading: Any,
) -> list[Scan]:
    """Load each model once and audit it at each length.

    Args:
        models: Checkpoints, as `Checkpoint` takes them.
        lengths: Tokens in each sequence.
        progress: Given a model's name, a context with the `Progress` of one audit.
        text: As in `audit`.
        batch: As in `audit`.
        metrics: As in `audit`.
        loading: Keywords of `Checkpoint`.
    """
    metrics = None if metrics is None else tuple(metrics)
    scans = []
    for model in models:
        checkpoint = Checkpoint(model, **loading)
        for length in lengths:
            with progress(Path(model).name) as report:
                scans.append(audit(checkpoint, text=text, length=length, batch=batch, metrics=metrics, progress=report))
    return scans


def bundled_text() -> str:
    """Return the English text that Python ships: the help topics of ``pydoc``, half a million characters."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def _run(model: Any, tokens: Mapping[str, Tensor]) -> None:
    can_skip_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
    default_forward(model, {**tokens, "logits_to_keep": 1} if can_skip_logits else tokens)


@contextmanager
def _forward_progress(model: nn.Module, progress: Callable[[float], None]) -> Iterator[None]:
    """Report the progress of a forward: the share of modules without children that have run."""
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


def _seven_digits(value: float) -> float:
    # A float32 has no more.
    return float(f"{value:.7g}")


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else _seven_digits(value)
