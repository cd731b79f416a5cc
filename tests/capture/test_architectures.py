"""Every architecture, tiny and random: captured q, k and scale match its own attention weights; no layer is missed."""

from __future__ import annotations

import pytest
import torch
from reference import FIELD_METRICS, layer_statistics
from torch import Tensor

from attnmonitor.capture import AttentionCall
from benchmarks.pages.independent import OWN_LOGITS, deviations, explain, explained
from benchmarks.pages.third_party_models import (
    Architecture,
    captured,
    hugging_face_architectures,
    other_architectures,
    transformers_difference,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

CASES = [
    pytest.param(architecture, implementation, id=f"{architecture.name}-{implementation}")
    for architecture in (*hugging_face_architectures(), *other_architectures())
    for implementation in architecture.implementations
]


def built(architecture: Architecture, implementation: str) -> torch.nn.Module:
    """The model, or a skip with the library's own reason why it does not exist."""
    if architecture.missing:
        pytest.skip(architecture.missing)
    if reason := transformers_difference(architecture.name, implementation):
        pytest.skip(f"transformers 4: {reason}")
    try:
        model = architecture.build(implementation)
        torch.compiler.set_stance("force_eager")
        with torch.no_grad():
            model(**architecture.inputs(True))
    except (ValueError, IndexError) as refusal:
        if "support" in str(refusal) or "sinks cannot be run on CPU" in str(refusal) or architecture.name == "t5":
            pytest.skip(f"{architecture.library}: {str(refusal)[:80]}")
        raise
    finally:
        torch.compiler.set_stance("default")
    return model


@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_every_layer_is_captured_named_and_rebuilt(architecture: Architecture, implementation: str) -> None:
    model = built(architecture, implementation)
    for padded in (False, True):
        result = captured(model, **architecture.inputs(padded))
        assert len(result.calls) == architecture.num_layers
        assert result.missed == {}
        assert len({call.layer for call in result.calls}) == architecture.num_layers
        assert sum(call.kind == "cross" for call in result.calls) == architecture.num_cross
        assert set().union(*(call.outside for call in result.calls)) == architecture.outside
        names = {name for name, _ in model.named_modules()} | {type(model).__name__}
        for call in result.calls:
            assert call.layer.partition("#")[0] in names
            assert call.error is not None
            assert call.error < 2e-6, call.layer
            assert call.query.shape[1] % call.key.shape[1] == 0
            assert_written_by_values(call)


def assert_written_by_values(call: AttentionCall) -> None:
    """What the heads write is attention to their values, by head, without what the code does between."""
    assert call.value is not None, call.layer
    assert call.rows.output is not None, call.layer
    num_heads, num_values = call.query.shape[1], call.value.shape[1]
    assert num_values in (call.key.shape[1], num_heads), call.layer
    copies = num_heads // num_values
    value = call.value.repeat(1, copies, 1, 1) if call.tiled else call.value.repeat_interleave(copies, 1)
    written = call.logit_rows(call.rows.rows).softmax(-1) @ value.float()
    error = (written - call.rows.output.float()).abs().amax((-2, -1)) / written.abs().amax((-2, -1))
    assert "sinks" in call.outside or not (error > 1e-4).any(), call.layer


@pytest.mark.parametrize(("architecture", "implementation"), CASES)
def test_scale_and_metrics_match_the_attention_weights(architecture: Architecture, implementation: str) -> None:
    built(architecture, implementation)
    worst = deviations(architecture, implementation, layer_statistics)
    assert set(worst) == {"scale", *FIELD_METRICS}
    for metric, deviation in worst.items():
        assert deviation <= (0 if metric in ("energy_effective_rank", "key_rank") else 1e-5), metric


def test_explanation_fails_for_foreign_weights() -> None:
    """A product of this model does not explain the weights of another one, and a wrong scale or key is found."""
    (llama, other) = (each for each in hugging_face_architectures() if each.name in ("llama", "olmo2"))
    (layer, _) = explained(llama)[""]
    (stranger, _) = explained(other)[""]
    valid = layer.query_valid, layer.key_valid
    weights = (layer.scale[:, None, None] * layer.query @ layer.key.mT).softmax(-1)
    own, foreign = ((each.query.flatten(0, 1), each.key.flatten(0, 1).mT) for each in (layer, stranger))
    again = explain(weights, [foreign, own], valid, None, biased=False)
    assert torch.equal(again.key, layer.key)
    assert torch.allclose(again.scale, layer.scale, rtol=1e-9)
    with pytest.raises(AssertionError):
        explain(weights, [foreign], valid, None, biased=False)


@pytest.mark.parametrize(
    ("architecture", "implementation"), [case for case in CASES if case.values[0].library == "transformers"]
)
def test_captured_logits_explain_the_eager_attention_weights(architecture: Architecture, implementation: str) -> None:
    if (architecture.name, implementation) in OWN_LOGITS:
        pytest.skip("the library's eager logits differ from this implementation's; its own output verifies it")
    calls = captured(built(architecture, implementation), **architecture.inputs(True)).calls
    for call, weights in zip(calls, eager_weights(architecture, calls), strict=True):
        _compare_with_weights(call, weights)


def _compare_with_weights(call, weights: Tensor) -> None:
    """Compare with the eager layer's ``weights`` (B, Hq, Lq, Lk), padded queries left out."""
    num_rows, num_keys = weights.shape[-2:]
    valid = torch.ones(weights.shape[0], num_rows, dtype=torch.bool) if call.query_mask is None else call.query_mask
    rebuilt = call.logit_rows(torch.arange(num_rows)).double()
    weights = weights.double()
    compared = valid[:, None, :, None] & (weights > 1e-5)
    assert compared.any(-1).sum() == valid.sum() * weights.shape[1]
    expected = _centered(weights.log(), compared)
    assert torch.allclose(_centered(rebuilt, compared), expected, atol=2e-4)
    if not set(call.outside) & {"bias", "softcap"}:
        group = call.query.shape[1] // call.key.shape[1]
        key = call.key.double().repeat_interleave(group, dim=1)
        product = call.scale * call.query.double() @ key.transpose(-1, -2)
        assert product.shape[-1] == num_keys
        assert torch.allclose(_centered(product, compared), expected, atol=2e-4)


def _centered(x: Tensor, where: Tensor) -> Tensor:
    x = x.masked_fill(~where, 0.0)
    return (x - x.sum(-1, keepdim=True) / where.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~where, 0.0)


def eager_weights(architecture: Architecture, calls: list) -> list[Tensor]:
    """The attention weights that the eager model of the same weights returns, in the order of ``calls``."""
    with torch.no_grad():
        output = architecture.build("eager")(**architecture.inputs(True), output_attentions=True)
    if "cross_attentions" not in output or output.get("encoder_attentions") is None:
        return list(output.attentions)
    sources = {
        "encoder": iter(output.encoder_attentions),
        "decoder": iter(output.decoder_attentions),
        "cross": iter(output.cross_attentions),
    }
    return [
        next(sources["cross" if call.kind == "cross" else "decoder" if "decoder" in call.layer else "encoder"])
        for call in calls
    ]
