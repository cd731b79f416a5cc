"""Capture under compilation, checkpointing and autocast, by the explicit call and the transformers interface."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from attnmonitor.capture import AttentionCall, Layouts, capture, capture_attention
from attnmonitor.capture.verify import Attention
from benchmarks.cost.gpu.launches import CountLaunches
from benchmarks.pages.handwritten_models import BATCH, LENGTH, HandWritten, by_matmul
from benchmarks.pages.third_party_models import (
    captured,
    hugging_face_architectures,
    other_architectures,
    sharpen,
    transformers_difference,
)

ALL = [*hugging_face_architectures(), *other_architectures()]


def hidden() -> Tensor:
    return torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(0))


def stack() -> nn.Sequential:
    return sharpen(nn.Sequential(HandWritten(by_matmul), nn.Linear(32, 32), HandWritten(by_matmul)))


@contextmanager
def counted_graphs() -> Iterator[list[int]]:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, example_inputs: object) -> Callable[..., object]:
        graphs.append(1)
        return graph.forward

    torch._dynamo.reset()
    counted_graphs.backend = count
    yield graphs
    torch._dynamo.reset()


def compiled_whole(model: nn.Sequential, backend: object) -> nn.Module:
    return torch.compile(model, backend=backend)


def compiled_in_place(model: nn.Sequential, backend: object) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_submodule(model: nn.Sequential, backend: object) -> nn.Module:
    model[0] = torch.compile(model[0], backend=backend)
    return model


def compiled_regions(model: nn.Sequential, backend: object) -> nn.Module:
    for layer in model:
        layer.compile(backend=backend)
    return model


def compiled_forward(model: nn.Sequential, backend: object) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    "compile_it",
    [compiled_whole, compiled_in_place, compiled_submodule, compiled_regions, compiled_forward],
    ids=lambda compile_it: compile_it.__name__,
)
def test_a_probe_adds_no_graph_to_a_compiled_model(
    compile_it: Callable[[nn.Sequential, object], nn.Module],
) -> None:
    with counted_graphs() as graphs:
        model = compile_it(stack(), counted_graphs.backend)
        x = hidden()

        def train_step() -> None:
            model(x).sum().backward()

        train_step()
        after_first_step = len(graphs)
        assert after_first_step > 0
        for _ in range(3):
            result = captured(model, input=x)
            assert [call.layer for call in result.calls] == ["0", "2"]
            assert all(call.error < 1e-6 for call in result.calls)
            assert len(graphs) == after_first_step
            train_step()
        assert len(graphs) == after_first_step


class ExpAttention(nn.Module):
    """Attention by exp and sum, which only an explicit call can register."""

    def __init__(self, explicit: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, 32) for _ in range(3))
        self.explicit = explicit

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (4, 8)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = torch.exp((q @ k.mT * 8**-0.5).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf))
        y = (weights / weights.sum(-1, keepdim=True)) @ v
        if self.explicit:
            capture(self, q, k, value=v, output=y, causal=True)
        return y.transpose(1, 2).flatten(2)


def test_an_explicit_call_is_recorded_and_verified() -> None:
    result = captured(nn.Sequential(sharpen(ExpAttention())), input=hidden())
    (call,) = result.calls
    assert (call.layer, call.how, call.kind, call.scale) == ("0", "explicit", "self", 8**-0.5)
    assert call.error < 1e-6
    assert result.missed == {}
    assert list(captured(nn.Sequential(ExpAttention(explicit=False)), input=hidden()).missed) == ["0"]


def test_explicit_call_compiles_to_one_graph() -> None:
    with counted_graphs() as graphs:
        model = torch.compile(nn.Sequential(sharpen(ExpAttention())), backend=counted_graphs.backend, fullgraph=True)
        for _ in range(3):
            model(hidden())
            assert len(captured(model, input=hidden()).calls) == 1
        assert len(graphs) == 1


def test_first_record_of_a_call_is_kept() -> None:
    class Explicit(HandWritten):
        def __init__(self, before: bool) -> None:
            super().__init__(by_matmul)
            self.before = before

        def forward(self, x: Tensor) -> Tensor:
            registered = torch.ones(BATCH, 1, LENGTH, 2)
            if self.before:
                capture(self, registered, registered)
            y = super().forward(x)
            if not self.before:
                capture(self, registered, registered)
            return y

    assert [call.how for call in captured(Explicit(before=True), x=hidden()).calls] == ["explicit"]
    assert [call.how for call in captured(Explicit(before=False), x=hidden()).calls] == ["traced"]


def test_explicit_call_of_wrong_shape_raises_with_the_shape() -> None:
    class Wrong(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            capture(self, input, input)
            return super().forward(input)

    with pytest.raises(ValueError, match=r"query=\(2, 12, 32\).*\(B, Hq, Lq, d\)"):
        captured(Wrong(32, 32), input=hidden())
    Wrong(32, 32)(hidden())


@pytest.fixture(scope="module")
def external_kernel() -> str:
    """Register an attention function with transformers in which no torch function is seen."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "AttentionMaskInterface"):
        pytest.skip("this transformers has no table of masks")

    @torch.library.custom_op("attnmonitor_tests::kernel", mutates_args=())
    def kernel(
        q: Tensor, k: Tensor, v: Tensor, valid: Tensor, sinks: Tensor, scale: float, window: int, cap: float
    ) -> Tensor:
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        logits = cap * torch.tanh(q @ k.mT * scale / cap)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        hidden = (distance < 0) | (distance >= window) | ~valid[:, None, None, :]
        sinks = sinks.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        weights = torch.cat([logits.masked_fill(hidden, -torch.inf), sinks], -1).softmax(-1)[..., :-1]
        return (weights * valid[:, None, :, None] @ v).transpose(1, 2).contiguous()

    def attend(module, query, key, value, attention_mask, scaling, sliding_window=None, s_aux=None, softcap=None, **_):
        valid = torch.ones(query.shape[0], query.shape[2]) if attention_mask is None else attention_mask
        sinks = torch.full((query.shape[1],), -torch.inf) if s_aux is None else s_aux
        output = kernel(query, key, value, valid.bool(), sinks, scaling, sliding_window or 10**6, softcap or 1e4)
        return output, None

    transformers.AttentionInterface.register("external", attend)
    transformers.AttentionMaskInterface.register("external", lambda *args, attention_mask=None, **_: attention_mask)
    return "external"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gemma2", "gemma3"])
def test_transformers_kernel_is_read_from_its_arguments(name: str, external_kernel: str) -> None:
    (architecture,) = (each for each in hugging_face_architectures() if each.name == name)
    model = architecture.build(external_kernel)
    for padded in (False, True):
        result = captured(model, **architecture.inputs(padded))
        assert [call.how for call in result.calls] == ["interface"] * 2
        assert set().union(*(call.outside for call in result.calls)) == architecture.outside
        for call in result.calls:
            assert call.error < 2e-6
            assert call.key.shape[1] == 2
            assert (call.key_mask is not None) == padded
            assert not padded or call.key_mask.sum(1).tolist() == [LENGTH, LENGTH - 4]
    table = sys.modules["transformers.modeling_utils"].AttentionInterface
    assert "__getitem__" not in vars(table)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss", "gemma2", "t5", "bloom", "gptj", "deberta_v2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_second_sample_never_waits_for_the_device(
    name: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (architecture,) = (each for each in hugging_face_architectures() if each.name == name)
    if implementation == "sdpa" and name not in ("gpt2", "llama", "mistral", "t5"):
        pytest.skip("no sdpa in the library")
    if reason := transformers_difference(name, implementation):
        pytest.skip(f"transformers 4: {reason}")
    model, inputs = architecture.build(implementation), architecture.inputs(True)
    layouts: Layouts = {}
    calls: list[AttentionCall] = []

    def waits(emit: Callable[[AttentionCall], None] | None) -> list[str]:
        with torch.no_grad(), CountLaunches("cpu") as count:
            if emit is None:
                model(**inputs)
            else:
                with capture_attention(model, emit, layouts=layouts):
                    model(**inputs)
        return count.waits

    own = waits(None)
    waits(calls.append)
    # Only `outside_effects` reads a value from the device; a second sample must not call it.
    monkeypatch.delattr(Attention, "outside_effects")
    assert waits(calls.append) == own
    first, second = calls[: len(calls) // 2], calls[len(calls) // 2 :]
    assert [call.outside for call in first] == [call.outside for call in second]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = stack()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = torch.utils.checkpoint.checkpoint(block, x.requires_grad_(), use_reentrant=use_reentrant)
            return x

    model = Checkpointed().train()
    assert [call.layer for call in captured(model, x=hidden()).calls] == ["blocks.0", "blocks.2"]


def test_verification_ignores_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls = captured(stack(), input=hidden()).calls
    for call in calls:
        assert call.query.dtype == torch.bfloat16
        assert call.error.dtype == torch.float32
        assert call.error < 3e-2
        assert call.logit_rows(torch.arange(2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "gpt_oss", "bloom", "falcon alibi"])
def test_precision_is_that_of_the_attention(name: str) -> None:
    """Rotary embeddings promote queries to float32 while the attention itself runs in the autocast type."""
    (architecture,) = (each for each in hugging_face_architectures() if each.name == name)
    model = architecture.build("eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        calls = captured(model, **architecture.inputs(True)).calls
    for call in calls:
        assert call.precision == torch.bfloat16
        assert call.error < 2e-2
    assert name != "llama" or calls[0].query.dtype == torch.float32
    assert all(call.precision == torch.float32 for call in captured(model, **architecture.inputs(True)).calls)


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_large_logits_in_half_precision_are_still_verified(size: float) -> None:
    """A logit of 500 in bfloat16 is off by up to 1: so the check must round like the code."""
    model = sharpen(HandWritten(by_matmul))
    with torch.no_grad():
        model.qkv.weight[:32] *= size
    (call,) = captured(model.to(torch.bfloat16), x=hidden().to(torch.bfloat16)).calls
    assert call.logit_rows(torch.arange(LENGTH)).amax() > 5 * size
    assert call.error < 2e-2


def test_error_in_emit_reaches_the_caller_and_removes_hooks() -> None:
    model = stack()

    def refuse(call: AttentionCall) -> None:
        raise KeyError(call.layer)

    with pytest.raises(KeyError, match="0"), torch.no_grad(), capture_attention(model, refuse):
        model(hidden())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch._C._len_torch_function_stack() == 0
    capture(model, torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))


def test_attention_computed_in_emit_is_ignored() -> None:
    model = stack()
    layers: list[str] = []

    def attend_again(call: AttentionCall) -> None:
        layers.append(call.layer)
        (call.query @ call.key.mT).softmax(-1) @ call.key
        nn.functional.scaled_dot_product_attention(call.query, call.key, call.key)

    with torch.no_grad(), capture_attention(model, attend_again):
        model(hidden())
    assert layers == ["0", "2"]


def test_operands_are_freed_after_their_call() -> None:
    import gc
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def emit(call: AttentionCall) -> None:
        assert sum(reference() is not None for reference in alive) <= 2
        alive.extend(weakref.ref(x) for x in (call.query, call.key))

    model = stack()
    with torch.no_grad(), capture_attention(model, emit) as report:
        model(hidden())
        gc.collect()
        assert all(reference() is None for reference in alive)
    assert report.missed == {}


def test_cross_attention_queries_have_the_decoder_padding() -> None:
    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)

        def forward(self, x: Tensor, memory: Tensor, padding: Tensor, memory_padding: Tensor) -> Tensor:
            return self.layer(x, memory, tgt_key_padding_mask=padding, memory_key_padding_mask=memory_padding)

    padding = torch.arange(LENGTH).expand(BATCH, -1) >= torch.tensor([[12], [9]])
    memory_padding = torch.arange(7).expand(BATCH, -1) >= torch.tensor([[5], [7]])
    result = captured(
        sharpen(Seq2Seq()), x=hidden(), memory=hidden()[:, :7], padding=padding, memory_padding=memory_padding
    )
    own, cross = result.calls
    assert (own.layer, own.kind, cross.layer, cross.kind) == (
        "layer.self_attn",
        "self",
        "layer.multihead_attn",
        "cross",
    )
    assert torch.equal(own.query_mask, ~padding)
    assert torch.equal(cross.query_mask, ~padding)
    assert torch.equal(cross.key_mask, ~memory_padding)


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "vit", "matmul", "einsum bthd", "baddbmm (B·H, L, d)"])
def test_second_sample_creates_no_tensor_on_another_device(name: str) -> None:
    """On the meta device, a tensor made on the host raises a device mismatch, and reading a value fails."""
    (architecture,) = (each for each in ALL if each.name == name)
    layouts: Layouts = {}
    here: list[AttentionCall] = []
    there: list[AttentionCall] = []
    model = architecture.build("eager")
    with torch.no_grad(), capture_attention(model, here.append, layouts=layouts):
        model(**architecture.inputs(False))
    inputs = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in architecture.inputs(False).items()}
    model.to("meta")
    with torch.no_grad(), torch.device("meta"):
        try:
            model(**inputs)
        except RuntimeError as error:  # Falcon's, in transformers 4 (autocast) and 5.24 (a value of its mask)
            pytest.skip(f"the model does not run on the meta device: {error}")
        with capture_attention(model, there.append, layouts=layouts):
            model(**inputs)
    for real, empty in zip(here, there, strict=True):
        assert empty.query.device.type == empty.error.device.type == "meta"
        assert (empty.query.shape, empty.key.shape, empty.scale) == (real.query.shape, real.key.shape, real.scale)
        assert empty.logit_rows(torch.arange(3, device="meta")).shape[2] == 3
