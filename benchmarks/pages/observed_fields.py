"""The fields ``q kᵀ`` that an observer saw, and which of them a captured head has.

Letters: B sequences, H heads, Lq and Lk positions, d head size.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from attnmonitor.capture import AttentionCall
from benchmarks.pages.observer import Observed

__all__ = ["Fields", "Match"]

NEGLIGIBLE = 1e-12
"""Weights below this belong to hidden keys, or are too small for an accurate logarithm."""

LEAST_EQUATIONS = 6
"""Of fewer differences between weights a scale is not found: any bias would fit as well."""

Place = tuple[int, int]
"""Number of an observed attention, and of a field in it."""


@dataclass
class Match:
    """The places of a call's fields.

    Attributes:
        call: The call.
        cut: Whether its rows were cut or padded by the capture, so that a field is what its masks leave.
        places: By sequence and head.
    """

    call: AttentionCall
    cut: bool
    places: dict[tuple[int, int], Place] = field(default_factory=dict)

    def products(self) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Yield sequence and head with their ``q kᵀ`` in float64."""
        yield from ((at, product) for at, product, _ in self.fields())

    def fields(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
        """Yield sequence and head with their ``q kᵀ`` and their keys in float64."""
        call = self.call
        copies = call.query.shape[1] // call.key.shape[1]
        key = call.key.repeat(1, copies, 1, 1) if call.tiled else call.key.repeat_interleave(copies, 1)
        for sequence in range(len(call.query)):
            rows, columns = self.valid(sequence) if self.cut else (slice(None), slice(None))
            for head in range(call.query.shape[1]):
                own, others = call.query[sequence, head][rows].double(), key[sequence, head][columns].double()
                yield (sequence, head), own @ others.mT, others

    def valid(self, sequence: int) -> tuple[Tensor, Tensor]:
        """Return which rows and columns of a sequence are tokens."""
        sides = (self.call.query_mask, self.call.query), (self.call.key_mask, self.call.key)
        query, key = (torch.ones(x.shape[-2], dtype=torch.bool) if m is None else m[sequence] for m, x in sides)
        return query, key


class Fields:
    """The fields of all observed attentions, looked up by what they hold."""

    def __init__(self, observed: list[Observed]) -> None:
        self._observed: list[Observed] = []
        self._places: dict[tuple[int, int], list[Place]] = defaultdict(list)
        self._products: dict[tuple[int, int], Tensor] = {}
        self._used: set[Place] = set()
        for each in observed:
            self._add(each)

    def _add(self, each: Observed) -> None:
        key = each.key.repeat_interleave(len(each.query) // len(each.key), 0)
        products = each.query.double() @ key.double().mT
        shape = (products.shape[1], products.shape[2])
        self._places[shape] += [(len(self._observed), n) for n in range(len(products))]
        self._products[shape] = torch.cat([self._products.get(shape, products[:0]), products])
        self._observed.append(each)

    def _split(self, num_rows: int, num_keys: int) -> list[Place]:
        """Return the fields of products that hold the rows of several heads, as code with one key head writes them."""
        for each in list(self._observed):
            heads, rest = divmod(each.query.shape[1], num_rows)
            if each.key.shape[1] == num_keys and not rest and heads > 1 and each.scale is None:
                rows = each.query.unflatten(1, (heads, num_rows)).flatten(0, 1)
                keys = each.key.repeat_interleave(heads, 0)
                self._add(Observed(each.module, rows, keys, None, each.weights, each.mixed))
        return self._places.get((num_rows, num_keys), [])

    def left(self) -> list[Observed]:
        """Return the attentions of which no call has taken a field."""
        taken = [self._observed[number] for number in {number for number, _ in self._used}]
        # A softmax of a sum of products is one attention.
        softmaxes = {id(each.weights) for each in taken if each.weights is not None}
        return [each for each in self._observed if each not in taken and id(each.weights) not in softmaxes]

    def product(self, place: Place) -> Tensor:
        """Return ``q kᵀ`` of a field, ``(Lq, Lk)``."""
        query, key = self.operands(place)
        return query @ key.mT

    def _distance(self, key: Tensor, place: Place) -> float:
        other = self.operands(place)[1]
        return float((other - key).abs().max()) if other.shape == key.shape else math.inf

    def operands(self, place: Place) -> tuple[Tensor, Tensor]:
        """Return queries and keys of a field."""
        number, n = place
        each = self._observed[number]
        shared = len(each.query) // len(each.key)
        return each.query[n].double(), each.key[n // shared].double()

    def of(self, call: AttentionCall, tolerance: float) -> Match | None:
        """Return where each sequence's and head's field is; None where one is not there. A field is taken once."""
        return self._match(call, tolerance, cut=False) or self._match(call, tolerance, cut=True)

    def _match(self, call: AttentionCall, tolerance: float, *, cut: bool) -> Match | None:
        found = Match(call, cut)
        free = self._used.copy()
        for at, product, own_key in found.fields():
            places = self._places.get((product.shape[0], product.shape[1])) or self._split(*product.shape)
            if not places:
                return None
            stack = self._products[product.shape[0], product.shape[1]].flatten(1)
            wanted = product.flatten()
            alike = (stack @ wanted) / (stack.norm(dim=1) * wanted.norm()).clamp_min(1e-300)
            likely = [
                place
                for place, likeness in zip(places, alike.tolist(), strict=True)
                if (abs(likeness) >= 1 - tolerance or not wanted.any()) and place not in free
            ]
            if not likely:
                return None
            # Where only padding attends to padding the fields of all heads are constant: there the keys tell.
            place = min(likely, key=partial(self._distance, own_key))
            free.add(place)
            found.places[at] = place
        self._used = free
        return found

    def scale_of(self, match: Match, tolerance: float) -> tuple[bool, str]:
        """Return whether a layer's scale can be compared with what the observer saw, and what is wrong with it."""
        call = match.call
        for at, product in match.products():
            place, other = match.places[at], match.places.get((at[0] + 1, at[1]))
            plain = self.product(place)
            if not plain.any():
                continue
            scale = self._scale(place, other)
            if not scale:  # not known, or nothing differs between the visible keys
                return False, ""
            own = call.scale * float((product * plain).sum() / plain.square().sum())
            if abs(own / scale - 1) > max(tolerance, 1e-5):
                return True, f"scale {own:.6g} instead of {scale:.6g}"
        return True, ""

    def _scale(self, place: Place, other: Place | None) -> float | None:
        """Return a field's scale by least squares; a bias that depends on positions alone cancels in the difference."""
        number, _ = place
        each = self._observed[number]
        if each.scale is not None:
            return each.scale
        logs = [self._logs(place)]
        fields = [self.product(place)]
        if logs[0] is None:
            return None
        scale, residual = _fitted(logs[0], fields[0])
        if residual < 1e-5:
            return scale
        second = None if other is None or other[0] != number else self._logs(other)
        if second is None or other is None:
            return None
        scale, residual = _fitted(logs[0] - second, fields[0] - self.product(other))
        return scale if residual < 1e-5 else None

    def _logs(self, place: Place) -> Tensor | None:
        """Return the logarithm of a field's weights, NaN where hidden; None where their layout is not known."""
        number, n = place
        each = self._observed[number]
        assert each.weights is not None
        num_rows, num_keys = each.query.shape[-2], each.key.shape[-2]
        weights = each.weights.double()
        if weights.shape[-2] != num_rows or weights.numel() != len(each.query) * num_rows * weights.shape[-1]:
            return None
        if weights.shape[-1] < num_keys:
            return None
        own = weights.reshape(-1, num_rows, weights.shape[-1])[n, :, :num_keys]
        return own.log().masked_fill(own < NEGLIGIBLE, torch.nan)


def _fitted(logs: Tensor, product: Tensor) -> tuple[float, float]:
    """Return the factor by which rows of a product differ from logarithms but for a constant, and the residual."""
    seen = ~logs.isnan()
    wanted, given = (_row_centered(x, seen) for x in (logs, product))
    scale = float((wanted * given).sum() / given.square().sum().clamp_min(1e-300))
    if int((seen.sum(-1) - 1).clamp_min(0).sum()) < LEAST_EQUATIONS:
        return scale, math.inf
    return scale, float((wanted - scale * given).norm() / wanted.norm().clamp_min(1e-300))


def _row_centered(x: Tensor, seen: Tensor) -> Tensor:
    x = x.masked_fill(~seen, 0.0)
    return (x - x.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp_min(1)).masked_fill(~seen, 0.0)
