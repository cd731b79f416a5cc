"""The probe: a fixed batch, how the model is called on it, and the batch's fingerprint.

A head's numbers can be compared over training only if the batch is the same, so it is copied once and its fingerprint
stands in the record. `Probe.run` is called inside `quiet`, which restores all state that a forward changes.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnmonitor.capture.hooks import replaced_hooks
from attnmonitor.measurement.batches import copied, is_plain, map_tensors, moved, plain_parts, shape_of, tensors_of
from attnmonitor.measurement.loader import CannotCopyError, PassingBatch, draw_first_batch
from attnmonitor.messages import error_text
from attnmonitor.parallel.fsdp import through_wrapper
from attnmonitor.parallel.wrappers import data_parallel_left_out

__all__ = [
    "ForwardFunction",
    "HookFilter",
    "Probe",
    "RejectedBatchError",
    "UnseenAttentionError",
    "default_forward",
]

ForwardFunction = Callable[[nn.Module, Any], Any]
HookFilter = Callable[[Callable[..., Any]], bool]

_MOST_SAVED_BYTES = 2**24  # of a probe in a checkpoint


class RejectedBatchError(ValueError):
    """The batch does not fit the model."""


class UnseenAttentionError(ValueError):
    """No attention can be measured in the model's forward on the batch."""


_WANDB_WATCH = "wandb.integration.torch.wandb_torch"


def check_probe_settings(forward: Any, skip_hooks: Any, packed: Any) -> None:
    """Raise ValueError where one of the arguments cannot be what `Probe` takes."""
    if forward is not None and not callable(forward):
        raise ValueError(f"forward={forward!r} is not callable; give a function forward(model, batch)")
    if skip_hooks is not None and not callable(skip_hooks):
        raise ValueError(
            f"skip_hooks={skip_hooks!r} is not callable; give a function of a hook: lambda hook: hook is count"
        )
    if packed not in ("documents", "one"):
        raise ValueError(
            f'packed={packed!r}; give "documents" to measure each document of a row by itself, or "one" to measure '
            "the row as a whole"
        )


class Probe:
    """A fixed batch, how to run it, and its fingerprint.

    A loader is not touched if drawing from it could move state of the user's (`attnmonitor.measurement.loader`): then
    the probe has no batch before `take_passing_batch` or `keep` gives it one.

    Args:
        model: The unwrapped model the batch is for.
        batch: A tensor, a mapping, tuple, list or object that holds tensors, or a ``DataLoader`` whose first batch (in
            stored order, where it shuffles) is drawn here from copies of its parts; of one that cannot be copied, the
            first batch that training reads. A batch given directly must be on the model's device; a loader's is moved.
        forward: ``forward(model, batch)``, where the default call does not fit. By default a tensor is the first
            argument; a mapping is passed by keyword (as one argument if ``forward`` knows none of the keys, or needs
            one argument that is not among them); of a tuple or list, as many leading entries are passed as ``forward``
            has arguments without a default, at least one; an object whose attributes have the names of the arguments
            is passed by keyword, any other as one argument.
        skip_hooks: Called with every forward hook and pre-hook of the model's modules; returns True for one that the
            probe's forward must not call. None calls all of them.
        packed: ``"documents"`` to cut rows of several documents, ``"one"`` to leave them whole.

    Attributes:
        batch: A detached copy of the batch; None before there is one.
        fingerprint: 12 hex digits of the SHA-256 over names, shapes, dtypes and bytes of the batch's tensors.
        source: Why the loader's first batch was not drawn; empty where it was, or where a batch was given.
        packed: As given.
        in_state: Whether the batch is saved with the monitor's state, because a resumed run cannot draw it again.

    Raises:
        ValueError: ``forward`` or ``skip_hooks`` is not callable, ``packed`` is neither word, the loader has no batch,
            a tensor of the batch cannot be read, or the model's weights hold no numbers.
        RejectedBatchError: The batch holds no tensor, is on another device than the model, or is longer than the
            positions the model's configuration allows.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        *,
        forward: ForwardFunction | None = None,
        skip_hooks: HookFilter | None = None,
        packed: str = "documents",
    ) -> None:
        check_probe_settings(forward, skip_hooks, packed)
        self.packed = packed
        self._forward = forward if forward is not None else default_forward
        self._skip_hooks = skip_hooks
        self.batch: Any = None
        self.fingerprint = self.source = ""
        self.in_state = False
        self._passing: PassingBatch | None = None
        if isinstance(batch, DataLoader):
            try:
                batch = moved(draw_first_batch(batch), _device(model))
            except CannotCopyError as reason:
                self.source, self._passing = str(reason), PassingBatch(batch)
                return
        self.settle(model, batch)

    def settle(self, model: nn.Module, batch: Any) -> None:
        """Check the batch and keep a copy of it.

        Raises:
            ValueError, RejectedBatchError: As the constructor.
        """
        self.close()
        device = _device(model)
        tensors = dict(tensors_of(batch))
        if not tensors:
            raise RejectedBatchError(
                f"probe={type(batch).__name__} holds no tensor; give a tensor of token ids (batch, length), a dict or "
                "tuple of tensors, or a DataLoader"
            )
        if device.type == "meta":
            raise ValueError(
                f"model={type(model).__qualname__}: its weights are on 'meta', without numbers; load them, then attach"
            )
        for where, tensor in tensors.items():
            if tensor.device != device:
                raise RejectedBatchError(
                    f"probe{where} is on {tensor.device} but the model is on {device}; move it there: "
                    f"probe.to({str(device)!r})"
                )
            _check_readable(where, tensor)
        _check_length(model, tensors)
        # A copy: the user may later write into the batch in place, and the probe must not change.
        self.batch = copied(batch)
        self.fingerprint = _fingerprint(self.batch)

    def take_passing_batch(self, model: nn.Module) -> bool:
        """Return whether the probe has a batch now; take the first that training has read from the loader."""
        if self.batch is None and self._passing is not None and self._passing.batch is not None:
            self.keep(model, self._passing.batch)
        return self.batch is not None

    def keep(self, model: nn.Module, batch: Any) -> None:
        """Take a batch that cannot be drawn again, and save it with the state."""
        self.in_state = True
        self.settle(model, moved(batch, _device(model)))

    def saved_batch(self) -> Any:
        """Return the batch on the CPU where a resumed run cannot draw it again, up to 16 MB; else None."""
        if not self.in_state or not _is_loadable(self.batch):
            return None
        num_bytes = sum(tensor.nbytes for _, tensor in tensors_of(self.batch))
        return moved(self.batch, torch.device("cpu")) if num_bytes <= _MOST_SAVED_BYTES else None

    def close(self) -> None:
        """Stop watching the loader."""
        if self._passing is not None:
            self._passing.close()

    def run(self, model: nn.Module) -> None:
        """Run the model once on a copy of the batch, moved to where the model is; the output is dropped.

        The forward may write into what it is given: it normalizes images in place, or fills a cache.

        Raises:
            RuntimeError: There is no batch yet.
        """
        if self.batch is None:
            raise RuntimeError(self.missing)
        batch = moved(self.batch, _device(model))
        with ExitStack() as stack:
            stack.enter_context(data_parallel_left_out(model))
            through_wrapper(model, lambda inner: self._forward(inner, batch))

    def without_hooks(self, model: nn.Module) -> AbstractContextManager[None]:
        """Leave out W&B's hooks and those that ``skip_hooks`` selects.

        Enter it before hooks of this package are on the model.
        """
        skip = self._skip_hooks

        def is_left_out(hook: Callable[..., Any]) -> bool:
            # `wandb.watch` counts the user's forwards, and logs weights and the graph from them.
            return getattr(hook, "__module__", None) == _WANDB_WATCH or (skip is not None and skip(hook))

        return replaced_hooks(model.modules(), lambda _, hook: None if is_left_out(hook) else hook)

    @property
    def missing(self) -> str:
        """Why there is no batch yet, and the way out."""
        return (
            f"probe=DataLoader: {self.source}, so drawing from it could change the training data. The probe is the "
            "first batch that is read from it, and none was read so far; or give one batch: probe=..."
        )

    def half(self) -> Probe | None:
        """Return a probe of the first half of the batch's sequences; None where there is only one sequence.

        The sequences are the first axis of the first tensor that has axes; a tensor of another length is kept whole.
        """
        tensors = [tensor for _, tensor in tensors_of(self.batch)]
        num_sequences = next((tensor.size(0) for tensor in tensors if tensor.dim()), 0)
        if num_sequences < 2 or any(shape_of(x)[:1] == (num_sequences,) and not is_plain(x) for x in tensors):
            return None
        half = copy.copy(self)
        half.batch = map_tensors(
            self.batch,
            lambda tensor: tensor[: num_sequences // 2] if shape_of(tensor)[:1] == (num_sequences,) else tensor,
        )
        half.fingerprint = _fingerprint(half.batch)
        return half

    def batch_only(self) -> Probe:
        """Return a probe with the same batch, but without functions and loaders, which may not be picklable."""
        probe = copy.copy(self)
        probe._forward, probe._skip_hooks, probe._passing = default_forward, None, None
        return probe

    def describe(self) -> str:
        """Return the shapes of the batch's tensors as text, for error messages and the run's configuration."""
        return ", ".join(
            f"{where.lstrip('.') or 'tensor'} {shape_of(tensor)} {str(tensor.dtype).removeprefix('torch.')}"
            for where, tensor in tensors_of(self.batch)
        )


def _device(model: nn.Module) -> torch.device:
    """Return where the model runs: where its weights are, or where accelerate brings those that it offloads."""
    first = next(chain(model.parameters(), model.buffers()), None)
    if first is None:
        return torch.device("cpu")
    if first.device.type == "meta":
        for module in model.modules():
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.device(device)
    return first.device


def _check_readable(where: str, tensor: Tensor) -> None:
    try:
        _fingerprint(copied(tensor))
    except Exception as error:
        raise ValueError(
            f"probe{where} is a {type(tensor).__name__} of {tensor.dtype} and {tensor.layout} that cannot be "
            f"copied and read ({error_text(error)}); give it in another form"
        ) from error


def _fingerprint(batch: Any) -> str:
    digest = hashlib.sha256()
    for where, tensor in tensors_of(batch):
        digest.update(f"{where}|{shape_of(tensor)}|{tensor.dtype}|".encode())
        for part in plain_parts(tensor.detach()):
            # Through a byte view: numpy has no bfloat16.
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _is_loadable(batch: Any) -> bool:
    """Return whether ``torch.load`` reads the batch with ``weights_only=True``."""
    if type(batch) in (dict, list, tuple):
        return all(map(_is_loadable, batch.values() if isinstance(batch, dict) else batch))
    return (type(batch) is Tensor and is_plain(batch)) or isinstance(batch, (str, int, float, type(None)))


def _check_length(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    config = getattr(model, "config", None)
    # The names under which public models state how many positions they have.
    names = ("max_position_embeddings", "n_positions", "n_ctx", "block_size", "max_seq_len")
    for name in names:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            break
    else:
        return
    for where, tensor in tensors.items():
        is_token_ids = is_plain(tensor) and tensor.dim() == 2 and tensor.dtype in (torch.int64, torch.int32)
        if is_token_ids and tensor.shape[1] > limit:
            raise RejectedBatchError(
                f"probe{where} is {tensor.shape[1]} tokens long but the model's config.{name} is {limit}; "
                f"cut it: probe[:, :{limit}]"
            )


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Call the model on the batch as the signature of its ``forward`` requires, see `Probe`."""
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    takes_any_keyword = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    # A probe does not need the key/value cache of generation, which would hold every layer's keys.
    extra = {"use_cache": False} if "use_cache" in named else {}
    if isinstance(batch, Mapping):
        known = dict(batch) if takes_any_keyword else {key: value for key, value in batch.items() if key in named}
        is_one_argument = not known or (len(required) == 1 and required[0].name not in batch)
        return model(batch) if is_one_argument else model(**{**extra, **known})
    parts = _parts_named(batch, named)
    if parts and all(p.name in parts for p in required):
        return model(**{**extra, **parts})
    if isinstance(batch, (tuple, list)) and not _is_one_argument(batch, required):
        takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return model(*(batch if takes_all else batch[: max(1, len(required))]), **extra)
    return model(batch, **extra)


def _parts_named(batch: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the attributes of an object (a dataclass, a named tuple, a PyG ``Batch``) that have these names."""
    if isinstance(batch, Tensor):
        return {}
    found = {name: getattr(batch, name) for name in names if hasattr(batch, name)}
    return {name: part for name, part in found.items() if not callable(part)}


def _is_one_argument(batch: Any, required: Sequence[inspect.Parameter]) -> bool:
    """Return whether a named tuple is passed whole: to one argument that is of its type, or called a batch."""
    if not hasattr(batch, "_fields") or len(required) != 1:
        return False
    [only] = required
    return type(batch).__name__ in str(only.annotation) or only.name in ("batch", "data", "sample", "item", "example")
