"""Queries, keys and scale of every attention layer in float64, from the model's own attention weights, without capture.

A model's attention weights A determine its logits up to a constant per row. So among the operands of all batched
matrix products of one float64 forward (as ATen sees them), the queries and keys of a layer are the pair whose product
equals log A up to such constants and one factor per head, the scale. Names, order and torch functions are not used: a
wrong pair leaves a large residual. Where a model does not return its weights, they are the results of its softmaxes at
that level. What is compared with the monitor is computed from these q, k and scale.

Other terms on the logits: masks and sinks only remove entries or a constant; a bias that depends on positions alone
cancels in the difference of two sequences; a soft-cap is undone by fitting the scale inside it.

Letters: B sequences, H query heads (keys still repeated where the model does so), Lq and Lk positions, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from attnmonitor import AttentionMonitor, LayerCoverage
from attnmonitor.functional.summaries import FROM_ATTENTION
from attnmonitor.metrics.catalog import METRICS
from benchmarks.pages.handwritten_models import BATCH
from benchmarks.pages.third_party_models import Architecture, other_architectures

LayerStatistics = Callable[[Tensor, Tensor, float, Tensor, Tensor], Mapping[str, Tensor]]
"""From query, key, scale, valid queries and valid keys of a layer to metrics, ``(B, H)`` each."""

NEGLIGIBLE = 1e-12
"""Weights below this belong to hidden keys, or are too small for an accurate logarithm."""

SINGLE_PRECISION_ONLY = {"gpt2 upcast"}
"""Cannot run in float64: its upcast is a cast to float32."""

OWN_LOGITS = {("falcon alibi", "sdpa")}
"""Cases in which the library's logits differ from those of its eager code: they are compared with their own weights."""

UNPADDED = {"nn.Transformer"}
"""Its weights do not show which of its two sequences they belong to, and only one of these can be padded."""

TWINS = {"x-transformers flash": "x-transformers", "x-transformers grouped flash": "x-transformers grouped"}
"""Rows that always use a fused kernel, and the row with the same weights that does not."""


@dataclass(frozen=True)
class Explained:
    """The queries, keys and scale that give a layer's attention weights.

    Attributes:
        query: ``(B, H, Lq, d)`` float64.
        key: ``(B, H, Lk, d)`` float64.
        scale: ``(H,)``, the factor on ``q kᵀ``, by least squares.
        query_valid: ``(B, Lq)`` bool, True where the position is not padding.
        key_valid: ``(B, Lk)`` bool, the same for keys.
    """

    query: Tensor
    key: Tensor
    scale: Tensor
    query_valid: Tensor
    key_valid: Tensor


# One forward, with every product and softmax recorded.


class _Products(TorchDispatchMode):
    """Records the operands of every batched matrix product, and the result and axis of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []
        self.softmaxes: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in ("bmm", "baddbmm"):
            left, right = args[-2:]
            self.operands.append((left.double(), right.double()))
        elif name == "_softmax":
            self.softmaxes.append((output.double(), args[1] if len(args) > 1 else kwargs["dim"]))
        return output


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `scaled_dot_product_attention` as its documentation writes it."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    logits = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1).nan_to_num() @ value


@contextmanager
def _recorded_products() -> Iterator[_Products]:
    """Record the products of forwards in float64, without fused kernels and fast paths."""
    fused, fast_path = nn.functional.scaled_dot_product_attention, torch.backends.mha.get_fastpath_enabled()
    dtype = torch.get_default_dtype()
    nn.functional.scaled_dot_product_attention = plain_attention
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.compiler.set_stance("force_eager")
    try:
        with torch.no_grad(), _Products() as products:
            yield products
    finally:
        torch.compiler.set_stance("default")
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        nn.functional.scaled_dot_product_attention = fused


@cache
def explained(architecture: Architecture, implementation: str = "eager") -> dict[str, list[Explained]]:
    """Return the attention layers in the order in which they ran; those of an encoder-decoder by kind."""
    model, inputs = prepared(architecture, implementation)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product does not accept float64
    if architecture.name not in SINGLE_PRECISION_ONLY:
        model = model.double()
        inputs = {
            name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()
        }
    returns_weights = architecture.library == "transformers" and implementation == "eager"
    with _recorded_products() as products:
        output = model(**inputs, **({"output_attentions": True} if returns_weights else {}))
    weights = _returned(output) if returns_weights else {"": [_keys_last(*each) for each in products.softmaxes]}
    cap = getattr(getattr(model, "config", None), "attn_logit_softcapping", None)
    found: dict[str, list[Explained]] = {}
    for kind, layers in weights.items():
        for each in layers:
            valid = _valid(inputs, kind, each.shape)
            found.setdefault(kind, []).append(
                explain(each, products.operands, valid, cap, biased="bias" in architecture.outside)
            )
    return found


def prepared(architecture: Architecture, implementation: str) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model and its inputs, changed where the independent computation needs it."""
    model, inputs = architecture.build(implementation), architecture.inputs(architecture.name not in UNPADDED)
    if architecture.name == "deberta_v2":
        # Its bias is a product of queries and keys, which no difference removes: its position terms are set to zero.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "rel_embeddings" in name or "encoder.LayerNorm" in name or name.endswith("query_proj.bias"):
                    parameter.zero_()
    return model, inputs


def _returned(output: Any) -> dict[str, list[Tensor]]:
    """Return the attention weights of a transformers model by kind, ``(B, H, Lq, Lk)`` each."""
    if output.get("encoder_attentions") is None:
        return {"": [each.double() for each in output.attentions]}
    return {kind: [each.double() for each in output[f"{kind}_attentions"]] for kind in ("encoder", "decoder", "cross")}


def _keys_last(weights: Tensor, key_axis: int) -> Tensor:
    """Return the result of a softmax in any layout as ``(B, H, Lq, Lk)``."""
    weights = weights.movedim(key_axis, -1)
    if weights.dim() == 3:
        return weights.unflatten(0, (BATCH, -1))
    # These models have more positions than heads and than sequences.
    return weights.movedim(weights.shape[:-1].index(max(weights.shape[:-1])), -2)


def _valid(inputs: dict[str, Any], kind: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return which query and key positions are not padding, ``(B, Lq)`` and ``(B, Lk)`` bool."""
    num_sequences, _, num_rows, num_keys = shape
    query_valid, key_valid = (torch.ones(num_sequences, length, dtype=torch.bool) for length in (num_rows, num_keys))
    tokens = ~inputs["padding"] if "padding" in inputs else inputs.get("attention_mask")
    if tokens is not None and kind != "decoder":
        key_valid[:, : tokens.shape[1]] = tokens.bool()  # the model may append a key
        if kind != "cross":
            query_valid[:] = tokens.bool()
    return query_valid, key_valid


# The product that gives the weights.


def explain(
    weights: Tensor,
    operands: list[tuple[Tensor, Tensor]],
    valid: tuple[Tensor, Tensor],
    cap: float | None,
    *,
    biased: bool,
) -> Explained:
    """Return the one pair of operands that gives ``weights``."""
    num_sequences, num_heads, num_rows, num_keys = weights.shape
    query_valid, key_valid = valid
    seen = (weights > NEGLIGIBLE) & query_valid[:, None, :, None] & key_valid[:, None, None, :]
    found = []
    for left, right in [*operands, *((right.mT, left.mT) for left, right in operands)]:
        if left.shape[:2] == (num_sequences * num_heads, num_rows) and right.shape[2] == num_keys:
            query, key = (x.unflatten(0, (num_sequences, num_heads)) for x in (left, right.mT))
            scale, residual = _fit_scale(weights.log(), query @ key.mT, seen, cap, biased)
            found.append((residual, Explained(query, key, scale, query_valid, key_valid)))
    found.sort(key=lambda each: each[0])
    residuals = [residual for residual, _ in found]
    assert residuals[0] < 1e-6, residuals
    assert all(residual > 0.1 for residual in residuals[1:]), "a second product gives these weights too"
    return found[0][1]


def _fit_scale(
    log_weights: Tensor, product: Tensor, seen: Tensor, cap: float | None, biased: bool
) -> tuple[Tensor, float]:
    """Return each head's scale, so that ``cap · tanh(scale · product / cap)`` fits best, and the relative residual."""
    if biased:
        log_weights, seen = log_weights - log_weights.roll(1, 0), seen & seen.roll(1, 0)
    wanted = _row_centered(log_weights, seen)

    def logits_at(scale: Tensor) -> Tensor:
        logits = scale * product if cap is None else cap * torch.tanh(scale * product / cap)
        return _row_centered(logits - logits.roll(1, 0) if biased else logits, seen)

    scale = torch.zeros(product.shape[1], 1, 1, dtype=torch.float64)
    for _ in range(1 if cap is None else 20):  # Gauss-Newton; one step is exact without a soft-cap
        logits, slope = torch.func.jvp(logits_at, (scale,), (torch.ones_like(scale),))
        step = (slope * (wanted - logits)).sum((0, 2, 3)) / slope.square().sum((0, 2, 3))
        scale = scale + step[:, None, None]
    return scale.flatten(), float((wanted - logits_at(scale)).norm() / wanted.norm())


def _row_centered(x: Tensor, seen: Tensor) -> Tensor:
    """Subtract the mean over the visible entries of each row; 0 elsewhere."""
    x = x.masked_fill(~seen, 0.0)
    return (x - x.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~seen, 0.0)


# The comparison.


def deviations(architecture: Architecture, implementation: str, statistics: LayerStatistics) -> dict[str, float]:
    """Measure a model in float32 as a user does, and compare with the independent q, k and scale in float64.

    Args:
        architecture: What is built and measured.
        implementation: Its attention implementation.
        statistics: Computes the metrics of the independent q, k and scale.

    Returns:
        Worst relative deviation over all layers and heads of ``"scale"`` and of every default metric of q and k.
    """
    model, inputs = prepared(architecture, implementation)
    with AttentionMonitor(
        model, inputs, forward=lambda model, inputs: model(**inputs), record=None, alerts=False
    ) as monitor:
        sample = monitor.sample(0)
    twin = next((each for each in other_architectures() if each.name == TWINS.get(architecture.name)), architecture)
    layers = explained(twin, implementation if (architecture.name, implementation) in OWN_LOGITS else "eager")
    in_order = {kind: iter(each) for kind, each in layers.items()}
    of_field = [name for name in sample.values if METRICS[name].summary not in FROM_ATTENTION]
    worst = dict.fromkeys(("scale", *of_field), 0.0)
    for name, coverage in sample.coverage.items():
        kind = "cross" if coverage.kind == "cross" else "decoder" if "decoder" in name else "encoder"
        layer = next(in_order[kind if kind in in_order else ""])
        if layer.scale.std() < 1e-6:  # otherwise the queries are multiplied by it below
            worst["scale"] = max(worst["scale"], float(abs(coverage.scale / layer.scale - 1).max()))
        for metric, expected in _expected(layer, coverage, statistics).items():
            actual = sample.values[metric][name].double()
            actual = actual * coverage.scale if metric == "query_rms" else actual
            worst[metric] = max(worst[metric], float((actual / expected - 1).abs().max()))
    return worst


def _expected(layer: Explained, coverage: LayerCoverage, statistics: LayerStatistics) -> dict[str, Tensor]:
    """Return the metrics of ``scale · q`` and k, ``(H,)`` or ``(num_kv_heads,)``, mean over sequences."""
    query = layer.query * layer.scale[:, None, None]
    key = layer.key.masked_fill(~layer.key_valid[:, None, :, None], 0.0)
    shared = [coverage.query_heads_of(kv_head) for kv_head in range(coverage.num_kv_heads)]
    assert all((key[:, heads] == key[:, heads[:1]]).all() for heads in shared), "these heads do not share their keys"
    firsts = [heads[0] for heads in shared]
    assert len(key[0, firsts].unique(dim=0)) == len(shared), "a key head is counted more than once"
    by_query_head = statistics(query, key, 1.0, layer.query_valid, layer.key_valid)
    return {
        name: value.mean(0)[firsts] if METRICS[name].scope == "kv_head" else value.mean(0)
        for name, value in by_query_head.items()
    }
