"""The stack of running module calls, which gives each attention the name of its layer.

Hooks keep the stack while the context is open. A softmax is often in a small child without parameters
(``attn.softmax``, ``attend``); the layer is the nearest enclosing module that has parameters. Each call also keeps its
input tensors: from them follow self or cross attention, and the number of sequences in a flattened ``(B·H, L, d)``.

Code that calls ``child.forward(x)``, another method of a child, or a Keras layer runs no hooks; there the running
module is the ``self`` of the innermost function on Python's own stack.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from attnmonitor.capture.nested import flat, read_by
from attnmonitor.parallel.fsdp import flattened_modules
from attnmonitor.parallel.wrappers import unwrapped_modules, whole_name

__all__ = ["Frame", "Frames", "is_graph_attention", "is_linear_layer"]

_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
_QUERY_NAME = re.compile(r"^(q|query|to_q|wq|q_proj|query_proj|q_lin|lin_query)$", re.IGNORECASE)
_FUSED_NAME = re.compile(r"^(c_attn|to_qkv|wqkv|qkv|qkv_proj|query_key_value)$", re.IGNORECASE)


class Frame:
    """One running call of one module.

    Attributes:
        name: The module's name.
        module: The module.
        inputs: Its input activations.
        projected: Those of them, and learned sequences, that a weight was applied to.
        recorded_by: How its latest attention was found, as in `AttentionCall`; ``""`` before there is one.
        num_found: Layers that were found in it.
        mixes_heads: Whether it has mixed the heads of its logits.
        turns: Attentions that wait for others of the same loop, as `attnmonitor.capture.turns.Found`.
    """

    def __init__(self, name: str, module: nn.Module, arguments: Iterable[Any]) -> None:
        self.name = name
        self.module = module
        self.inputs = [x for x in arguments if isinstance(x, Tensor) and _is_activation(x)]
        self.projected: list[Tensor] = []
        self.recorded_by = ""
        self.num_found = 0
        self.mixes_heads = False
        self.turns: list[Any] = []

    def attentions(self) -> list[Any]:
        """Return the attention of each turn that waits for others of its module."""
        return [turn.attention for turn in self.turns]

    def note_projection(self, source: Tensor) -> None:
        """Note that a weight was applied to one of this call's own inputs, or to a learned sequence."""
        origins = [tensor for tensor in self.inputs if tensor is source or tensor._base is source]
        for tensor in origins[:1] or ([source] if isinstance(source, nn.Parameter) else []):
            if tensor.dim() >= 3 and not any(tensor is seen for seen in self.projected):
                self.projected.append(tensor)

    def is_self_attention(self, num_rows: int, num_keys: int) -> bool:
        """Return whether q and k come from one sequence: the call projected no second one of the keys' length."""
        # Lengths alone do not decide: biases appended to the keys make them longer, and two sequences may be equally
        # long.
        if any(num_keys in x.shape[:-1] for x in self.projected[1:]):
            return False
        return num_rows == num_keys or len(self.projected) == 1


def _named_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among a call's arguments with their names; those in a mapping have their key as the name."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):  # a forward in C, or of an odd make
        names = []
    named = [*zip([*names, *map(str, range(len(args)))], args, strict=False), *kwargs.items()]
    for name, value in named:
        if isinstance(value, list | tuple):
            value = {f"{name}.{position}": part for position, part in enumerate(value)}
        parts = value.items() if isinstance(value, Mapping) else [(name, value)]
        yield from ((str(key), part) for key, part in parts if isinstance(part, Tensor))


def _is_activation(x: Tensor) -> bool:
    return x.is_floating_point() and x.dim() >= 2 and x.layout is torch.strided and not x.is_nested


class Frames:
    """The stack of module calls of one model, while the context is open.

    Args:
        model: The model.
        entered: Called with the tensors that the model is called with.
        left: Called with each call that ends.

    Attributes:
        arguments: The tensors that the model was called with, by the name of the argument.
        called: Names of the modules that ran.
        scripted: Names of scripted modules.
        suspected: Names of modules that did something that may be attention.
        hidden: Names of modules that met a tensor that no seen function made.
    """

    def __init__(
        self,
        model: nn.Module,
        entered: Callable[[Iterable[Tensor]], None] = lambda _: None,
        left: Callable[[Frame], None] = lambda _: None,
    ) -> None:
        self._model = model
        self._entered = entered
        self._left = left
        self._stack: list[Frame] = []
        self._handles: list[RemovableHandle] = []
        self._flattened: dict[nn.Module, int] = {}  # what FSDP1 shows no parameters of
        self._names: dict[nn.Module, str] = {}
        self.arguments: dict[str, Tensor] = {}
        self.called: set[str] = set()
        self.scripted: set[str] = set()
        self.suspected: set[str] = set()
        self.hidden: set[str] = set()

    def __enter__(self) -> Frames:
        try:
            self._flattened = flattened_modules(self._model)
            for name, module in unwrapped_modules(self._model):
                if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks, and its operations cannot be seen
                    self.scripted.add(name)
                    continue
                self._names[module] = name
                enter = partial(self._enter_module, name)
                self._handles.append(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave_module, always_call=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._stack.clear()
        self._names.clear()

    def _enter_module(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called.add(name)
        if not self._stack:
            self.arguments = dict(_named_tensors(module, args, kwargs))
            given = [*args, *kwargs.values()]
            masks = [value.mask_mod for value in flat(given) if type(value).__name__ == "BlockMask"]
            self._entered([*self.arguments.values(), *(x for mask in masks for x in read_by(mask))])
        self._stack.append(Frame(name, module, [*args, *kwargs.values()]))

    def _leave_module(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._stack and self._stack[-1].module is module:
            frame = self._stack.pop()
            if frame.turns:
                self._left(frame)

    def note_projection(self, x: Tensor) -> None:
        """Note in every running call that a weight was applied to ``x`` or to a view of it."""
        source = x if x._base is None else x._base
        for frame in self._stack:
            frame.note_projection(source)

    def suspect(self) -> set[str]:
        """Note that the running modules did something that may be attention; return their names."""
        names = {frame.name for frame in self._stack}
        if (hidden := self._without_hooks()) is not None:
            names.add(hidden[0])
        self.suspected |= names
        return names

    def suspect_hidden(self) -> None:
        """Note that the running modules met a tensor that no seen function made."""
        self.hidden |= self.suspect()

    def heads_were_mixed(self) -> bool:
        """Return whether a running module has mixed the heads of its logits."""
        return any(frame.mixes_heads for frame in self._stack)

    def first_input(self) -> Tensor | None:
        """Return the first input of the running layer; None where it has none."""
        _, frame = self.current_layer()
        return None if frame is None or not frame.inputs else frame.inputs[0]

    def running_call(self, module: nn.Module) -> Frame | None:
        """Return the innermost running call of ``module``."""
        return next((frame for frame in reversed(self._stack) if frame.module is module), None)

    def call_in(self, frame: Frame | None) -> Frame | None:
        """Return the running call that was made in a running call; None where there is none."""
        at = next((number for number, running in enumerate(self._stack[:-1]) if running is frame), None)
        return None if at is None else self._stack[at + 1]

    def is_running(self, frame: Frame | None) -> bool:
        """Return whether a call is running."""
        return any(running is frame for running in self._stack)

    def has_explicit_record(self) -> bool:
        """Return whether a running call has registered its q and k explicitly."""
        return any(frame.recorded_by == "explicit" for frame in self._stack)

    def current_layer(self) -> tuple[str, Frame | None]:
        """Return name and call of the running layer: the innermost module that has parameters, also in its children."""
        hidden = self._without_hooks()
        if hidden is not None:
            self.called.add(hidden[0])
            return hidden[0], Frame(*hidden, ())
        for frame in reversed(self._stack):
            if self._has_parameters(frame.module):
                return frame.name, frame
        return whole_name(self._model), None

    def is_of_running_layer(self, call: Frame | None) -> bool:
        """Return whether the running layer is that of an earlier call, or is inside or around it."""
        running = self.current_layer()[1]
        if running is None or call is None:
            return True
        return call.module in running.module.modules() or running.module in call.module.modules()

    def _without_hooks(self) -> tuple[str, nn.Module] | None:
        """Return name and module of the innermost module that runs although no hook of it ran; None if none."""
        top = self._stack[-1] if self._stack else None
        around = "" if top is None or top.module is self._model else f"{top.name}."
        unregistered: tuple[str, nn.Module] | None = None
        running: FrameType | None = sys._getframe(1)
        while running is not None:
            code = running.f_code
            module = running.f_locals.get("self") if code.co_argcount and code.co_varnames[0] == "self" else None
            if isinstance(module, nn.Module) and module in self._names:
                if module is self._model or (top is not None and module is top.module):
                    return unregistered
                if self._names[module].startswith(around) and self._has_parameters(module):
                    return self._names[module], module
            elif isinstance(module, nn.Module) and unregistered is None and self._has_parameters(module):
                path = getattr(module, "path", "")  # a layer of Keras in a functional model
                if isinstance(path, str) and path:
                    unregistered = path.replace("/", "."), module
            running = running.f_back
        return None

    def _has_parameters(self, module: nn.Module) -> bool:
        if next(module.parameters(), None) is not None:
            return True
        return any(each in self._flattened or is_linear_layer(each) for each in module.modules())

    def _has_matrices(self, module: nn.Module) -> bool:
        if any(parameter.dim() >= 2 for parameter in module.parameters()):
            return True
        return any(self._flattened.get(each, 0) >= 2 or is_linear_layer(each) for each in module.modules())

    def _looks_like_attention(self, name: str, module: nn.Module) -> bool:
        return self._has_matrices(module) and _is_named_like_attention(name, module)

    def unrecorded(self, layers: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that look like attention and have none of ``layers`` in, at or around them."""
        layers = set(layers)
        modules = dict(unwrapped_modules(self._model))
        whole = whole_name(self._model)
        names = {name for name, module in modules.items() if self._looks_like_attention(name, module)}
        if names != {whole} or layers:
            names.discard(whole)
        for name in sorted(names):
            inside = any(other.startswith(f"{name}.") for other in (*names, *layers))
            around = any(name.startswith(f"{layer}.") for layer in layers & names)
            if not inside and not around and name not in layers:
                yield name, modules[name]


def is_linear_layer(module: nn.Module) -> bool:
    """Return whether a module has the sizes of a linear layer, also one whose weight is packed and no parameter."""
    return all(isinstance(getattr(module, size, None), int) for size in ("in_features", "out_features"))


def _is_named_like_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | nn.Embedding | nn.ModuleList | nn.ModuleDict):
        return False
    children = [child for child, _ in module.named_children()]
    scripted = getattr(module, "original_name", None)  # a module of the user may answer to any name, with anything
    return is_graph_attention(module) or bool(
        _ATTENTION_NAME.search(name.rpartition(".")[2])
        or _ATTENTION_NAME.search(scripted if isinstance(scripted, str) else type(module).__name__)
        or any(_QUERY_NAME.match(child) or _FUSED_NAME.match(child) for child in children)
    )


def is_graph_attention(module: nn.Module) -> bool:
    """Return whether a module passes messages along the edges of a graph, weighted by attention."""
    if not any(base.__name__ == "MessagePassing" for base in type(module).__mro__):
        return False
    own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_children())]
    return any(name.startswith("att") or _QUERY_NAME.match(name) for name in own)
