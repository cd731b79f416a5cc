from __future__ import annotations

import pytest
import torch
from torch import nn

from attnmonitor.capture import AttentionCall, capture_attention


class Attention(nn.Module):
    """Grouped-query attention over `scaled_dot_product_attention`, with every knob that call has."""

    def __init__(self, num_query_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 8, **options: object) -> None:
        super().__init__()
        self.heads = (num_query_heads, num_kv_heads, head_dim)
        width = num_query_heads * head_dim
        self.q_proj = nn.Linear(width, width)
        self.kv_proj = nn.Linear(width, 2 * num_kv_heads * head_dim)
        self.out_proj = nn.Linear(width, width)
        self.options = options

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None):
        num_query_heads, num_kv_heads, head_dim = self.heads
        q = self.q_proj(x).unflatten(-1, (num_query_heads, head_dim)).transpose(1, 2)
        k, v = (
            self.kv_proj(x if context is None else context)
            .unflatten(-1, (2, num_kv_heads, head_dim))
            .permute(2, 0, 3, 1, 4)
        )
        self.seen = q, k, v
        if self.options.get("repeat"):
            k, v = (y.repeat_interleave(num_query_heads // num_kv_heads, dim=1) for y in (k, v))
        options = {name: value for name, value in self.options.items() if name != "repeat"}
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, mask, enable_gqa="repeat" not in self.options, **options
        )
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.attn = Attention(**options)
        self.mlp = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return self.mlp(x + self.attn(x, **kwargs))


def captured(model: nn.Module, *args: object, **kwargs: object) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), capture_attention(model, calls.append):
        model(*args, **kwargs)
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"repeat": True}, {"is_causal": True}, {"scale": 0.2}, {"scale": 0.2, "is_causal": True}], ids=str
)
def test_operands_and_scale_are_those_of_the_call(options: dict[str, object]) -> None:
    model = Block(**options).double()
    (call,) = captured(model, torch.randn(3, 10, 32, dtype=torch.float64))
    q, k, _ = model.attn.seen
    assert (call.layer, call.how, call.kind, call.outside) == ("attn", "sdpa", "self", ())
    assert torch.equal(call.query, q)
    assert torch.equal(call.key, k)
    assert call.scale == options.get("scale", 8**-0.5)
    assert call.query_mask is None
    assert call.error is not None
    assert call.error < 1e-12


@pytest.mark.parametrize("as_float", [False, True])
def test_padding_is_read_from_the_mask_that_arrives(as_float: bool) -> None:
    valid = torch.ones(2, 10, dtype=torch.bool)
    valid[1, 6:] = False
    mask = valid[:, None, None, :] & torch.ones(10, 10).tril().bool()
    arriving = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if as_float else mask
    (call,) = captured(Block(), torch.randn(2, 10, 32), mask=arriving)
    assert torch.equal(call.key_mask, valid)
    assert torch.equal(call.query_mask, valid)
    assert call.outside == ()
    assert call.error < 1e-5
    assert torch.equal(call.logit_rows(torch.arange(10)).isfinite(), mask.expand(2, 4, 10, 10))


@pytest.mark.parametrize("num_heads", [4, 1])
def test_sequences_and_heads_in_one_axis_are_separated(num_heads: int) -> None:
    class Flat(Attention):
        def forward(self, x: torch.Tensor):
            q = self.q_proj(x).unflatten(-1, (num_heads, -1)).transpose(1, 2)
            k, v = self.kv_proj(x).unflatten(-1, (2, num_heads, -1)).permute(2, 0, 3, 1, 4)
            self.seen = q, k, v
            padding = torch.zeros(3, 1, 1, 10).index_fill(-1, torch.tensor([8, 9]), -torch.inf)
            mask = padding.expand(-1, num_heads, 10, -1).flatten(0, 1)
            y = nn.functional.scaled_dot_product_attention(*(z.flatten(0, 1) for z in (q, k, v)), mask)
            return self.out_proj(y.unflatten(0, (3, num_heads)).transpose(1, 2).flatten(2))

    model = Flat(num_kv_heads=4).double()
    (call,) = captured(model, torch.randn(3, 10, 32, dtype=torch.float64))
    q, k, _ = model.seen
    assert torch.equal(call.query, q)
    assert torch.equal(call.key, k)
    assert call.key_mask.sum(1).tolist() == [8, 8, 8]
    assert call.logit_rows(torch.arange(10)).shape == (3, num_heads, 10, 10)
    assert call.error < 1e-12


def test_hooks_are_removed_also_when_the_model_raises() -> None:
    model = Block()
    with pytest.raises(RuntimeError), capture_attention(model, lambda call: None):
        model(torch.randn(2, 10, 31))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not torch.overrides._len_torch_function_stack()
