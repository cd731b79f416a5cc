"""What is read of a layer while it runs: its values, its output and some of its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from attnmonitor.functional import attention_row_statistics
from attnmonitor.functional.checked_rows import CHECKED_STATISTICS, CheckedRows
from attnmonitor.functional.precision import full_precision
from attnmonitor.functional.values import Values
from attnmonitor.metrics.catalog import METRICS

__all__ = ["AttentionValues", "attention_values"]

_NEED_OUTPUT = ("output_rms", "output_share")
_UNKNOWN_PROJECTION = (
    "its output projection is not known, so output_share is not: no weight that can be read is applied to its output "
    "as it is"
)
_OTHER_OUTPUT = (
    "the input of its output projection is not its output as at attach, or what it writes is zero or not finite"
)
_UNKNOWN_OUTPUT = "its output by head is not known: dropout acts on its weights, or its layout could not be read"


@dataclass(eq=False)
class AttentionValues:
    """Values of one layer by metric.

    Attributes:
        values: ``(B, H)`` float32, query heads in the model's order.
        counted: For some metrics, the sequences that have a value, ``(B, H)`` bool; all have one of the others.
        reason: Why metrics of the values or of the output are NaN; ``""`` where they are not.
        has_written: Whether what the heads write is known; it is not before the output projection has run.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    counted: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""
    has_written: bool = False

    def why_unknown(self, share: Tensor | None) -> str:
        """Why metrics of the values or of the output are NaN; ``""`` where they are not.

        Args:
            share: `output_share` as it is shown, ``(Hq,)``; None where it is not measured.
        """
        if self.reason or share is None or not bool(share.isnan().all()):
            return self.reason
        return _OTHER_OUTPUT if self.has_written else _UNKNOWN_PROJECTION


def attention_values(call: AttentionCall, metrics: Sequence[str]) -> AttentionValues:
    """Compute the metrics whose summary is read while the layer runs; the others are left out."""
    by_summary = {
        summary: [name for name in metrics if METRICS[name].summary == summary]
        for summary in ("values", "checked_rows", "rows")
    }
    found = AttentionValues()
    if by_summary["values"]:
        _add_values(found, call, by_summary["values"])
    if by_summary["checked_rows"]:
        with full_precision(call.query.device):
            _add_checked_rows(found, call, by_summary["checked_rows"])
    if by_summary["rows"]:
        found.values |= attention_row_statistics(
            call.logit_rows,
            call.query.shape[2],
            query_mask=call.query_mask,
            key_mask=call.key_mask,
            metrics=by_summary["rows"],
            device=call.query.device,
        )
    return found


def _add_values(found: AttentionValues, call: AttentionCall, metrics: Sequence[str]) -> None:
    num_kv_heads, value = call.key.shape[1], call.value
    found.reason = _unknown_values(call)
    if value is None or found.reason:
        nothing = torch.full((len(call.key), num_kv_heads), torch.nan, device=call.key.device)
        found.values |= dict.fromkeys(metrics, nothing)
        return
    values = Values(value, call.key_mask, num_kv_heads, call.tiled)
    found.values |= {name: METRICS[name].formula(values) for name in metrics}


def _unknown_values(call: AttentionCall) -> str:
    if call.value is None:
        if call.how == "explicit":
            return "its values are not known: capture(..., value=..., output=...) registers them"
        return "its values could not be read from the product with its attention weights"
    num_values, num_kv_heads = call.value.shape[1], call.key.shape[1]
    if call.value.shape[2] != call.key.shape[2] or max(num_values, num_kv_heads) % min(num_values, num_kv_heads):
        return f"its values {tuple(call.value.shape)} do not fit its keys {tuple(call.key.shape)}"
    return ""


def _add_checked_rows(found: AttentionValues, call: AttentionCall, metrics: Sequence[str]) -> None:
    rows = CheckedRows(
        call.rows.logits,
        call.rows.seen,
        call.rows.output,
        None if call.query_mask is None else call.query_mask[:, call.rows.rows],
        call.key_mask,
    )
    for name in metrics:
        if name in _NEED_OUTPUT and (rows.output is None or name == "output_share"):
            found.values[name] = torch.full(call.query.shape[:2], torch.nan, device=call.query.device)
        else:
            found.values[name] = CHECKED_STATISTICS[name](rows)
        found.counted[name] = CHECKED_STATISTICS[name].counted(rows)
    if rows.output is None and not set(_NEED_OUTPUT).isdisjoint(metrics):
        found.reason = found.reason or _UNKNOWN_OUTPUT
    elif "output_share" in metrics:
        call.when_written.append(partial(_add_written, found, replace(rows, output=None)))


def _add_written(found: AttentionValues, rows: CheckedRows, written: Tensor | None) -> None:
    """Add the share of each head in what the layer writes; NaN while only a part of that is known."""
    share = CHECKED_STATISTICS["output_share"]
    unknown = torch.full_like(found.values["output_share"], torch.nan)
    found.values["output_share"] = unknown if written is None else share(replace(rows, output=written))
    found.has_written = written is not None
