"""The softmax attention that really runs in a forward, seen at ATen level, without capture.

Every tensor carries a note: which batched products it holds numbers of. A softmax of such numbers, whose result is then
an operand of another batched product, is an attention, and its queries and keys are the operands of the first product.
Fused kernels are read from their arguments. Names, modules and torch functions play no part in this.

Letters: N sequences times heads in the code's own order, Lq and Lk positions, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.pages.independent import plain_attention

__all__ = ["Observed", "observing"]

_FUSED = "_scaled_dot_product_"
_PRODUCTS = ("bmm", "baddbmm")
_SOFTMAXES = ("_softmax", "_safe_softmax", "_log_softmax")
_MIXERS = ("convolution", "mm", "addmm")
_FEW = 32  # heads at most that a matrix mixes


@dataclass(frozen=True, eq=False)
class Observed:
    """One softmax attention that ran.

    Attributes:
        module: Name of the innermost module that ran.
        query: ``(N, Lq, d)``.
        key: ``(N, Lk, d)``, repeated where the code repeats keys.
        scale: Factor on ``q kᵀ`` where a fused kernel was given one; None where it is to be found in the weights.
        weights: The result of the softmax in the code's own layout, None of a fused kernel.
        mixed: Whether another product or a convolution acts on the logits or weights.
    """

    module: str
    query: Tensor
    key: Tensor
    scale: float | None
    weights: Tensor | None
    mixed: bool = False


@dataclass(frozen=True)
class _Note:
    """Which products a tensor holds numbers of, and the softmax they went through."""

    products: frozenset[int]
    softmax: Tensor | None = None
    mixed: bool = False


class _Observer(TorchDispatchMode):
    """Notes what tensors are made of; keeps all of them alive, so that no identity is used twice."""

    def __init__(self, running: list[str], constants: set[int]) -> None:
        super().__init__()
        self._constants = constants  # storages of weights, and of what is computed from them alone
        self.found: list[Observed] = []
        self._running = running
        self._products: list[tuple[Tensor, Tensor]] = []
        self._notes: dict[int, _Note] = {}
        self._alive: list[Tensor] = []
        self._reported: set[tuple[int, int]] = set()
        self._normalized: set[int] = set()  # products whose logsumexp was computed, for a softmax by hand

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        self._alive += [*operands, *outputs]
        if operands and all(_storage(x) in self._constants for x in operands):
            self._constants |= {_storage(x) for x in outputs}
        if name.startswith(_FUSED) and "backward" not in name:
            query, key = (x.flatten(0, -3) for x in operands[:2])
            given = kwargs.get("scale")
            self._report(query, key, query.shape[-1] ** -0.5 if given is None else given, None)
        elif outputs:
            note = self._note(name, operands, outputs[0])
            if note is not None:
                self._notes |= {id(x): note for x in outputs}
        return output

    def _note(self, name: str, operands: list[Tensor], output: Tensor) -> _Note | None:
        known = [self._notes[id(x)] for x in operands if id(x) in self._notes]
        if name in _PRODUCTS:
            used = [self._notes.get(id(x)) for x in operands[-2:]]
            weighing = [note for note in used if note is not None and note.softmax is not None]
            for note in weighing:
                for product in note.products:
                    if (product, id(note.softmax)) not in self._reported:
                        self._reported.add((product, id(note.softmax)))
                        query, key = self._products[product]
                        self._report(query, key, None, note.softmax, mixed=note.mixed)
            if weighing:
                return None
            left, right = operands[-2:]
            if len(left) == 1 and (_storage(left) in self._constants or _storage(right) in self._constants):
                products = frozenset().union(*(note.products for note in known))
                is_mixing = bool(products) and output.numel() == self._num_entries(products)
                return _Note(products, None, mixed=True) if is_mixing else None  # else a projection
            if known and any(note is not None for note in used):  # numbers of a product in another one
                return _Note(frozenset().union(*(note.products for note in known)), mixed=True)
            self._products.append((left, right.mT))
            return _Note(frozenset({len(self._products) - 1}))
        if not known:
            return None
        products = frozenset().union(*(note.products for note in known))
        softmax = next((note.softmax for note in known if note.softmax is not None), None)
        mixed = any(note.mixed for note in known)
        if name in _MIXERS:
            # Only where heads are mixed, entry by entry of the L×L numbers: else it is a projection of what follows.
            is_small = operands[-1].shape[0] <= _FEW
            is_mixing = is_small and output.numel() == self._num_entries(products)
            return _Note(products, softmax, True) if is_mixing else None
        if name == "logsumexp":
            self._normalized |= products
            return None
        if softmax is None and (name in _SOFTMAXES or (name == "exp" and products <= self._normalized)):
            return _Note(products, output, mixed)
        if output.numel() < max(x.numel() for x in operands if id(x) in self._notes) and name in (
            "mean",
            "sum",
            "amax",
        ):
            return None
        return _Note(products, softmax, mixed)

    def _num_entries(self, products: frozenset[int]) -> int:
        """Return how many numbers the largest of some products has."""
        operands = (self._products[each] for each in products)
        return max((len(query) * query.shape[1] * key.shape[1] for query, key in operands), default=0)

    def _report(
        self, query: Tensor, key: Tensor, scale: float | None, weights: Tensor | None, *, mixed: bool = False
    ) -> None:
        module = self._running[-1] if self._running else ""
        self.found.append(Observed(module, query, key, scale, weights, mixed))


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@contextmanager
def observing(model: nn.Module) -> Iterator[list[Observed]]:
    """Yield a list that receives every softmax attention of the forwards run inside the context."""
    names = {id(module): name for name, module in model.named_modules()}
    running: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        running.append(names.get(id(module), running[-1] if running else ""))

    def leave(module: nn.Module, _: Any, output: Any) -> None:
        running.pop()

    fast_path, fused = torch.backends.mha.get_fastpath_enabled(), nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = plain_attention  # torch's own, where it is not fused, changes q and k
    torch.backends.mha.set_fastpath_enabled(False)
    constants = {_storage(x) for x in (*model.parameters(), *model.buffers())}
    try:
        with ExitStack() as stack:
            stack.callback(register_module_forward_pre_hook(enter).remove)
            stack.callback(register_module_forward_hook(leave, always_call=True).remove)
            observer = stack.enter_context(_Observer(running, constants))
            yield observer.found
    finally:
        nn.functional.scaled_dot_product_attention = fused
        torch.backends.mha.set_fastpath_enabled(fast_path)
