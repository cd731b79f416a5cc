"""The weight of a module as a matrix, read from its response to basis vectors and checked to be linear.

``f(I) - f(0)`` holds whatever the module keeps its weight in: a parameter, a product with an adapter's, packed codes.
It is read from the module as it is now, without the user's hooks but those that take part in what it computes.
`observed` shows once what the module computes in the model's forward, with which that weight must agree.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnmonitor.capture.hooks import replaced_hooks, same_versions, versions_of
from attnmonitor.capture.verify import without_autocast

__all__ = ["ModuleWeight", "Observation", "ParameterRows", "UnreadableError", "observed", "storage_of"]

NUM_OBSERVED = 64
"""Rows of a module's input and output that are compared with its weight."""

NUM_CHECKS = 4
"""Rows of random signs behind the check. Signs and basis vectors have one largest entry: quantizing them is exact."""

# Allowed deviation from a linear map, relative. Rounding alone stays below; dropout of 1 % is above 5e-2.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Allowed deviation of a module's outputs in the model's forward. Activations quantized to 8 bits are within 5 %.
_TOLERANCE_IN_MODEL = 0.1
# A bias much larger than the weights would round them away in half precision: basis vectors of this length then.
_LARGE = 2.0**12


class UnreadableError(RuntimeError):
    """A weight cannot be read from a module."""


@dataclass(eq=False)
class Observation:
    """What a module computed in the model's forward.

    Attributes:
        rows: A few rows of its input, ``(R, width)``, and the same of its output, ``(R, N)``, float32; empty where
            these are no tensors of one length.
        dtype: Type of its output, which autocast may have made coarser than its weights.
        parameters: Its parameters then, and their versions.
        had_its_own: Whether these are the parameters it has outside of the forward.
    """

    rows: list[Tensor]
    dtype: torch.dtype
    parameters: list[tuple[Tensor, int]]
    had_its_own: bool = True


@contextmanager
def observed(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, Observation]]:
    """Yield a dictionary that receives what each module computes in its first call; complete after exit."""
    seen: dict[nn.Module, Observation] = {}

    def observe(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        rows: list[Tensor] = []
        if isinstance(x, Tensor) and isinstance(output, Tensor) and x.shape[:-1] == output.shape[:-1]:
            rows = [each.detach().flatten(0, -2)[:NUM_OBSERVED].float() for each in (x, output)]
        dtype = output.dtype if rows else torch.float32
        seen.setdefault(module, Observation(rows, dtype, versions_of(module.parameters())))

    handles = [module.register_forward_hook(observe, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for module, observation in seen.items():
            observation.had_its_own = same_versions(observation.parameters, versions_of(module.parameters()))


@dataclass(eq=False)
class ParameterRows:
    """Rows of a parameter of a module that applies it itself: ``nn.MultiheadAttention``.

    Attributes:
        module: The module, weakly referenced.
        name: The name of the module, for messages.
        parameter: The name of the parameter.
        start: The first row.
        stop: The row after the last.
    """

    module: weakref.ref[nn.Module]
    name: str
    parameter: str
    start: int
    stop: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for what is read as the same tensor."""
        return self.module, self.parameter, self.start

    def read(self) -> Tensor:
        """Return the rows as they are now, ``(N, width)`` float32.

        Raises:
            UnreadableError: They are on the meta device.
        """
        weight: Tensor = getattr(self.module(), self.parameter).detach()[self.start : self.stop]
        if weight.is_meta:
            raise UnreadableError(f"{self.name}.{self.parameter} is on the meta device outside of the module's forward")
        return weight.float()

    def check(self, weight: Tensor, seen: Observation) -> None:
        """Raise UnreadableError where the model's forward runs the module with other parameters."""
        _check_parameters(self.module(), self.name, seen)


@dataclass(eq=False)
class ModuleWeight:
    """The effective weight of one module, read from its response to basis vectors.

    Attributes:
        module: The module. A weak reference: one that the user has replaced is freed.
        name: Its name, for messages.
        width: Size of its input.
        num_axes: Axes of its input in the model's forward.
        dtype: The type of that input.
        device: The device of that input.
        hooks: Keys of the hooks that take part in what it computes.
    """

    module: weakref.ref[nn.Module]
    name: str
    width: int
    num_axes: int
    dtype: torch.dtype
    device: torch.device
    hooks: set[int]

    @property
    def key(self) -> weakref.ref[nn.Module]:
        """The same for what is read as the same tensor."""
        return self.module

    def read(self) -> Tensor:
        """Return the weight, ``(N, width)`` float32.

        Raises:
            UnreadableError: The module cannot be called on basis vectors, or is not linear.
        """
        module = self.module()
        if module is None:
            raise UnreadableError(f"{self.name} has been replaced")
        try:
            weight, error, rounding = self._response(module, 1.0)
            if rounding > 1e-3:
                larger, larger_error, _ = self._response(module, _LARGE)
                if larger_error <= 1.0 or rounding > 0.05:
                    weight, error = larger, larger_error
        except Exception as reason:
            raise self._unreadable(module, f"{type(reason).__name__}: {reason}".partition("\n")[0]) from reason
        if not bool(weight.isfinite().any()) or weight.is_meta:
            raise self._unreadable(module, "its output on basis vectors has no number")
        if not error <= 1.0:
            raise self._unreadable(module, "its output is not a linear function of its input")
        return weight

    def check(self, weight: Tensor, seen: Observation) -> None:
        """Compare the weight with what the module computed in the model's forward.

        Args:
            weight: What `read` returned.
            seen: What the module computed.

        Raises:
            UnreadableError: The outputs follow other weights than those the module has on its own.
        """
        module = self.module()
        _check_parameters(module, self.name, seen)
        if module is None or not seen.rows:
            return
        inputs, outputs = (rows.to(weight.device) for rows in seen.rows)
        with without_autocast(weight):
            centered, expected = outputs - outputs.mean(0), (inputs - inputs.mean(0)) @ weight.mT
        finite = centered.isfinite().all(0) & expected.isfinite().all(0)
        error = (centered - expected)[:, finite].norm()
        coarsest = self._coarsest(module, max(self.dtype, seen.dtype, key=lambda dtype: torch.finfo(dtype).eps))
        rounding = 16 * torch.finfo(coarsest).eps * outputs[:, finite].norm()
        if not bool(error <= _TOLERANCE_IN_MODEL * centered[:, finite].norm() + rounding):
            raise self._unreadable(module, "in the model's forward its output is not that of its own weight")

    def _response(self, module: nn.Module, length: float) -> tuple[Tensor, float, float]:
        """Return the weight, its deviation from a linear map over the tolerance, and how much the bias rounds away."""
        dtype, device = self._dtype_and_device(module)
        basis = torch.eye(self.width, device=device)
        signs = torch.randn(NUM_CHECKS, self.width, generator=torch.Generator().manual_seed(0)).sign().to(device)
        rows = torch.cat([torch.zeros_like(basis[:1]), length * basis, signs]).to(dtype)
        x = rows.reshape(*[1] * (self.num_axes - 2), *rows.shape)
        with (
            replaced_hooks(module.modules(), lambda key, hook: hook if key in self.hooks else None),
            _exact_activations(module, x),
            without_autocast(x),  # the caller's autocast is no part of the weight
        ):
            output = module(x)
            response = output.detach().float().reshape(len(rows), -1)
            origin = response[0]
            weight = (response[1 : 1 + self.width] - origin).mT / length
            found, expected = response[1 + self.width :] - origin, signs @ weight.mT
        finite = found.isfinite().all(0) & expected.isfinite().all(0)
        coarsest = self._coarsest(module, dtype)
        bias = float(torch.finfo(coarsest).eps * origin[finite].norm())
        size = float(weight[finite].norm())
        allowed = _TOLERANCE[coarsest] * float(expected[:, finite].norm()) + 2 * bias * NUM_CHECKS**0.5
        error = float((found - expected)[:, finite].norm())
        # A weight of zero may be one that the bias has rounded away.
        rounding = bias * self.width**0.5 / size if size else bias
        return weight, error / allowed if error else 0.0, rounding

    def _coarsest(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """Return the coarsest type the module may compute in: packed weights are often unpacked to half precision."""
        stored = [x.dtype if x.dtype in _TOLERANCE else torch.bfloat16 for x in _tensors(module) if x.dim() >= 2]
        return max((dtype, *stored), key=_TOLERANCE.__getitem__)

    def _dtype_and_device(self, module: nn.Module) -> tuple[torch.dtype, torch.device]:
        """Return type and device of its input: of its weight now, else of its input in the model's forward.

        A packed weight has another type, and one that is offloaded no device. The right type matters: some quantized
        layers convert their bias to the type of any input they get.
        """
        weight = next((parameter for parameter in module.parameters() if parameter.dim() >= 2), None)
        dtype = weight.dtype if weight is not None and weight.dtype in _TOLERANCE else self.dtype
        return dtype, next((x.device for x in _tensors(module) if not x.is_meta), self.device)

    def _unreadable(self, module: nn.Module, why: str) -> UnreadableError:
        return UnreadableError(f"{self.name} ({storage_of(module)}): {why}")


@contextmanager
def _exact_activations(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Leave out the fake quantization of activations like ``x``: they are no part of the weight; that of it stays."""

    def leave_out(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return args[0] if args[0].shape[:-1] == x.shape[:-1] else None

    # The buffers of torch.ao's FakeQuantize; importing it to compare classes takes a second.
    quantizers = [
        each for each in module.modules() if {"fake_quant_enabled", "observer_enabled"} <= each._buffers.keys()
    ]
    handles = [each.register_forward_hook(leave_out) for each in quantizers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_parameters(module: nn.Module | None, name: str, seen: Observation) -> None:
    if module is not None and not seen.had_its_own:
        raise UnreadableError(
            f"{name} ({storage_of(module)}): the model's forward runs it with other weights than those it has outside "
            "of a forward"
        )


def storage_of(module: nn.Module) -> str:
    """Return the class of a module and the type its weight is stored in, as text: ``Linear4bit, uint8``."""
    stored = next((x for x in _tensors(module) if x.dim() >= 2), None)
    kind = type(module).__name__
    return kind if stored is None else f"{kind}, {str(stored.dtype).removeprefix('torch.')}"


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
