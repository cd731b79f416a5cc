"""Rebuild rows of attention from q, k and s, and verify them by the layer's own output.

A layer's logits are a bilinear product followed by a few row-wise operations,

    logits = nonlinear( s · q kᵀ + bias ),

where `bias` is whatever is added before the first nonlinear operation (masks, ALiBi, relative positions), and
`nonlinear` what follows it (a soft-cap, learned sinks). Both are kept as **steps**, functions of a block of rows, so
that any few rows can be rebuilt from q, k, s without the L×L matrix. The same rows then go through softmax and the
values and are compared with the layer's own output, which shows a wrong scale, a wrong key head or a missing mask.

Letters: B sequences, Hq query heads, Hkv key heads, Lq query and Lk key positions, d head size, R chosen rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from attnmonitor.capture.comparison import Comparison, deviations
from attnmonitor.capture.documents import Documents
from attnmonitor.capture.heads import Lead
from attnmonitor.capture.merged_rows import MergedRows
from attnmonitor.parallel.workers import few_cores

__all__ = [
    "HIDDEN",
    "Attention",
    "RebuiltRows",
    "Step",
    "checked_rows",
    "grouped_product",
    "visible_keys",
    "without_autocast",
]

HIDDEN = -9e3
"""A logit at or below this hides its key: exp of it is 0 in every floating type. To hide a key, code adds a value from
-1e4 to -inf, which stays hidden under a logit of 1,000. ALiBi slopes and learned biases stay above this for the nearest
keys, and a key counts as padding only if no query sees it.
"""

NUM_CHECKED_ROWS = 8


@dataclass(frozen=True)
class Step:
    """One operation on logits, as a function of some of their rows.

    Attributes:
        apply: ``apply(x, rows)``: the code's operation on rows ``rows`` of its operand, in the code's own layout.
        rearranges: Whether it only rearranges entries (a view, a transpose), and so applies to product and bias alike.
        shifts: Whether it adds the same number to all entries of a row, as code that subtracts their maximum.
    """

    apply: Callable[[Tensor, Tensor], Tensor]
    rearranges: bool = False
    shifts: bool = False


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, eq=False)
class RebuiltRows:
    """The rows of an attention that verification rebuilds.

    Attributes:
        rows: Their indices, ``(R,)``.
        logits: ``s q kᵀ``, before masks, biases and soft-caps, ``(B, Hq, R, Lk)``.
        hidden: The keys that a row does not attend to, ``(B, Hq, R, Lk)`` bool; a NaN counts as seen.
        output: What the layer computed in these rows, ``(B, Hq, R, dv)``; None where that is not known.
        comparisons: The layer's output in these rows as rebuilt and as it is; none where that is not known, several
            where the layer is several calls.
    """

    rows: Tensor
    logits: Tensor
    hidden: Tensor
    output: Tensor | None
    comparisons: tuple[Comparison, ...]
    _argument: Tensor
    _restore: Callable[[Tensor], Tensor] = _identity
    _key_axis: int = -1

    @cached_property
    def error(self) -> Tensor | None:
        """Largest deviation of the rebuilt output from the layer's, relative to its largest entry; None likewise."""
        return deviations([self.comparisons])[0] if self.comparisons else None

    def attention_logits(self) -> tuple[Tensor, bool]:
        """Return what the softmax of each row is taken of, ``(B, Hq, R, Lk)``, and whether it was taken already.

        Where a row has entries that are no key (learned sinks), its logarithm of the softmax is returned.
        """
        if self._argument.shape[self._key_axis] == self.logits.shape[-1]:
            return self._restore(self._argument), False
        return self._restore(self._argument.log_softmax(self._key_axis)), True


@dataclass
class Attention:
    """One attention as the code computed it: its operands, and the steps from their product to its output.

    Attributes:
        query: ``(B, Hq, Lq, d)``.
        key: ``(B, Hkv, Lk, d)``.
        scale: Factor on ``q kᵀ``.
        tiled: Whether query head h reads key head h % Hkv, not h // (Hq / Hkv).
        lead: Which leading axes of the code's operands count heads.
        rows_at: As in `PairwiseProduct`.
        merged: As in `Layout`.
        product_axes: As in `Layout`.
        arrange: From ``(B, Hq, R, Lk)`` to the layout in which the code keeps its logits.
        restore: From the layout of the softmax's argument back to ``(B, Hq, R, Lk)``, extra columns dropped.
        affine: Steps that add to the product or scale it.
        nonlinear: Steps from the first nonlinear one up to the softmax.
        after: The softmax, the product with the values, and what lies between.
        key_axis: Axis of the softmax in the code's layout.
        outside: What acts on the logits outside ``s q kᵀ``, as far as known from the operations alone.
        visible: ``(B, Lk)`` bool, one per mask that arrived: keys that at least one query may see. ``(*lead, Lk)``
            before the operands are.
        has_added: Whether a tensor was added to the logits: a mask, or a bias that may be learned.
        masked_by: The masks that arrived.
        documents: Finds the documents that the call itself names, by their lengths; waits for the device.
        exact: Whether the layer's output can be rebuilt: False where dropout was applied to the weights.
        operands_in: Type the code rounded q and k to before their product; None for the type they have.
        logits_in: Type the code kept the product in; None for full precision.
        value: ``(B, Hv, Lk, dv)``, not repeated per query head where that is known; None where it could not be read.
        heads_of: From rows of the output in the code's layout to ``(B, Hq, R, dv)``; None where that is not known.
    """

    query: Tensor
    key: Tensor
    scale: float
    tiled: bool = False
    lead: Lead | None = None
    rows_at: int | None = None
    merged: MergedRows | None = None
    product_axes: tuple[int, ...] = ()
    arrange: Callable[[Tensor], Tensor] = _identity
    restore: Callable[[Tensor], Tensor] = _identity
    affine: list[Step] = field(default_factory=list)
    nonlinear: list[Step] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    key_axis: int = -1
    outside: set[str] = field(default_factory=set)
    visible: list[Tensor] = field(default_factory=list)
    has_added: bool = False
    masked_by: tuple[Tensor, ...] = ()
    documents: Callable[[], Documents] | None = None
    exact: bool = True
    operands_in: torch.dtype | None = None
    logits_in: torch.dtype | None = None
    value: Tensor | None = None
    heads_of: Callable[[Tensor], Tensor] | None = _identity

    @property
    def may_be_biased(self) -> bool:
        """Whether something was added to the logits, or multiplied into them entry by entry."""
        return self.has_added or "bias" in self.outside

    def key_mask(self) -> Tensor | None:
        """Return the keys that every mask shows to some query, ``(B, Lk)``; None when no mask arrived."""
        mask = None
        for seen in self.visible:
            mask = seen if mask is None else mask & seen
        return mask

    def without_masks(self, left_out: Sequence[bool]) -> Attention:
        """Return the same attention, some of whose masks say nothing about padding."""
        if not any(left_out):
            return self
        kept = [seen for seen, is_out in zip(self.visible, left_out, strict=False) if not is_out]
        return replace(self, visible=kept)

    def without_product(self, value: float = 0.0) -> Attention:
        """Return the same attention with one value as the product of all queries and keys: bias and masks alone."""
        query, key = (x.new_full((*x.shape[:-1], 1), fill) for x, fill in ((self.query, value), (self.key, 1.0)))
        return replace(self, query=query, key=key)

    def _product(self, rows: Tensor, *, as_rounded: bool = False) -> Tensor:
        """Return ``s q kᵀ`` in some rows, ``(B, Hq, R, Lk)``; as the code rounded it if asked for."""
        query, key = self.query.index_select(-2, rows), self.key
        if not as_rounded:
            return self.scale * grouped_product(query, key, tiled=self.tiled)
        query, key = (x.to(self.operands_in) if self.operands_in else x for x in (query, key))
        product = grouped_product(query, key, tiled=self.tiled)
        return _rounded(self.scale * _rounded(product, self.logits_in), self.logits_in)

    def _with_bias(self, product: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return product and bias in the code's layout."""
        product = self.arrange(product)
        bias = torch.zeros_like(product)
        for step in self.affine:
            product = step.apply(product, rows) if step.rearranges else product
            bias = step.apply(bias, rows)
        return product, bias

    def _apply_nonlinear(self, logits: Tensor, rows: Tensor) -> Tensor:
        for step in self.nonlinear:
            logits = step.apply(logits, rows)
        return logits

    def _softmax_argument(self, product: Tensor, rows: Tensor) -> Tensor:
        if self.affine:
            product, bias = self._with_bias(product, rows)
            return self._apply_nonlinear(product + bias, rows)
        return self._apply_nonlinear(self.arrange(product).clone(), rows)  # a step may write into it

    def logit_rows(self, rows: Tensor) -> Tensor:
        """Return rows of the logits as they enter the softmax, ``(B, Hq, R, Lk)`` float32, -inf where hidden."""
        with without_autocast(self.query):
            logits = self.restore(self._softmax_argument(self._product(rows), rows)).float()
            return logits.masked_fill(logits <= HIDDEN, -torch.inf)

    def rebuilt(self, output: Tensor | None, row_axis: int = -2) -> RebuiltRows:
        """Rebuild a few rows, and compare them with the same rows of ``output`` where there is one.

        Args:
            output: The layer's attention output, in the code's layout; None where it is not known.
            row_axis: The axis of ``output`` that counts query positions.
        """
        rows = checked_rows(self.query)
        entries = self.query.shape[:-2].numel() * len(rows) * self.key.shape[-2]
        with without_autocast(self.query), few_cores(entries, self.query.device):
            product = self._product(rows)
            # Code in half precision rounds its logits: one of 100 in bfloat16 is off by 0.25, which changes a sharp
            # softmax by as much. So the check rounds where the code did.
            rounds = self.logits_in is not None or self.operands_in not in (None, self.query.dtype)
            argument = self._softmax_argument(self._product(rows, as_rounded=True) if rounds else product, rows)
            hidden = argument <= HIDDEN
            by_head = self.restore(hidden)
            if output is None:
                return RebuiltRows(rows, product, by_head, None, (), argument, self.restore, self.key_axis)
            actual = output.index_select(row_axis, rows)
            # Rows that see no key are left out: eager code gives them uniform attention, fused kernels zeros.
            expected = argument.masked_fill(hidden.all(self.key_axis, keepdim=True), torch.nan)
            for step in self.after:
                expected = step.apply(expected, rows)
            comparison = Comparison(*torch.broadcast_tensors(expected, actual))
            written = None if self.heads_of is None else self.heads_of(actual)
            return RebuiltRows(rows, product, by_head, written, (comparison,), argument, self.restore, self.key_axis)

    def output_rows(self, output: Tensor | None, row_axis: int) -> Callable[[Tensor], Tensor] | None:
        """Return the function from rows to what the layer computed in them by head; None where that is not known."""
        heads_of = self.heads_of
        if output is None or heads_of is None:
            return None
        return lambda rows: heads_of(output.index_select(row_axis, rows))

    def is_biased(self) -> Tensor:
        """Return whether a bias differs between visible keys of a checked row, a 0-dim bool; made without a wait."""
        multiplies = "bias" in self.outside  # logits of zero would not show it
        logits = self.without_product(1.0 if multiplies else 0.0).logit_rows(checked_rows(self.query))
        seen = logits > HIDDEN
        return (logits.amax(-1) > logits.masked_fill(~seen, torch.inf).amin(-1)).any()

    def outside_effects(self, query_mask: Tensor | None, key_mask: Tensor | None, *, is_self: bool) -> tuple[str, ...]:
        """Name what acts on the logits outside ``s q kᵀ``; waits for the device: once per layer only.

        Found on the checked rows. A bias differs between visible keys when the product is zero. A soft-cap keeps logits
        of 1,000 from growing with the product; they are scaled up to that size, so that a cap is found while the
        layer's logits are still small. A window hides part of the past (also chunks and packed documents).
        """
        rows = checked_rows(self.query)
        with without_autocast(self.query):
            plain = self._product(rows)
            product, bias = self._with_bias(plain, rows)
            large = 1e3 / product.abs().amax().clamp_min(1e-30)
            at_zero, half, far = (
                self.restore(self._apply_nonlinear(t * product + bias, rows)) for t in (0.0, large / 2, large)
            )
        hidden = at_zero <= HIDDEN  # by a mask, which does not depend on the size of the logits
        seen = ~hidden
        highest = at_zero.masked_fill(~seen, -torch.inf).amax(-1)
        biased = (highest > at_zero.masked_fill(~seen, torch.inf).amin(-1)).any()
        curved = seen & ((far - 2 * half + at_zero).abs() > 1e-3 * (far - at_zero).where(seen, 0.0).abs().amax())
        # A tensor that multiplies logits entry by entry is a bias, but not where it is 1 at all that is seen: a mask.
        multiplied = seen & ((far - at_zero - large * plain).abs() > 1.0)  # of 1,000
        past = torch.arange(self.key.shape[-2], device=rows.device) <= rows[:, None]  # (R, Lk)
        hidden = hidden & past & ~hidden.all(-1, keepdim=True)
        if key_mask is not None:
            hidden = hidden & key_mask[:, None, None, :]
        if query_mask is not None:
            hidden = hidden & query_mask.index_select(-1, rows)[:, None, :, None]
        may_multiply = "bias" in self.outside
        biased = biased | (multiplied.any() & may_multiply)
        acts = torch.stack([biased, curved.any(), hidden.any() & is_self]).tolist()
        names = {name for name, acting in zip(("bias", "softcap", "window"), acts, strict=True) if acting}
        return tuple(sorted(names | (self.outside - {"bias"})))


def checked_rows(query: Tensor) -> Tensor:
    """Return the rows to check: at most 8, evenly spaced, the last among them; made without a wait."""
    length = query.shape[-2]
    count = min(NUM_CHECKED_ROWS, length)
    return torch.arange(length - count, count * length, max(length, 1), device=query.device) // max(count, 1)


def grouped_product(query: Tensor, key: Tensor, *, tiled: bool = False) -> Tensor:
    """Return ``q kᵀ`` where groups of query heads share a key head.

    Shapes: ``(B, Hq, R, d), (B, Hkv, Lk, d) -> (B, Hq, R, Lk)``. Query head h reads key head h % Hkv where ``tiled``,
    else h // (Hq / Hkv).
    """
    if tiled:
        key = key.repeat(1, query.shape[1] // key.shape[1], 1, 1)
    batch, num_query_heads, num_rows, head_dim = query.shape
    groups = query.to(_accumulation_dtype(query)).reshape(batch, key.shape[1], -1, head_dim)  # rows of a whole group
    key = key.to(groups.dtype)
    if key.device.type == "cpu" and not key.is_contiguous():
        # `matmul` reads one sequence's heads where they are, and would copy those of several.
        product = torch.stack([rows @ keys.mT for rows, keys in zip(groups, key, strict=True)])
    else:
        product = groups @ key.mT
    return product.reshape(batch, num_query_heads, num_rows, key.shape[-2])


def visible_keys(mask: Tensor, query_axis: int = -2) -> Tensor:
    """Return the keys that at least one query may see, from a bool (True = visible) or additive mask."""
    return mask.any(query_axis) if mask.dtype == torch.bool else mask.amax(query_axis) > HIDDEN


def _rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x.to(dtype).to(x.dtype)


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which a product is not rounded by autocast, under which the user's probe may run."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
