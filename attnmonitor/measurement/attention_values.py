"""What is kept of a layer's values and rows, and the metrics that are computed while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from attnmonitor.functional import attention_row_statistics
from attnmonitor.functional.row_statistics import CheckedRows, CheckedStatistic
from attnmonitor.functional.values import ValueMoments, Values
from attnmonitor.metrics.catalog import METRICS
from attnmonitor.parallel.workers import few_cores

__all__ = ["OTHER_OUTPUT", "UNKNOWN_PROJECTION", "kept_rows", "kept_values", "unknown_reason", "values_at_once"]

UNKNOWN_PROJECTION = (
    "its output projection is not known, so output_share is not: no weight that can be read is applied to its output "
    "as it is"
)
OTHER_OUTPUT = "the input of its output projection is not its output as at attach, or what it writes is not finite"


def values_at_once(call: AttentionCall, metrics: Sequence[str]) -> dict[str, Tensor]:
    """The metrics that need more rows of the logits than are kept, ``(B, Hq)`` float32 each."""
    by_rows = [name for name in metrics if METRICS[name].summary == "rows"]
    if not by_rows:
        return {}
    return attention_row_statistics(
        call.logit_rows,
        call.query.shape[2],
        query_mask=call.query_mask,
        key_mask=call.key_mask,
        metrics=by_rows,
        device=call.query.device,
    )


def kept_values(call: AttentionCall) -> Values | ValueMoments | None:
    """The moments of its values, or a copy of them on a GPU; None where they are not known."""
    if call.value is None or _unknown_values(call):
        return None
    values = Values(call.value, call.key_mask, call.key.shape[1], call.tiled)
    if call.value.device.type == "cpu":
        with few_cores(call.value.numel(), call.value.device):
            return values.moments()
    # A GPU computes those of all layers at the end: each launch counts. The model may overwrite the values until then.
    return replace(values, value=call.value.clone(memory_format=torch.contiguous_format))


def kept_rows(call: AttentionCall) -> CheckedRows:
    """The rows that verification rebuilt."""
    rows, mask = call.rows, call.query_mask
    query_mask = None if mask is None else mask.index_select(1, rows.rows)
    return CheckedRows(rows.logits, rows.hidden, rows.output, None, query_mask, call.key_mask)


def unknown_reason(call: AttentionCall, metrics: Sequence[str]) -> str:
    """Why metrics of its values or of its output are NaN; ``""`` where they are not."""
    if any(METRICS[name].summary == "values" for name in metrics) and (reason := _unknown_values(call)):
        return reason
    formulas = [METRICS[name].formula for name in metrics]
    if call.rows.output is None and any(
        isinstance(each, CheckedStatistic) and each.reads != "logits" for each in formulas
    ):
        return "its output by head is not known: dropout acts on its weights, or its layout could not be read"
    return ""


def _unknown_values(call: AttentionCall) -> str:
    if call.value is None:
        if call.how == "explicit":
            return "its values are not known: capture(..., value=..., output=...) registers them"
        return "its values could not be read from the product with its attention weights"
    num_values, num_kv_heads = call.value.shape[1], call.key.shape[1]
    if call.value.shape[2] != call.key.shape[2] or max(num_values, num_kv_heads) % min(num_values, num_kv_heads):
        return f"its values {tuple(call.value.shape)} do not fit its keys {tuple(call.key.shape)}"
    return ""
