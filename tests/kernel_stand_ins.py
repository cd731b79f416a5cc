"""Stand-ins for kernels that need a GPU: the modules' names, the functions' real signatures, computed on a CPU."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def dense(q, k, v, scale, causal, window, softcap, slopes, bias=None):
    """Attention of ``(B, L, H, d)`` operands; a query stands at the last keys."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    ahead = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None] - (k.shape[1] - q.shape[1])
    if slopes is not None:
        logits = logits - slopes.reshape(-1, q.shape[2], 1, 1) * ahead.abs()
    if bias is not None:
        logits = logits + bias
    left, right = window
    right = 0 if causal else right
    hidden = (ahead > right if right >= 0 else ahead > 10**9) | (ahead < -left if left >= 0 else ahead < -(10**9))
    return torch.einsum("bhij,bjhd->bihd", logits.masked_fill(hidden, -torch.inf).softmax(-1), v)


def packed(q, k, v, ours, theirs, *terms):
    spans = zip(ours[:-1], ours[1:], theirs[:-1], theirs[1:], strict=True)
    return torch.cat([dense(q[None, a:b], k[None, c:d], v[None, c:d], *terms)[0] for a, b, c, d in spans])


# flash_attn 2.8


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip # noqa: E501
    return dense(q, k, v, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_qkvpacked_func(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip # noqa: E501
    return dense(*qkv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_kvpacked_func(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip # noqa: E501
    return dense(q, *kv.unbind(2), softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip # noqa: E501
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip # noqa: E501
    return packed(*qkv.unbind(1), cu_seqlens, cu_seqlens, softmax_scale, causal, window_size, softcap, alibi_slopes)


def flash_attn_varlen_kvpacked_func(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip # noqa: E501
    return packed(q, *kv.unbind(1), cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, alibi_slopes)  # fmt: skip # noqa: E501


FLASH_2 = [flash_attn_func, flash_attn_qkvpacked_func, flash_attn_kvpacked_func, flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func, flash_attn_varlen_kvpacked_func]  # fmt: skip # noqa: E501


# flash_attn 3 (module flash_attn_interface)


def flash_3_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip # noqa: E501
    chunks = torch.arange(k.shape[1]) // attention_chunk if attention_chunk else torch.zeros(k.shape[1])
    bias = torch.zeros(k.shape[1], k.shape[1]).masked_fill(chunks[:, None] != chunks, -torch.inf)
    return dense(q, k, v, softmax_scale, causal, window_size, softcap, None, bias)


def flash_3_qkvpacked(qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_attn_probs=False):  # fmt: skip # noqa: E501
    if qkv.dim() == 5:
        return dense(*qkv.unbind(-3), softmax_scale, causal, window_size, softcap, None)
    num_kv_heads = (qkv.shape[2] - num_heads_q) // 2
    sizes = (num_heads_q, num_kv_heads, num_kv_heads)
    return dense(*qkv.split(sizes, dim=2), softmax_scale, causal, window_size, softcap, None)


def flash_3_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):  # fmt: skip # noqa: E501
    return packed(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window_size, softcap, None)


# xformers 0.0.32


class LowerTriangularMask:
    """The class of this name in xformers.ops: a causal mask counted from the first position."""


class BlockDiagonalCausalMask:
    """The class of this name in xformers.ops, for sequences of these lengths."""

    def __init__(self, cumulative: Tensor) -> None:
        self.q_seqinfo = self.k_seqinfo = types.SimpleNamespace(seqstart=cumulative)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    q, k, v = (x if x.dim() == 4 else x.unsqueeze(2) for x in (query, key, value))
    causal = attn_bias is not None and not isinstance(attn_bias, Tensor)
    bias = None if causal else attn_bias
    if isinstance(attn_bias, BlockDiagonalCausalMask):
        ends = attn_bias.q_seqinfo.seqstart
        y = packed(q[0], k[0], v[0], ends, ends, scale, True, (-1, -1), 0.0, None)[None]
    else:
        y = dense(q, k, v, scale, causal, (-1, -1), 0.0, None, bias)
    return y if query.dim() == 4 else y.squeeze(2)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None):  # fmt: skip # noqa: E501
    return packed(query, key, value, cu_seq_q, cu_seq_k, scale, False, window_size, 0.0, None)


# Transformer Engine 2: a module


class DotProductAttention(nn.Module):
    """The class of this name in transformer_engine.pytorch."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format="sbhd", attn_mask_type="causal", window_size=None, bottom_right_diagonal=None, sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, tp_group=None, layer_number=None, attention_type="self", cp_group=None, cp_global_ranks=None, cp_stream=None, cp_comm_type="p2p", softmax_scale=None, softmax_type="vanilla", return_max_logit=False, name=None):  # fmt: skip # noqa: E501
        super().__init__()
        self.qkv_format, self.attn_mask_type, self.softmax_type = qkv_format, attn_mask_type, softmax_type
        self.window_size = window_size or ((-1, 0) if "causal" in attn_mask_type else (-1, -1))
        self.attention_dropout, self.cp_group = attention_dropout, cp_group
        self.fused_attention = nn.Module()
        self.fused_attention.softmax_scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(self, query_layer=None, key_layer=None, value_layer=None, attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None, cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None, window_size=None, bottom_right_diagonal=None, checkpoint_core_attention=False, core_attention_bias_type="no_bias", core_attention_bias=None, alibi_slopes=None, fast_zero_fill=True, inference_params=None, pad_between_seqs=None, fp8_output=False, bf16_backward=False, num_splits=1, score_mod=None, score_mod_bprop=None, score_mod_tensors=None, score_mod_bprop_tensors=None, qkv_layer=None, kv_layer=None, qkv_interleave_dim=-3, g=None, beta=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False):  # fmt: skip # noqa: E501
        order, kind = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        q, k, v = (query_layer, key_layer, value_layer) if qkv_layer is None else qkv_layer.unbind(qkv_interleave_dim)
        scale, window = self.fused_attention.softmax_scale, window_size or self.window_size
        terms = (scale, "causal" in kind, window, 0.0, alibi_slopes)
        if order == "thd":
            return packed(q, k, v, cu_seqlens_q, cu_seqlens_kv, *terms).flatten(-2)
        if order == "sbhd":
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        bias = core_attention_bias
        if "padding" in kind:
            hidden = torch.arange(q.shape[1]) >= cu_seqlens_q.diff()[:, None] if attention_mask is None else attention_mask[:, 0, 0]  # fmt: skip # noqa: E501
            bias = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
        output = dense(q, k, v, *terms, bias).flatten(-2)
        if "padding" in kind:
            output = output.masked_fill(hidden[..., None], 0.0)
        return output.transpose(0, 1) if order == "sbhd" else output


class ByModule(nn.Module):
    """Attention of ``(B, L, H, d)`` operands by ``DotProductAttention``."""

    def __init__(self, order: str, settings: dict[str, object], **arguments: object) -> None:
        super().__init__()
        self.core, self.order = DotProductAttention(4, 8, qkv_format=order, **settings), order
        self.arguments = arguments

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.order == "thd":
            return self.core(q[0], k[0], v[0], **self.arguments)
        if self.order == "packed":
            return self.core(qkv_layer=torch.stack([q, k, v], 2), qkv_format="bshd", **self.arguments)
        if self.order == "bshd":
            return self.core(q, k, v, **self.arguments)
        return self.core(*(x.transpose(0, 1) for x in (q, k, v)), **self.arguments).transpose(0, 1)


# Operators that libraries register with torch, in both orders of axes.


@torch.library.custom_op("attnmonitor_stand_ins::attention", mutates_args=())
def registered(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    return dense(q, k, v, softmax_scale, causal, (-1, -1), 0.0, None)


@torch.library.custom_op("attnmonitor_stand_ins::heads_first_attention", mutates_args=())
def registered_heads_first(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return dense(q, k, v, None, is_causal, (-1, -1), 0.0, None).transpose(1, 2).contiguous()


def heads_last(operator, *operands, **options):
    """Call an operator of ``(B, H, L, d)`` with operands ``(B, L, H, d)``."""
    output = operator(*(x.transpose(1, 2) for x in operands), **options)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


@torch.library.custom_op("attnmonitor_stand_ins::linear_attention", mutates_args=())
def registered_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bihd,bjhd,bjhe->bihe", q, k, v)


@contextmanager
def installed() -> Iterator[None]:
    """Put the stand-ins where the libraries would be."""
    contents = {
        "flash_attn": {each.__name__: each for each in FLASH_2},
        "flash_attn_interface": {
            "flash_attn_func": flash_3_func,
            "flash_attn_varlen_func": flash_3_varlen,
            "flash_attn_qkvpacked_func": flash_3_qkvpacked,
        },
        "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
        "torch.nn.attention.varlen": {"varlen_attn": varlen_attn},
        "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
    }
    before = {name: sys.modules.get(name) for name in contents}
    for name, content in contents.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
