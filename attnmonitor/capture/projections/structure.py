"""What the layout of a layer's projections depends on, without their values: compared to notice a changed layer."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

from torch import nn

from attnmonitor.capture.projections.noise import block_norms
from attnmonitor.parallel.wrappers import unwrapped_modules

__all__ = ["Structure", "structures"]

Structure = tuple[Any, ...]


def structures(model: nn.Module, layers: Collection[str]) -> dict[str, Structure]:
    """Return the structure of each layer: equal to an earlier one where its projections have the same layout.

    That is: the modules around, in and in front of it, weakly referenced, with their classes, forwards and hooks, and
    the shapes and types of the parameters in it. A layer that the model does not have has an empty structure.
    """
    modules = dict(unwrapped_modules(model))
    return {name: _structure(name, layers, modules) if name in modules else () for name in layers}


def _structure(name: str, layers: Collection[str], modules: dict[str, nn.Module]) -> Structure:
    parts = name.split(".")
    around = [modules[".".join(parts[:depth])] for depth in range(1, len(parts))]
    norms = block_norms(name, layers, modules)
    return (
        *(_identity(module) for module in around),
        *(_identity(module) for module in modules.values() if module in norms),
        *((_identity(module), _parameters(module), _hooks(module)) for module in modules[name].modules()),
    )


def _identity(module: nn.Module) -> Structure:
    # The id of a forward that is set on the instance: the function itself would keep the module alive.
    return weakref.ref(module), type(module), type(module).forward, id(vars(module).get("forward"))


def _parameters(module: nn.Module) -> Structure:
    own = module.named_parameters(recurse=False)
    return tuple((name, type(parameter), parameter.shape, parameter.dtype) for name, parameter in own)


def _hooks(module: nn.Module) -> Structure:
    return (*module._forward_pre_hooks, *module._forward_hooks)
