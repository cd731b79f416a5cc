"""W_Q and W_K are found in every layout and agree with the layer's q and k; unmatched layers get a reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnmonitor import AttentionMonitor
from attnmonitor.capture.projections import HeadProjections, discover_projections
from benchmarks.pages.handwritten_models import HandWritten, by_matmul
from benchmarks.pages.third_party_models import (
    Architecture,
    captured,
    hugging_face_architectures,
    other_architectures,
    sharpen,
    transformers_difference,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
]

ARCHITECTURES = [
    pytest.param(architecture, id=architecture.name)
    for architecture in (*hugging_face_architectures(), *other_architectures())
]

# Normalized by a function, not by a module: the coordinates follow no single column, so there is no spectrum.
QK_NORMS = {"q_norm", "q_layernorm", "qk_norm", "q_a_layernorm"}
REFUSED = {"cosine with temperature per head", "x-transformers qk_norm"}


def discovered(model: nn.Module, **inputs: object) -> dict[str, HeadProjections | str]:
    layers = [call.layer for call in captured(model, **inputs).calls]
    return discover_projections(model, lambda: model(**inputs), layers)


def gain_of(norm: nn.Module) -> Tensor:
    (weight, *_) = norm.parameters()
    return 1 + weight if "Gemma" in type(norm).__name__ or getattr(norm, "unit_offset", False) else weight


class Inputs:
    """The input of each attention layer."""

    def __init__(self, model: nn.Module, layers: set[str]) -> None:
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        root = type(model).__name__
        for name, module in model.named_modules():
            if (name or root) in layers:
                module.register_forward_pre_hook(self._store(name or root), with_kwargs=True)

    def _store(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            source = kwargs.get("key_value_states", kwargs.get("key", args[1] if len(args) > 1 else hidden[0]))
            self.seen.setdefault(name, (hidden[0], source))

        return hook


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_projections_reproduce_the_captured_queries_and_keys(architecture: Architecture) -> None:
    """At position 0 the difference of two sequences' queries is W_Q times the difference of their inputs."""
    if architecture.missing:
        pytest.skip(architecture.missing)
    if architecture.name == "t5" and (reason := transformers_difference("t5", "eager")):
        pytest.skip(f"transformers 4: {reason}")
    model = architecture.build("eager")
    found = discovered(model, **architecture.inputs(False))
    if architecture.name in REFUSED:
        assert all(isinstance(reason, str) and "follow no column" in reason for reason in found.values())
        return
    assert not [reason for reason in found.values() if isinstance(reason, str)]
    inputs = Inputs(model, {name.partition("#")[0] for name in found})
    calls = captured(model, **architecture.inputs(False)).calls
    compared = 0
    for call in calls:
        layer = model.get_submodule(call.layer) if call.layer in dict(model.named_modules()) else None
        projections = found[call.layer]
        assert projections.w_q.shape[:2] == call.query.shape[1:4:2]
        key = call.key.repeat(1, call.query.shape[1] // call.key.shape[1], 1, 1) if call.tiled else call.key
        assert projections.w_k.shape[:2] == key.shape[1:4:2]
        # With QK-norm, q and k are not linear in the input; those layers are compared weight by weight below.
        normed_inside = layer is not None and QK_NORMS & {name for name, _ in layer.named_children()}
        if "#" in call.layer or normed_inside or call.layer not in inputs.seen:
            continue
        for weight, heads, hidden, gained in (
            (projections.w_q, call.query, inputs.seen[call.layer][0], True),
            (projections.w_k, key, inputs.seen[call.layer][call.kind == "cross"], call.kind == "self"),
        ):
            gain = gain_of(projections.norms[0]) if projections.norms and gained else torch.ones(())
            first = hidden[:, 0] if hidden.shape[0] == heads.shape[0] else hidden[0]
            change = (first[0] - first[1]) / gain
            actual = heads[0, :, 0] - heads[1, :, 0]
            rebuilt = torch.einsum("hdm,m->hd", weight, change)
            if "MultiheadAttention need_weights" in architecture.name:
                actual = actual * 8**0.5 if gained and heads is call.query else actual  # it scales q beforehand
            assert torch.allclose(rebuilt, actual, atol=1e-4 * float(actual.abs().max())), call.layer
            compared += int(change.abs().max() > 1e-3)
    assert compared > 0 or normed_inside


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gemma3", "olmo2", "phi", "opt", "whisper", "llama4", "gpt_oss"]
)
def test_separate_projections_equal_the_weights_up_to_a_gain(name: str) -> None:
    (architecture,) = (each for each in hugging_face_architectures() if each.name == name)
    model = architecture.build("eager")
    for layer, projections in discovered(model, **architecture.inputs(False)).items():
        module = model.get_submodule(layer)
        folded = gain_of(projections.norms[0]) if projections.norms else torch.ones(32)
        for found, proj, is_key in ((projections.w_q, module.q_proj, False), (projections.w_k, module.k_proj, True)):
            gained = 1.0 if is_key and "encoder_attn" in layer else folded
            own = f"{'k' if is_key else 'q'}_norm", f"{'k' if is_key else 'q'}_layernorm"
            head_norms = [getattr(module, each) for each in own if hasattr(module, each)]
            head_gain = gain_of(head_norms[0]) if head_norms else torch.ones(1)
            head_gain = head_gain.repeat(len(proj.weight) // len(head_gain))
            expected = (head_gain[:, None] * proj.weight * gained).reshape(found.shape)
            assert projections.note == ""
            ratio = (found / expected).median()
            assert torch.allclose(found, expected * ratio, atol=1e-4)
            assert 0.1 < ratio < 2.0


def test_low_rank_projections_are_composed_through_their_norms() -> None:
    (architecture,) = (each for each in hugging_face_architectures() if each.name == "deepseek_v3")
    model = architecture.build("eager")
    for layer, projections in discovered(model, **architecture.inputs(False)).items():
        attention = model.get_submodule(layer)
        gain = model.get_submodule(layer.rpartition(".")[0]).input_layernorm.weight
        query = attention.q_b_proj.weight * attention.q_a_layernorm.weight @ (attention.q_a_proj.weight * gain)
        # Interleaved rotary embeddings reorder the last coordinates of a head; which ones they are does not change.
        plain, turned = projections.w_q.split([8, 4], 1)
        expected, expected_turned = query.unflatten(0, (4, 12)).split([8, 4], 1)
        assert torch.allclose(plain, expected, atol=1e-4)
        assert torch.allclose(turned.sort(1).values, expected_turned.sort(1).values, atol=1e-4)
        latent, rotary = (attention.kv_a_proj_with_mqa.weight * gain).split([16, 4])
        key = (attention.kv_b_proj.weight * attention.kv_a_layernorm.weight @ latent).unflatten(0, (4, 16))[:, :8]
        assert torch.allclose(projections.w_k[:, :8], key, atol=1e-4)
        assert torch.allclose(projections.w_k[0, 8:].sort(0).values, rotary.sort(0).values, atol=1e-4)


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(32, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


def hidden() -> Tensor:
    return torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))


def test_adapter_is_part_of_the_projection() -> None:
    model = HandWritten(by_matmul)
    model.qkv = Adapted(model.qkv)
    (found,) = discovered(sharpen(model), x=hidden()).values()
    whole = model.qkv.base.weight + 0.5 * model.qkv.up.weight @ model.qkv.down.weight
    assert torch.allclose(found.w_q.flatten(0, 1), whole[:32], atol=1e-4)
    assert torch.allclose(found.w_k.flatten(0, 1), whole[32:64], atol=1e-4)


def test_projections_follow_the_weights_also_in_bfloat16() -> None:
    model = sharpen(HandWritten(by_matmul)).to(torch.bfloat16)
    (found,) = discovered(model, x=hidden().to(torch.bfloat16)).values()
    for _ in range(2):
        assert torch.allclose(found.w_q.flatten(0, 1), model.qkv.weight[:32].float(), atol=2e-2)
        with torch.no_grad():
            model.qkv.weight.mul_(-2)


def test_discovery_changes_nothing_of_the_model() -> None:
    (architecture,) = (each for each in hugging_face_architectures() if each.name == "llama")
    model = architecture.build("sdpa")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    random_state = torch.get_rng_state()
    discovered(model, **architecture.inputs(True))
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_unknown_layer_gets_a_reason() -> None:
    model = HandWritten(by_matmul)
    found = discover_projections(model, lambda: model(hidden()), ["nowhere", "HandWritten"])
    assert found["nowhere"] == "no attention of this name was captured"
    assert isinstance(found["HandWritten"], HeadProjections)


class NormedHeads(nn.Module):
    """Attention whose queries and keys go through norms: of each head, or of all heads as one vector."""

    def __init__(self, norm: Callable[[int], nn.Module], *, whole: bool = False, shuffled: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = (norm(32 if whole else 8) for _ in range(2))
        self.whole, self.shuffled = whole, shuffled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.normed(self.q_norm, self.q_proj(x)), self.normed(self.k_norm, self.k_proj(x)), self.v_proj(x)
        q, k, v = (each.unflatten(-1, (4, 8)).transpose(1, 2) for each in (q, k, v))
        if self.shuffled:  # as a rotary embedding that stores the even coordinates first
            q, k = (torch.cat([each[..., ::2], each[..., 1::2]], -1) for each in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.whole else norm(x.unflatten(-1, (4, 8))).flatten(-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_gain_of_a_norm_on_the_heads_is_multiplied_in(
    norm: Callable[[int], nn.Module], whole: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model, x = NormedHeads(norm, whole=whole).to(dtype), torch.randn(4, 8, 32, dtype=dtype)
    found = discovered(model, x=x)["NormedHeads"]
    assert isinstance(found, HeadProjections)
    assert found.note == ""
    for smallest in (-1, 0.5):  # read anew when training has moved the gains
        with torch.no_grad():
            for each in (model.q_norm, model.k_norm):
                each.weight.copy_(torch.logspace(0, smallest, len(each.weight)))
        for weight, projection, each in (
            (found.w_q, model.q_proj, model.q_norm),
            (found.w_k, model.k_proj, model.k_norm),
        ):
            gain = each.weight.float().repeat(32 // len(each.weight))
            expected = (projection.weight.float() * gain[:, None]).unflatten(0, (4, 8))
            torch.testing.assert_close(weight, expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


def test_gain_that_cannot_be_followed_is_named() -> None:
    torch.manual_seed(0)
    model = NormedHeads(nn.RMSNorm, shuffled=True)
    found = discovered(model, x=torch.randn(4, 8, 32))["NormedHeads"]
    assert isinstance(found, HeadProjections)
    assert "gain of a norm between its projections and their product is left out" in found.note
    with AttentionMonitor(
        model, torch.randn(4, 8, 32), metrics=["interaction_effective_rank"], alerts=False, record=None
    ) as monitor:
        assert monitor.coverage["NormedHeads"].weights_note == found.note
        assert f"NormedHeads: {found.note}" in str(monitor)
