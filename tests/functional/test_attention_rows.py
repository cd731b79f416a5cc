"""Entropy, largest logit and sink mass from attention rows: all of them, or a subset that stands for the rest."""

from __future__ import annotations

import pytest
import reference
import torch
from drawn_layers import PADDINGS, draw, padding_mask

from attnmonitor.functional import attention_row_statistics, row_logits

ROW_METRICS = ("attention_entropy", "max_logit", "sink_mass")


@pytest.mark.parametrize("padding", PADDINGS)
def test_all_rows_equal_dense_attention(padding):
    query, key = draw((2, 4, 2, 50, 8), key_offset=0.0)
    mask = padding_mask(padding, 2, 50)
    logits, query_mask = row_logits(query, key, mask=mask)
    found = attention_row_statistics(logits, 50, query_mask=query_mask, key_mask=mask)
    causal = torch.ones(2, 50, 50, dtype=torch.bool).tril()
    expected = reference.layer_statistics(query, key, 8**-0.5, mask, mask, visible=causal, metrics=ROW_METRICS)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.float(), rtol=1e-4, atol=1e-5, msg=name)


def test_few_rows_stand_for_the_rest():
    query, key = draw((1, 4, 4, 512, 16), key_offset=0.0)
    logits, _ = row_logits(query, key)
    every = attention_row_statistics(logits, 512, num_rows=512)
    few = attention_row_statistics(logits, 512)
    torch.testing.assert_close(few["attention_entropy"], every["attention_entropy"], rtol=0.03, atol=0)
    assert (few["max_logit"] <= every["max_logit"]).all()
    last = attention_row_statistics(logits, 512, num_rows=1)
    torch.testing.assert_close(last["max_logit"], logits(torch.tensor([511])).amax((-2, -1)))


def test_rows_are_evenly_spaced_and_few_at_a_time():
    query, key = draw((1, 4, 4, 512, 16), key_offset=0.0)
    logits, _ = row_logits(query, key)
    asked = []
    attention_row_statistics(lambda rows: asked.append(rows) or logits(rows), 512)
    assert len(torch.cat(asked).unique()) == 64
    assert torch.cat(asked).max() == 511
    assert torch.cat(asked).diff().unique().tolist() == [8], "evenly spaced"
    assert max(map(len, asked)) <= 16


def test_last_queries_see_the_keys_before_them():
    query, key = draw((1, 4, 2, 30, 8), key_offset=0.0)
    whole, _ = row_logits(query, key)
    last, _ = row_logits(query[:, :, 25:], key)
    torch.testing.assert_close(last(torch.arange(5)), whole(torch.arange(25, 30)))


def test_sequence_of_padding_has_no_row_statistics():
    query, key = draw((2, 3, 3, 20, 4))
    mask = torch.tensor([[True] * 20, [False] * 20])
    for query_mask in (None, torch.ones(2, 20, dtype=torch.bool)):  # rows that see no key count for nothing either
        logits, rows_mask = row_logits(query, key, mask=mask, query_mask=query_mask)
        for value in attention_row_statistics(logits, 20, query_mask=rows_mask, key_mask=mask).values():
            assert value.isnan().tolist() == [[False] * 3, [True] * 3]


def test_broken_head_has_no_row_statistics():
    query, key = draw((1, 3, 3, 20, 4))
    query[0, 1, 12] = torch.nan
    logits, _ = row_logits(query, key, causal=False)
    for value in attention_row_statistics(logits, 20).values():
        assert value.isnan().tolist() == [[False, True, False]]
