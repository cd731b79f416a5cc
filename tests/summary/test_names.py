"""Short layer names are unique and made of parts of the full names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnmonitor.summary.names import short_layer_names


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["transformer.h.0.attn", "transformer.h.11.attn"], ["h.0", "h.11"]),
        (["encoder.layers.0.attn", "decoder.layers.0.attn"], ["encoder", "decoder"]),
        (["blocks.0.self", "blocks.0.cross", "blocks.1.self"], ["blocks.0.self", "blocks.0.cross", "blocks.1.self"]),
        (["attn", "attn#2"], ["attn", "attn#2"]),
        (["a.attn", "attn"], ["a.attn", "attn"]),
        (["only.one"], ["only.one"]),
        ([], []),
    ],
)
def test_short_names_drop_shared_parts(names: list[str], short: list[str]) -> None:
    assert short_layer_names(names) == dict(zip(names, short, strict=True))


@given(st.lists(st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), unique=True))
def test_short_names_are_unique_parts_of_names(names: list[str]) -> None:
    short = short_layer_names(names)
    assert len(set(short.values())) == len(names)
    assert all(part and part in name for name, part in short.items())
