"""A scripted, traced, exported or quantized part of a model does not keep the rest from being measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor

X = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0))


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x).view(2, 12, 2, 8).transpose(1, 2)
        key = self.k(x).view(2, 12, 2, 8).transpose(1, 2)
        value = self.v(x).view(2, 12, 2, 8).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def scripted_and_frozen(part: nn.Module) -> nn.Module:
    return torch.jit.freeze(torch.jit.script(part.eval()))


KINDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "scripted": torch.jit.script,
    "frozen": scripted_and_frozen,
    "traced": lambda part: torch.jit.trace(part, X),
    "exported": lambda part: torch.export.export(part, (X,)).module(),
    "fx": torch.fx.symbolic_trace,
    "quantized": lambda part: torch.ao.quantization.quantize_dynamic(part, {nn.Linear}),
}


def model_with(part: nn.Module, kind: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its deprecations
        return nn.Sequential(
            nn.TransformerEncoderLayer(16, nhead=2, batch_first=True), nn.Sequential(KINDS[kind](part))
        )


def state_of(model: nn.Module) -> tuple[list[bool | None], list[Tensor]]:
    flags = [getattr(module, "training", None) for module in model.modules()]
    return flags, [buffer.clone() for buffer in model.buffers()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rest_of_the_model_is_measured(kind: str) -> None:
    part = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.BatchNorm1d(12))
    model = model_with(part, kind)
    flags, buffers = state_of(model)
    monitor = AttentionMonitor(
        model, X, metrics=["energy_rms", "interaction_effective_rank"], alerts=False, record=None, strict=True
    )
    sample = monitor.sample(0)
    assert list(monitor.coverage) == ["0.self_attn"]
    assert monitor.coverage["0.self_attn"].measured
    assert not sample.values["energy_rms"]["0.self_attn"].isnan().any()
    assert state_of(model)[0] == flags
    assert all(torch.equal(a, b) for a, b in zip(state_of(model)[1], buffers, strict=True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("scripted", "it is a scripted module"),
        ("traced", "it is a scripted module"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:attnmonitor. 1.0 is not measured")
def test_attention_inside_such_a_part_is_named(kind: str, reason: str) -> None:
    coverage = AttentionMonitor(model_with(PlainAttention(), kind), X, record=None).coverage
    assert coverage["0.self_attn"].measured
    assert reason in coverage["1.0"].reason


@pytest.mark.parametrize("kind", ["fx", "quantized", "exported"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_attention_in_graph_and_quantized_modules_is_measured(kind: str) -> None:
    coverage = AttentionMonitor(model_with(PlainAttention(), kind), X, record=None).coverage
    assert len(coverage) == 2
    assert all(layer.measured for layer in coverage.values())


def test_scripted_model_is_refused_with_the_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(PlainAttention())
    with pytest.raises(ValueError, match=r"no attention was seen.*it is a scripted module"):
        AttentionMonitor(model, X, record=None)
