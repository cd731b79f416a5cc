"""Numbers measured on a GPU, by every route, beside float64 on the CPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_runs import DEVICE, ForwardWithoutWaits
from models import TinyGPT, token_batch
from reference import layer_statistics
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from attnmonitor import DEFAULT_METRICS, AttentionMonitor
from attnmonitor.capture import capture_attention
from attnmonitor.functional import query_gram
from attnmonitor.measurement.quiet import quiet
from attnmonitor.metrics.statistics import LayerHeads, head_statistics

ON_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def decaying(batch: int, heads: int, length: int, head_dim: int, seed: int) -> Tensor:
    """Heads whose directions decay as trained ones do, float64 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    decay = torch.arange(1, head_dim + 1, dtype=torch.float64) ** -0.6
    return torch.randn(batch, heads, length, head_dim, dtype=torch.float64, generator=generator) * decay


@pytest.mark.parametrize("size", [8, 32, 64, 128])
@pytest.mark.parametrize("solve", ["eigh", "eigvalsh"])
def test_eigenproblems_on_device_equal_lapack(size: int, solve: str) -> None:
    """The solver of the installed torch, whichever library it calls: values, residuals and orthogonality."""
    matrices = (rows := decaying(1, 40, 2 * size, size, seed=size)[0]).mT @ rows
    matrices[3] = 0
    matrices[5] = torch.eye(size, dtype=torch.float64)
    expected = torch.linalg.eigvalsh(matrices)
    largest = expected.amax(-1).clamp_min(1e-300)
    if solve == "eigvalsh":
        found = torch.linalg.eigvalsh(matrices.to(DEVICE)).cpu()
    else:
        found, vectors = (each.cpu() for each in torch.linalg.eigh(matrices.to(DEVICE)))
        residual = (matrices @ vectors - vectors * found[:, None]).abs().amax((-1, -2))
        assert (residual <= 1e-12 * largest).all()
        assert (vectors.mT @ vectors - torch.eye(size, dtype=torch.float64)).abs().max() < 1e-12
    assert ((found - expected).abs().amax(-1) <= 1e-13 * size * largest).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("method", ["auto", "exact", "randomized"])
def test_every_metric_equals_float64_on_the_cpu(dtype: str, head_dim: int, method: Any) -> None:
    query = decaying(2, 4, 96, head_dim, seed=1).to(TYPES[dtype])
    key = (decaying(2, 2, 96, head_dim, seed=2) + 1).to(TYPES[dtype])
    mask = torch.arange(96) < torch.tensor([[96], [80]])
    heads = LayerHeads(query_gram(query.to(DEVICE), mask.to(DEVICE)), key.to(DEVICE), 0.3, mask.to(DEVICE))
    [found] = head_statistics([heads], DEFAULT_METRICS, method=method)
    assert_equal(found.values, layer_statistics(query, key, 0.3, mask, mask))


def assert_equal(found: Any, expected: dict[str, Tensor]) -> None:
    """Ranks are equal, the rest agrees to 1e-5."""
    assert set(expected) <= set(found)
    for name, wanted in expected.items():
        tolerance = 0 if name in ("energy_effective_rank", "key_rank") else 1e-5
        torch.testing.assert_close(
            found[name].cpu().double(), wanted, rtol=tolerance, atol=tolerance * 1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


class Flex(nn.Module):
    """Causal attention by FlexAttention."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        def causal(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(q >= k, score, -torch.inf)

        return flex_attention(query, key, value, score_mod=causal)


class Fused(nn.Module):
    """Causal attention by one backend of `scaled_dot_product_attention`."""

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class GivenProjections(nn.Module):
    """One layer of attention between linear maps."""

    def __init__(self, attend: nn.Module) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (each(x).unflatten(-1, (4, 16)).transpose(1, 2) for each in self.maps)
        return self.attend(query, key, value).transpose(1, 2).flatten(2)


ATTENTIONS = {
    "math": lambda: Fused(SDPBackend.MATH),
    "flash": lambda: Fused(SDPBackend.FLASH_ATTENTION),
    "flex": Flex,
    "memory-efficient": lambda: Fused(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": lambda: Fused(SDPBackend.CUDNN_ATTENTION),
}
ONLY_ON_GPU = ("memory-efficient", "cudnn")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "kernel", [pytest.param(name, marks=ON_GPU if name in ONLY_ON_GPU else ()) for name in ATTENTIONS]
)
def test_attention_kernel_is_measured_as_it_ran(kernel: str) -> None:
    """Verified by the layer's own output, and the numbers are those of the captured tensors in float64."""
    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    model = GivenProjections(ATTENTIONS[kernel]()).to(DEVICE, dtype).eval()
    probe = torch.randn(2, 40, 64).to(DEVICE, dtype)
    monitor = AttentionMonitor(model, probe, record=None, strict=True, forward=ForwardWithoutWaits())
    sample = monitor.sample(0)
    [(layer, coverage)] = sample.coverage.items()
    assert coverage.measured
    assert coverage.error is not None

    calls: list[Any] = []
    with quiet(model), capture_attention(model, calls.append):
        model(probe)
    expected = layer_statistics(calls[0].query.cpu(), calls[0].key.cpu(), calls[0].scale)
    found = {name: values[layer] for name, values in sample.values.items()}
    assert_equal(found, {name: values.mean(0) for name, values in expected.items()})


@pytest.mark.parametrize("kind", ["float32", "bfloat16 weights", "bfloat16 autocast", "float16 autocast", "compiled"])
def test_forward_of_a_sample_never_waits(kind: str) -> None:
    """With `torch.cuda.set_sync_debug_mode("error")` around it; and the sample has all its numbers."""
    torch._dynamo.reset()
    dtype = torch.bfloat16 if kind == "bfloat16 weights" else torch.float32
    model = TinyGPT(width=64, num_query_heads=4, num_kv_heads=2).to(DEVICE, dtype).eval()
    cast = {"bfloat16 autocast": torch.bfloat16, "float16 autocast": torch.float16}.get(kind)

    def call(model: nn.Module, batch: Tensor) -> object:
        with nullcontext() if cast is None else torch.autocast(DEVICE, cast):
            return model(batch)

    watched = torch.compile(model, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    forward = ForwardWithoutWaits(call)
    monitor = AttentionMonitor(
        watched if kind == "compiled" else model,
        token_batch().to(DEVICE),
        record=None,
        strict=True,
        forward=forward,
        metrics=[*DEFAULT_METRICS, "attention_entropy", "max_logit", "sink_mass"],
    )
    samples = [monitor.sample(step) for step in range(3)]
    assert forward.calls == 5  # two of them at attach
    for sample in samples:
        assert all(layer.measured for layer in sample.coverage.values())
        for layers in sample.values.values():
            assert all(values.isfinite().all() for values in layers.values())
    for layer, values in samples[0].values["energy_rms"].items():
        assert torch.equal(values, samples[-1].values["energy_rms"][layer]), "the same model, the same numbers"
