"""A probe may hold sparse, nested and other tensors beside plain ones, in any container."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding, DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from attnmonitor import AttentionMonitor
from attnmonitor.measurement.batches import map_tensors, plain_parts
from attnmonitor.measurement.probe import Probe

X = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(0))


class WithExtra(nn.TransformerEncoderLayer):
    """A layer that takes one more entry of a batch."""

    def __init__(self) -> None:
        super().__init__(16, nhead=2, batch_first=True)

    def forward(self, src: Tensor, extra: Any) -> Tensor:
        return super().forward(src)


class Pair(NamedTuple):
    first: Tensor
    second: str | None


@dataclass(frozen=True)
class Item:
    ids: Tensor
    text: str = "none"


class Labeled(Tensor):
    """A subclass of tensor, as image libraries have them."""


def nested(layout: torch.layout, scale: float) -> Tensor:
    return torch.nested.nested_tensor([torch.full((2, 3), scale), torch.zeros(3, 3)], layout=layout)


def extras(scale: float = 1.0) -> dict[str, Any]:
    matrix = scale * torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    return {
        "sparse COO": matrix.to_sparse(),
        "sparse COO of all sequences": (scale * torch.eye(4)).to_sparse(),
        "sparse CSR": matrix.to_sparse_csr(),
        "sparse CSC": matrix.to_sparse_csc(),
        "sparse BSR": matrix.to_sparse_bsr((1, 1)),
        "jagged": nested(torch.jagged, scale),
        "nested": nested(torch.strided, scale),
        "quantized": torch.quantize_per_tensor(matrix, 0.1, 0, torch.quint8),
        "complex and conjugated": torch.complex(matrix, matrix).conj(),
        "a subclass": matrix.as_subclass(Labeled),
        "empty": torch.empty(0, 3),
        "a NamedTuple": Pair(matrix, "text"),
        "a dataclass": Item(scale * torch.arange(3)),
        "numpy": np.arange(3),
        "text": ["a", "b"],
        "None": None,
    }


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once that sparse and nested tensors are in beta
    EXTRAS, SAME, OTHER = extras(), extras(), extras(2.0)


@pytest.mark.parametrize("name", EXTRAS)
def test_entry_of_a_batch_is_accepted(name: str) -> None:
    monitor = AttentionMonitor(WithExtra(), {"src": X, "extra": EXTRAS[name]}, record=None, strict=True)
    assert not monitor.sample(0).values["energy_rms"]["self_attn"].isnan().any()
    assert monitor.describe()["probe"]


HOLD_NUMBERS = [name for name in EXTRAS if name not in ("empty", "numpy", "text", "None")]


@pytest.mark.parametrize("name", HOLD_NUMBERS)
def test_fingerprint_covers_values_of_every_kind_of_tensor(name: str) -> None:
    one, same, other = (Probe(WithExtra(), {"src": X, "extra": extra[name]}) for extra in (EXTRAS, SAME, OTHER))
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != other.fingerprint


class Graphs:
    """Holds its tensors as attributes, and itself, as batches of graphs and images do."""

    def __init__(self) -> None:
        self.x, self.names, self.itself = X, ["a", "b"], self


class InSlots:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = X


@dataclass
class Row:
    x: Tensor
    label: int = 0


class Rows(NamedTuple):
    x: Tensor
    label: int


OBJECTS = [
    Graphs(),
    InSlots(),
    Row(X),
    Rows(X, 1),
    BatchEncoding({"x": X}),
    BaseModelOutput(last_hidden_state=X),
]


@pytest.mark.parametrize("batch", OBJECTS, ids=lambda batch: type(batch).__name__)
@pytest.mark.parametrize("how", ["as one argument", "by name"])
def test_object_with_attributes_is_a_probe(batch: Any, how: str) -> None:
    name = "last_hidden_state" if isinstance(batch, BaseModelOutput) else "x"

    class Whole(nn.TransformerEncoderLayer):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(getattr(batch, name))

    class ByName(nn.TransformerEncoderLayer):
        def forward(self, last_hidden_state: Any = None, x: Any = None, **others: Any) -> Tensor:
            return super().forward(x if last_hidden_state is None else last_hidden_state)

    torch.manual_seed(0)
    model = (ByName if how == "by name" else Whole)(16, nhead=2, batch_first=True)
    monitor = AttentionMonitor(model, batch, record=None, strict=True)
    assert type(monitor.probe.batch) is type(batch)
    assert getattr(monitor.probe.batch, name) is not X
    expected = AttentionMonitor(model, X, record=None, forward=lambda model, x: super(type(model), model).forward(x))
    assert torch.equal(
        monitor.sample(0).values["key_rms"]["self_attn"], expected.sample(0).values["key_rms"]["self_attn"]
    )


def test_mapping_is_one_argument_where_one_is_missing() -> None:
    class Encoder(nn.TransformerEncoderLayer):
        def forward(self, features: dict[str, Tensor], **options: Any) -> Tensor:
            assert not options
            return super().forward(features["embeddings"])

    AttentionMonitor(Encoder(16, nhead=2, batch_first=True), {"embeddings": X}, record=None, strict=True)


def test_frozen_dataclass_is_copied() -> None:
    batch = Item(torch.arange(3), "text")
    copied = map_tensors(batch, lambda tensor: tensor + 1)
    assert copied.ids.tolist() == [1, 2, 3]
    assert batch.ids.tolist() == [0, 1, 2]
    assert copied.text == "text"


def test_plain_parts_of_a_plain_tensor_are_itself() -> None:
    [part] = plain_parts(X)
    assert part is X


def test_unreadable_entry_is_refused_by_name() -> None:
    class Unreadable(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.__name__ == "clone":
                raise NotImplementedError("no clone")
            return super().__torch_function__(func, types, args, kwargs)

    with pytest.raises(ValueError, match=r"probe\.extra\[1\] is a Unreadable .* \(NotImplementedError: no clone\)"):
        Probe(WithExtra(), {"src": X, "extra": [X, torch.ones(2).as_subclass(Unreadable)]})


def test_later_write_to_an_array_does_not_reach_the_probe() -> None:
    array = np.arange(3)
    probe = Probe(WithExtra(), {"src": X, "extra": array})
    array[:] = 7
    assert probe.batch["extra"].tolist() == [0, 1, 2]


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> None:
        self.count += 1


WRITES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "a tensor": (lambda: torch.ones(4, 12, 16), lambda x: x.mul_(2.0)),
    "a view of a tensor": (lambda: torch.ones(4, 12, 16), lambda x: x[:, 1:].zero_()),
    "a list": (list, lambda calls: calls.append(1)),
    "a mapping": (dict, lambda seen: seen.update(n=len(seen))),
    "a set": (set, lambda seen: seen.add(len(seen))),
    "an array": (lambda: np.zeros(3), lambda x: x.fill(7)),
    "an object": (Counter, Counter.add),
    "an empty cache": (DynamicCache, lambda cache: cache.update(X[:, None], X[:, None], 0)),
    "a static cache": (lambda: {"length": torch.zeros(1)}, lambda cache: cache["length"].add_(12)),
}


@pytest.mark.parametrize("name", WRITES)
def test_forward_that_writes_into_its_batch_changes_no_probe(name: str) -> None:
    made, write = WRITES[name]
    met: list[str] = []

    class Writer(WithExtra):
        def forward(self, src: Tensor, extra: Any) -> Tensor:
            met.append(repr(vars(extra) if isinstance(extra, Counter) else extra))
            src.mul_(0.5)
            write(extra)
            return super().forward(src, extra)

    src, extra = X.clone(), made()
    with AttentionMonitor(Writer(), {"src": src, "extra": extra}, record=None, alerts=False) as monitor:
        first, second = (monitor.sample(step).values["energy_rms"]["self_attn"] for step in range(2))
    assert torch.equal(first, second)
    assert torch.equal(src, X)
    assert len({repr(vars(extra) if isinstance(extra, Counter) else extra), *met}) == 1


def test_batch_with_a_sparse_entry_per_sequence_is_not_halved() -> None:
    assert Probe(WithExtra(), {"src": X, "extra": torch.eye(4).to_sparse()}).half() is None
    half = Probe(WithExtra(), {"src": X, "extra": torch.eye(3).to_sparse()}).half()
    assert half is not None
    assert half.batch["src"].shape == (2, 12, 16)
