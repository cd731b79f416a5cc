"""Faults of known kind, place and strength, and how they are put into an attention layer.

The size of a fault is set, not pushed: after every optimizer step since onset, the size (or rank) of the faulty head's
queries or keys becomes its value at onset times a ramp, so that training cannot undo the fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.detection.models import Shape

FULL_STRENGTH = {
    "query_hot": 4.0,  # factor on the size of one head's queries
    "query_fading": 0.25,
    "key_fading": 0.25,
    "layer_hot": 4.0,  # factor on the queries of all heads of one layer
    "layer_cold": 0.25,
    "key_takeover": 2.0,  # key norms added to one position of one KV head
    "key_rank_1": 0.02,  # factor on all but the largest singular value of one head's key projection
}
FINITE_FAULTS = tuple(FULL_STRENGTH)
"""Half strength is half the logarithm of a factor (x2 for x4), half of the added norm, and rank loss half way."""

SILENT = {"value": 0.04, "output": 0.04}
"""Factor on the size of one head's value rows, or of its columns of the output projection."""
WHOLE_HEAD_FAULTS = ("dead", "twin", "value", "output", "rolled_keys")
"""Queries and keys zero; a copy of the head beside it; silent values; silent output; the KV heads of a layer rolled."""


@dataclass(frozen=True)
class Fault:
    """One fault: kind, place, strength in (0, 1], onset."""

    kind: str
    layer: int
    head: int  # a query head, or a KV head where the fault is in the keys
    strength: float
    onset: int
    num_steps: int = 160  # after onset
    ramp_steps: int = 60


class Breakable(Protocol):
    """An attention layer in which one head can be broken."""

    shape: Shape
    num_kv_heads: int
    extra_key: Tensor | None

    def weights_of(self, head: int) -> Mapping[str, list[Tensor]]:
        """Return views of all weights of one query head and of the KV head it reads, by side."""

    def slices(self, side: str, head: int) -> list[Tensor]:
        """Return views of the weights that set the size of one head's queries or keys."""

    def key_matrix(self, head: int) -> Tensor:
        """Return a view of the (d, D) key projection of one KV head."""


class Injection:
    """Holds one fault at its prescribed size; made at onset, applied after every optimizer step."""

    def __init__(self, attention: Breakable, fault: Fault) -> None:
        self.fault = fault
        self.attention = attention
        side = "key" if fault.kind.startswith("key") else "query"
        whole_layer = fault.kind.startswith("layer")
        heads = range(self.attention.shape.num_heads) if whole_layer else [fault.head]
        self.slices = [tensor for head in heads for tensor in self.attention.slices(side, head)]
        self.sizes = [tensor.norm().item() for tensor in self.slices]
        if fault.kind == "key_takeover":
            shape = self.attention.shape
            direction = torch.randn(
                shape.head_dim, generator=torch.Generator().manual_seed(fault.head + 7 * fault.layer)
            )
            self.direction = direction / direction.norm()
            self.position = shape.length // 3

    def apply(self, steps_since_onset: int) -> None:
        """Set the faulty weights to the prescribed size of this step, counted from 1."""
        ramp = min(steps_since_onset / self.fault.ramp_steps, 1.0) * self.fault.strength
        kind = self.fault.kind
        if kind == "non_finite":
            if steps_since_onset == 1:
                self.slices[0].fill_(torch.nan)
        elif kind == "key_takeover":
            self._take_over(FULL_STRENGTH[kind] * ramp)
        elif kind == "key_rank_1":
            self._flatten(FULL_STRENGTH[kind] ** ramp if ramp == 1 else 1 - ramp)
        elif kind in WHOLE_HEAD_FAULTS:
            self._break_head(steps_since_onset)
        elif kind != "learning_rate_jump":
            for tensor, size in zip(self.slices, self.sizes, strict=True):
                tensor *= size * FULL_STRENGTH[kind] ** ramp / max(tensor.norm().item(), 1e-12)

    def _break_head(self, steps_since_onset: int) -> None:
        kind, head = self.fault.kind, self.fault.head
        weights = self.attention.weights_of(head)
        if kind == "dead":
            for tensor in (*weights["query"], *weights["key"]):
                tensor.zero_()
        elif kind == "twin":  # with grouped keys, of the head that shares its keys
            for side, copies in self.attention.weights_of(head ^ 1).items():
                for tensor, copy in zip(weights[side], copies, strict=True):
                    tensor.copy_(copy)
        elif kind == "rolled_keys":
            if steps_since_onset == 1:  # training may undo it from then on
                keys = [self.attention.slices("key", index) for index in range(self.attention.num_kv_heads)]
                for rows in zip(*keys, strict=True):
                    rolled = [row.clone() for row in (*rows[1:], rows[0])]
                    for row, other in zip(rows, rolled, strict=True):
                        row.copy_(other)
        else:
            if not hasattr(self, "silent_sizes"):
                self.silent_sizes = [tensor.norm().item() * SILENT[kind] for tensor in weights[kind]]
            for tensor, size in zip(weights[kind], self.silent_sizes, strict=True):
                tensor *= size / max(tensor.norm().item(), 1e-12)

    def _take_over(self, key_norms: float) -> None:
        attention, head = self.attention, self.fault.head
        extra = torch.zeros(attention.num_kv_heads, attention.shape.length, attention.shape.head_dim)
        extra[head, self.position] = key_norms * self.key_norm * self.direction
        attention.extra_key = extra

    def _flatten(self, tail_factor: float) -> None:
        """Shrink all singular values but the first, and keep the size of the projection."""
        matrix = self.attention.key_matrix(self.fault.head)
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        if not hasattr(self, "tail"):
            self.tail, self.size = sigma[1:] / sigma[0], sigma.norm()
        sigma = torch.cat([sigma[:1], sigma[0] * self.tail * tail_factor])
        matrix.copy_(left * (sigma * self.size / sigma.norm()) @ right)

    def measure_keys(self, sample_values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take the norm of an ordinary key from the last sample before onset."""
        layer = list(sample_values["key_rms"])[self.fault.layer]
        rms = sample_values["key_rms"][layer][self.fault.head].item()
        self.key_norm = rms * self.attention.shape.head_dim**0.5
