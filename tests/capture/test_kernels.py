"""Kernels known by name are read from their arguments, whatever they do inside, and verified by their output."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import kernel_stand_ins as kernels
import pytest
import torch
from reference import layer_statistics
from torch import Tensor, nn

from attnmonitor import AttentionMonitor

HEADS, LENGTH = 4, 12
ENDS = torch.tensor([0, 7, 12], dtype=torch.int32)
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.05])


@pytest.fixture(autouse=True)
def stand_ins() -> Iterator[None]:
    with kernels.installed():
        yield


class Layer(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], num_kv_heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, (HEADS + 2 * num_kv_heads) * 8)
        self.out = nn.Linear(32, 32)
        self.sizes, self.attend = (HEADS, num_kv_heads, num_kv_heads), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 8)).split(self.sizes, dim=-2)
        self.kept = q, k
        return self.out(self.attend(q, k, v).reshape(x.shape))


def rows(x: Tensor) -> Tensor:
    """(1, T, H, d) as (T, H, d)."""
    return x[0]


CASES = {
    "flash": (lambda q, k, v: kernels.flash_attn_func(q, k, v, causal=True), 2, False, ()),
    "flash window": (lambda q, k, v: kernels.flash_attn_func(q, k, v, window_size=(3, 1)), 4, False, ("window",)),
    "flash terms": (
        lambda q, k, v: kernels.flash_attn_func(q, k, v, 0.0, 0.3, True, softcap=5.0, alibi_slopes=SLOPES),
        4,
        False,
        ("bias", "softcap"),
    ),
    "flash qkv": (lambda q, k, v: kernels.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2)), 4, False, ()),
    "flash kv": (lambda q, k, v: kernels.flash_attn_kvpacked_func(q, torch.stack([k, v], 2)), 2, False, ()),
    "flash varlen": (
        lambda q, k, v: kernels.flash_attn_varlen_func(rows(q), rows(k), rows(v), ENDS, ENDS, 7, 7, causal=True),
        2,
        True,
        (),
    ),
    "flash varlen qkv": (
        lambda q, k, v: kernels.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 2)[0], ENDS, 7),
        4,
        True,
        (),
    ),
    "flash varlen kv": (
        lambda q, k, v: kernels.flash_attn_varlen_kvpacked_func(q[0], torch.stack([k, v], 2)[0], ENDS, ENDS, 7, 7),
        2,
        True,
        (),
    ),
    "flash 3": (lambda q, k, v: kernels.flash_3_func(q, k, v, None, True), 2, False, ()),
    "flash 3 chunks": (lambda q, k, v: kernels.flash_3_func(q, k, v, attention_chunk=4), 2, False, ("window",)),
    "flash 3 qkv": (lambda q, k, v: kernels.flash_3_qkvpacked(torch.stack([q, k, v], 2), causal=True), 4, False, ()),
    "flash 3 qkv, fewer keys": (
        lambda q, k, v: kernels.flash_3_qkvpacked(torch.cat([q, k, v], 2), num_heads_q=HEADS),
        2,
        False,
        (),
    ),
    "operator": (
        lambda q, k, v: torch.ops.attnmonitor_stand_ins.attention(q, k, v, 0.3, True),
        2,
        False,
        (),
    ),
    "operator, heads first": (
        lambda q, k, v: kernels.heads_last(
            torch.ops.attnmonitor_stand_ins.heads_first_attention, q, k, v, is_causal=True
        ),
        2,
        False,
        (),
    ),
    "operator of torch": (
        lambda q, k, v: kernels.heads_last(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, q, k, v),
        4,
        False,
        (),
    ),
    "flash 3 varlen": (
        lambda q, k, v: kernels.flash_3_varlen(rows(q), rows(k), rows(v), ENDS, ENDS, 7, 7, causal=True),
        2,
        True,
        (),
    ),
    "xformers": (lambda q, k, v: kernels.memory_efficient_attention(q, k, v, scale=0.2), 4, False, ()),
    "xformers bias": (
        lambda q, k, v: kernels.memory_efficient_attention(q, k, v, torch.linspace(0, 1, 12)[None, None, None]),
        4,
        False,
        ("bias",),
    ),
    "xformers causal": (
        lambda q, k, v: kernels.memory_efficient_attention(q, k, v, kernels.LowerTriangularMask()),
        4,
        False,
        (),
    ),
    "xformers blocks": (
        lambda q, k, v: kernels.memory_efficient_attention(q, k, v, kernels.BlockDiagonalCausalMask(ENDS)),
        4,
        True,
        (),
    ),
    "torch varlen": (
        lambda q, k, v: kernels.varlen_attn(rows(q), rows(k), rows(v), ENDS, ENDS, 7, 7, window_size=(-1, 0)),
        4,
        True,
        (),
    ),
    "module": (kernels.ByModule("sbhd", {}), 2, False, ()),
    "module window": (kernels.ByModule("bshd", {"window_size": (3, 0)}), 4, False, ("window",)),
    "module qkv": (kernels.ByModule("packed", {"softmax_scale": 0.3}), 4, False, ()),
    "module bias": (
        kernels.ByModule(
            "sbhd",
            {"attn_mask_type": "no_mask"},
            core_attention_bias_type="post_scale_bias",
            core_attention_bias=torch.linspace(0, 1, 12).expand(1, 4, 12, 12),
        ),
        4,
        False,
        ("bias",),
    ),
    "module varlen": (
        kernels.ByModule("thd", {"attn_mask_type": "padding_causal"}, cu_seqlens_q=ENDS, cu_seqlens_kv=ENDS),
        2,
        True,
        (),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_known_kernels_are_read_and_verified(name: str) -> None:
    attend, num_kv_heads, is_packed, outside = CASES[name]
    torch.manual_seed(0)
    model = nn.Sequential(Layer(attend, num_kv_heads))
    batch = torch.randn(1 if is_packed else 2, LENGTH, 32)
    with AttentionMonitor(model, batch, record=None, alerts=False) as monitor:
        coverage = monitor.coverage["0"]
        assert (coverage.how, coverage.kind, coverage.heads) == ("kernel", "self", (HEADS, num_kv_heads, 8))
        assert (coverage.outside, coverage.documents) == (outside, 2 if is_packed else 0)
        assert coverage.error is not None
        assert coverage.error < 1e-6
        q, k = (y.detach().double().transpose(1, 2) for y in model[0].kept)
        parts = [(q[..., a:b, :], k[..., a:b, :]) for a, b in ([(0, 7), (7, 12)] if is_packed else [(0, LENGTH)])]
        fields = [layer_statistics(*part, coverage.scale, None, None) for part in parts]
        sample = monitor.sample(1)
        for metric in ("energy_rms", "energy_effective_rank", "key_incoherence"):
            expected = torch.cat([field[metric] for field in fields]).mean(0)
            assert torch.allclose(sample.values[metric]["0"].double(), expected, rtol=1e-4)
        assert sample.values["value_rms"]["0"].isfinite().all()
        assert sample.values["output_rms"]["0"].isfinite().all()


@pytest.mark.parametrize("given", ["mask", "lengths"])
def test_padding_of_a_kernel_module_is_left_out(given: str) -> None:
    lengths = torch.tensor([12, 7])
    hidden = (torch.arange(LENGTH) >= lengths[:, None])[:, None, None]
    ends = torch.tensor([0, 12, 19])
    mask = {"attention_mask": hidden} if given == "mask" else {"cu_seqlens_q": ends, "cu_seqlens_kv": ends}
    attend = kernels.ByModule("bshd", {"attn_mask_type": "padding"}, **mask)
    torch.manual_seed(0)
    model, batch = nn.Sequential(Layer(attend, 2)), torch.randn(2, LENGTH, 32)
    with AttentionMonitor(model, batch, record=None, alerts=False) as monitor:
        [found] = monitor.sample(1).values["energy_rms"].values()
    attend.arguments = {"attn_mask_type": "no_mask"}
    alone = []
    for row, length in enumerate(lengths):
        with AttentionMonitor(model, batch[row : row + 1, :length], record=None, alerts=False) as monitor:
            alone += monitor.sample(1).values["energy_rms"].values()
    assert torch.allclose(found, torch.stack(alone).mean(0), rtol=1e-5)


def test_operator_that_is_no_softmax_attention_has_no_numbers() -> None:
    model = nn.Sequential(Layer(torch.ops.attnmonitor_stand_ins.linear_attention, HEADS))
    with pytest.raises(ValueError, match=r"linear_attention could not be followed: its output is not that of softmax"):
        AttentionMonitor(model, torch.randn(2, LENGTH, 32), record=None)


def test_kernels_are_as_before_after_a_capture() -> None:
    functions = [*kernels.FLASH_2, kernels.memory_efficient_attention, kernels.varlen_attn]
    functions.append(kernels.DotProductAttention.forward)
    before = [(each.__code__, each.__defaults__, each.__kwdefaults__, inspect.signature(each)) for each in functions]
    model = Layer(CASES["flash"][0], 2)
    AttentionMonitor(nn.Sequential(model), torch.randn(2, LENGTH, 32), record=None).close()
    functions[-1] = kernels.DotProductAttention.forward
    after = [(each.__code__, each.__defaults__, each.__kwdefaults__, inspect.signature(each)) for each in functions]
    assert before == after


def test_wrong_scale_of_a_kernel_fails_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = kernels.dense
    monkeypatch.setattr(kernels, "dense", lambda q, *others: dense(1.5 * q, *others))
    with pytest.raises(ValueError, match="none of it can be measured; 0: attention rebuilt"):
        AttentionMonitor(nn.Sequential(Layer(CASES["flash"][0], 2)), torch.randn(2, LENGTH, 32), record=None)
